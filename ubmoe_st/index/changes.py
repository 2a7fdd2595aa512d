"""Changes of an index that is there: each takes the writer lock, works, and commits one next version."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..files import replacing
from .budget import MemoryBudget
from .build import Build
from .corpus import Corpus, CorpusFields
from .embedder import Embedder, check_probes
from .hybrid import write_bm25
from .kinds import Request, write_faiss
from .manifest import DISCARD, FaissRecord, Manifest, SourceRecord, folded
from .progress import ProgressCallback, show
from .store import Namespace, Snapshot, publish, rows_union, write_dead, write_segment
from .tuning import TuningReport
from .windows import OnBadRow, OnDuplicate, PipelineOptions
from .workplace import Workplace

COPY_ROWS = 8192
"""Rows copied at a time when an index is compacted."""


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[tuple[Workplace, Snapshot]]:
    """The newest version under the writer lock, for a change that is made in one go.

    Raises:
        RuntimeError: If another writer is at work.
        ValueError: If an addition or build has not finished.
    """
    with Workplace(folder) as workplace:
        if workplace.begun():
            raise ValueError(
                f"a build or an addition in {folder} has not finished: repeat it to finish it, or throw it away with "
                f"{DISCARD}"
            )
        yield workplace, Snapshot(folder)


def add(
    folder: Path,
    embedder: Embedder,
    corpus: Any,
    *,
    on_duplicate: OnDuplicate,
    on_bad_row: OnBadRow,
    fields: dict[str, str | None],
    progress: bool | ProgressCallback,
) -> tuple[Snapshot, int]:
    """Add a corpus; the next version and the number of new entries.

    As `EmbeddingIndex.add`; `fields` are those of `id`, `text` and `title`, where they are not those of the build.

    Raises:
        ValueError: If the model is not, or no longer, the one that the newest version was built with, or its
            `max_seq_length` is another.
    """
    with contextlib.ExitStack() as stack:
        workplace = stack.enter_context(Workplace(folder))
        base = Snapshot(folder)
        manifest = base.manifest
        named: dict[str, Any] = {name: value for name, value in fields.items() if value}
        run = Build(
            workplace,
            embedder,
            Corpus(corpus, replace(CorpusFields.of(manifest.fields), **named), _rows_before(manifest.sources)),
            PipelineOptions(**manifest.options, on_duplicate=on_duplicate, on_bad_row=on_bad_row),
            manifest.dtype,
            manifest.segment_rows,
            show(stack, progress),
            base,
        )
        if (entries := run.entries_if_repeated(manifest)) is not None:
            workplace.clear()
            return base, entries
        embedder.check_limit(manifest.model.max_tokens, longer_too=True)
        check_probes(embedder.probes_now(), base.probes)
        if not workplace.begun():  # what has been embedded is not to be lost
            Manifest.check_room(folder)
        run.begin(restart=False)
        run.run()
        added = run.publish_addition(base)
        return added, added.manifest.sources[-1].entries


def _rows_before(sources: list[SourceRecord]) -> int:
    """Rows of the corpora that went in: where the numbers of rows without ids go on."""
    return sum(source.corpus_rows for source in sources)


def delete(folder: Path, ids: list[str], missing_ok: bool, namespace: Namespace | None = None) -> tuple[Snapshot, int]:
    """Take entries out; the next version and the number of entries gone.

    Raises:
        KeyError: If an id is not there and `missing_ok` is false; nothing is deleted then.
        ValueError: If an id is that of a document and of a chunk, and `namespace` does not say which is meant.
    """
    with writing(folder) as (workplace, base):
        rows: list[int] = []
        for identity in ids:
            found = base.rows_of(identity, namespace)
            if not found and not missing_ok:
                raise KeyError(f"no entry has the id {identity!r}: nothing was deleted")
            rows.extend(found)
        if not rows:
            return base, 0
        manifest = base.manifest.next_version()
        manifest.edited = True
        dead = rows_union([base.dead, np.array(rows, np.int64)])
        manifest.dead = write_dead(workplace, dead, manifest.version)
        return publish(workplace, manifest), len(set(rows))


def compact(folder: Path, budget: MemoryBudget) -> Snapshot:
    """The next version, with the live rows alone, in full segments, and its faiss (and BM25) part made anew.

    Raises:
        ValueError: If no row is alive.
    """
    with writing(folder) as (workplace, base):
        live = np.setdiff1d(np.arange(base.stored_rows, dtype=np.int64), base.dead, assume_unique=True)
        if not len(live):
            raise ValueError("every row is deleted: there is nothing to compact")
        manifest = base.manifest.next_version()
        manifest.segments, manifest.dead, manifest.edited = [], None, True
        manifest.sources, reports = folded(manifest.sources)
        manifest.sources[0].bad_rows_file = _joined(workplace, reports, manifest) or manifest.sources[0].bad_rows_file
        step = manifest.segment_rows
        for start in range(0, len(live), step):
            rows = live[start : start + step]

            def batches(rows: np.ndarray = rows) -> Iterator[Any]:
                return base.batches_of(rows, COPY_ROWS)

            vectors = (base.vectors_at(rows[i : i + COPY_ROWS]) for i in range(0, len(rows), COPY_ROWS))
            name = workplace.next_segment()
            manifest.segments.append(
                write_segment(folder, name, manifest.dtype, base.dimension, len(rows), vectors, batches)
            )
        before, manifest.index = manifest.index, FaissRecord()
        compacted = Snapshot(folder, manifest)
        request = Request(before.requested, budget, before.memory_mb, before.faiss_file)
        manifest.index = write_faiss(compacted, request, workplace, manifest.version)
        if manifest.index.kind == before.kind:
            manifest.index.parameters = before.parameters
        if manifest.bm25 is not None:
            manifest.bm25 = write_bm25(compacted, workplace, manifest.version)
        return publish(workplace, manifest)


def _joined(workplace: Workplace, reports: list[str], manifest: Manifest) -> str | None:
    """Reports of bad rows as one file of a version; the name of it, or of the only one, or None."""
    there = [name for name in dict.fromkeys(reports) if (workplace.folder / name).is_file()]
    if len(there) < 2:
        return there[0] if there else None
    joined = workplace.next_name("bad_rows", manifest.version)
    with replacing(workplace.folder / joined) as file:
        for name in there:
            with (workplace.folder / name).open("rb") as report:
                shutil.copyfileobj(report, file)
    return joined


def reindex(folder: Path, request: Request) -> Snapshot:
    """The next version, with another kind of index over the same rows."""
    with writing(folder) as (workplace, base):
        manifest = base.manifest.next_version(same_rows=True)
        manifest.index = write_faiss(base, request, workplace, manifest.version)
        return publish(workplace, manifest)


def build_bm25(folder: Path) -> Snapshot:
    """The next version, with a BM25 part over all rows."""
    with writing(folder) as (workplace, base):
        manifest = base.manifest.next_version(same_rows=True)
        manifest.bm25 = write_bm25(base, workplace, manifest.version)
        return publish(workplace, manifest)


def keep_parameters(folder: Path, report: TuningReport, tuned: Manifest) -> Snapshot:
    """The next version, with the search parameters that were found for the version `tuned`.

    Raises:
        ValueError: If the index was made anew meanwhile.
    """
    with writing(folder) as (workplace, base):
        manifest = base.manifest.next_version(same_rows=True)
        if manifest.index.files != tuned.index.files:
            raise ValueError("the index was made anew meanwhile: tune it again")
        manifest.index.parameters = dict(report.chosen.parameters)
        manifest.index.tuned = {name: value for name, value in report.as_dict().items() if name != "trials"}
        return publish(workplace, manifest)


def discard_unfinished(folder: Path) -> bool:
    """Throw away an unfinished build or addition; True if there was one. What is committed stays."""
    with Workplace(folder) as workplace:
        return workplace.clear()
