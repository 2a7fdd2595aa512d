"""Hybrid search: BM25 over the texts, joined with the vectors by reciprocal rank fusion or by weighted scores."""

from __future__ import annotations

import contextlib
import itertools
import re
import tempfile
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..files import record_of, replacing_by_name
from ..forking import ForkSafeLock
from .manifest import FolderRecord
from .store import Snapshot
from .workplace import Workplace

WORDS = 1
"""Rule by which texts become words now: letters that are written in several ways in Unicode are one, without case.
A BM25 part without a number took texts as they are, in lower case, and is searched in the same way, or has ASCII words
alone, which are the same by both."""
RRF_CONSTANT = 60
"""k of reciprocal rank fusion (Cormack, Clarke and Büttcher, 2009): a list adds 1 / (k + rank)."""


_UNSPACED = "".join(
    f"{chr(first)}-{chr(last)}"
    for first, last in (
        (0x0E01, 0x0EFF),  # Thai, Lao
        (0x1000, 0x109F),  # Burmese
        (0x1780, 0x17D3),  # Khmer
        (0x3041, 0x30FF),  # Kana
        (0x3400, 0x4DBF),  # Han
        (0x4E00, 0x9FFF),
        (0xAC00, 0xD7A3),  # Hangul, whose particles stand at the word
        (0xF900, 0xFAFF),
        (0xFF66, 0xFF9D),
        (0x20000, 0x323AF),
    )
)
"""Scripts without a space between words, or between a word and what belongs to another."""
_RUN = re.compile(f"[{_UNSPACED}]+")


@cache
def _marks() -> str:
    return "".join(chr(code) for code in range(0x80, 0x10000) if unicodedata.category(chr(code))[0] == "M")


@cache
def _token_pattern() -> str:
    """What bm25s takes for a word.

    Two letters or digits or more, as it does by itself, with the marks that belong to letters: Hindi is in shreds
    without. And a single character of a script without spaces.
    """
    return rf"\w(?:\w+|[{_marks()}])+|[{_UNSPACED}]"


@cache
def _letters() -> re.Pattern[str]:
    return re.compile(f"[^{_marks()}][{_marks()}]*")


def tokenize(texts: Iterable[str], *, words: int | None = None, **options: Any) -> Any:
    """Words of texts as bm25s has them; a run of a script without spaces becomes its overlapping pairs of letters.

    Args:
        texts: N texts.
        words: See `WORDS`; None is the first rule.
        **options: As for `bm25s.tokenize`.
    """
    plain = texts if words is None else map(_folded, texts)
    apart = [text if text.isascii() else _RUN.sub(_pairs, text) for text in plain]
    return import_bm25s().tokenize(
        apart, token_pattern=_token_pattern(), stopwords=None, show_progress=False, **options
    )


def _folded(text: str) -> str:
    """A text in the one way of writing it, without case: composed, of plain letters, `ss` for a sharp s."""
    if text.isascii():
        return text  # which bm25s makes lower case
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _pairs(run: re.Match[str]) -> str:
    letters = _letters().findall(run.group())
    pairs = ["".join(pair) for pair in itertools.pairwise(letters)] or letters
    return f" {' '.join(pairs)} "


def import_bm25s() -> Any:
    """The bm25s package.

    Raises:
        ImportError: Saying what to install.
    """
    try:
        import bm25s
    except ImportError as error:
        raise ImportError("keyword search needs bm25s: pip install 'ubmoe-st[index]'") from error
    return bm25s


def write_bm25(snapshot: Snapshot, workplace: Workplace, version: int) -> FolderRecord:
    """Index title and text of every stored row and return its part of the manifest of `version`.

    All token ids are held in memory while this runs.
    """
    bm25s = import_bm25s()
    texts: list[str] = []
    for segment in snapshot.segments:
        for batch in segment.entries.batches():
            titles, bodies = batch.column("title").to_pylist(), batch.column("text").to_pylist()
            texts.extend(f"{title}\n{body}" if title else body for title, body in zip(titles, bodies))
    tokens: Any = tokenize(texts, words=WORDS)
    if not tokens.vocab:
        # No text has a word, of which bm25s cannot make an index: one that no query can hold.
        tokens = [["\0"]] * len(texts)
    engine = bm25s.BM25()
    engine.index(tokens, show_progress=False)
    name = workplace.next_name("bm25", version)
    with replacing_by_name(snapshot.folder / name) as folder:
        engine.save(str(folder), show_progress=False)
        files = {path.name: record_of(path) for path in sorted(folder.iterdir())}
    return FolderRecord(name, snapshot.stored_rows, files, None if all(map(str.isascii, texts)) else WORDS)


class KeywordSearch:
    """BM25 over one snapshot, opened on first use.

    Args:
        snapshot: Its rows.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._engine: Any = None
        self._words: int | None = None
        self._told = False
        self._lock = ForkSafeLock()

    def search(self, queries: Sequence[str], k: int, allowed: np.ndarray | None) -> list[tuple[np.ndarray, np.ndarray]]:
        """Rows by falling BM25 score, and these scores; per query at most K, and only such that share a word with it.

        Raises:
            ValueError: If the index has no BM25 part.
        """
        record = self._snapshot.manifest.bm25
        if record is None:
            raise ValueError("this index has no BM25 part: call build_bm25() once, then search with mode='hybrid'")
        bm25s = import_bm25s()
        with self._lock:
            if self._engine is None:
                engine = self._opened(bm25s, self._snapshot.folder / record.folder)
                self._words = WORDS if all(map(str.isascii, engine.vocab_dict)) else record.words
                self._engine = engine
        covered = record.rows
        if covered < self._snapshot.stored_rows and not self._told:
            self._told = True
            warnings.warn(
                f"{self._snapshot.stored_rows - covered} of {self._snapshot.stored_rows} rows were added after "
                "build_bm25() and are found by their vectors only: call it again",
                stacklevel=2,
            )
        weight = None if allowed is None else allowed[:covered].astype(np.float32)
        tokens = tokenize(queries, words=self._words, return_ids=False)
        found = []
        for words in tokens:
            scores = self._scores(words, covered)
            if weight is not None:
                scores = scores * weight
            rows = np.flatnonzero(scores > 0)
            order = np.lexsort((rows, -scores[rows]))[:k]
            found.append((rows[order].astype(np.int64), scores[rows[order]]))
        return found

    def _opened(self, bm25s: Any, folder: Path) -> Any:
        """The BM25 part; from what the snapshot holds of it, where the folder was removed or written anew since."""
        with contextlib.suppress(FileNotFoundError):
            found = bm25s.BM25.load(str(folder), mmap=True)
            if self._snapshot.has_its_bm25_files():
                return found
        with tempfile.TemporaryDirectory(prefix="ubmoe-index-", ignore_cleanup_errors=True) as copy:
            for name, content in self._snapshot.bm25_files.items():
                (Path(copy) / name).write_bytes(content)
            return bm25s.BM25.load(copy, mmap=True)

    def _scores(self, words: list[str], rows: int) -> np.ndarray:
        known = [word for word in words if word in self._engine.vocab_dict]
        if not known:
            return np.zeros(rows, np.float32)
        return np.asarray(self._engine.get_scores(known), np.float32)


def fuse(lists: Sequence[np.ndarray], k: int) -> np.ndarray:
    """Rows by falling sum of 1 / (60 + rank) over the lists, ties by row, at most K."""
    points: dict[int, float] = {}
    for rows in lists:
        for rank, row in enumerate(rows.tolist(), start=1):
            points[row] = points.get(row, 0.0) + 1.0 / (RRF_CONSTANT + rank)
    ordered = sorted(points, key=lambda row: (-points[row], row))
    return np.array(ordered[:k], np.int64)


def fuse_weighted(lists: Sequence[tuple[np.ndarray, np.ndarray]], weights: Sequence[float], k: int) -> np.ndarray:
    """Rows by falling weighted sum of their scores, ties by row, at most K.

    The scores of each list are scaled to 0 to 1, so its last row counts as much as one that is not in it: nothing.

    Args:
        lists: Rows with their scores.
        weights: Of each list.
        k: How many.
    """
    points: dict[int, float] = {}
    for (rows, scores), weight in zip(lists, weights):
        if not len(rows):
            continue
        low, high = float(scores.min()), float(scores.max())
        for row, score in zip(rows.tolist(), scores.tolist()):
            scaled = (score - low) / (high - low) if high > low else 1.0
            points[row] = points.get(row, 0.0) + weight * scaled
    ordered = sorted(points, key=lambda row: (-points[row], row))
    return np.array(ordered[:k], np.int64)
