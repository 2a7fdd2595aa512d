"""The checkpoint folder: names, structure check, reading, writing, checksums, facts. The only file that knows it."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ubmoe_st import shards
from ubmoe_st.configuration import UBMoEConfig
from ubmoe_st.files import is_plain, read_json, sha256_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel

    from ubmoe_st.experts import LowRank

INDEX_FILE = "model.safetensors.index.json"
SHARED_FILE = "model-shared.safetensors"
BI_FILE = "model-bi.safetensors"
GENERATOR_FOLDER = "generator"
UNI_FILE = f"{GENERATOR_FOLDER}/model-uni.safetensors"
DELTA_FILE = f"{GENERATOR_FOLDER}/bi_delta.safetensors"
ROUTER_FILE = f"{GENERATOR_FOLDER}/router.safetensors"
GENERATOR_CONFIG = f"{GENERATOR_FOLDER}/config.json"
SUMS_FILE = "SHA256SUMS"
_LISTED = ("config.json", "modules.json", "tokenizer.json", INDEX_FILE, GENERATOR_CONFIG)
"""What every checkpoint lists there beside its weights."""
CONFIG_KEY = "ubmoe"
CACHE_LINE = shards.CACHE_LINE

NOTICES = ("NOTICE*", "*TERMS*", "LICENSE*")
"""Files of terms that go with the experts of some bases, and so with every checkpoint made of them."""

_PARTS = re.compile(
    r".+\.safetensors|model\.safetensors\.index\.json|SHA256SUMS|generator|\d+_[A-Z]\w*"
    r"|(config|modules|sentence_bert_config|config_sentence_transformers|generation_config|adapter_config)\.json"
    r"|tokenizer(_config)?\.json|(special_tokens_map|added_tokens|vocab|processor_config|preprocessor_config)\.json"
    r"|(tokenizer|spiece|sentencepiece\.bpe)\.model|(vocab|merges)\.txt"
    r"|chat_template\.(jinja|json)|additional_chat_templates"
)
"""Names, at the root, of what transformers and sentence-transformers read of any checkpoint."""
_MODULES_FILE = "modules.json"
_ONE_FILE = "model.safetensors"
_ADAPTER = "adapter_model.safetensors"
_PICKLE = "pytorch_model.bin"
_READ = (".json", ".safetensors", ".jinja", ".model", ".txt")
"""Endings of the files of a checkpoint that are read when it is loaded."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted: names the file and what is wrong with it."""


def refuse_foreign_weights(path: str | os.PathLike[str], *, adapter: bool = False) -> None:
    """Refuse a folder that holds weights, but no checkpoint: saving into it would replace somebody's model.

    Args:
        path: The folder.
        adapter: Whether an adapter alone is to be saved, which may replace another adapter and no checkpoint.

    Raises:
        FileExistsError: If it does.
    """
    target = Path(path)
    if adapter and is_checkpoint(target):
        raise FileExistsError(
            f"{target} holds a checkpoint, and a model with a PEFT adapter is saved as the adapter alone, which would "
            "replace it; choose another folder, or merge the adapter first"
        )
    if target.is_dir() and not is_checkpoint(target):
        own = {_ADAPTER} if adapter else set()
        weights = sorted({file.name for file in target.glob("*.safetensors")} - own)
        if weights:
            raise FileExistsError(f"{target} holds {weights[0]}, not of a UBMoE checkpoint; choose another folder")


def is_of_others(entry: Path) -> bool:
    """Whether an entry of a folder was put there by somebody else and survives a new checkpoint.

    Not what loaders would take for a part of the new one, nor what the old one lists in `SHA256SUMS` or, being a
    checkpoint, has to be given along with it.
    """
    if entry.name.startswith("."):
        return True
    if is_part(entry.name) or entry.name in _listed_in(entry.parent):
        return False
    along = any(fnmatch(entry.name, pattern) for pattern in ("README.md", *NOTICES))
    return not (along and is_checkpoint(entry.parent))


def is_part(name: str) -> bool:
    """Whether loaders read a file or folder of this name as a part of the checkpoint that it lies in."""
    return _PARTS.fullmatch(name) is not None


def _listed_in(folder: Path) -> set[str]:
    """First parts of the names in `SHA256SUMS`, where there is one."""
    try:
        lines = (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError):
        return set()
    return {line.partition("  ")[2].partition("/")[0] for line in lines}


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a folder claims to be a UBMoE checkpoint."""
    return (Path(path) / GENERATOR_CONFIG).is_file()


def check_checkpoint(path: str | os.PathLike[str], *, modules: bool = True) -> UBMoEConfig:
    """Check the structure of a checkpoint from its JSON files and safetensors headers; reads no weights.

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
    _check_files(root, modules=modules)
    index = _read_json(root, INDEX_FILE)
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
    return config


def read_config(path: str | os.PathLike[str]) -> UBMoEConfig:
    """Read the `ubmoe` section of `generator/config.json`.

    Raises:
        CheckpointError: If it is missing or not valid.
    """
    section = _read_json(Path(path), GENERATOR_CONFIG).get(CONFIG_KEY)
    if not isinstance(section, dict):
        raise CheckpointError(f"{GENERATOR_CONFIG}: expected a section {CONFIG_KEY!r}")
    try:
        return UBMoEConfig.from_dict(section)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{GENERATOR_CONFIG}: {error}") from error


def _read_json(root: Path, name: str) -> dict[str, Any]:
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


def _check_files(root: Path, *, modules: bool = True) -> None:
    """Refuse what would be read in the place of the checkpoint's own files: from outside, or as code.

    Raises:
        CheckpointError: Naming it.
    """
    if (root / _ONE_FILE).exists():
        raise CheckpointError(f"{_ONE_FILE} lies beside {INDEX_FILE} and would be read in its place: move it away")
    paths = _module_paths(root) if modules else []
    for folder in {root, root / GENERATOR_FOLDER, *(root / path for path in paths)}:
        if (folder / _PICKLE).exists() and not (folder / _ONE_FILE).exists() and folder != root:
            raise CheckpointError(f"{folder.name}/{_PICKLE} is a pickle, which can execute code: save as safetensors")
        for file in [folder, *(folder.iterdir() if folder.is_dir() else ())]:
            if file.is_symlink() and (file == folder or file.suffix in _READ) and not _is_inside(file, root):
                raise CheckpointError(f"{file.relative_to(root)} is a link out of {root}: put the file itself there")


def _module_paths(root: Path) -> list[str]:
    """Folders of the modules, relative to the checkpoint."""
    try:
        modules = json.loads((root / _MODULES_FILE).read_text(encoding="utf-8"))
        texts = [(module["path"], module["type"], module["name"]) for module in modules]
    except FileNotFoundError as error:
        raise CheckpointError(f"{_MODULES_FILE} is missing from {root}: not a complete UBMoE checkpoint") from error
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise CheckpointError(f"{_MODULES_FILE}: expected a list of modules with type, name and path") from error
    if not texts or not all(isinstance(text, str) for one in texts for text in one):
        raise CheckpointError(f"{_MODULES_FILE}: expected at least one module, with texts for type, name and path")
    for path, *_ in texts:
        if not is_plain(path):
            raise CheckpointError(f"{_MODULES_FILE} names the folder {path!r}, which is not in {root}")
    return [path for path, *_ in texts]


def _is_inside(file: Path, root: Path) -> bool:
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


# --- tensors ---------------------------------------------------------------------------------------------------------


def data_start(path: Path) -> int:
    """Offset in bytes of the first tensor of a safetensors file."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, alignment: int = 0) -> None:
    """Write a safetensors file whose tensors start at a given offset modulo 64 bytes; see `shards.write_tensors`."""
    shards.write_tensors(path, tensors, alignment)


# --- writing ---------------------------------------------------------------------------------------------------------


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
    file = folder / "modules.json"
    modules = json.loads(file.read_text(encoding="utf-8"))
    modules[0]["type"] = kind
    _write_json(file, modules)


def _write_index(file: Path, parts: list[tuple[str, Mapping[str, Tensor]]]) -> None:
    weight_map = {key: name for name, part in parts for key in sorted(part)}
    size = sum(spec.bytes for _, part in parts for spec in shards.specs_of(part).values())
    _write_json(file, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=isinstance(content, dict)) + "\n", encoding="utf-8")


# --- facts and checksums ---------------------------------------------------------------------------------------------


def facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint holds, from its JSON files and safetensors headers alone.

    Args:
        path: The checkpoint folder.

    Returns:
        For JSON: `name`, `architecture`, `layers`, `dimension`, `expert_rank`, `routing`, `router`, `parameters`
        (counts), `bytes` (by part), `base`, `layout_version` and `versions`.

    Raises:
        CheckpointError: If a file is missing, truncated or not valid.
        FileNotFoundError: If the folder is not a checkpoint.
    """
    root = Path(path)
    if not is_checkpoint(root):
        raise FileNotFoundError(f"{root} is not a UBMoE checkpoint; make one with `ubmoe build BASE --out {root}`")
    config = read_config(root)
    _check_files(root)
    stock = _read_json(root, "config.json")
    unset = [key for key in ("num_hidden_layers", "hidden_size") if type(stock.get(key)) is not int]
    if unset:
        raise CheckpointError(f"config.json: expected a whole number {unset[0]}, got {stock.get(unset[0])!r}")
    parts = {"delta": DELTA_FILE, "router": ROUTER_FILE}
    parts = {name: file for name, file in parts.items() if (root / file).is_file()}
    parts = {"shared": SHARED_FILE, "bi": BI_FILE, "uni": UNI_FILE, **parts}
    count = {name: sum(map(math.prod, read_shapes(root, file).values())) for name, file in parts.items()}
    files = [file for file in root.rglob("*") if file.is_file()]
    behind = sum(
        sum(map(math.prod, read_shapes(root, f"{module}/{_ONE_FILE}").values()))
        for module in _module_paths(root)
        if module and (root / module / _ONE_FILE).is_file()
    )
    added = (count.get("delta") or count["bi"]) + count.get("router", 0) + behind
    base_parameters = count["shared"] + count["uni"]
    return {
        "name": root.resolve().name,
        "architecture": config.base_architecture,
        "layers": stock["num_hidden_layers"],
        "dimension": min(_dimension(root, stock["hidden_size"]), _kept_dimensions(root)),
        "expert_rank": config.expert_rank,
        "routing": config.routing,
        "router": config.router,
        "parameters": {
            "stored": sum(count.values()) + behind,
            "active_encoding": count["shared"] + count["bi"] + behind,
            "active_generating": base_parameters,
            "base": base_parameters,
            "added": added,
            "added_percent": round(100 * added / base_parameters, 2),
        },
        "bytes": {
            "stored": sum(file.stat().st_size for file in files),
            **{name: (root / file).stat().st_size for name, file in parts.items()},
        },
        "base": {"name": config.base_model, "origin": config.base_origin, "sha256": config.base_sha256},
        "layout_version": config.layout_version,
        "versions": config.versions,
    }


def _dimension(root: Path, hidden: int) -> int:
    for module in reversed(json.loads((root / _MODULES_FILE).read_text(encoding="utf-8"))):
        if module["path"] and (root / module["path"] / "config.json").is_file():
            size = _read_json(root, f"{module['path']}/config.json").get("out_features")
            if size is not None and type(size) is not int:
                raise CheckpointError(
                    f"{module['path']}/config.json: expected a whole number out_features, got {size!r}"
                )
            if size is not None:
                return size
    return hidden


def _kept_dimensions(root: Path) -> float:
    """How many dimensions of a vector are kept where the checkpoint says so."""
    file = "config_sentence_transformers.json"
    kept = _read_json(root, file).get("truncate_dim") if (root / file).is_file() else None
    if kept is not None and type(kept) is not int:
        raise CheckpointError(f"{file}: expected a whole number truncate_dim, got {kept!r}")
    return math.inf if kept is None else kept


def notices_in(folder: Path) -> dict[str, bytes]:
    """Terms and notices that lie in a folder, by name."""
    found = {file for pattern in NOTICES for file in folder.glob(pattern) if file.is_file()}
    return {file.name: file.read_bytes() for file in sorted(found)}


def write_sums(path: Path) -> None:
    """Write `SHA256SUMS` over every other file of a folder."""
    lines = [f"{sha256_of(file)}  {file.relative_to(path).as_posix()}\n" for file in _files(path)]
    (path / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def verify_sums(path: str | os.PathLike[str]) -> list[str]:
    """Check every byte of a checkpoint against its `SHA256SUMS`.

    Args:
        path: The checkpoint folder.

    Returns:
        The files that were checked.

    Raises:
        CheckpointError: If a file is missing or changed; names all of them.
    """
    root = Path(path)
    try:
        lines = (root / SUMS_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise CheckpointError(f"{SUMS_FILE} is missing from {root}: nothing to verify against") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{SUMS_FILE} of {root} is not a list of checksums: {error}") from error
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in sums:
        if not is_plain(name) or not _is_inside(root / name, root):
            raise CheckpointError(f"{SUMS_FILE} names {name}, which is not in {root}")
    wrong = []
    for name, digest in sums.items():
        if not (root / name).is_file():
            wrong.append(f"{name} is missing")
        elif sha256_of(root / name) != digest:
            wrong.append(f"{name} has changed")
    wrong += [f"{name} is not listed" for name in (*_weights(root), *_LISTED) if name not in sums]
    if wrong:
        raise CheckpointError(f"{root} does not match {SUMS_FILE}: {'; '.join(wrong)}")
    return list(sums)


def _weights(root: Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in _files(root) if file.suffix == ".safetensors"]


def _files(root: Path) -> Iterator[Path]:
    return (
        file
        for file in sorted(root.rglob("*"))
        if file.is_file() and file.name != SUMS_FILE and ".cache" not in file.relative_to(root).parts
    )
