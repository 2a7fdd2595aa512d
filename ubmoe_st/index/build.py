"""The build: makes and extends an index so that it may be killed at any moment and started again.

While it works everything is in `build/`: a journal (replaced atomically at each commit), one small part per window
(vectors and entries), and two logs whose committed length is in the journal. Full sets of parts become segments; the
last step replaces `index_info.json`. Nothing that is committed is written to again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..files import remove, replacing, sha256_of
from .corpus import Corpus, CorpusChangedError, CorpusError, Document
from .embedder import Embedder, TokenCounter, check_probes, weights_fingerprint
from .kinds import Request, check_factory, write_faiss
from .late import check_late
from .manifest import (
    DISCARD,
    FaissRecord,
    FileRecord,
    Journal,
    Manifest,
    ModelRecord,
    RunConfig,
    SourceRecord,
    library_versions,
    now,
)
from .progress import BuildProgress, ProgressCallback, show
from .storage import CommitLog, check_size, map_npy, write_npy
from .store import EntryFile, Snapshot, publish, rows_union, write_dead, write_segment
from .windows import Part, PartMaker, PipelineOptions, Reading, ahead
from .workplace import Workplace

logger = logging.getLogger(__name__)

SEGMENT_ROWS = 1 << 17
"""Rows after which the parts of a build become a segment."""
SAME_RUN_COSINE = 0.99999
"""Smallest cosine of a probe between two runs of one build."""


def build_index(
    folder: Path,
    embedder: Embedder,
    corpus: Corpus,
    options: PipelineOptions,
    request: Request,
    *,
    sizes: dict[str, Any],
    dtype: str,
    segment_rows: int,
    overwrite: bool,
    progress: bool | ProgressCallback,
    engine: Callable[[], Any] | None,
) -> Snapshot:
    """Build the index of a corpus, go on with a build that was stopped, or open the one that is there already.

    Arguments as in `EmbeddingIndex.build`; `sizes` are those of `options` that were given, the others follow from the
    budget; `engine` makes what embeds windows elsewhere (see `RayEngine`).
    """
    with contextlib.ExitStack() as stack:
        workplace = stack.enter_context(Workplace(folder))
        fitting = request.budget.sizes(embedder.model, embedder.dimension)
        options = replace(options, **fitting | sizes)
        if isinstance(corpus.source, str) and folder.resolve().is_relative_to(Path(corpus.source).resolve()):
            raise ValueError(f"{folder} lies in the corpus {corpus.source}, whose files are read: give another folder")
        run = Build(workplace, embedder, corpus, options, dtype, segment_rows, show(stack, progress))
        if Manifest.exists(folder):
            if not overwrite:
                if run.is_current(request):
                    workplace.clear()
                    return Snapshot(folder)
                held = Manifest.read(folder)
                if held.edited or len(held.sources) > 1:
                    raise ValueError(
                        f"{folder} has been changed since it was built (rows added, replaced or deleted), which a "
                        "build would lose: change it further by add(), upsert(), delete() or build_bm25() of "
                        "EmbeddingIndex.open(...), give another folder, or replace it with overwrite=True"
                    )
                raise ValueError(
                    f"{folder} already holds an index of another corpus, model or options: give another folder, or "
                    "replace it with overwrite=True"
                )
        elif strangers := workplace.strangers():
            raise ValueError(f"{folder} holds {strangers[0]!r}, which is no part of an index: give another folder")
        run.check_chunks()
        check_factory(request.kind, embedder.dimension)
        if engine is not None:
            run.engine = engine()
        run.begin(restart=overwrite)
        try:
            run.run()
        except CorpusChangedError:
            if not overwrite:
                raise
            run.begin_anew()
            if not corpus.repeatable:  # some of its rows have been read, and are gone
                raise CorpusChangedError(
                    f"the unfinished build in {folder} was of other rows and has been thrown away, but that was seen "
                    "only after rows of this corpus had been read, which cannot be read twice: give it again"
                ) from None
            run.run()
        return run.publish_index(request)


class Build:
    """One build or one addition, new or resumed.

    Args:
        workplace: The index folder, locked.
        embedder: The model.
        corpus: What to index.
        options: How to cut and batch.
        dtype: Type of the stored vectors.
        segment_rows: Rows after which parts become a segment.
        progress: Called after each batch.
        base: The version to add to; None builds anew.
    """

    def __init__(
        self,
        workplace: Workplace,
        embedder: Embedder,
        corpus: Corpus,
        options: PipelineOptions,
        dtype: str,
        segment_rows: int = SEGMENT_ROWS,
        progress: ProgressCallback | None = None,
        base: Snapshot | None = None,
    ) -> None:
        self._workplace, self._folder, self._work = workplace, workplace.folder, workplace.path
        self._embedder, self._corpus, self._options, self._dtype = embedder, corpus, options, dtype
        self._segment_rows, self._progress, self._base = segment_rows, progress, base
        self.engine: Any = None
        self._probes = embedder.probes()
        if np.isnan(self._probes).any():
            raise ValueError("the model gives NaN or zero vectors for plain sentences: it cannot make an index")
        self._tokens = self._run_rows = self._window_rows = 0
        self._first_fraction: float | None = None
        self._began = time.perf_counter()
        self.journal: Journal

    def config(self) -> RunConfig:
        """Everything that decides the vectors."""
        options = asdict(self._options)
        for name in self._rules():
            options.pop(name)
        if not self._options.late_chunking:
            options.pop("late_chunking")  # as in indexes of before there was any
        counter = TokenCounter(self._embedder.copy_tokenizer(), self._embedder.max_tokens)
        return RunConfig(
            operation="build" if self._base is None else "add",
            base_version=None if self._base is None else self._base.manifest.version,
            weights=weights_fingerprint(self._embedder.model),
            dimension=self._embedder.dimension,
            truncate_dim=self._embedder.truncate_dim,
            max_tokens=self._embedder.max_tokens,
            prompts=self._embedder.prompts(),
            probe_tokens=counter.lengths(["a", "Fox, jumps!", "naïve 数 x=1"]),
            dtype=self._dtype,
            corpus=self._corpus.name,
            fields=self._corpus.fields.as_dict(),
            options=options,
            segment_rows=self._segment_rows,
        )

    def _rules(self) -> dict[str, str]:
        return {"on_duplicate": self._options.on_duplicate, "on_bad_row": self._options.on_bad_row}

    def is_current(self, request: Request) -> bool:
        """Whether the index that is there is what this build would make, from the same rows of the same corpus."""
        manifest = Manifest.read(self._folder)
        return (
            len(manifest.sources) == 1
            and not manifest.edited
            and (manifest.index.requested, manifest.index.faiss_file) == (request.kind, request.faiss_file)
            and (request.kind != "auto" or manifest.index.memory_mb == request.memory_mb)
            and self._took_in(manifest.sources[0], self._corpus)
            and self._made_its_vectors(manifest)
        )

    def _made_its_vectors(self, manifest: Manifest) -> bool:
        """Whether the model gives the vectors of the index that is there: pooling is no part of the weights."""
        stored = Snapshot(self._folder, manifest).probes
        try:
            check_probes(self._probes, stored)
        except ValueError:
            return False
        return True

    def entries_if_repeated(self, base: Manifest) -> int | None:
        """How many entries this addition made, if it was the last thing done to the rows; None if it was not.

        A corpus that can be read only once is never taken for a repeated one.
        """
        source = base.sources[-1]
        numbered_from = self._corpus.first_number - source.corpus_rows  # as it was when this corpus went in
        if (
            source.version != base.version
            or self._workplace.begun()
            or not self._corpus.repeatable
            or not self._took_in(source, replace(self._corpus, first_number=numbered_from))
        ):
            return None
        return source.entries

    def _took_in(self, source: SourceRecord, corpus: Corpus) -> bool:
        """Whether a corpus went in as this run would take it in, and has the very rows that are on record."""
        same = source.config.same_input(self.config()) and source.same_rules(self._rules())
        return same and same_rows(source, corpus)

    def check_chunks(self) -> None:
        """Refuse chunks that the model would not read whole, or that it cannot pool late.

        Raises:
            ValueError: If `chunk_tokens` is more than the model reads beside its special tokens and its prompt.
        """
        if self._options.late_chunking:
            check_late(self._embedder)
        embedder, wanted = self._embedder, self._options.chunk_tokens
        counter = TokenCounter(embedder.copy_tokenizer(), embedder.max_tokens, embedder.document_prompt())
        room = counter.room(None)
        if wanted is not None and room is not None and wanted > room:
            raise ValueError(
                f"chunk_tokens={wanted} does not fit: the model reads {embedder.max_tokens} tokens, of which "
                f"{counter.special_tokens} are special tokens and {counter.prompt_tokens} the prompt of documents; "
                f"give at most {room}"
            )

    def begin(self, restart: bool) -> None:
        """Start, or take up a run that was stopped.

        Args:
            restart: Throw away a stopped run that does not match, instead of refusing.

        Raises:
            ValueError: If the stopped run had another model, other options or another base, or its journal is damaged.
        """
        try:
            if self._workplace.begun():
                self._resume()
                return
        except ValueError:
            if not restart:
                raise
            logger.warning("the unfinished build in %s does not match and is thrown away", self._folder)
        self.begin_anew()

    def begin_anew(self) -> None:
        """Start from the first row, throwing away whatever an earlier run left."""
        config = self.config()
        self._workplace.clear()
        self._work.mkdir(exist_ok=True)
        write_npy(self._work / "probes.npy", self._probes)
        self.journal = Journal(uuid.uuid4().hex, config, self._rules())
        self.journal.write(self._folder)

    def _otherwise(self) -> str:
        """What to do about a stopped run that is not to be finished."""
        return "begin again with overwrite=True" if self._base is None else f"throw it away with {DISCARD}"

    def _resume(self) -> None:
        journal = Journal.read(self._folder)
        before = journal.config.operation
        if different := journal.config.differences(self.config()):
            raise ValueError(
                f"an unfinished {before} in {self._folder} was begun differently ({'; '.join(different)}): repeat it "
                f"as it was, or {self._otherwise()}"
            )
        for name, rule in self._rules().items():
            if journal.rules[name] not in ("raise", rule):
                raise ValueError(
                    f"the unfinished build in {self._folder} was begun with {name}={journal.rules[name]!r}, now it is "
                    f"{rule!r}: repeat it as it was, or {self._otherwise()}"
                )
        try:
            check_probes(self._probes, map_npy(self._work / "probes.npy"), SAME_RUN_COSINE)
        except ValueError as error:
            raise ValueError(
                f"the model changed since the unfinished build in {self._folder} was begun ({error}): give the same "
                f"model, or {self._otherwise()}"
            ) from error
        for part in journal.parts:
            for path, record in part.paths(self._work):
                check_size(path, record)
        journal.rules = self._rules()
        self.journal = journal

    def run(self) -> None:
        """Embed what is left of the corpus.

        Raises:
            CorpusError: For a bad row (unless skipped), an empty corpus or one that changed.
            ValueError: For a vector that is zero or not finite (unless skipped).
            OSError: If the disk is full. Rows committed before are safe in each case.
        """
        journal = self.journal
        dead = CommitLog(self._work / "dead.bin", journal.dead_bytes)
        replaced = CommitLog(self._work / "replaced.bin", journal.replaced_bytes or 0)
        bad = CommitLog(self._work / "bad_rows.txt", journal.bad_bytes)
        reading = Reading(
            corpus=self._corpus,
            options=self._options,
            tokenizer=self._embedder.copy_tokenizer(),
            max_tokens=self._embedder.max_tokens,
            prompt=self._embedder.document_prompt(),
            position=journal.position,
            first_row=journal.rows + (self._base.stored_rows if self._base is not None else 0),
            number=journal.windows,
            base=None if self._base is None else (self._folder, self._base.manifest),
            files=[
                *(self._folder / segment.folder / "entries.arrow" for segment in journal.segments),
                *(self._work / f"{part.name}.arrow" for part in journal.parts),
            ],
            scratch=self._work / "seen",
        )
        maker = PartMaker(self._work, self._options, self._embedder.dimension, self._dtype)
        parts: Any = self._made_here(reading, maker) if self.engine is None else self._made_by_engine(reading, maker)
        with contextlib.closing(parts):
            for part in parts:
                self._commit(part, dead, replaced, bad)
        if not journal.rows and not (self._base is not None and journal.position.row):
            reasons = f"{journal.bad_rows} bad rows were left out" if journal.bad_rows else "no row"
            raise CorpusError(f"the corpus {self._corpus.name} is empty: {reasons}, nothing to index")
        self._merge()
        journal.finished = True
        journal.write(self._folder)

    def _made_here(self, reading: Reading, maker: PartMaker) -> Iterator[Part]:
        """Parts from the model of this process; the next window is read and tokenised meanwhile."""
        read_ahead: Any = ahead(reading.windows())
        with contextlib.closing(read_ahead) as windows:
            for window in windows:
                yield maker.make(self._embedder, window, self._count)

    def _made_by_engine(self, reading: Reading, maker: PartMaker) -> Iterator[Part]:
        """Parts from the engine's workers."""
        for part in self.engine.parts(reading, maker):
            for path, record in part.record.paths(self._work):
                try:
                    check_size(path, record)
                except ValueError as error:
                    raise ValueError(
                        f"a worker wrote {path.name}, which is not seen here: the index folder must be on a "
                        f"file system that all machines share ({error})"
                    ) from error
            self._count(part.record.rows, part.tokens, part.fraction)
            yield part

    def _count(self, rows: int, tokens: int, fraction: float | None) -> None:
        self._tokens += tokens
        self._run_rows += rows
        self._window_rows += rows
        self._report("embed", fraction)

    def _report(self, stage: str, fraction: float | None) -> None:
        """Tell the progress callback where the build is."""
        if self._progress is None:
            return
        seconds = max(1e-9, time.perf_counter() - self._began)
        rows = self.journal.rows + self._window_rows
        left = None
        if fraction and stage == "embed":
            if self._first_fraction is None:  # what an earlier run did took no time of this one
                self._first_fraction = fraction if self.journal.position.row else 0.0
            if fraction > self._first_fraction:
                left = seconds * (1 - fraction) / (fraction - self._first_fraction)
        self._progress(
            BuildProgress(
                stage, rows, self._tokens, seconds, self._run_rows / seconds, self._tokens / seconds, fraction, left
            )
        )

    def _commit(self, part: Part, dead: CommitLog, replaced: CommitLog, bad: CommitLog) -> None:
        """Make a part count: the logs, then the journal."""
        if part.error is not None:
            raise ValueError(part.error)
        journal = self.journal
        if part.record.files:
            journal.parts.append(part.record)
        dead.append((-1 - np.asarray(part.dead, "<i8")).tobytes())
        replaced.append(np.asarray(part.replaced, "<i8").tobytes())
        bad.append("".join(f"{reason}\n" for reason in part.bad).encode("utf-8", "backslashreplace"))
        for reason in part.bad:
            logger.warning("row left out: %s", reason)
        journal.position = part.position
        journal.windows = part.number + 1
        journal.rows += part.record.rows
        journal.tokens += part.tokens
        journal.dead_bytes, journal.bad_bytes = dead.length, bad.length
        journal.replaced_bytes = replaced.length or None
        journal.bad_rows += len(part.bad)
        journal.duplicates += part.duplicates
        journal.cut = ((journal.cut or 0) + part.cut) or None
        journal.write(self._folder)
        self._window_rows = 0
        if sum(part.rows for part in journal.parts) >= self._segment_rows:
            self._merge()

    def _merge(self) -> None:
        """Turn the parts on record into one segment."""
        parts = self.journal.parts
        if not parts:
            return
        for part in parts:
            for path, record in part.paths(self._work):
                if sha256_of(path) != record["sha256"]:
                    raise ValueError(
                        f"{path.name} changed on disk since it was written: begin again with overwrite=True"
                    )

        def batches() -> Iterator[Any]:
            for part in parts:
                yield from EntryFile(self._work / f"{part.name}.arrow").batches()

        vectors = (np.load(self._work / f"{part.name}.npy") for part in parts)
        rows = sum(part.rows for part in parts)
        name = self._workplace.next_segment()
        segment = write_segment(self._folder, name, self._dtype, self._embedder.dimension, rows, vectors, batches)
        self.journal.segments.append(segment)
        self.journal.parts = []
        self.journal.write(self._folder)
        for part in parts:
            for path, _ in part.paths(self._work):
                remove(path)

    def publish_index(self, request: Request) -> Snapshot:
        """Make what was built the first version of an index, or the next one if another index was there."""
        journal, embedder = self.journal, self._embedder
        version = Manifest.read(self._folder).version + 1 if Manifest.exists(self._folder) else 1
        probes = self._workplace.next_name("probes", version)
        model = ModelRecord(
            id=embedder.identity,
            weights=journal.config.weights,
            truncate_dim=embedder.truncate_dim,
            max_tokens=embedder.max_tokens,
            prompts=embedder.prompts(),
            probes=FileRecord(probes, **write_npy(self._folder / probes, self._probes)),
        )
        model.locate(self._folder)
        manifest = Manifest(
            version=version,
            committed=journal.token,
            edited=False,
            created=now(),
            updated=now(),
            rows=journal.rows,
            stored_rows=journal.rows,
            dimension=embedder.dimension,
            dtype=self._dtype,
            metric="cosine",
            model=model,
            fields=self._corpus.fields.as_dict(),
            options=journal.config.options,
            segment_rows=self._segment_rows,
            segments=journal.segments,
            dead=None,
            index=FaissRecord(),
            bm25=None,
            sources=[],
            versions=library_versions(),
        )
        snapshot = Snapshot(self._folder, manifest)
        dead = self._dead_rows(snapshot)
        manifest.dead = write_dead(self._workplace, dead, version)
        self._report("index", 1.0)
        manifest.index = write_faiss(snapshot, request, self._workplace, version)
        manifest.sources = [self._source(version, journal.rows - len(dead))]
        return publish(self._workplace, manifest)

    def publish_addition(self, base: Snapshot) -> Snapshot:
        """Make `base` and what was added, less what it replaces, the next version."""
        manifest = base.manifest.next_version()
        manifest.committed = self.journal.token
        manifest.segments += self.journal.segments
        manifest.dead = None
        dead = self._dead_rows(Snapshot(self._folder, manifest))
        manifest.dead = write_dead(self._workplace, rows_union([base.dead, dead]), manifest.version)
        entries = self.journal.rows - int((dead >= base.stored_rows).sum())
        manifest.sources.append(self._source(manifest.version, entries))
        return publish(self._workplace, manifest)

    def _dead_rows(self, snapshot: Snapshot) -> np.ndarray:
        """Rows that this run replaced, with every chunk of their documents, or could not embed: sorted, int64.

        Args:
            snapshot: The index with the new segments.
        """
        logged = np.fromfile(self._work / "dead.bin", "<i8", count=self.journal.dead_bytes // 8)
        lost = set((-1 - logged[logged < 0]).tolist())
        count = (self.journal.replaced_bytes or 0) // 8  # there is no such file in a run that an earlier version began
        pairs = np.fromfile(self._work / "replaced.bin", "<i8", count=count) if count else np.zeros(0, np.int64)
        kept: dict[int, int] = {}  # documents that stay, by those that would have replaced them and have no vector

        def document(first: int) -> range:
            return range(first, snapshot.end_of_document(first))

        def rows() -> Iterator[int]:
            yield from lost
            for old in logged[logged >= 0].tolist():  # an earlier version replaced documents here
                yield from document(old)
            for old, new in (pair.tolist() for pair in pairs.reshape(-1, 2)):  # not all as Python numbers at once
                if new in lost and lost.issuperset(document(new)):
                    kept[new] = kept.get(old, old)
                    continue
                yield from document(old)
                if old in kept:
                    yield from document(kept[old])

        return np.unique(np.fromiter(rows(), np.int64))

    def _source(self, version: int, entries: int) -> SourceRecord:
        """What the index remembers of the corpus, of which so many entries are there."""
        journal = self.journal
        if journal.cut:
            logger.warning(
                "%s of %s entries of %s are longer than the %s tokens the model reads: what is behind them is not "
                "searched; cut documents into chunks with chunk_tokens",
                f"{journal.cut:,}",
                f"{journal.rows:,}",
                self._corpus.name,
                f"{self._embedder.max_tokens:,}",
            )
        return SourceRecord(
            version=version,
            name=self._corpus.name,
            corpus_rows=journal.position.row,
            sha256_of_rows=journal.position.digest,
            entries=entries,
            tokens=journal.tokens,
            bad_rows=journal.bad_rows,
            bad_rows_file=self._keep_bad_rows(version),
            duplicates_left_out=journal.duplicates,
            config=journal.config,
            added=now(),
            entries_cut=journal.cut,
            rules=journal.rules,
        )

    def _keep_bad_rows(self, version: int) -> str | None:
        """Keep the report of bad rows; None when there were none."""
        source = self._work / "bad_rows.txt"
        if not source.is_file() or not source.stat().st_size:
            return None
        name = self._workplace.next_name("bad_rows", version)
        with source.open("rb") as reports, replacing(self._folder / name) as file:
            shutil.copyfileobj(reports, file)
        return name


def same_rows(source: SourceRecord, corpus: Corpus) -> bool:
    """Whether a corpus has the very rows that are on record."""
    digest = hashlib.sha256()
    rows = 0
    for item in corpus:
        rows += 1
        if rows > source.corpus_rows:
            return False
        digest.update(item.digest_bytes() if isinstance(item, Document) else b"bad row")
        digest.update(b"\n")
    return rows == source.corpus_rows and digest.hexdigest() == source.sha256_of_rows
