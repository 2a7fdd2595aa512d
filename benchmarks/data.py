"""What the benchmarks read of the data folder (`training.data.data_folder`): STS tables, BEIR folders, classification.

Nothing of it is part of the repository. Where there is a network, mteb and lm-eval fetch the official sets themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.data import (
    DOLLY_DEV,
    DOLLY_FILE,
    Collection,
    dolly_dev,
    labelled_texts,
    read_collection,
    read_jsonl,
    read_table,
)

__all__ = ["DOLLY_DEV", "Collection", "dolly_dev", "labelled_texts", "read_collection", "read_jsonl", "read_table"]

STS_FILES: dict[tuple[str, str], tuple[str, ...]] = {
    ("STS12", "test"): ("STS12",),
    ("STS13", "test"): ("STS13",),
    ("STS14", "test"): ("STS14",),
    ("STS15", "test"): ("STS15",),
    ("STS16", "test"): ("STS16",),
    ("STSBenchmark", "test"): ("STSB-test",),
    ("STSBenchmark", "validation"): ("STSB-dev",),
    # mteb's SICK-R is all of SICK; "test" of the original alone is a subset of it (see `SICK_TEST_ROWS`)
    ("SICK-R", "test"): ("SICK-R-train", "SICK-R-dev", "SICK-R-test"),
    ("SICK-R", "validation"): ("SICK-R-dev",),
    ("BIOSSES", "test"): ("BIOSSES",),
    ("STS17", "test"): ("STS17-en-en",),
}
SICK_TEST_ROWS = 4927
"""Rows of SICK's own test split: the last ones of the local form of SICK-R."""


def sts_pairs(folder: Path, task: str, split: str) -> dict[str, list[Any]]:
    """Columns `sentence1`, `sentence2`, `score` of one STS task, as mteb wants them.

    Raises:
        ValueError: If there is no local form of the split.
        FileNotFoundError: If a file is missing.
    """
    files = STS_FILES.get((task, split))
    if files is None:
        splits = sorted(s for t, s in STS_FILES if t == task)
        raise ValueError(
            f"Expected a split of {task} that is there locally ({', '.join(splits) or 'none'}), got {split!r}."
        )
    rows = [row for name in files for row in read_table(folder / "eval" / "sts" / f"{name}.tsv")]
    return {
        "sentence1": [row["s1"] for row in rows],
        "sentence2": [row["s2"] for row in rows],
        "score": [float(row["score"]) for row in rows],
    }


def collections(folder: Path) -> list[str]:
    """Names that `open_collection` takes: the development set, and the BEIR folders under `retrieval/`."""
    found = sorted(path.parent.name for path in (folder / "retrieval").glob("*/qrels.tsv"))
    return [DOLLY_DEV, *found] if (folder / DOLLY_FILE).is_file() else found


def open_collection(folder: Path, name: str) -> Collection:
    """One of `collections(folder)`."""
    return dolly_dev(folder) if name == DOLLY_DEV else read_collection(folder / "retrieval" / name)


def split_of(collection: str) -> str:
    """`dev` for what choices are made on, `test` for what is for the final tables."""
    return "dev" if collection == DOLLY_DEV else "test"
