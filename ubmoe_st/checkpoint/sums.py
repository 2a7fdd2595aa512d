"""`SHA256SUMS`: a digest of every file of a checkpoint."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..files import is_plain, sha256_of
from .names import LISTED, SUMS_FILE, CheckpointError, is_part, read_sums
from .structure import is_inside, module_paths


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
        CheckpointError: If a file is missing or changed, or one that loading reads was added; names all of them.
    """
    root = Path(path)
    try:
        sums = read_sums(root)
    except FileNotFoundError as error:
        raise CheckpointError(f"{SUMS_FILE} is missing from {root}: nothing to verify against") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{SUMS_FILE} of {root} is not a list of checksums: {error}") from error
    for name in sums:
        if not is_plain(name) or not is_inside(root / name, root):
            raise CheckpointError(f"{SUMS_FILE} names {name}, which is not in {root}")
    wrong = []
    for name, digest in sums.items():
        if not (root / name).is_file():
            wrong.append(f"{name} is missing")
        elif sha256_of(root / name) != digest:
            wrong.append(f"{name} has changed")
    wrong += [f"{name} is not listed" for name in sorted({*_read(root), *LISTED} - set(sums))]
    if wrong:
        raise CheckpointError(f"{root} does not match {SUMS_FILE}: {'; '.join(wrong)}")
    return list(sums)


def _read(root: Path) -> list[str]:
    """The files that loading the checkpoint may read: weights, what loaders know by name, and all of its folders."""
    folders: list[str] = []
    with contextlib.suppress(CheckpointError):  # a changed or missing list of modules is told of as such
        folders = [path.partition("/")[0] for path in module_paths(root) if path]
    found = [file.relative_to(root) for file in _files(root)]
    return [
        file.as_posix()
        for file in found
        if file.suffix == ".safetensors"
        or (not file.name.startswith(".") and (is_part(file.parts[0]) or file.parts[0] in folders))
    ]


def _files(root: Path) -> Iterator[Path]:
    return (
        file
        for file in sorted(root.rglob("*"))
        if file.is_file() and file.name != SUMS_FILE and ".cache" not in file.relative_to(root).parts
    )
