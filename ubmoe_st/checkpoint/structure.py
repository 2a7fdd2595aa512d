"""Structure of a checkpoint: whether its JSON files and the headers of its weights fit each other."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import shards
from ..configuration import UBMoEConfig
from ..files import is_plain, read_json
from .names import (
    CONFIG_KEY,
    DELTA_FILE,
    GENERATOR_CONFIG,
    GENERATOR_FOLDER,
    HEAD_FILE,
    INDEX_FILE,
    MODULES_FILE,
    ONE_FILE,
    ROUTER_FILE,
    UNI_FILE,
    CheckpointError,
)

if TYPE_CHECKING:
    from ..classification import ClassificationHead

_PICKLE = "pytorch_model.bin"
_READ = (".json", ".safetensors", ".jinja", ".model", ".txt")
"""Endings of the files of a checkpoint that are read when it is loaded."""


def check_checkpoint(path: str | os.PathLike[str], *, modules: bool = True) -> UBMoEConfig:
    """Check the structure of a checkpoint from its JSON files and safetensors headers; reads no weights but a head's.

    Args:
        path: The checkpoint folder.
        modules: Whether `modules.json` is looked at; it is the last that is written.

    Returns:
        The `ubmoe` section of `generator/config.json`.

    Raises:
        CheckpointError: If a file is missing, truncated or does not fit the others.
    """
    root = Path(path)
    config = read_config(root)
    check_files(root, modules=modules)
    index = json_of(root, INDEX_FILE)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{INDEX_FILE}: expected a `weight_map` from tensor to file")
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for file in sorted({*weight_map.values()}):
        if Path(file).name != file or not is_plain(file):
            raise CheckpointError(f"{INDEX_FILE}: {file!r} is not a file beside it")
        if not (root / file).is_file():
            raise CheckpointError(f"{INDEX_FILE} names {file}, which is missing from {root}")
        shards[file] = read_shapes(root, file)
    for key, file in weight_map.items():
        if key not in shards[file]:
            raise CheckpointError(f"{file}: tensor {key} is missing, though {INDEX_FILE} places it there")
    encoder = {key: shards[file][key] for key, file in weight_map.items()}
    uni = read_shapes(root, UNI_FILE)
    _check_against_config(root, encoder, weight_map, uni)
    from ubmoe_st.experts import is_ffn_key

    for key in filter(is_ffn_key, encoder):
        if uni.get(key) != encoder[key]:
            found = f"has shape {uni[key]}" if key in uni else "is missing"
            raise CheckpointError(f"{UNI_FILE}: {key} {found}, expected {encoder[key]} as in {weight_map[key]}")
    if config.expert_rank is not None:
        _check_delta(read_shapes(root, DELTA_FILE), uni)
    if config.router is not None:
        layers = {key.split(".mlp.")[0] for key in encoder if is_ffn_key(key)}
        routed = {key.split(".router.")[0] for key in read_shapes(root, ROUTER_FILE)}
        if layers != routed:
            raise CheckpointError(f"{ROUTER_FILE}: routers of {len(routed)} layers, expected {len(layers)}")
    classification_head(root)
    return config


def classification_head(path: str | os.PathLike[str]) -> ClassificationHead | None:
    """The classification head of a checkpoint, which most have not.

    Raises:
        CheckpointError: If its file is damaged, or of another encoder.
    """
    from ..classification import check_fit, read_head

    root = Path(path)
    if not (root / HEAD_FILE).is_file():
        return None
    encoder = json_of(root, "config.json")
    try:
        head = read_head(root / HEAD_FILE)
        check_fit(head, encoder.get("num_hidden_layers") or 0, encoder.get("hidden_size") or 0)
        return head
    except ValueError as error:
        raise CheckpointError(f"{HEAD_FILE}: {error}") from error


def read_config(path: str | os.PathLike[str]) -> UBMoEConfig:
    """Read the `ubmoe` section of `generator/config.json`.

    Raises:
        CheckpointError: If it is missing or not valid.
    """
    section = json_of(Path(path), GENERATOR_CONFIG).get(CONFIG_KEY)
    if not isinstance(section, dict):
        raise CheckpointError(f"{GENERATOR_CONFIG}: expected a section {CONFIG_KEY!r}")
    try:
        return UBMoEConfig.from_dict(section)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{GENERATOR_CONFIG}: {error}") from error


def json_of(root: Path, name: str) -> dict[str, Any]:
    """A JSON object of the checkpoint.

    Raises:
        CheckpointError: If the file is missing or holds anything else.
    """
    try:
        return read_json(root / name)
    except FileNotFoundError as error:
        raise CheckpointError(f"{name} is missing from {root}: not a complete UBMoE checkpoint") from error
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def read_shapes(root: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Shapes by tensor of a safetensors file, from its header, with a check of the file's length.

    Raises:
        CheckpointError: If the file is missing, truncated, too long or not safetensors.
    """
    try:
        return {key: spec.shape for key, (_, spec) in shards.read_header(root / name, name).items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{name} is missing from {root}") from error
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def check_files(root: Path, *, modules: bool = True) -> None:
    """Refuse what would be read in the place of the checkpoint's own files: from outside, or as code.

    Raises:
        CheckpointError: Naming it.
    """
    if (root / ONE_FILE).exists():
        raise CheckpointError(f"{ONE_FILE} lies beside {INDEX_FILE} and would be read in its place: move it away")
    paths = module_paths(root) if modules else []
    for folder in {root, root / GENERATOR_FOLDER, *(root / path for path in paths)}:
        if (folder / _PICKLE).exists() and not (folder / ONE_FILE).exists() and folder != root:
            raise CheckpointError(f"{folder.name}/{_PICKLE} is a pickle, which can execute code: save as safetensors")
        for file in [folder, *(folder.iterdir() if folder.is_dir() else ())]:
            if file.is_symlink() and (file == folder or file.suffix in _READ) and not is_inside(file, root):
                raise CheckpointError(f"{file.relative_to(root)} is a link out of {root}: put the file itself there")


def module_paths(root: Path) -> list[str]:
    """Folders of the modules, relative to the checkpoint."""
    try:
        modules = json.loads((root / MODULES_FILE).read_text(encoding="utf-8"))
        texts = [(module["path"], module["type"], module["name"]) for module in modules]
    except FileNotFoundError as error:
        raise CheckpointError(f"{MODULES_FILE} is missing from {root}: not a complete UBMoE checkpoint") from error
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise CheckpointError(f"{MODULES_FILE}: expected a list of modules with type, name and path") from error
    if not texts or not all(isinstance(text, str) for one in texts for text in one):
        raise CheckpointError(f"{MODULES_FILE}: expected at least one module, with texts for type, name and path")
    for path, *_ in texts:
        if not is_plain(path):
            raise CheckpointError(f"{MODULES_FILE} names the folder {path!r}, which is not in {root}")
    return [path for path, *_ in texts]


def is_inside(file: Path, root: Path) -> bool:
    """Whether a link stays in the folder, or in the blobs of the Hub's cache that the folder is a snapshot of."""
    target, home = file.resolve(), root.resolve()
    snapshot = next((folder for folder in (home, *home.parents) if folder.parent.name == "snapshots"), None)
    blobs = [snapshot.parents[1] / "blobs"] if snapshot and snapshot.parents[1].name.startswith("models--") else []
    return any(target.is_relative_to(place) for place in (home, *blobs))


def _check_against_config(
    root: Path, encoder: dict[str, tuple[int, ...]], weight_map: dict[str, str], uni: dict[str, tuple[int, ...]]
) -> None:
    from transformers import AutoConfig

    from ubmoe_st.experts import is_ffn_key
    from ubmoe_st.generator import meta_causal_lm, uni_keys

    layers = len({key.split(".")[1] for key in encoder if key.startswith("layers.")})
    try:
        config = AutoConfig.from_pretrained(root, trust_remote_code=False)
        if (asked := getattr(config, "num_hidden_layers", None)) != layers:
            raise CheckpointError(f"config.json asks for {asked} layers, {INDEX_FILE} has those of {layers}")
        lm = meta_causal_lm(config)
        expected = getattr(lm, lm.base_model_prefix).state_dict()
        needed = {key: tuple(lm.state_dict()[name].shape) for key, name in uni_keys(lm).items()}
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # stock classes check little of a config, and each in its own way
        raise CheckpointError(f"config.json describes no model that can be made: {error}") from error
    for key, tensor in expected.items():
        if key not in encoder:
            raise CheckpointError(f"{INDEX_FILE}: {key} is missing, though config.json asks for it")
        if encoder[key] != tuple(tensor.shape):
            raise CheckpointError(
                f"{weight_map[key]}: {key} has shape {encoder[key]}, config.json asks for {tuple(tensor.shape)}"
            )
    unexpected = sorted(set(encoder) - set(expected))
    if unexpected:
        raise CheckpointError(f"{weight_map[unexpected[0]]}: {unexpected[0]} has no place in the model of config.json")
    missing = sorted(set(needed) - set(uni))
    if missing:
        raise CheckpointError(f"{UNI_FILE}: {missing[0]} is missing, which the generator of config.json needs")
    for key, shape in needed.items():
        if not is_ffn_key(key) and uni[key] != shape:
            raise CheckpointError(f"{UNI_FILE}: {key} has shape {uni[key]}, config.json asks for {shape}")


def _check_delta(delta: dict[str, tuple[int, ...]], uni: dict[str, tuple[int, ...]]) -> None:
    for key, shape in delta.items():
        layer, _, half = key.rpartition(".lora_")
        weight = uni.get(f"{layer}.weight")
        side = {"A": 1, "B": 0}.get(half)
        if weight is None or side is None or len(shape) != 2 or shape[side] != weight[side]:
            raise CheckpointError(f"{DELTA_FILE}: {key} of shape {shape} fits no FFN layer of {UNI_FILE}")
