"""What a checkpoint folder holds: names of its files, and whose the others are."""

from __future__ import annotations

import os
import re
from fnmatch import fnmatch
from pathlib import Path

from .. import shards
from ..files import read_json

INDEX_FILE = "model.safetensors.index.json"
SHARED_FILE = "model-shared.safetensors"
BI_FILE = "model-bi.safetensors"
GENERATOR_FOLDER = "generator"
UNI_FILE = f"{GENERATOR_FOLDER}/model-uni.safetensors"
DELTA_FILE = f"{GENERATOR_FOLDER}/bi_delta.safetensors"
ROUTER_FILE = f"{GENERATOR_FOLDER}/router.safetensors"
HEAD_FILE = f"{GENERATOR_FOLDER}/classification.safetensors"
GENERATOR_CONFIG = f"{GENERATOR_FOLDER}/config.json"
SUMS_FILE = "SHA256SUMS"
LISTED = ("config.json", "modules.json", "tokenizer.json", INDEX_FILE, GENERATOR_CONFIG)
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
MODULES_FILE = "modules.json"
ONE_FILE = "model.safetensors"
_ADAPTER = "adapter_model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted: names the file and what is wrong with it."""


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a folder claims to be a UBMoE checkpoint."""
    return (Path(path) / GENERATOR_CONFIG).is_file()


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
        return {name.partition("/")[0] for name in read_sums(folder)}
    except (FileNotFoundError, UnicodeDecodeError):
        return set()


def read_sums(folder: Path) -> dict[str, str]:
    """Digests of `SHA256SUMS` by the names of the files, as they stand there; blank lines say nothing.

    Raises:
        FileNotFoundError: If there is no such file.
        UnicodeDecodeError: If it is no text.
    """
    lines = (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines if line.strip())}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads of a stock model; none if it has no such file or index."""
    if (folder / ONE_FILE).is_file():
        return [folder / ONE_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        return []
    return sorted({folder / name for name in read_json(index).get("weight_map", {}).values()})


def notices_in(folder: Path) -> dict[str, bytes]:
    """Terms and notices that lie in a folder, by name."""
    found = {file for pattern in NOTICES for file in folder.glob(pattern) if file.is_file()}
    return {file.name: file.read_bytes() for file in sorted(found)}
