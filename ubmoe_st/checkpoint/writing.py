"""Writing a checkpoint: configs and weights of both views."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .. import shards
from ..configuration import UBMoEConfig
from .names import (
    BI_FILE,
    CONFIG_KEY,
    DELTA_FILE,
    GENERATOR_CONFIG,
    GENERATOR_FOLDER,
    INDEX_FILE,
    MODULES_FILE,
    ROUTER_FILE,
    SHARED_FILE,
    UNI_FILE,
    CheckpointError,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel

    from ubmoe_st.experts import LowRank


def data_start(path: Path) -> int:
    """Offset in bytes of the first tensor of a safetensors file."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, alignment: int = 0) -> None:
    """Write a safetensors file whose tensors start at a given offset modulo 64 bytes; see `shards.write_tensors`."""
    shards.write_tensors(path, tensors, alignment)


def write(
    folder: Path,
    config: UBMoEConfig,
    model: PreTrainedModel,
    *,
    encoder: Mapping[str, Tensor],
    uni: Mapping[str, Tensor],
    low_rank: LowRank | None,
    routers: Mapping[str, Tensor] | None,
    generation_config: GenerationConfig | None,
    alignment: int,
) -> None:
    """Write configs and weights of both views; tokenizer, modules, card and checksums are for the caller.

    Args:
        folder: An existing folder.
        config: What the checkpoint says of itself; its rank and versions are filled in.
        model: The encoder.
        encoder: Its tensors under their stock names, with the `bi` experts merged.
        uni: What the generator has beside the shared tensors, by backbone name.
        low_rank: Low-rank form of the `bi` experts. None: they are dense.
        routers: Token routers, where `config` has any.
        generation_config: The base model's defaults for `generate`.
        alignment: Of the base's tensors, see `save_tensors`.
    """
    from ubmoe_st.experts import is_ffn_key, save_low_rank
    from ubmoe_st.generator import causal_config

    dtypes = [plain_dtypes(encoder), plain_dtypes(uni)]
    if dtypes[0] != dtypes[1]:
        raise CheckpointError(
            f"shared weights and experts are of {sorted(map(str, dtypes[0]))}, the generator's own of "
            f"{sorted(map(str, dtypes[1]))}; convert the whole model with `.to(dtype)`, not one view of it"
        )
    (folder / GENERATOR_FOLDER).mkdir(exist_ok=True)
    config.versions = {
        name: importlib.metadata.version(name)
        for name in ("ubmoe-st", "sentence-transformers", "transformers", "torch")
    }
    config.expert_rank = max(lora_a.shape[0] for lora_a, _ in low_rank.values()) if low_rank is not None else None
    shared = shards.pick(encoder, lambda key: not is_ffn_key(key))
    bi = shards.pick(encoder, is_ffn_key)
    save_tensors(shared, folder / SHARED_FILE, alignment)
    save_tensors(bi, folder / BI_FILE, alignment)
    save_tensors(uni, folder / UNI_FILE, alignment)
    if low_rank is not None:
        save_low_rank(low_rank, folder / DELTA_FILE, {"base_sha256": config.base_sha256})
    if config.router is not None:
        save_tensors(routers or {}, folder / ROUTER_FILE)
    if generation_config is not None:
        generation_config.save_pretrained(folder / GENERATOR_FOLDER)

    stock = model.config.to_dict() | {"is_causal": False, "architectures": [type(model).__name__]}
    causal = causal_config(model.config).to_dict() | {"architectures": [config.base_architecture]}
    for settings in (stock, causal):
        settings.pop("_name_or_path", None)
        if len(dtypes[0]) == 1:
            settings["dtype"] = str(next(iter(dtypes[0]))).removeprefix("torch.")
    _write_json(folder / "config.json", stock)
    _write_json(folder / GENERATOR_CONFIG, {**causal, CONFIG_KEY: config.to_dict()})
    _write_index(folder / INDEX_FILE, [(SHARED_FILE, shared), (BI_FILE, bi)])
    # Stock transformers opens the local folder `generator` as the base model by this index.
    parts = [(f"../{SHARED_FILE}", shared), (Path(UNI_FILE).name, uni)]
    _write_index(folder / GENERATOR_FOLDER / INDEX_FILE, parts)


def plain_dtypes(tensors: Mapping[str, Tensor]) -> set[torch.dtype]:
    """The dtypes of tensors that can be stored.

    Raises:
        CheckpointError: If one is packed, quantised or no tensor at all; names it and its type.
    """
    if isinstance(tensors, shards.Described):
        return {_plain_dtype(key, tensors.spec(key).blank()) for key in tensors}
    return {_plain_dtype(key, tensor) for key, tensor in tensors.items()}


def _plain_dtype(key: str, tensor: object) -> torch.dtype:
    import torch

    # The very type: subclasses are how libraries pack and quantise.
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    if not plain or not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        found = f"{type(tensor).__name__}{f' of {tensor.dtype}' if isinstance(tensor, torch.Tensor) else ''}"
        raise CheckpointError(f"{key} is {found}, expected a plain tensor of floating point: save before quantising")
    return tensor.dtype


def generator_tensors(lm: PreTrainedModel, encoder: torch.nn.Module, uni: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a generator in use has beside the shared tensors, by the names of `uni_keys`.

    Args:
        lm: The generator.
        encoder: The encoder view.
        uni: What it had when it was built. Where low-rank experts stand on it, it is shared, too.

    Raises:
        CheckpointError: If it is no longer what a checkpoint holds: names a tensor that was added, or put in the place
            of a shared one, as adapters and quantisers do.
    """
    from ubmoe_st.experts import LowRankLinear, is_ffn_key
    from ubmoe_st.generator import meta_causal_lm, plain_name, uni_keys

    stock = meta_causal_lm(lm.config)
    shared: dict[str, Tensor] = {
        plain_name(key): tensor for key, tensor in encoder.named_parameters() if not is_ffn_key(key)
    }
    if any(isinstance(module, LowRankLinear) for module in encoder.modules()):
        shared |= {key: tensor for key, tensor in uni.items() if is_ffn_key(key)}
    state = {plain_name(name): tensor for name, tensor in lm.state_dict(keep_vars=True).items()}
    odd = sorted(state.keys() ^ stock.state_dict().keys())
    if odd:
        raise CheckpointError(f"the generator differs from a {type(stock).__name__} in {odd[0]}")
    for name, tensor in state.items():
        if shared.get(name.removeprefix(f"{lm.base_model_prefix}."), tensor) is not tensor:
            raise CheckpointError(f"{name} of the generator was replaced, and is not that of the encoder any more")
    if lm.config.tie_word_embeddings and lm.get_output_embeddings().weight is not lm.get_input_embeddings().weight:
        raise CheckpointError("the generator's head is not that of its embeddings, though its config ties them")
    own = {key: state[name].detach() for key, name in uni_keys(stock).items()}
    plain_dtypes(own)
    return own


def name_first_module(folder: Path, kind: str) -> None:
    """Let `modules.json` name the class that stock sentence-transformers takes for the first module.

    Args:
        folder: The checkpoint.
        kind: Import path of the class.
    """
    file = folder / MODULES_FILE
    modules = json.loads(file.read_text(encoding="utf-8"))
    modules[0]["type"] = kind
    _write_json(file, modules)


def _write_index(file: Path, parts: list[tuple[str, Mapping[str, Tensor]]]) -> None:
    weight_map = {key: name for name, part in parts for key in sorted(part)}
    size = sum(spec.bytes for _, part in parts for spec in shards.specs_of(part).values())
    _write_json(file, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=isinstance(content, dict)) + "\n", encoding="utf-8")
