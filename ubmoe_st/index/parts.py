"""What a worker of a build does, in this process or in another: read windows, embed one, write it as a part.

`Reading` and `PartMaker` hold no open files, so both can be sent to another process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .corpus import Corpus
from .embedder import Embedder, TokenCounter
from .pipeline import PipelineOptions, Position, SeenIds, Window, WindowMaker
from .segments import EntryFile, entry_batch, write_entries
from .snapshot import Snapshot, names_in
from .storage import remove, write_npy

BatchCallback = Callable[[int, int, float | None], None]
"""Called after a batch with its rows, its tokens and the part of the corpus that has been read."""


@dataclass
class Reading:
    """All that is needed to read what is left of a corpus."""

    corpus: Corpus
    options: PipelineOptions
    tokenizer: Any
    """From `Embedder.copy_tokenizer`."""
    max_tokens: int | None
    position: Position
    """Where an earlier run stopped."""
    first_row: int
    """Row number the next entry gets."""
    number: int
    """Number of the next window."""
    base: tuple[Path, dict[str, Any]] | None
    """Folder and manifest of the index that is added to."""
    files: list[Path]
    """Entries this build has committed, in order."""
    scratch: Path
    """A folder for the table of known ids; emptied first."""

    def windows(self) -> Iterator[Window]:
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
                for name, first in base.documents():
                    seen.move(name, first)
            for position, name, parent, chunk in names_in(EntryFile(file) for file in self.files):
                if chunk == 0:
                    seen.move(name if parent is None else parent, row + position)
            counter = TokenCounter(self.tokenizer, self.max_tokens)
            yield from WindowMaker(self.corpus, self.options, counter, seen, self.position, self.first_row, self.number)
        remove(self.scratch)


@dataclass
class Part:
    """A window that has been embedded and written; what the journal needs of it."""

    number: int
    """Of the window."""
    name: str
    """The files are `name.npy` and `name.arrow`."""
    rows: int
    tokens: int
    files: dict[str, dict[str, Any]]
    """Size and SHA-256 by suffix; empty for a window without rows."""
    position: Position
    fraction: float | None
    duplicates: int
    dead: list[int] = field(default_factory=list)
    """First rows of replaced documents, and -1 - row for a row without a vector."""
    bad: list[str] = field(default_factory=list)
    """Reports of rows that were left out."""
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
        for batch in window.batches(self.options):
            vectors[batch] = embedder.documents([window.entries[i].model_input(self.options.with_title) for i in batch])
            if done is not None:
                done(len(batch), sum(window.lengths[i] for i in batch), window.fraction)
        part = Part(
            window.number,
            f"part-{window.number:08d}{self.suffix}",
            len(window.entries),
            sum(window.lengths),
            {},
            window.position,
            window.fraction,
            window.duplicates,
            window.dead,
            window.bad,
        )
        for position in np.flatnonzero(np.isnan(vectors).any(axis=1)).tolist():
            reason = f"id {window.entries[position].id!r}: the model gives a vector that is zero, NaN or infinite"
            if self.options.on_bad_row == "raise":
                part.error = f"{reason} (leave such rows out with on_bad_row='skip')"
                return part
            vectors[position] = 0.0
            part.dead.append(-1 - window.first_row - position)
            part.bad.append(reason)
        if window.entries:
            path = self.folder / part.name
            part.files = {
                ".npy": write_npy(path.with_name(f"{part.name}.npy"), vectors.astype(self.dtype)),
                ".arrow": write_entries(path.with_name(f"{part.name}.arrow"), iter([entry_batch(window.entries)])),
            }
        return part
