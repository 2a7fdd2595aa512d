"""The writer: builds and extends an index so that it may be killed at any moment and started again.

While it works everything is in `build/`: a journal (replaced atomically at each commit), one small part per window
(vectors and entries), and two logs whose committed length is in the journal. Full sets of parts become segments; the
last step replaces `index_info.json`. Nothing that is committed is written to again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from .corpus import Corpus, CorpusError
from .embedder import Embedder, TokenCounter, check_probes, weights_fingerprint
from .parts import Part, PartMaker, Reading
from .pipeline import BuildProgress, PipelineOptions, Position, ProgressCallback, ahead
from .segments import EntryFile, keys_of_batches, write_entries
from .snapshot import INFO_FILE, Snapshot, read_info
from .storage import (
    check_size,
    disk_full_explained,
    map_npy,
    npy_header,
    remove,
    replacing,
    sha256_of,
    sync_directory,
    write_json,
    write_npy,
)

logger = logging.getLogger(__name__)

SEGMENT_ROWS = 1 << 17
"""Rows after which the parts of a build become a segment."""
SAME_RUN_COSINE = 0.99999
"""Smallest cosine of a probe between two runs of one build."""


def now() -> str:
    """The time in UTC, ISO format, whole seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def library_versions() -> dict[str, str]:
    """Versions of what made an index."""
    found = {}
    for name in ("ubmoe-st", "sentence-transformers", "transformers", "torch", "numpy", "pyarrow", "faiss-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def next_segment(folder: Path, taken: Iterable[str]) -> str:
    """The next free `segments/NNNNNN`."""
    numbers = [int(Path(name).name) for name in taken]
    numbers += [int(p.name) for p in (folder / "segments").glob("*") if p.name.isdigit()]
    return f"segments/{max(numbers, default=-1) + 1:06d}"


def write_segment(
    root: Path,
    name: str,
    dtype: str,
    dimension: int,
    rows: int,
    vectors: Iterable[np.ndarray],
    batches: Callable[[], Iterator[Any]],
) -> dict[str, Any]:
    """Write one segment folder, atomically, and return its part of the manifest.

    Args:
        root: The index folder.
        name: `segments/NNNNNN`.
        dtype: float32 or float16.
        dimension: D.
        rows: How many rows follow.
        vectors: Blocks that add up to (rows, D).
        batches: Gives the Arrow batches of the same rows; called twice.
    """
    final, folder = root / name, root / f"{name}.tmp"
    remove(folder)
    remove(final)
    folder.mkdir(parents=True)
    files = {}
    written = 0
    with replacing(folder / "vectors.npy") as file:
        file.write(npy_header(rows, dimension, np.dtype(dtype)))
        for block in vectors:
            file.write(np.ascontiguousarray(block, dtype=dtype))
            written += len(block)
        if written != rows:
            raise ValueError(f"segment {name} got {written} vectors for {rows} rows")
        files["vectors.npy"] = file.record()
    files["entries.arrow"] = write_entries(folder / "entries.arrow", batches())
    files["keys.npy"] = write_npy(folder / "keys.npy", keys_of_batches(batches()))
    with disk_full_explained(final):
        os.replace(folder, final)
        sync_directory(final.parent)
    return {"folder": name, "rows": rows, "files": files}


class CommitLog:
    """A file that only grows, whose committed length is kept elsewhere; what is behind that length is cut off."""

    def __init__(self, path: Path, committed: int) -> None:
        self._path = path
        if not path.exists():
            path.touch()
        size = path.stat().st_size
        if size < committed:
            raise ValueError(f"{path} has {size} bytes where {committed} were committed: begin again with overwrite")
        if size > committed:
            os.truncate(path, committed)
        self.length = committed

    def append(self, data: bytes) -> None:
        """Write and sync; counts only once the new `length` is committed."""
        if not data:
            return
        with disk_full_explained(self._path), self._path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.length += len(data)


class BuildWriter:
    """One build or one addition, new or resumed. The caller holds the writer lock.

    Args:
        folder: The index folder.
        embedder: The model.
        corpus: What to index.
        options: How to cut and batch.
        dtype: Type of the stored vectors.
        base: The version to add to; None builds anew.
        progress: Called after each batch.
        segment_rows: Rows after which parts become a segment.
        engine: Embeds windows elsewhere (see `RayEngine`); None does it here.
    """

    def __init__(
        self,
        folder: Path,
        embedder: Embedder,
        corpus: Corpus,
        options: PipelineOptions,
        dtype: str,
        base: Snapshot | None,
        progress: ProgressCallback | None,
        segment_rows: int = SEGMENT_ROWS,
        engine: Any = None,
    ) -> None:
        self.folder, self.embedder, self.corpus, self.options = folder, embedder, corpus, options
        self.dtype, self.base, self._progress, self._segment_rows = dtype, base, progress, segment_rows
        self.engine = engine
        self.work = folder / "build"
        self._journal_path = self.work / "journal.json"
        self.probes = embedder.probes()
        self.dimension = embedder.dimension
        if np.isnan(self.probes).any():
            raise ValueError("the model gives NaN or zero vectors for plain sentences: it cannot make an index")
        self._tokens = self._run_rows = self._window_rows = 0
        self._first_fraction: float | None = None
        self._began = time.perf_counter()
        self.journal: dict[str, Any] = {}

    def config(self) -> dict[str, Any]:
        """Everything that decides the vectors: a build resumes only when it is the same."""
        options = asdict(self.options)
        for name in ("on_duplicate", "on_bad_row"):
            options.pop(name)
        counter = TokenCounter(self.embedder.copy_tokenizer(), self.embedder.max_tokens)
        return {
            "operation": "build" if self.base is None else "add",
            "base_version": None if self.base is None else self.base.version,
            "weights": weights_fingerprint(self.embedder.model),
            "dimension": self.dimension,
            "truncate_dim": self.embedder.truncate_dim,
            "max_tokens": self.embedder.max_tokens,
            "prompts": self.embedder.prompts(),
            "probe_tokens": counter.lengths(["a", "Fox, jumps!", "naïve 数 x=1"]),
            "dtype": self.dtype,
            "corpus": self.corpus.name,
            "fields": self.corpus.fields.as_dict(),
            "options": options,
            "segment_rows": self._segment_rows,
        }

    def begin(self, restart: bool) -> bool:
        """Start, or take up a run that was stopped; True if resumed.

        Args:
            restart: Throw away a stopped run that does not match, instead of refusing.

        Raises:
            ValueError: If the stopped run had another model, other options or another base.
        """
        if self.unfinished() and not self.committed():
            try:
                self._resume(self.config())
                return True
            except ValueError:
                if not restart:
                    raise
                logger.warning("the unfinished build in %s does not match and is thrown away", self.folder)
        self.begin_anew()
        return False

    def unfinished(self) -> bool:
        """Whether an earlier run left its journal."""
        return self._journal_path.is_file()

    def committed(self) -> bool:
        """Whether the run in `build/` became the current version (and was killed before it could clear up)."""
        if not (self.folder / INFO_FILE).is_file() or not self.unfinished():
            return False
        try:
            token = json.loads(self._journal_path.read_text("utf-8"))["token"]
        except (ValueError, KeyError):
            return False
        return token == read_info(self.folder)["committed"]

    def begin_anew(self) -> None:
        """Start from the first row, throwing away whatever an earlier run left."""
        config = self.config()
        remove(self.work)
        self.work.mkdir(parents=True)
        (self.folder / "segments").mkdir(exist_ok=True)
        write_npy(self.work / "probes.npy", self.probes)
        self.journal = {
            "format_version": 1,
            "token": uuid.uuid4().hex,
            "config": config,
            "rules": {"on_duplicate": self.options.on_duplicate, "on_bad_row": self.options.on_bad_row},
            "position": Position().as_dict(),
            "windows": 0,
            "rows": 0,
            "tokens": 0,
            "segments": [],
            "parts": [],
            "dead_bytes": 0,
            "bad_bytes": 0,
            "bad_rows": 0,
            "duplicates": 0,
            "finished": False,
        }
        write_json(self._journal_path, self.journal)

    def _resume(self, config: dict[str, Any]) -> None:
        try:
            journal = json.loads(self._journal_path.read_text("utf-8"))
            stored = map_npy(self.work / "probes.npy")
            before = journal["config"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{self._journal_path} is damaged ({error}): begin again with overwrite=True") from error
        different = sorted(name for name in config if before.get(name) != config[name])
        if different:
            shown = "; ".join(f"{name}: was {before.get(name)!r}, is {config[name]!r}" for name in different)
            raise ValueError(
                f"an unfinished {before['operation']} in {self.folder} was begun differently ({shown}): repeat it as "
                "it was, or begin again with overwrite=True"
            )
        for name, rule in journal["rules"].items():
            if rule not in ("raise", getattr(self.options, name)):
                raise ValueError(
                    f"the unfinished build in {self.folder} was begun with {name}={rule!r}, now it is "
                    f"{getattr(self.options, name)!r}: repeat it as it was, or begin again with overwrite=True"
                )
        try:
            check_probes(self.probes, stored, SAME_RUN_COSINE)
        except ValueError as error:
            raise ValueError(
                f"the model changed since the unfinished build in {self.folder} was begun ({error}): give the same "
                "model, or begin again with overwrite=True"
            ) from error
        for part in journal["parts"]:
            for suffix, record in part["files"].items():
                check_size(self.work / f"{part['name']}{suffix}", record)
        journal["rules"] = {"on_duplicate": self.options.on_duplicate, "on_bad_row": self.options.on_bad_row}
        self.journal = journal

    def run(self) -> None:
        """Embed what is left of the corpus.

        Raises:
            CorpusError: For a bad row (unless skipped), an empty corpus or one that changed.
            ValueError: For a vector that is zero or not finite (unless skipped).
            OSError: If the disk is full. Rows committed before are safe in each case.
        """
        dead = CommitLog(self.work / "dead.bin", self.journal["dead_bytes"])
        bad = CommitLog(self.work / "bad_rows.txt", self.journal["bad_bytes"])
        base_rows = self.base.stored_rows if self.base is not None else 0
        reading = Reading(
            corpus=self.corpus,
            options=self.options,
            tokenizer=self.embedder.copy_tokenizer(),
            max_tokens=self.embedder.max_tokens,
            position=Position(**self.journal["position"]),
            first_row=base_rows + self.journal["rows"],
            number=self.journal["windows"],
            base=None if self.base is None else (self.folder, self.base.info),
            files=[
                *(self.folder / segment["folder"] / "entries.arrow" for segment in self.journal["segments"]),
                *(self.work / f"{part['name']}.arrow" for part in self.journal["parts"]),
            ],
            scratch=self.work / "seen",
        )
        maker = PartMaker(self.work, self.options, self.dimension, self.dtype)
        parts: Any = self._made_here(reading, maker) if self.engine is None else self._made_by_engine(reading, maker)
        with contextlib.closing(parts):
            for part in parts:
                self._commit(part, dead, bad)
        if not self.journal["rows"] and not (self.base is not None and self.journal["position"]["row"]):
            reasons = f"{self.journal['bad_rows']} bad rows were left out" if self.journal["bad_rows"] else "no row"
            raise CorpusError(f"the corpus {self.corpus.name} is empty: {reasons}, nothing to index")
        self._merge()
        self.journal["finished"] = True
        write_json(self._journal_path, self.journal)

    def _made_here(self, reading: Reading, maker: PartMaker) -> Iterator[Part]:
        """Parts from the model of this process; the next windows are read and tokenised meanwhile."""
        read_ahead: Any = ahead(reading.windows())
        with contextlib.closing(read_ahead) as windows:
            for window in windows:
                yield maker.make(self.embedder, window, self._count)

    def _made_by_engine(self, reading: Reading, maker: PartMaker) -> Iterator[Part]:
        """Parts from the engine's workers."""
        for part in self.engine.parts(reading, maker):
            for suffix, record in part.files.items():
                try:
                    check_size(self.work / f"{part.name}{suffix}", record)
                except ValueError as error:
                    raise ValueError(
                        f"a worker wrote {part.name}{suffix}, which is not seen here: the index folder must be on a "
                        f"file system that all machines share ({error})"
                    ) from error
            self._count(part.rows, part.tokens, part.fraction)
            yield part

    def _count(self, rows: int, tokens: int, fraction: float | None) -> None:
        self._tokens += tokens
        self._run_rows += rows
        self._window_rows += rows
        self.report("embed", fraction)

    def report(self, stage: str, fraction: float | None) -> None:
        """Tell the progress callback where the build is."""
        if self._progress is None:
            return
        seconds = max(1e-9, time.perf_counter() - self._began)
        rows = self.journal["rows"] + self._window_rows
        left = None
        if fraction and stage == "embed":
            if self._first_fraction is None:  # what an earlier run did took no time of this one
                self._first_fraction = fraction if self.journal["position"]["row"] else 0.0
            if fraction > self._first_fraction:
                left = seconds * (1 - fraction) / (fraction - self._first_fraction)
        self._progress(
            BuildProgress(
                stage, rows, self._tokens, seconds, self._run_rows / seconds, self._tokens / seconds, fraction, left
            )
        )

    def _commit(self, part: Part, dead: CommitLog, bad: CommitLog) -> None:
        """Make a part count: the logs, then the journal."""
        if part.error is not None:
            raise ValueError(part.error)
        journal = self.journal
        if part.files:
            journal["parts"].append({"name": part.name, "rows": part.rows, "files": part.files})
        dead.append(np.asarray(part.dead, "<i8").tobytes())
        bad.append("".join(f"{reason}\n" for reason in part.bad).encode("utf-8", "backslashreplace"))
        for reason in part.bad:
            logger.warning("row left out: %s", reason)
        journal["position"] = part.position.as_dict()
        journal["windows"] = part.number + 1
        journal["rows"] += part.rows
        journal["tokens"] += part.tokens
        journal["dead_bytes"], journal["bad_bytes"] = dead.length, bad.length
        journal["bad_rows"] += len(part.bad)
        journal["duplicates"] += part.duplicates
        write_json(self._journal_path, journal)
        self._window_rows = 0
        if sum(part["rows"] for part in journal["parts"]) >= self._segment_rows:
            self._merge()

    def _merge(self) -> None:
        """Turn the parts on record into one segment."""
        parts = self.journal["parts"]
        if not parts:
            return
        rows = sum(part["rows"] for part in parts)
        taken = [segment["folder"] for segment in self.journal["segments"]]
        if self.base is not None:
            taken += [segment["folder"] for segment in self.base.info["segments"]]
        name = next_segment(self.folder, [*taken, *self._current_segments()])
        paths = [self.work / part["name"] for part in parts]
        for part, path in zip(parts, paths):
            for suffix, record in part["files"].items():
                if sha256_of(path.with_name(path.name + suffix)) != record["sha256"]:
                    raise ValueError(
                        f"{path.name}{suffix} changed on disk since it was written: begin again with overwrite=True"
                    )

        def batches() -> Iterator[Any]:
            for path in paths:
                yield from EntryFile(path.with_name(path.name + ".arrow")).batches()

        vectors = (np.load(path.with_name(path.name + ".npy")) for path in paths)
        record = write_segment(self.folder, name, self.dtype, self.dimension, rows, vectors, batches)
        self.journal["segments"].append(record)
        self.journal["parts"] = []
        write_json(self._journal_path, self.journal)
        for part in parts:
            for suffix in part["files"]:
                remove(self.work / f"{part['name']}{suffix}")

    def _current_segments(self) -> list[str]:
        """Segments of the index that is there now: an overwriting build leaves them alone until it commits."""
        if not (self.folder / INFO_FILE).is_file():
            return []
        return [segment["folder"] for segment in read_info(self.folder)["segments"]]

    def dead_rows(self, snapshot: Snapshot) -> np.ndarray:
        """Rows that this run replaced, with every chunk of their documents, or could not embed: sorted, int64.

        Args:
            snapshot: The index with the new segments.
        """
        logged = np.fromfile(self.work / "dead.bin", "<i8", count=self.journal["dead_bytes"] // 8)

        def rows() -> Iterator[int]:
            for value in logged:
                if value < 0:  # one row without a vector
                    yield -1 - int(value)
                else:  # a replaced document
                    yield from range(int(value), snapshot.end_of_document(int(value)))

        return np.unique(np.fromiter(rows(), np.int64))
