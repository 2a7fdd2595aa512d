"""PEFT adapters as `bi` experts: what PEFT itself makes of them, to the last bit, and their low-rank form."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from ubmoe_st import checkpoint
from ubmoe_st.bases import Base
from ubmoe_st.cards import CUSTOMARY_FOLDERS
from ubmoe_st.experts import LowRank, is_ffn_key, low_rank_mismatch
from ubmoe_st.files import read_json, sha256_of
from ubmoe_st.shards import read_header
from ubmoe_st.source import Source
from ubmoe_st.transformer import UBMoETransformer

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_MERGE_FIRST = "merge it with PEFT (`merge_and_unload`), save the model and give its folder"
_UNREPEATABLE = ("pissa_niter", "corda", "loftq", "lora_ga")
"""Initialisations that change the base by what is not in the adapter: chance, data, gradients."""


@dataclass(frozen=True)
class AdapterExperts:
    """What an adapter makes of the FFNs.

    Attributes:
        ffn: Every FFN tensor by backbone name, as PEFT merges it.
        low_rank: The same as low-rank experts on the original FFNs, where they are that.
        trained_on: The checkpoint whose experts the adapter goes on from. None: those of the base.
    """

    ffn: dict[str, Tensor]
    low_rank: LowRank | None
    trained_on: Path | None


def is_adapter(path: Path) -> bool:
    """Whether a folder is that of a PEFT adapter."""
    return (path / ADAPTER_CONFIG).is_file()


def read_adapter(module: UBMoETransformer, base: Base, path: Path, *, allow_mismatch: bool = False) -> AdapterExperts:
    """The experts of an adapter that was trained on a base, or on a checkpoint of it.

    Args:
        module: The base made bidirectional.
        base: The base.
        path: Folder of the adapter.
        allow_mismatch: Take an adapter that was trained on other weights of the same shape.

    Raises:
        ImportError: If PEFT is not installed.
        ValueError: If PEFT cannot merge it, it belongs to another base, or it changes more than FFNs.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError("reading a PEFT adapter needs peft: pip install 'ubmoe-st[train]'") from error
    config = read_json(path / ADAPTER_CONFIG)
    _check_kind(config, path)
    keys = _keys(path)
    said = config.get("base_model_name_or_path")
    if said is not None and not isinstance(said, str):
        raise ValueError(f"{path / ADAPTER_CONFIG}: expected a name as base_model_name_or_path, got {said!r}")
    trained_on = _check_base(base, said, path, allow_mismatch)
    prefix = f"{module.model.base_model_prefix}."
    # An adapter of a causal LM names its layers `model.layers...`, one of an encoder `layers...`.
    whole = any(key.startswith(f"base_model.model.{prefix}") for key in keys)
    loader: Any = AutoModelForCausalLM if whole else AutoModel
    stock = loader.from_pretrained(trained_on or base.path, dtype=module.model.dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Missing keys are an error here, see below.
            tuned: Any = PeftModel.from_pretrained(stock, str(path))
        delta = layer_deltas(tuned.get_base_model(), prefix)
        _check_keys(tuned, keys, path)
        merged = tuned.merge_and_unload()
    except (ValueError, OSError, ImportError, MemoryError):
        raise
    except Exception as error:  # PEFT checks little of a config, and each kind in its own way
        raise ValueError(f"PEFT cannot merge the adapter {path} into {base.name}: {_first_line(error)}") from error
    state = {key.removeprefix(prefix): tensor for key, tensor in merged.state_dict().items()}
    ffn = {key: tensor for key, tensor in state.items() if is_ffn_key(key)}
    tied = whole and module.model.config.tie_word_embeddings
    rest = {k: t for k, t in state.items() if k not in ffn and not (tied and k.startswith("lm_head."))}
    changed = module.source.changed(rest)
    if changed is not None:
        raise ValueError(f"the adapter changes {changed}, which is shared with the generator; only FFN layers may")
    low_rank: LowRank | None = delta
    if trained_on is not None:
        released = Source(folder=trained_on).low_rank()
        low_rank = added_low_rank(released, delta) if released is not None else None
    if low_rank is not None and low_rank_mismatch(low_rank, module.uni_tensors(), ffn) is not None:
        low_rank = None
    return AdapterExperts(ffn, low_rank, trained_on)


def adapter_experts(module: UBMoETransformer) -> LowRank:
    """The LoRA adapter of a module in training as low-rank experts on the original FFNs, its scaling folded into B.

    Low-rank experts that the module had before are part of them.

    Raises:
        ValueError: If the adapter does more than add low-rank deltas to the FFN, or sits on dense experts.
    """
    delta = layer_deltas(module.model, f"{module.model.base_model_prefix}.", plain=True)
    released = module.low_rank if module.low_rank is not None else module.source.low_rank()
    below = {key.replace(".base_layer.", "."): t for key, t in module.model.state_dict().items() if ".lora_" not in key}
    odd = low_rank_mismatch(released or {}, module.uni_tensors(), below)
    if odd is not None:
        raise ValueError(
            f"the adapter sits on dense experts ({odd} is not that of the base), so that both together have no "
            "low-rank form; merge it (`merge_and_unload`) and save the model"
        )
    return added_low_rank(released, delta) if released else delta


def layer_deltas(model: Any, prefix: str = "", *, plain: bool = False) -> LowRank:
    """A and scaled B of every LoRA layer, by backbone name.

    Args:
        model: With injected layers.
        prefix: Of the backbone's names in `model`.
        plain: Refuse what low-rank pairs do not say, as DoRA and biases.

    Raises:
        ValueError: If a layer outside the FFN is adapted, or none is.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    low_rank: LowRank = {}
    for full, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        name = full.removeprefix(prefix)
        if not is_ffn_key(f"{name}."):
            raise ValueError(f"the adapter changes {name}, which is shared with the generator; only FFN layers may")
        if not isinstance(layer, LoraLayer):
            raise ValueError(f"the adapter on {name} is a {type(layer).__name__}; expected LoRA")
        halves: Any = layer
        for adapter in layer.lora_A:
            if plain and (layer.use_dora.get(adapter) or (layer.lora_bias or {}).get(adapter)):
                raise ValueError(f"the adapter on {name} uses DoRA or a bias; expected plain LoRA")
            if name in low_rank:
                raise ValueError(f"{name} carries more than one adapter; merge them into one first")
            scaled = halves.lora_B[adapter].weight.detach().float() * layer.scaling[adapter]
            low_rank[name] = (halves.lora_A[adapter].weight.detach().float(), scaled)
    if not low_rank:
        raise ValueError("the adapter has no LoRA layers on the FFN (gate_proj, up_proj, down_proj, ...)")
    return low_rank


def added_low_rank(first: LowRank, second: LowRank) -> LowRank:
    """Low-rank experts whose deltas are the sums of two, exactly: the ranks add up."""
    total = {**first, **second}
    for name in first.keys() & second.keys():
        (a, b), (c, d) = first[name], second[name]
        total[name] = (torch.cat([a.float(), c.float()]), torch.cat([b.float(), d.float()], dim=1))
    return total


def _check_kind(config: dict[str, Any], path: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path} is a {kind} adapter, expected LoRA; {_MERGE_FIRST}")
    if config.get("use_dora"):
        raise ValueError(f"{path} is a DoRA adapter, expected plain LoRA; {_MERGE_FIRST}")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_UNREPEATABLE):
        raise ValueError(
            f"{path} was initialised by {start}, which changes the base in a way that cannot be repeated from the "
            "adapter; convert it with PEFT (`path_initial_model_for_weight_conversion`), or merge it while the changed "
            "base is in memory and give the folder of the merged model"
        )


def _keys(path: Path) -> set[str]:
    if not (path / _WEIGHTS).is_file():
        if (path / "adapter_model.bin").is_file():
            raise ValueError(
                f"{path} holds its weights as adapter_model.bin, a pickle, which can execute code and is not read; "
                "load it with PEFT and `save_pretrained` it again"
            )
        raise ValueError(f"{_WEIGHTS} is missing from {path}")
    return set(read_header(path / _WEIGHTS))


def _check_keys(tuned: Any, keys: set[str], path: Path) -> None:
    from peft import get_peft_model_state_dict

    own = set(get_peft_model_state_dict(tuned, save_embedding_layers=False))
    if own - keys:
        raise ValueError(f"{path / _WEIGHTS}: {sorted(own - keys)[0]} is missing, though {ADAPTER_CONFIG} asks for it")
    if keys - own:
        odd = sorted(keys - own)[0]
        raise ValueError(f"{path / _WEIGHTS}: {odd} is no part of the adapter that {ADAPTER_CONFIG} describes")


def _check_base(base: Base, recorded: str | None, path: Path, allow_mismatch: bool) -> Path | None:
    """The checkpoint that an adapter was trained on, if it was one; refuses another base."""
    if not recorded:
        return None
    folder = Path(recorded)
    if checkpoint.is_checkpoint(folder):
        sums = checkpoint.check_checkpoint(folder).base_sha256
        if not (allow_mismatch or base.has_weights(sums)):
            raise ValueError(
                f"the adapter {path} was trained on the checkpoint {recorded}, which is not one of {base.name}; "
                "give its base, or pass allow_base_mismatch=True and measure what it does"
            )
        return folder
    if allow_mismatch or recorded == base.name or folder.resolve() == base.path.resolve():
        return None
    known = folder.is_dir()
    if known:
        found = {sha256_of(file) for file in folder.glob("*.safetensors")}
        if found in (set(base.sha256.values()), {sha256_of(file) for file in base.path.glob("*.safetensors")}):
            return None
    same_name = folder.name.lower() == Path(base.name).name.lower()
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", recorded) is not None and folder.parent.name not in CUSTOMARY_FOLDERS
    known = known or (hub_id and base.origin == "hub" and not same_name)
    message = f"the adapter {path} says that it was trained on {recorded}, not on {base.name}"
    if known:
        raise ValueError(f"{message}; give that base, or pass allow_base_mismatch=True and measure what it does")
    if not (same_name or hub_id):  # its own experts would be lost with it
        raise ValueError(
            f"{message}, and nothing is there now; if it is a checkpoint, put it there or correct "
            f"base_model_name_or_path in {ADAPTER_CONFIG}; if it is that base, pass allow_base_mismatch=True"
        )
    warnings.warn(f"{message}; the two are taken for the same", stacklevel=4)
    return None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or type(error).__name__
