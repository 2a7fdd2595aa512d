"""Export to llama.cpp: a view of a checkpoint as one GGUF file.

Written for the Llama, Mistral, Qwen2, Qwen3 and Gemma 3 (text) architectures. llama.cpp reads `attention.causal` and
`pooling_type` of any architecture since March 2026; builds before that attend causally.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from torch import Tensor

from ubmoe_st.export import gemma
from ubmoe_st.export.folders import tensors_of
from ubmoe_st.export.vocabulary import vocabulary_of
from ubmoe_st.model import UBMoE

_GGUF_ARCHITECTURES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "gemma3_text": "GEMMA3",
}
_LARGEST_F16 = float(np.finfo(np.float16).max)
_CONVERT_HINT = "export it with format='hf' and convert that folder with convert_hf_to_gguf.py of llama.cpp"


def write_gguf(model: UBMoE, file: Path, view: str, quantize: str | None) -> None:
    """Write a view as a GGUF file.

    Args:
        model: The checkpoint.
        file: The file.
        view: `encoder` or `generator`.
        quantize: None: F32. `f16`: F16. `int8`: Q8_0.

    Raises:
        ValueError: If llama.cpp has no place for this model; says which tool has.
    """
    import gguf

    views: Any = model[0]
    network: Any = views.model if view == "encoder" else model.generator
    config = network.config
    architecture = _gguf_architecture(network)
    pooling = _gguf_pooling(model) if view == "encoder" else None
    state = tensors_of(model, view)
    vocabulary = vocabulary_of(model.tokenizer, config.vocab_size, _CONVERT_HINT)
    arch = getattr(gguf.MODEL_ARCH, architecture)
    is_gemma = arch == gguf.MODEL_ARCH.GEMMA3
    arch_name = gemma.ENCODER if is_gemma and view == "encoder" else gguf.MODEL_ARCH_NAMES[arch]
    # Tensors wait in a temporary file: a 7B would not fit into memory twice.
    writer = gguf.GGUFWriter(file, arch_name, use_temp_file=True)
    settings = model.ubmoe_config
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"{settings.base_model if settings else architecture} ({view} of UBMoE)")
    kind = {None: "F32", "f16": "F16", "int8": "Q8_0"}[quantize]
    writer.add_file_type({"F32": 0, "F16": 1, "Q8_0": 7}[kind])
    if kind == "Q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    if is_gemma:
        gemma.write_gemma_attention(writer, config, view)
    else:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if pooling is not None:
        writer.add_causal_attention(False)
        writer.add_pooling_type(pooling)
    vocabulary.write(writer)
    if view == "generator":
        _write_further_ends(writer, model, vocabulary.special["eos"])
    for name, tensor in _gguf_tensors(network, state, arch, heads, kv_heads):
        if is_gemma:
            tensor = gemma.gemma_tensor(name, tensor, config, view)
        array = tensor.to(torch.float32).numpy()
        if kind == "F16" and np.abs(array).max(initial=0) > _LARGEST_F16:
            raise ValueError(
                f"{name} holds {np.abs(array).max():.3g}, beyond the {_LARGEST_F16:.0f} of f16; export in fp32 or int8"
            )
        wanted = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        if wanted == gguf.GGMLQuantizationType.Q8_0 and array.shape[-1] % 32:
            wanted = gguf.GGMLQuantizationType.F16
        writer.add_tensor(name, gguf.quants.quantize(array, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_further_ends(writer: Any, model: UBMoE, first: int | None) -> None:
    """Tokens that end an answer beside the tokenizer's own."""
    found = getattr(model.generator.generation_config, "eos_token_id", None)
    ends = [found] if isinstance(found, int) else list(found or [])
    further = [end for end in ends if end != first]
    for end, write in zip(further, (writer.add_eot_token_id, writer.add_eom_token_id)):
        write(end)
    if len(further) > 2:
        names = model.tokenizer.convert_ids_to_tokens(further[2:])
        warnings.warn(f"llama.cpp has no place for more ends of an answer; it goes on after {names}", stacklevel=3)


def _gguf_architecture(network: Any) -> str:
    config = network.config
    name = type(network).__name__
    found = _GGUF_ARCHITECTURES.get(config.model_type)
    if found is None:
        raise ValueError(
            f"gguf of {name} is not written here (known: {', '.join(_GGUF_ARCHITECTURES)}); {_CONVERT_HINT}"
        )
    if found == "GEMMA3":
        gemma.check_gemma(config)
        return found
    if config.hidden_act not in ("silu", "swish"):  # llama.cpp takes no other for these architectures
        raise ValueError(f"gguf of {name} with activation {config.hidden_act} is not written here; {_CONVERT_HINT}")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        config.model_type == "mistral" and config.sliding_window is not None
    ):
        raise ValueError(f"gguf of {name} with sliding windows is not written here; {_CONVERT_HINT}")
    scale = getattr(_rotary(network), "attention_scaling", 1.0)
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3") or scale != 1.0 or (kind != "default" and found != "LLAMA"):
        raise ValueError(f"gguf of {name} with rope type {kind} is not written here; {_CONVERT_HINT}")
    return found


def _rotary(network: Any) -> Any:
    """The rotary embedding of a model, made anew: one on the meta device has no frequencies."""
    kind = type(getattr(network, network.base_model_prefix, network).rotary_emb)
    return kind(config=network.config)


def _gguf_pooling(model: UBMoE) -> Any:
    import gguf

    behind = list(model)[1:]
    pooling = [module for module in behind if isinstance(module, Pooling)]
    others = [type(module).__name__ for module in behind if not isinstance(module, Pooling | Normalize)]
    if others and all(isinstance(module, Pooling | Dense | Normalize) for module in behind):
        raise ValueError(
            "llama.cpp pools and normalises, and has no place for the Dense between them; take format='onnx', or "
            "format='gguf-lora' and apply the Dense yourself, as docs/serving.md shows"
        )
    views: Any = model[0]
    if model.truncate_dim is not None:
        whole = views.get_embedding_dimension()
        warnings.warn(
            f"llama.cpp gives all {whole} dimensions: keep the first {model.truncate_dim} of each vector yourself, and "
            "normalise them again",
            stacklevel=2,
        )
    if any(model.prompts.values()) and not all(module.include_prompt for module in pooling):
        raise ValueError(
            "the checkpoint pools without its prompts, which llama.cpp cannot; take format='onnx', or set "
            "include_prompt of its Pooling and measure what it does"
        )
    limit, context = model.max_seq_length, views.model.config.max_position_embeddings
    if limit is not None and limit < context:
        warnings.warn(
            f"llama.cpp reads up to {context} tokens: cut texts after {limit}, as the checkpoint does",
            stacklevel=2,
        )
    mode = pooling[0].pooling_mode if len(pooling) == 1 else None
    known = {"mean": gguf.PoolingType.MEAN, "cls": gguf.PoolingType.CLS, "lasttoken": gguf.PoolingType.LAST}
    if others or not isinstance(mode, str) or mode not in known:
        found = others[0] if others else f"pooling {mode}"
        raise ValueError(
            f"llama.cpp pools by {', '.join(known)} and nothing else, the checkpoint has {found}; take format='onnx'"
        )
    return known[mode]


def _gguf_tensors(
    network: Any, state: Mapping[str, Tensor], arch: Any, heads: int, kv_heads: int
) -> Iterator[tuple[str, Tensor]]:
    import gguf

    config = network.config
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    prefix = f"{network.base_model_prefix}."
    factors = None if arch == gguf.MODEL_ARCH.GEMMA3 else _rope_factors(_rotary(network), config)
    if factors is not None:
        yield "rope_freqs.weight", factors
    for key, tensor in state.items():
        full = key if key.startswith((prefix, "lm_head.")) else f"{prefix}{key}"
        name = names.get_name(full, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"llama.cpp has no place for {key} of {type(network).__name__}; {_CONVERT_HINT}")
        if arch == gguf.MODEL_ARCH.LLAMA and ".self_attn.q_proj." in full:
            tensor = _interleave(tensor, heads)
        elif arch == gguf.MODEL_ARCH.LLAMA and ".self_attn.k_proj." in full:
            tensor = _interleave(tensor, kv_heads)
        yield name, tensor


def _interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows of a projection in the order of llama.cpp, whose rotation pairs neighbours instead of halves."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape).contiguous()


def _rope_factors(rotary: Any, config: Any) -> Tensor | None:
    """What llama.cpp divides each rotation frequency by, (head_dim / 2,). None: by nothing."""
    frequencies = rotary.inv_freq.float()  # (head_dim / 2,)
    steps = torch.arange(0, 2 * len(frequencies), 2, dtype=torch.float32) / (2 * len(frequencies))
    plain = 1.0 / config.rope_parameters["rope_theta"] ** steps
    factors = plain / frequencies
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-4) else factors
