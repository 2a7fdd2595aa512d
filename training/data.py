"""Texts to train and choose on, from a local folder (`--data-dir`, `$UBMOE_DATA`, `../shared/data`) or the Hub."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.recipe import Mixture

DEFAULT_DATA = Path("../shared/data")


def data_folder(given: str | os.PathLike[str] | None = None) -> Path:
    """The local data folder: the one given, else `$UBMOE_DATA`, else `../shared/data`.

    Raises:
        FileNotFoundError: If it does not exist.
    """
    folder = Path(given or os.environ.get("UBMOE_DATA") or DEFAULT_DATA)
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a data folder with train/ and eval/sts/ at {folder}; set UBMOE_DATA")
    return folder


def read_lines(file: Path) -> Iterator[str]:
    """Stripped lines of a `.txt` or `.gz` file.

    Raises:
        FileNotFoundError: If it does not exist.
    """
    if not file.is_file():
        raise FileNotFoundError(f"expected {file.name} in {file.parent}, got nothing there; check the recipe's data")
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        for line in lines:
            yield line.strip()


def read_sentences(mixture: Mixture, folder: Path | None = None) -> list[str]:
    """Draw the sentences of a mixture, shuffled; the same ones for the same seed.

    Args:
        mixture: What to draw.
        folder: The data folder. None: `data_folder()`, where a name of the mixture is not a file.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If nothing is left.
    """
    rng = random.Random(mixture.seed)
    fewest, most = mixture.words
    drawn: list[str] = []
    for name, share in mixture.files.items():
        file = Path(name)
        if not file.is_file():
            file = (folder or data_folder()) / "train" / f"sentences-{name}.txt.gz"
        lines = [line for line in read_lines(file) if fewest <= len(line.split()) <= most]
        drawn += rng.sample(lines, min(len(lines), int(mixture.count * share)))
    rng.shuffle(drawn)
    if not drawn:
        raise ValueError(f"no sentence of {fewest} to {most} words in {', '.join(mixture.files)}")
    return drawn[: mixture.use]


def texts_sha256(texts: Iterable[str]) -> str:
    """SHA-256 over texts and their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()


def read_rows(source: str, columns: Sequence[str]) -> dict[str, list[str]]:
    """Columns of supervised pairs or triplets.

    Args:
        source: A local `.jsonl` or `.jsonl.gz` file, or `dataset` or `dataset:subset` on the Hub (its train split).
        columns: Two (anchor, positive) or more (hard negatives) column names.

    Raises:
        ValueError: If a column is missing.
    """
    if Path(source).is_file():
        rows: Iterable[Mapping[str, Any]] = map(json.loads, filter(None, read_lines(Path(source))))
    else:
        from datasets import load_dataset

        name, _, subset = source.partition(":")
        rows = load_dataset(name, subset or None, split="train")
    table: dict[str, list[str]] = {column: [] for column in columns}
    for number, row in enumerate(rows):
        for column, values in table.items():
            if column not in row:
                raise ValueError(f"{source}: row {number} has {sorted(row)}, expected the columns {list(columns)}")
            values.append(row[column])
    return table


def sts_pairs(name: str, folder: Path, sample: int | None = None) -> tuple[list[str], list[str], list[float]]:
    """Sentences and gold scores of a development set.

    Args:
        name: `STSB-dev` or `SICK-R-dev`. Test sets are refused: they are for the final tables.
        folder: The data folder.
        sample: A seeded sample of so many pairs. None: all.

    Raises:
        ValueError: If it is not a development set.
    """
    if not name.endswith("-dev"):
        raise ValueError(f"training looks at development sets only (STSB-dev, SICK-R-dev), got {name}")
    lines = list(read_lines(folder / "eval" / "sts" / f"{name}.tsv"))
    rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    if sample is not None and sample < len(rows):
        rows = random.Random(0).sample(rows, sample)
    return [row["s1"] for row in rows], [row["s2"] for row in rows], [float(row["score"]) for row in rows]


def read_instructions(files: Sequence[str], folder: Path | None = None) -> list[tuple[str, str]]:
    """Questions and answers of instruction sets.

    Args:
        files: Names under `instruct/` without `.jsonl.gz`, or paths; rows hold `instruction`, `input`, `output`.
        folder: The data folder. None: `data_folder()`, where a name is not a file.

    Raises:
        ValueError: If there is no usable row.
    """
    pairs = []
    for name in files:
        file = Path(name)
        if not file.is_file():
            file = (folder or data_folder()) / "instruct" / f"{name}.jsonl.gz"
        for row in map(json.loads, filter(None, read_lines(file))):
            question = "\n\n".join(filter(None, (row["instruction"].strip(), (row.get("input") or "").strip())))
            if question and row["output"].strip():
                pairs.append((question, row["output"].strip()))
    if not pairs:
        raise ValueError(f"no question with an answer in {', '.join(files)}")
    return pairs
