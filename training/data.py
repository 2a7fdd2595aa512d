"""Data in the layout of the local folder (`--data-dir`, `$UBMOE_DATA`, `../shared/data`), for training and benchmarks.

Reading files, the development sets, instruction sets, classification and retrieval sets. What a recipe mixes from
them is in `texts.py`.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.mixtures import Mixture

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


def need(file: Path) -> Path:
    """A file of the data folder.

    Raises:
        FileNotFoundError: If it does not exist.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"expected {file.name} in {file.parent}, got nothing there; check the name, or complete the data folder "
            "(UBMOE_DATA)"
        )
    return file


def read_lines(file: Path, *, strip: bool = True) -> Iterator[str]:
    """Lines of a text file, or of a gzip file of one.

    Args:
        file: UTF-8, `.gz` or not.
        strip: Without white space at both ends. False: without the line end alone.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If a line is not UTF-8, or the compressed file is broken.
    """
    with gzip.open(need(file), "rb") if file.suffix == ".gz" else need(file).open("rb") as lines:
        try:
            for number, line in enumerate(lines, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield text.strip() if strip else text.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file}, line {number}: expected UTF-8, got byte 0x{error.object[error.start]:02x}; convert the file, "
                "e.g. with `iconv -f ISO-8859-1 -t UTF-8`"
            ) from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{file} is no whole gzip file ({error}); get it again") from error


def read_jsonl(file: Path) -> Iterator[dict[str, Any]]:
    """Objects of a `.jsonl` or `.jsonl.gz` file.

    Raises:
        ValueError: If a line is no JSON object.
    """
    for _, row in numbered_rows(file):
        yield row


def numbered_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of `read_jsonl` with the numbers of their lines, from 1 on."""
    for number, line in enumerate(read_lines(file), 1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: expected a JSON object, got {line[:40]!r}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: expected a JSON object, got {line[:40]!r}")
        yield number, row


def read_table(file: Path) -> list[dict[str, str]]:
    """Rows of a tab-separated file with a header and without quoting."""
    return list(csv.DictReader(read_lines(file, strip=False), delimiter="\t", quoting=csv.QUOTE_NONE))


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
        lines = [line for line in _text_lines(file) if fewest <= len(line.split()) <= most]
        drawn += rng.sample(lines, min(len(lines), int(mixture.count * share)))
    rng.shuffle(drawn)
    if not drawn:
        raise ValueError(f"no sentence of {fewest} to {most} words in {', '.join(mixture.files)}")
    return drawn[: mixture.use]


_NO_TEXT = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".xlsx")
"""Endings of files whose lines are no texts."""


def refuse_table(file: Path) -> None:
    """Refuse a file whose lines are no texts.

    Raises:
        ValueError: If it is one, by its name.
    """
    if Path(file.name.removesuffix(".gz")).suffix.lower() in _NO_TEXT:
        raise ValueError(
            f"{file}: expected a text file with a text a line, or .jsonl with rows, got another form; convert it, "
            "e.g. with `pandas.DataFrame.to_json(orient='records', lines=True)`"
        )


def _text_lines(file: Path) -> Iterator[str]:
    """Texts of a text file, one a line, or of the column `text` of a `.jsonl` file."""
    refuse_table(file)
    if ".jsonl" not in file.name:
        yield from read_lines(file)
        return
    for number, row in numbered_rows(file):
        if not isinstance(row.get("text"), str):
            raise ValueError(f"{file}, line {number}: expected a text in `text`, got {', '.join(row)}")
        yield row["text"].strip()


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
    table: dict[str, list[str]] = {column: [] for column in columns}
    for row in iter_rows(source, columns):
        for column, values in table.items():
            values.append(row[column])
    return table


def iter_rows(source: str, columns: Sequence[str], *, stream: bool = False) -> Iterator[dict[str, str]]:
    """The rows of `read_rows` one by one, those columns alone.

    Args:
        source: As for `read_rows`.
        columns: As for `read_rows`.
        stream: Read a dataset of the Hub as it comes, instead of downloading it first.

    Raises:
        ValueError: If a column is missing, or holds no text.
    """
    if Path(source).is_file():
        rows: Iterable[Mapping[str, Any]] = read_jsonl(Path(source))
    else:
        from datasets import load_dataset

        name, _, subset = source.partition(":")
        rows = load_dataset(name, subset or None, split="train", streaming=stream)
    for number, row in enumerate(rows):
        if any(column not in row for column in columns):
            raise ValueError(f"{source}: row {number} has {sorted(row)}, expected the columns {list(columns)}")
        if odd := next((column for column in columns if not isinstance(row[column], str)), None):
            raise ValueError(
                f"{source}: expected a text in {odd!r} of row {number}, got {repr(row[odd])[:60]}; take the row out"
            )
        yield {column: row[column] for column in columns}


def _endless_rows(source: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    while True:
        empty = True
        for row in iter_rows(source, columns, stream=True):
            empty = False
            yield row
        if empty:
            raise ValueError(f"{source} has no row, expected rows with the columns {list(columns)}")


def stream_rows(source: str, columns: Sequence[str], buffer: int, seed: int) -> Any:
    """Rows of `read_rows` as a `datasets.IterableDataset`, shuffled in a buffer as they come.

    It has no end: behind the last row the first one comes again, in another order. The order depends on the seed alone,
    so a run that goes on, and passes over the batches that it had, reads the same ones as an uninterrupted one. (An end
    would be an epoch's, and a trainer that knows no length looks for all finished steps in the first epoch.)

    Args:
        source: As for `read_rows`.
        columns: As for `read_rows`.
        buffer: Rows of the buffer.
        seed: Of the order.
    """
    from datasets import Features, IterableDataset, Value

    rows = IterableDataset.from_generator(
        _endless_rows,
        features=Features({column: Value("string") for column in columns}),
        gen_kwargs={"source": source, "columns": tuple(columns)},
    )
    return rows.shuffle(seed=seed, buffer_size=buffer)


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
    rows = read_table(folder / "eval" / "sts" / f"{name}.tsv")
    if sample is not None and sample < len(rows):
        rows = random.Random(0).sample(rows, sample)
    return [row["s1"] for row in rows], [row["s2"] for row in rows], [float(row["score"]) for row in rows]


def read_instructions(files: Sequence[str], folder: Path | None = None) -> list[tuple[str, str]]:
    """Questions and answers of instruction sets.

    Args:
        files: Names under `instruct/` without `.jsonl.gz`, or paths; rows hold `instruction`, `input`, `output`.
        folder: The data folder. None: `data_folder()`, where a name is not a file.

    Raises:
        ValueError: If a row has no texts in these columns, or there is no usable row.
    """
    pairs = []
    for name in files:
        file = Path(name)
        if not file.is_file():
            file = (folder or data_folder()) / "instruct" / f"{name}.jsonl.gz"
        for number, row in numbered_rows(file):
            instruction, more, answer = row.get("instruction"), row.get("input") or "", row.get("output")
            if not (isinstance(instruction, str) and isinstance(more, str) and isinstance(answer, str)):
                raise ValueError(
                    f"{file}, line {number}: expected texts in `instruction` and `output`, and a text or nothing in "
                    f"`input`, got {json.dumps(row, ensure_ascii=False)[:80]}"
                )
            question = "\n\n".join(filter(None, (instruction.strip(), more.strip())))
            if question and answer.strip():
                pairs.append((question, answer.strip()))
    if not pairs:
        raise ValueError(f"no question with an answer in {', '.join(files)}")
    return pairs


def labelled_texts(folder: Path, name: str) -> dict[str, dict[str, list[Any]]]:
    """Texts and label numbers of a classification set, by split; labels are numbered in sorted order."""
    rows = list(read_jsonl(folder / "classification" / f"{name}.jsonl.gz"))
    numbers = {label: number for number, label in enumerate(sorted({row["label"] for row in rows}))}
    splits: dict[str, dict[str, list[Any]]] = {}
    for row in rows:
        columns = splits.setdefault(row["split"], {"text": [], "label": []})
        columns["text"].append(row["text"])
        columns["label"].append(numbers[row["label"]])
    return splits


@dataclass(frozen=True)
class Collection:
    """A retrieval set."""

    name: str
    documents: dict[str, str]
    """Document id to text; a title stands before the text."""
    queries: dict[str, str]
    """Query id to text, only queries with at least one relevant document."""
    relevance: dict[str, dict[str, int]]
    """Query id to document id to grade; judged but not relevant documents have grade 0."""


def read_collection(folder: str | Path) -> Collection:
    """Read a folder in BEIR layout: corpus.jsonl, queries.jsonl, qrels.tsv.

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
        raise ValueError(f"expected a relevant document in {folder / 'qrels.tsv'}, got none; check the file")
    queries = {str(r["_id"]): r["text"] for r in read_jsonl(folder / "queries.jsonl") if str(r["_id"]) in relevance}
    return Collection(folder.name, documents, queries, relevance)


DOLLY_DEV = "Dolly-dev"
DOLLY_FILE = Path("instruct") / "dolly_partial.jsonl.gz"
DOLLY_DEV_CATEGORIES = ("closed_qa", "information_extraction")
"""Of the instruction set; training must skip them, see `TextSource.skip`."""


def dolly_dev(folder: Path, queries: int | None = 300, documents: int = 500, words: int = 110) -> Collection:
    """The retrieval development set: questions of Dolly against their own contexts.

    Args:
        folder: The data folder.
        queries: Questions, of a seeded sample. None: one for each context.
        documents: Contexts, each cut to `words`; those of 30 words or fewer are left out.
        words: Most words of a context.
    """
    asked: dict[str, str] = {}
    for row in read_jsonl(folder / DOLLY_FILE):
        context = row["input"].strip()
        if row["category"] in DOLLY_DEV_CATEGORIES and len(context.split()) > 30:
            asked.setdefault(context, row["instruction"].strip())
    pairs = sorted(asked.items())
    if not pairs:
        raise ValueError(f"expected questions with a context in {folder / DOLLY_FILE}, got none; check the file")
    pairs = random.Random(3).sample(pairs, min(documents, len(pairs)))
    found = {f"d{number}": " ".join(context.split()[:words]) for number, (context, _) in enumerate(pairs)}
    questions = {f"q{number}": question for number, (_, question) in enumerate(pairs[:queries])}
    return Collection(DOLLY_DEV, found, questions, {query: {f"d{query[1:]}": 1} for query in questions})
