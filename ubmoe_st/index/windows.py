"""From a corpus to windows of rows, and from a window to the files of a part.

A window is what the model embeds between two commits. Where windows begin and end, and which rows share a batch,
follows from the corpus and the options alone, never from time or from where an earlier run stopped. That is what makes
a resumed build give the same bytes as an uninterrupted one. `Reading` and `PartMaker` hold no open files, so both can
be sent to another process.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ..files import remove
from .budget import BATCH_TOKENS, WINDOW_BYTES, WINDOW_ROWS, WINDOW_TOKENS
from .corpus import BadRow, Corpus, CorpusChangedError, CorpusError, Document, utf8_bytes
from .embedder import Embedder, TokenCounter, chunk_spans
from .late import Pass, late_vectors, passes_of
from .manifest import DISCARD, Manifest, PartRecord, Position
from .seen import SeenIds
from .storage import write_npy
from .store import Entry, EntryFile, Snapshot, entry_batch, names_in, write_entries

OnDuplicate = Literal["raise", "skip", "upsert"]
OnBadRow = Literal["raise", "skip"]

BatchCallback = Callable[[int, int, float | None], None]
"""Called after a batch with its rows, its tokens and the part of the corpus that has been read."""

SPARE_TOKENS = 8
"""Tokens a chunk may have more when it is tokenised by itself; so close to the limit, chunks are counted again."""
TITLE_SHARE = 4
"""A title leaves at least one token in so many to the text of a chunk."""
TOKENISE_ROWS = 128
"""Rows tokenised in one call of the tokenizer."""
TOKENISE_CHARACTERS = 1 << 20
"""Characters tokenised in one call of the tokenizer, at most (one row may have more)."""


@dataclass(frozen=True)
class PipelineOptions:
    """What decides which rows an index gets and which of them share a batch."""

    chunk_tokens: int | None = None
    """Cut documents into chunks of this many tokens. None: a document is a row."""
    overlap_tokens: int = 0
    """Tokens that neighbouring chunks share."""
    late_chunking: bool = False
    """Let the model read a document in one piece, and pool its chunks from that."""
    with_title: bool = True
    """Put the title on a line before the text the model reads."""
    batch_tokens: int = BATCH_TOKENS
    """Tokens per batch, padding included."""
    batch_rows: int = 256
    """Rows per batch, at most."""
    window_tokens: int = WINDOW_TOKENS
    """Tokens after which a window closes: it is sorted by length, embedded and committed."""
    window_rows: int = WINDOW_ROWS
    """Rows after which a window closes."""
    window_bytes: int = WINDOW_BYTES
    """Bytes of text and metadata after which a window closes."""
    on_duplicate: OnDuplicate = "raise"
    """An id that is already there: refuse the corpus, keep the first row, or let the last one win."""
    on_bad_row: OnBadRow = "raise"
    """A row that cannot be indexed: refuse the corpus, or leave it out and report it."""

    def __post_init__(self) -> None:
        sizes = ("batch_tokens", "batch_rows", "window_tokens", "window_rows", "window_bytes", "chunk_tokens")
        for name in (*sizes, "overlap_tokens"):
            value = getattr(self, name)
            if value is not None and type(value) is not int:
                raise TypeError(f"{name} is a whole number, got {value!r}")
            if value is not None and name in sizes and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.overlap_tokens < 0 or (self.overlap_tokens and self.overlap_tokens >= (self.chunk_tokens or 0)):
            raise ValueError(
                f"overlap_tokens must be at least 0 and below chunk_tokens={self.chunk_tokens}, "
                f"got {self.overlap_tokens}"
            )
        if self.late_chunking and self.chunk_tokens is None:
            raise ValueError("late_chunking pools the chunks of documents: say how long they are with chunk_tokens")
        if self.on_duplicate not in ("raise", "skip", "upsert"):
            raise ValueError(f"on_duplicate is raise, skip or upsert, got {self.on_duplicate!r}")
        if self.on_bad_row not in ("raise", "skip"):
            raise ValueError(f"on_bad_row is raise or skip, got {self.on_bad_row!r}")


@dataclass
class Window:
    """Rows that are embedded and committed together."""

    number: int
    first_row: int
    """Row number in the index of the first entry."""
    entries: list[Entry] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Tokens of each entry as the model reads it."""
    passes: list[Pass] = field(default_factory=list)
    """What the model reads, with late chunking: whole documents, their chunks by position in `entries`."""
    replaced: list[tuple[int, int]] = field(default_factory=list)
    """Rows of the index that this window replaces, and those that take their place: the first of each document."""
    bad: list[str] = field(default_factory=list)
    """Reports of the bad rows met since the last window."""
    duplicates: int = 0
    """Rows left out because their id was there already."""
    cut: int = 0
    """Entries of which the model reads only the beginning."""
    position: Position = field(default_factory=Position)
    """Where the corpus stands after this window."""
    fraction: float | None = None
    """How much of the corpus has been read."""
    last: bool = False
    """Whether the corpus ends with this window."""

    def batches(self, options: PipelineOptions) -> Iterator[list[int]]:
        """Positions of entries per batch: longest first, at most `batch_tokens` with padding."""
        return token_batches(self.lengths, options.batch_tokens, options.batch_rows)


def token_batches(lengths: Sequence[int], batch_tokens: int, batch_rows: int) -> Iterator[list[int]]:
    """Groups of positions, sorted by falling length, whose padded size stays within `batch_tokens`."""
    # Not in reverse: positions of one length stay in their order.
    order = sorted(range(len(lengths)), key=[-length for length in lengths].__getitem__)
    begin = 0
    while begin < len(order):
        fitting = batch_tokens // max(1, lengths[order[begin]])
        end = begin + max(1, min(batch_rows, fitting))
        yield order[begin:end]
        begin = end


class _Done(NamedTuple):
    """Where the corpus stands after an entry."""

    row: int
    chunk: int
    item: Document | BadRow
    """The row that is done with it, or, where `chunk` is not 0, of which so many chunks are."""


def _digest_bytes(item: Document | BadRow) -> bytes:
    return (item.digest_bytes() if isinstance(item, Document) else b"bad row") + b"\n"


class WindowMaker:
    """Turns a corpus into windows. Runs in the worker thread.

    Args:
        corpus: Read from its start; the rows before `position` are only hashed.
        options: See `PipelineOptions`.
        counter: Tokenizer copy of this thread.
        seen: Ids that are already in the index.
        position: Where an earlier run stopped.
        first_row: Row number the next entry gets.
        number: Number of the next window.

    Raises:
        CorpusError: If the rows before `position` are not the ones that were read then.
    """

    def __init__(
        self,
        corpus: Corpus,
        options: PipelineOptions,
        counter: TokenCounter,
        seen: SeenIds,
        position: Position,
        first_row: int,
        number: int,
    ) -> None:
        self._corpus, self._options, self._counter, self._seen = corpus, options, counter, seen
        self._start, self._row, self._number = position, first_row, number
        # Of the rows that are behind `_at`: rows are read ahead, and only what is in a window counts.
        self._digest, self._at = hashlib.sha256(), _Done(position.row, position.chunk, BadRow("", ""))

    def __iter__(self) -> Iterator[Window]:
        window = Window(self._number, self._row, position=self._start)
        options, limit = self._options, self._counter.limit
        tokens = size = 0
        for item in self._measured():
            if type(item) is _Done:
                self._pass(item)
                continue
            if isinstance(item, BadRow):
                window.bad.append(str(item))
                continue
            if item is None:
                window.duplicates += 1
                continue
            entry, size_in_tokens, length, replaced, done, width, passes = item
            window.passes.extend(one.moved(len(window.entries)) for one in passes)
            window.cut += limit is not None and size_in_tokens > limit
            if replaced is not None:
                window.replaced.append((replaced, window.first_row + len(window.entries)))
            window.entries.append(entry)
            window.lengths.append(length)
            self._pass(done)
            tokens, size = tokens + length, size + width
            if options.late_chunking and done.chunk:
                continue  # a document is read in one piece, so it is not parted
            if (
                tokens >= options.window_tokens
                or len(window.entries) >= options.window_rows
                or size >= options.window_bytes
            ):
                window.position, window.fraction = self._position(), self._corpus.fraction
                yield window
                window = Window(window.number + 1, window.first_row + len(window.entries))
                tokens = size = 0
        window.last, window.fraction, window.position = True, 1.0, self._position()
        yield window

    def _pass(self, done: _Done) -> None:
        """Go on to where the corpus stands after an entry."""
        self._at = done
        if not done.chunk:
            self._digest.update(_digest_bytes(done.item))

    def _position(self) -> Position:
        row, chunk, item = self._at
        return Position(row, chunk, self._digest_with(item if chunk else None) if row or chunk else "")

    def _digest_with(self, begun: Document | BadRow | None) -> str:
        """Of the rows that are behind, and of one that is begun."""
        digest = self._digest.copy()
        digest.update(_digest_bytes(begun) if begun is not None else b"")
        return digest.hexdigest()

    def _measured(self) -> Iterator[Any]:
        """Items of `_rows` with the token count of each entry; tokenises many rows at once."""
        pending: list[Any] = []
        characters = 0

        def flush() -> Iterator[Any]:
            sizes = self._counter.sizes([item[1] for item in pending if type(item) is tuple])
            counts = iter(zip(sizes, self._counter.seen(sizes)))
            for item in pending:
                if type(item) is tuple:
                    entry, text, replaced, done, passes = item
                    width = utf8_bytes(text) + len(entry.id) + len(entry.metadata or "")
                    yield entry, *next(counts), replaced, done, width, passes
                else:
                    yield item
            pending.clear()

        try:
            for item in self._rows():
                pending.append(item)
                if type(item) is tuple:
                    characters += len(item[1])
                if len(pending) >= TOKENISE_ROWS or characters >= TOKENISE_CHARACTERS:
                    yield from flush()
                    characters = 0
        except CorpusError:
            yield from flush()  # full windows before a bad row are committed
            raise
        yield from flush()

    def _blocks(self) -> Iterator[list[tuple[int, Document | BadRow]]]:
        """Numbered rows from where an earlier run stopped, some at a time; those before are compared."""
        block: list[tuple[int, Document | BadRow]] = []
        characters = 0
        start = self._start.row
        number = -1
        try:
            for number, item in enumerate(self._corpus):
                if number < start:
                    self._digest.update(_digest_bytes(item))
                    continue
                if number == start:
                    self._compare(number, item if self._start.chunk else None)
                block.append((number, item))
                characters += len(item.text) if type(item) is Document else 0
                if len(block) >= TOKENISE_ROWS or characters >= TOKENISE_CHARACTERS:
                    yield block
                    block, characters = [], 0
        except CorpusError:
            yield block
            raise
        if number < start:
            self._compare(number + 1, None)
        yield block

    def _rows(self) -> Iterator[Any]:
        """Rows as (entry, model input, replaced row, `_Done`, passes).

        Between them `BadRow`, None for a skipped duplicate, and `_Done` of no entry.
        """
        options = self._options
        for block in self._blocks():
            known = self._seen.known([item.id for _, item in block if type(item) is Document])
            for number, item in block:
                after = _Done(number + 1, 0, item)
                spans: list[tuple[int, int]] = []
                if type(item) is Document and options.chunk_tokens:
                    reason = self._unfit(item)
                    spans = [] if reason else self._spans(item)
                    if not spans:
                        item = BadRow(
                            item.place, reason or "has no token that the model reads: there is no chunk of it"
                        )
                if isinstance(item, BadRow):
                    if options.on_bad_row == "raise":
                        raise CorpusError(f"{item} (leave such rows out with on_bad_row='skip')")
                    yield item
                    yield after
                    continue
                skip = self._start.chunk if number == self._start.row else 0
                replaced = None
                if not skip:
                    replaced = known.row_of(item.id)
                    if replaced is not None and options.on_duplicate == "raise":
                        raise CorpusError(
                            f"{item.place}: id {item.id!r} is already there; keep the first row with "
                            "on_duplicate='skip' or the last one with on_duplicate='upsert'"
                        )
                    if replaced is not None and options.on_duplicate == "skip":
                        yield None
                        yield after
                        continue
                    known.move(item.id, self._row)
                if options.chunk_tokens is None:
                    entry = Entry(item.id, item.text, item.title, None, 0, 0, len(item.text), item.metadata)
                    yield entry, entry.model_input(options.with_title), replaced, after, ()
                    self._row += 1
                    continue
                passes: Sequence[Pass] = ()
                if options.late_chunking:
                    passes = passes_of(item.text, spans, item.title if options.with_title else None, self._counter)
                for chunk in range(skip, len(spans)):
                    entry = self._entry(item, chunk, *spans[chunk])
                    done = after if chunk == len(spans) - 1 else _Done(number, chunk + 1, item)
                    yield entry, entry.model_input(options.with_title), replaced, done, passes
                    replaced, passes = None, ()
                    self._row += 1
            known.write()

    def _compare(self, number: int, begun: Document | BadRow | None) -> None:
        # Builds that an earlier version began have no digest of a row that is begun.
        fitting = {self._digest_with(row) for row in (None, begun)} if number else {"", self._digest_with(begun)}
        start = self._start
        if number != start.row or start.digest not in fitting or (begun is None and start.chunk):
            raise CorpusChangedError(
                f"the corpus is not the one this build began with: among its first {self._start.row:,} rows something "
                f"changed; give the same corpus, or begin again with overwrite=True (an addition: {DISCARD})"
            )

    def _room(self, document: Document) -> int | None:
        """Tokens the model reads of a chunk of this document, behind its title; None where that is not known."""
        return self._counter.room(document.title if self._options.with_title else None)

    def _unfit(self, document: Document) -> str | None:
        """Why a document cannot be cut into chunks that the model reads whole; None where it can be."""
        wanted, room = self._options.chunk_tokens, self._room(document) if self._options.chunk_tokens else None
        least = min(wanted or 0, max(1, (self._counter.limit or 0) // TITLE_SHARE))
        if room is None or room >= least:
            return None
        return (
            f"has a title that leaves {max(0, room)} of the {self._counter.limit} tokens the model reads to a chunk, "
            f"expected at least {least}: shorten it, or build with with_title=False"
        )

    def _spans(self, document: Document) -> list[tuple[int, int]]:
        """Where the entries of a document begin and end, in characters; chunks are short enough to be read whole."""
        options, counter, text = self._options, self._counter, document.text
        if options.chunk_tokens is None:
            raise ValueError("documents are only cut where chunk_tokens says how long chunks are")
        room = self._room(document)
        wanted = options.chunk_tokens if room is None else min(options.chunk_tokens, room)
        while True:
            overlap = (
                options.overlap_tokens if wanted == options.chunk_tokens else min(options.overlap_tokens, wanted // 2)
            )
            spans = chunk_spans(text, counter, wanted, overlap)
            if counter.limit is None or room is None or (counter.fast and wanted + SPARE_TOKENS <= room):
                return spans
            chunks = (self._entry(document, chunk, *span) for chunk, span in enumerate(spans))
            most = max(counter.sizes([chunk.model_input(options.with_title) for chunk in chunks]), default=0)
            if most <= counter.limit or wanted == 1:
                return spans
            wanted = max(1, wanted - (most - counter.limit))

    def _entry(self, document: Document, chunk: int, start: int, end: int) -> Entry:
        text, title, metadata = document.text[start:end], document.title, document.metadata
        return Entry(f"{document.id}#{chunk}", text, title, document.id, chunk, start, end, metadata)


def ahead(items: Generator[Any, None, None]) -> Iterator[Any]:
    """The same items, each made in a worker thread while the caller works on the one before.

    An exception of the worker is raised here. The iterator is closed when the caller stops early.
    """
    end = object()
    with contextlib.closing(items), ThreadPoolExecutor(1, "ubmoe-index-reader") as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item


@dataclass
class Reading:
    """All that is needed to read what is left of a corpus."""

    corpus: Corpus
    options: PipelineOptions
    tokenizer: Any
    """From `Embedder.copy_tokenizer`."""
    max_tokens: int | None
    prompt: str
    """What the model puts before each document."""
    position: Position
    """Where an earlier run stopped."""
    first_row: int
    """Row number the next entry gets."""
    number: int
    """Number of the next window."""
    base: tuple[Path, Manifest] | None
    """Folder and manifest of the index that is added to."""
    files: list[Path]
    """Entries this build has committed, in order."""
    scratch: Path
    """A folder for the table of known ids; emptied first."""

    def windows(self) -> Generator[Window, None, None]:
        """The windows from `position` on.

        Raises:
            CorpusError: As `WindowMaker`.
        """
        remove(self.scratch)
        with contextlib.closing(SeenIds(self.scratch)) as seen:
            row = 0
            if self.base is not None:
                base = Snapshot(*self.base)
                row = base.stored_rows
                seen.move_all(base.documents())
            seen.move_all(
                (name if parent is None else parent, row + position)
                for position, name, parent, chunk in names_in(EntryFile(file) for file in self.files)
                if chunk == 0
            )
            counter = TokenCounter(self.tokenizer, self.max_tokens, self.prompt)
            yield from WindowMaker(self.corpus, self.options, counter, seen, self.position, self.first_row, self.number)
        remove(self.scratch)


@dataclass
class Part:
    """A window that has been embedded and written; what the journal needs of it."""

    number: int
    """Of the window."""
    record: PartRecord
    """Its files, `name.npy` and `name.arrow`; none for a window without rows."""
    tokens: int
    position: Position
    fraction: float | None
    duplicates: int
    replaced: list[tuple[int, int]] = field(default_factory=list)
    """As of the window."""
    dead: list[int] = field(default_factory=list)
    """Rows without a vector."""
    bad: list[str] = field(default_factory=list)
    """Reports of rows that were left out."""
    cut: int = 0
    """Entries of which the model reads only the beginning."""
    error: str | None = None
    """Why the build cannot go on; nothing was written then."""


@dataclass
class PartMaker:
    """Embeds windows and writes them into a folder."""

    folder: Path
    options: PipelineOptions
    dimension: int
    dtype: str
    suffix: str = ""
    """Put behind the names, so that a worker of an earlier run cannot write over the files of this one."""

    def make(self, embedder: Embedder, window: Window, done: BatchCallback | None = None) -> Part:
        """Embed a window in its token-budget batches and write it.

        Args:
            embedder: The model of this worker.
            window: What to embed.
            done: Called after each batch.
        """
        vectors = np.empty((len(window.entries), self.dimension), np.float32)
        if self.options.late_chunking:
            lengths = [one.length for one in window.passes]
            for batch in token_batches(lengths, self.options.batch_tokens, self.options.batch_rows):
                passes = [window.passes[number] for number in batch]
                for one, found in zip(passes, late_vectors(embedder, passes)):
                    vectors[[position for position, _, _ in one.chunks]] = embedder.finished(found)
                if done is not None:
                    rows = sum(len(one.chunks) for one in passes)
                    done(rows, sum(one.length for one in passes), window.fraction)
        else:
            lengths = window.lengths
            for batch in window.batches(self.options):
                texts = [window.entries[i].model_input(self.options.with_title) for i in batch]
                vectors[batch] = embedder.documents(texts)
                if done is not None:
                    done(len(batch), sum(lengths[i] for i in batch), window.fraction)
        record = PartRecord(f"part-{window.number:08d}{self.suffix}", len(window.entries), {})
        tokens = sum(lengths)
        part = Part(
            window.number,
            record,
            tokens,
            window.position,
            window.fraction,
            window.duplicates,
            window.replaced,
            bad=window.bad,
        )
        part.cut = window.cut
        for position in np.flatnonzero(np.isnan(vectors).any(axis=1)).tolist():
            reason = f"id {window.entries[position].id!r}: the model gives a vector that is zero, NaN or infinite"
            if self.options.on_bad_row == "raise":
                part.error = f"{reason} (leave such rows out with on_bad_row='skip')"
                return part
            vectors[position] = 0.0
            part.dead.append(window.first_row + position)
            part.bad.append(reason)
        if window.entries:
            record.files = {
                ".npy": write_npy(self.folder / f"{record.name}.npy", vectors.astype(self.dtype)),
                ".arrow": write_entries(self.folder / f"{record.name}.arrow", iter([entry_batch(window.entries)])),
            }
        return part
