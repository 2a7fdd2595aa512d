"""What the benchmarks read of the data folder (`training.data.data_folder`): STS tables, BEIR folders, classification.

Nothing of it is part of the repository. Where there is a network, mteb and lm-eval fetch the official sets themselves.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from training.data import Collection, labelled_texts, read_jsonl, read_table

__all__ = ["Collection", "labelled_texts", "read_jsonl", "read_table"]

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

DOLLY_DEV = "dolly-dev"
DOLLY_FILE = Path("instruct") / "dolly_partial.jsonl.gz"
DOLLY_CATEGORIES = ("closed_qa", "information_extraction")
"""Kinds of instructions that have a context; training leaves them out."""


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


def read_collection(folder: str | Path) -> Collection:
    """Read a BEIR folder: corpus.jsonl, queries.jsonl, qrels.tsv.

    Raises:
        FileNotFoundError: If one of the three files is missing.
        ValueError: If no query has a relevant document.
    """
    folder = Path(folder)
    documents = {
        str(row["_id"]): f"{row.get('title') or ''} {row['text']}".strip()
        for row in read_jsonl(folder / "corpus.jsonl")
    }
    relevance: dict[str, dict[str, int]] = {}
    for row in read_table(folder / "qrels.tsv"):
        relevance.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
    relevance = {query: grades for query, grades in relevance.items() if any(g > 0 for g in grades.values())}
    if not relevance:
        raise ValueError(
            f"Expected at least one relevant document in {folder / 'qrels.tsv'}, got none. Check the file."
        )
    queries = {str(r["_id"]): r["text"] for r in read_jsonl(folder / "queries.jsonl") if str(r["_id"]) in relevance}
    return Collection(folder.name, documents, queries, relevance)


def dolly_dev(folder: Path, queries: int = 300, documents: int = 500, words: int = 110) -> Collection:
    """The retrieval development set: questions of Dolly against their own contexts, a seeded sample.

    Args:
        folder: The data folder.
        queries: Questions.
        documents: Contexts, each cut to `words`; those of 30 words or fewer are left out.
        words: Most words of a context.

    Raises:
        ValueError: If there is no such question.
    """
    asked: dict[str, str] = {}
    for row in read_jsonl(folder / DOLLY_FILE):
        context = row["input"].strip()
        if row["category"] in DOLLY_CATEGORIES and len(context.split()) > 30:
            asked.setdefault(context, row["instruction"].strip())
    if not asked:
        raise ValueError(f"Expected questions with a context in {folder / DOLLY_FILE}, got none. Check the file.")
    pairs = random.Random(3).sample(sorted(asked.items()), min(documents, len(asked)))
    texts = {f"d{number}": " ".join(context.split()[:words]) for number, (context, _) in enumerate(pairs)}
    questions = {f"q{number}": question for number, (_, question) in enumerate(pairs[:queries])}
    return Collection(DOLLY_DEV, texts, questions, {query: {f"d{query[1:]}": 1} for query in questions})
