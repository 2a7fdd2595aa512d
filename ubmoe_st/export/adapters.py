"""The `bi` experts as an adapter on the base's own weights: for PEFT, and for llama.cpp beside the base's own GGUF.

An adapter holds the experts alone: who loads it has to attend in full (`is_causal` false), to pool and to normalise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ubmoe_st import shards
from ubmoe_st.adapters import ADAPTER_CONFIG
from ubmoe_st.experts import LowRank, is_ffn_key
from ubmoe_st.model import UBMoE

# llama.cpp's names of architectures whose FFNs are plain linear layers under the names of transformers.
_LLAMA_CPP = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "olmo2": "OLMO2",
    "phi3": "PHI3",
    "smollm3": "SMOLLM3",
}


def low_rank_of(model: UBMoE) -> LowRank:
    """The low-rank form of the experts.

    Raises:
        ValueError: If the experts are dense.
    """
    views: Any = model[0]
    low_rank = views.low_rank or views.source.low_rank()
    if not low_rank:
        raise ValueError(
            "an adapter holds low-rank experts, and the bi experts of this checkpoint are dense; take format='hf'"
        )
    return low_rank


def write_peft(model: UBMoE, folder: Path) -> None:
    """A LoRA folder that PEFT loads on the base's causal LM.

    The scaling is folded into B, so alpha is the rank.

    Args:
        model: The checkpoint.
        folder: Where to.
    """
    views: Any = model[0]
    low_rank = low_rank_of(model)
    config = views.ubmoe_config
    ranks = {name: lora_a.shape[0] for name, (lora_a, _) in low_rank.items()}
    rank = max(ranks.values())
    others = {name: own for name, own in ranks.items() if own != rank}
    prefix = f"{views.generator('uni').base_model_prefix}."
    settings = {
        "peft_type": "LORA",
        # Of no task: the encoder is neither of those that PEFT wraps, and the causal LM's `generate` is not meant.
        "task_type": None,
        "base_model_name_or_path": config.base_model if config else None,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "rank_pattern": {f"{prefix}{name}": own for name, own in others.items()},
        "alpha_pattern": {f"{prefix}{name}": own for name, own in others.items()},
        "target_modules": _targets(views.model, set(low_rank), prefix),
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors: dict[str, Tensor] = {}
    for name, (lora_a, lora_b) in low_rank.items():
        tensors[f"base_model.model.{prefix}{name}.lora_A.weight"] = lora_a
        tensors[f"base_model.model.{prefix}{name}.lora_B.weight"] = lora_b
    shards.write_with_metadata(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    (folder / "README.md").write_text(_card(model), encoding="utf-8")


def _targets(encoder: nn.Module, names: set[str], prefix: str) -> list[str]:
    """Last names where they mean these layers and no other, as vLLM wants them; else full names."""
    linears = {name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    ends = {name.rpartition(".")[2] for name in names}
    meant = {name for name in linears if name.rpartition(".")[2] in ends}
    return sorted(ends) if meant == names else sorted(f"{prefix}{name}" for name in names)


def _card(model: UBMoE) -> str:
    config = model.ubmoe_config
    base = config.base_model if config else "the base"
    behind = ", ".join(type(module).__name__ for module in list(model)[1:])
    return (
        f"---\nlibrary_name: peft\n{f'base_model: {base}' if '/' in base else 'tags: [lora]'}\n---\n\n"
        f"The `bi` experts of a UBMoE checkpoint as a LoRA adapter on {base}. It embeds once attention is full; behind "
        f"it come {behind}.\n\n```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'lm = AutoModelForCausalLM.from_pretrained("{base}")\nlm.config.is_causal = False\n'
        'encoder = PeftModel.from_pretrained(lm, ".").get_base_model().get_decoder()\n```\n\n'
        "On `AutoModel` the names of the layers are others, and PEFT would leave the adapter out with a warning.\n"
    )


def write_gguf_lora(model: UBMoE, file: Path) -> None:
    """A LoRA file for llama.cpp, to be loaded beside a GGUF of the base.

    Args:
        model: The checkpoint.
        file: The file.

    Raises:
        ValueError: If llama.cpp has no place for the experts of this model.
    """
    import gguf

    views: Any = model[0]
    low_rank = low_rank_of(model)
    kind = views.model.config.model_type
    if kind not in _LLAMA_CPP:
        raise ValueError(
            f"gguf-lora of {type(views.model).__name__} is not written here (known: {', '.join(_LLAMA_CPP)}); export "
            "it with format='peft' and convert that folder with convert_lora_to_gguf.py of llama.cpp"
        )
    arch = getattr(gguf.MODEL_ARCH, _LLAMA_CPP[kind])
    names = gguf.get_tensor_name_map(arch, views.model.config.num_hidden_layers)
    rank = max(lora_a.shape[0] for lora_a, _ in low_rank.values())
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    writer.add_name("bi experts of UBMoE")
    for name, (lora_a, lora_b) in low_rank.items():
        place = names.get_name(f"model.{name}")
        if place is None or not is_ffn_key(f"{name}."):
            raise ValueError(f"llama.cpp has no place for {name} of {type(views.model).__name__}")
        # llama.cpp scales each pair by alpha / its own rank.
        scaled = lora_b.float() * (lora_a.shape[0] / rank)
        for half, tensor in (("lora_a", lora_a.float()), ("lora_b", scaled)):
            stored = torch.float16 if lora_a.dtype == torch.float16 else torch.float32
            writer.add_tensor(f"{place}.weight.{half}", tensor.to(stored).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
