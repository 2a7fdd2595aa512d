"""The texts of a recipe: what a mixture draws, and which of its texts belong together."""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from training.data import data_folder, read_jsonl, read_lines, read_sentences, refuse_table
from training.mixtures import Texts, TextSource
from training.recipe import ContrastiveRecipe
from training.variants import content_words, contrasts, corrupt, has_contrast, roughen

logger = logging.getLogger(__name__)

HUB = "hf:"


@dataclass
class Corpus:
    """The texts of a run.

    Attributes:
        texts: N texts, in an order that depends on the recipe alone.
        kinds: Of each of them.
        bundles: Rows that belong together, the first one of which stands for all: a sentence and its corruptions; a
            passage, its title, its query and one of its sentences. Every row is in one bundle.
        joining: Positions in `bundles` of those that are to join a passage's.
    """

    texts: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    bundles: list[list[int]] = field(default_factory=list)
    joining: set[int] = field(default_factory=set)

    def add(self, texts: Sequence[str], kinds: Sequence[str], *, joins: bool = False) -> None:
        """Append one bundle."""
        if joins:
            self.joining.add(len(self.bundles))
        self.bundles.append(list(range(len(self.texts), len(self.texts) + len(texts))))
        self.texts += texts
        self.kinds += kinds

    def passages(self) -> list[int]:
        """Row of the passage that each row is the title or the question of, its own row for a passage, else -1."""
        found = [-1] * len(self.texts)
        for bundle in self.bundles:
            if self.kinds[bundle[0]] == "passages":
                for row in bundle:
                    if self.kinds[row] in ("passages", "titles", "queries"):
                        found[row] = bundle[0]
        return found


def read_corpus(recipe: ContrastiveRecipe) -> Corpus | None:
    """The texts of a recipe. None: it has `pairs`.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a source has no usable text, or a sentence has no corruption.
    """
    if recipe.texts is not None:
        return draw(recipe.texts)
    if recipe.sentences is None:
        return None
    texts = read_sentences(recipe.sentences)
    return Corpus(texts, ["sentences"] * len(texts), [[row] for row in range(len(texts))])


def draw(mixture: Texts, folder: Path | None = None) -> Corpus:
    """Draw a mixture; no row twice. Titles, corruptions and sentences of passages may come twice.

    Args:
        mixture: What to draw.
        folder: The data folder. None: `data_folder()`, where the name of a source is no path.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a source has no usable text, or a sentence has no corruption.
    """
    shuffled = []
    for number, source in enumerate(mixture.sources):
        rows = [row for row in _rows(source, folder) if _fits(row.get(source.column), source)]
        random.Random(f"{mixture.seed}-{number}").shuffle(rows)
        shuffled.append(iter(rows))
    seen: set[str] = set()
    drawn: list[list[Mapping[str, Any]]] = []
    for _ in range(mixture.part + 1):  # what earlier parts took is passed over
        drawn = [
            list(islice(_unseen(rows, source.column, seen), _count(source, mixture)))
            for source, rows in zip(mixture.sources, shuffled)
        ]
    corpus = Corpus()
    for number, (source, rows) in enumerate(zip(mixture.sources, drawn)):
        if not rows:
            raise ValueError(
                f"{source.file}: no text of {source.words[0]} to {source.words[1]} words is left for part "
                f"{mixture.part}; change words, count, skip or texts.part"
            )
        rng = random.Random(f"{mixture.seed}-{number}-{mixture.part}")
        pool = content_words(row[source.column] for row in rows)
        for row in rows:
            corpus.add(*_bundle(row, source, rng, pool), joins=source.join)
    return corpus


def _count(source: TextSource, mixture: Texts) -> int:
    return source.count if source.count is not None else int((source.share or 0) * (mixture.count or 0))


def _unseen(rows: Iterator[Mapping[str, Any]], column: str, seen: set[str]) -> Iterator[Mapping[str, Any]]:
    for row in rows:
        if row[column] not in seen:
            seen.add(row[column])
            yield row


def _rows(source: TextSource, folder: Path | None) -> Iterator[Mapping[str, Any]]:
    """Rows of a source without those to skip; a line of a text file is a row with one column."""
    checked = False
    unmet = {(column, value) for column, values in source.skip.items() for value in values}
    for row in _all_rows(source, folder):
        if not checked:
            wanted = [source.column, source.title, source.query, *source.skip]
            absent = next((column for column in wanted if column is not None and column not in row), None)
            if absent is not None:
                raise ValueError(f"{source.file}: expected a column {absent!r}, got {', '.join(map(str, row))}")
            checked = True
        met = {(column, _as_text(row.get(column))) for column in source.skip}
        if any(value in source.skip[column] for column, value in met):
            unmet -= met
        else:
            yield row
    for column, value in sorted(unmet):
        logger.warning("%s: no row has a value of `skip`: %r in %r; is it spelt so?", source.file, value, column)


def _as_text(value: Any) -> str:
    """A value as `skip` says it: a text, or as JSON writes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _all_rows(source: TextSource, folder: Path | None) -> Iterable[Mapping[str, Any]]:
    if source.file.startswith(HUB):
        return _hub_rows(source)
    file = _find(source, folder)
    refuse_table(file)
    if ".jsonl" in file.name:
        return read_jsonl(file)
    return ({source.column: line} for line in read_lines(file) if line)


def _find(source: TextSource, folder: Path | None) -> Path:
    """The file of a source, by path or by name."""
    if (path := Path(source.file)).is_file():
        return path
    if path.is_absolute() or path.suffix:
        raise FileNotFoundError(f"expected a file at {path}, got nothing there; check `file` of the source")
    root = folder or data_folder()
    places = [root / part / f"{source.file}{end}" for part in ("train", "instruct") for end in (".txt.gz", ".jsonl.gz")]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"expected a file {source.file}.txt.gz or {source.file}.jsonl.gz in train/ or instruct/ of {root}, got "
            "none; check `file` of the source, or use hf:NAME#SPLIT:COLUMN"
        )
    return found


def _hub_rows(source: TextSource) -> Iterable[Mapping[str, Any]]:
    """Rows of a dataset on the Hub; the column of `hf:NAME#SPLIT:COLUMN` goes under the name `source.column`."""
    from datasets import load_dataset

    name, _, rest = source.file.removeprefix(HUB).partition("#")
    name, _, subset = name.partition(":")
    split, _, column = rest.partition(":")
    if not name or not split:
        raise ValueError(f"{source.file}: expected hf:NAME[:SUBSET]#SPLIT[:COLUMN], e.g. hf:owner/name#train:text")
    try:
        rows = load_dataset(name, subset or None, split=split)
    except Exception as error:
        raise ValueError(f"{source.file}: the dataset cannot be read: {type(error).__name__}: {error}") from error
    if not column or column == source.column:
        return rows
    if column not in rows.column_names:
        raise ValueError(f"{source.file}: expected a column {column!r}, got {', '.join(rows.column_names)}")
    return ({**row, source.column: row[column]} for row in rows)


def _fits(text: Any, source: TextSource) -> bool:
    if not isinstance(text, str):
        return False
    if source.kind == "contrasts" and not has_contrast(text):
        return False
    words = len(text.split())
    return source.words[0] <= words and (source.kind == "passages" or words <= source.words[1])


def _bundle(
    row: Mapping[str, Any], source: TextSource, rng: random.Random, pool: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The texts of one row, and their kinds."""
    text = " ".join(row[source.column].split())
    if source.kind == "passages":
        return _passage(row, text, source, rng)
    if source.kind == "corruptions":
        graded = corrupt(text, pool, rng, source.corruptions)
        if not graded:
            raise ValueError(
                f"{source.file}: {text!r} has no corruption, and a group of one text teaches nothing; raise the "
                "fewest `words`"
            )
        return [text, *graded], ["sentences", *["fragments"] * len(graded)]
    if source.kind == "contrasts":
        others = contrasts(text, rng, source.corruptions)
        return [text, *others], ["sentences"] * (1 + len(others))
    if source.kind == "fragments":
        text = roughen(text, rng.random() < 0.5)
    return [text], [source.kind]


def _passage(row: Mapping[str, Any], text: str, source: TextSource, rng: random.Random) -> tuple[list[str], list[str]]:
    words = text.split()
    most = min(len(words), rng.choice(source.lengths) if source.lengths else len(words), source.words[1])
    start = rng.randrange(len(words) - most + 1) if rng.random() < source.anywhere else 0
    cut = " ".join(words[start : start + most])
    title = " ".join(str(row.get(source.title) or "").split()) if source.title else ""
    if title and rng.random() < source.titled:
        cut = f"{title}. {cut}"
    texts, kinds = [cut], ["passages"]
    if title and rng.random() < source.title_apart:
        texts.append(title)
        kinds.append("titles")
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", text) if 6 <= len(s.split()) <= 30]
    if sentences and rng.random() < source.sentence_apart:
        texts.append(rng.choice(sentences))
        kinds.append("sentences")
    if source.query and (query := " ".join(str(row.get(source.query) or "").split())):
        texts.append(query)
        kinds.append("queries")
    return texts, kinds
