"""Index kinds: what each costs, which one `auto` takes, how it is made, searched and tuned.

Every kind but `flat` only proposes candidates: the scores that come back are exact cosines from the stored vectors.
"""

from __future__ import annotations

import itertools
import math
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import record_of, replacing, replacing_by_name
from .budget import MemoryBudget, physical_memory
from .manifest import FaissRecord, FileRecord, Record
from .store import Snapshot
from .workplace import Workplace

FLAT_ROWS = 50_000
"""Up to this many rows `auto` keeps to exact search."""
HNSW_ROWS = 5_000_000
"""Beyond this many rows `auto` takes IVF-PQ: a graph takes hours to build."""
TRIAL_ROWS, TRIAL_CELLS = 1_024, 4
"""Random vectors on which a faiss factory string is tried, and the cells it gets then."""
FEWEST_ROWS = 1_000
"""Below this, kinds that need training are replaced by `flat`."""
HNSW_LINKS = 32


@dataclass(frozen=True)
class Kind:
    """One kind of index."""

    name: str
    factory: Callable[[int, int], str]
    """The faiss factory string for (IVF cells, dimension)."""
    bytes_per_row: Callable[[int], float]
    """Memory of the searchable structure, by dimension."""
    parameters: dict[str, int]
    """Search parameters to begin with; `rerank` is the number of candidates per result."""


def lists_for(rows: int, sample: int) -> int:
    """Number of IVF cells: 4 sqrt(N) as a power of two, with at least 39 rows of the sample each to train on."""
    return max(1, 2 ** int(math.log2(max(1, min(4 * math.sqrt(rows), min(rows, sample) / 39)))))


def subquantizers_for(dimension: int) -> int:
    """Parts of a vector that are quantised apart: the largest divisor of D that is at most D / 4, in 4 bits each."""
    return max(m for m in range(1, max(1, dimension // 4) + 1) if dimension % m == 0)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("flat", lambda n, d: "Flat", lambda d: 4 * d, {}),
        Kind("int8", lambda n, d: "SQ8", lambda d: d, {"rerank": 4}),
        Kind(
            "hnsw",
            lambda n, d: f"HNSW{HNSW_LINKS},Flat",
            lambda d: 4 * d + 8 * HNSW_LINKS + 16,
            {"efSearch": 64, "rerank": 2},
        ),
        Kind(
            "hnsw-int8",
            lambda n, d: f"HNSW{HNSW_LINKS},SQ8",
            lambda d: d + 8 * HNSW_LINKS + 16,
            {"efSearch": 64, "rerank": 4},
        ),
        Kind("ivf-flat", lambda n, d: f"IVF{n},Flat", lambda d: 4 * d + 8, {"nprobe": 16, "rerank": 2}),
        Kind(
            "ivf-pq",
            lambda n, d: f"OPQ{subquantizers_for(d)},IVF{n},PQ{subquantizers_for(d)}x4fs",
            lambda d: subquantizers_for(d) / 2 + 8,
            {"nprobe": 32, "rerank": 16},
        ),
        Kind("binary", lambda n, d: "LSHrt", lambda d: d / 8, {"rerank": 32}),
    )
}


@dataclass(frozen=True)
class Choice:
    """A kind that was chosen, and why."""

    kind: str
    factory: str
    why: str
    parameters: dict[str, int]


def choose(
    kind: str, rows: int, dimension: int, memory_mb: int | None = None, budget: MemoryBudget | None = None
) -> Choice:
    """The kind to build, with a sentence that explains it.

    Args:
        kind: A name in `KINDS`, `auto`, or `faiss:FACTORY` for a faiss factory string of one's own.
        rows: N.
        dimension: D.
        memory_mb: Memory the index may take when it is searched, MiB. None: a quarter of the machine's.
        budget: Of the build, which bounds the training sample and with it the number of IVF cells.

    Raises:
        ValueError: If there is no such kind.
    """
    lists = lists_for(rows, (budget or MemoryBudget.of(None)).training_rows(dimension))

    def choice(name: str, why: str) -> Choice:
        return Choice(name, KINDS[name].factory(lists, dimension), why, dict(KINDS[name].parameters))

    if kind.startswith("faiss:"):
        return Choice(kind, kind.removeprefix("faiss:"), "asked for", {"rerank": 4})
    if kind != "auto":
        if kind not in KINDS:
            raise ValueError(f"kind is auto, {', '.join(KINDS)} or faiss:FACTORY, got {kind!r}")
        if kind != "flat" and rows < FEWEST_ROWS:
            return choice("flat", f"{kind} was asked for, but {rows:,} rows are too few to train it")
        return choice(kind, "asked for")
    allowed = memory_mb if memory_mb is not None else physical_memory() >> 22

    def size(name: str) -> float:
        return rows * KINDS[name].bytes_per_row(dimension) / (1 << 20)

    shape = f"{rows:,} rows of {dimension} dimensions"
    if rows <= FLAT_ROWS:
        return choice("flat", f"{shape}: up to {FLAT_ROWS:,} rows exact search is quick enough")
    if rows <= HNSW_ROWS and size("hnsw-int8") <= allowed:
        why = (
            f"{shape}: a graph over int8 vectors takes about {size('hnsw-int8'):,.0f} MiB of the {allowed:,} MiB there "
            f"are (flat would take {size('flat'):,.0f})"
        )
        return choice("hnsw-int8", why)
    cause = (
        f"a graph takes too long to build beyond {HNSW_ROWS:,} rows"
        if rows > HNSW_ROWS
        else f"hnsw-int8 would take {size('hnsw-int8'):,.0f} MiB, more than the {allowed:,} MiB there are"
    )
    why = f"{shape}: {cause}; 4-bit codes take about {size('ivf-pq'):,.0f} MiB"
    return choice("ivf-pq", why)


@dataclass(frozen=True)
class Request:
    """What is asked for when the faiss part of an index is made."""

    kind: str
    """As in `choose`."""
    budget: MemoryBudget
    memory_mb: int | None = None
    """As in `choose`."""
    faiss_file: bool | None = None
    """Whether a flat index, which is searched in the stored vectors, has a faiss file, too, for other programs. None:
    up to `flat_rows` rows."""
    flat_rows: int = FLAT_ROWS


def write_faiss(snapshot: Snapshot, request: Request, workplace: Workplace, version: int) -> FaissRecord:
    """Make the faiss files of all stored rows; their part of the manifest.

    Args:
        snapshot: The rows.
        request: What to make.
        workplace: Gives the names.
        version: The version it is for.
    """
    rows = snapshot.stored_rows
    choice = choose(request.kind, rows, snapshot.dimension, request.memory_mb, request.budget)
    files: list[FileRecord] = []
    if choice.kind != "flat" or (rows <= request.flat_rows if request.faiss_file is None else request.faiss_file):
        files = write_files(choice, snapshot, request.budget, workplace, version)
    return FaissRecord(
        file=files[0].file if files else None,
        files=files,
        kind=choice.kind,
        requested=request.kind,
        memory_mb=request.memory_mb,
        faiss_file=request.faiss_file,
        factory=choice.factory,
        why=choice.why,
        rows=rows,
        bytes=sum(file.bytes for file in files) or None,
        parameters=choice.parameters,
    )


def train(choice: Choice, snapshot: Snapshot, most: int) -> Any:
    """An empty faiss index of `choice`, trained.

    Args:
        choice: From `choose`.
        snapshot: What to train on a sample of.
        most: Largest sample, rows.
    """
    index, quantizer = new_index(choice.factory, snapshot.dimension)
    if (cells := cells_of(index)) > snapshot.stored_rows:
        raise ValueError(
            f"{choice.factory} has {cells:,} cells and needs at least as many rows to train, there are "
            f"{snapshot.stored_rows:,}: repeat this with another kind (what is embedded is kept)"
        )
    if not index.is_trained:
        index.train(snapshot.sample(min(snapshot.stored_rows, most, max(65_536, 64 * cells))))
    del quantizer  # was needed until here
    return index


def new_index(factory: str, dimension: int) -> tuple[Any, Any]:
    """An untrained faiss index, and what must be kept as long as it is trained."""
    import faiss as untyped

    faiss: Any = untyped
    metric = faiss.METRIC_L2 if factory.startswith("LSH") else faiss.METRIC_INNER_PRODUCT
    index = faiss.index_factory(dimension, factory, metric)
    quantizer = None
    if isinstance(index, faiss.IndexPreTransform):
        transform = faiss.downcast_VectorTransform(index.chain.at(0))
        if isinstance(transform, faiss.OPQMatrix):
            # The quantizer the rotation is fitted to is the one used after it: 4 bits. Few rounds are enough.
            quantizer = faiss.ProductQuantizer(transform.d_out, transform.M, 4)
            quantizer.cp.min_points_per_centroid = 1
            transform.pq = quantizer
            transform.niter, transform.niter_pq, transform.niter_pq_0 = 10, 4, 10
            transform.max_train_points = 20_000
    return index, quantizer


def check_factory(kind: str, dimension: int) -> None:
    """Try a faiss factory string of a user's own on random vectors, before hours of embedding.

    Args:
        kind: As in `choose`; another than `faiss:FACTORY` needs no trial.
        dimension: D.

    Raises:
        ValueError: If faiss cannot make, fill, write or search such an index.
    """
    if not kind.startswith("faiss:"):
        return
    import faiss

    factory = kind.removeprefix("faiss:")
    rows = np.random.default_rng(0).normal(size=(TRIAL_ROWS, dimension)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    try:
        new_index(factory, dimension)
        index, quantizer = new_index(re.sub(r"IVF\d+", f"IVF{TRIAL_CELLS}", factory), dimension)
        inner = _behind_transform(index)
        if hasattr(inner, "do_polysemous_training"):  # takes a minute, and cannot fail
            inner.do_polysemous_training = False
        if not index.is_trained:
            index.train(rows)
        index.add(rows)
        _code_bytes(index)
        index = faiss.deserialize_index(faiss.serialize_index(index))
        candidates([(0, index)], rows[:2], 4, {}, None)
        del quantizer
    except (RuntimeError, AssertionError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        if "training points" in reason:  # finer than so few rows can show
            return
        raise ValueError(
            f"faiss cannot use {factory!r} for vectors of {dimension} dimensions ({reason}): expected a factory string "
            "of an index that takes rows by add() and can be written"
        ) from error


def _behind_transform(index: Any) -> Any:
    """The index that gets the rows, behind a transform of them where there is one."""
    import faiss

    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def _innermost(index: Any) -> Any:
    """The index that proposes rows, behind transforms of them and a second look at what it proposes."""
    import faiss

    while True:
        if isinstance(index, faiss.IndexPreTransform):
            index = faiss.downcast_index(index.index)
        elif isinstance(index, faiss.IndexRefine):
            index = faiss.downcast_index(index.base_index)
        else:
            return index


def _code_bytes(index: Any) -> int:
    """Bytes of a row in a faiss index; a graph, which has no code of its own, keeps its rows in another index."""
    import faiss

    inner = _behind_transform(index)
    if isinstance(inner, faiss.IndexRefine):
        return sum(_code_bytes(faiss.downcast_index(part)) for part in (inner.base_index, inner.refine_index))
    if isinstance(inner, faiss.IndexHNSW):
        graph: Any = inner.hnsw
        return int(faiss.downcast_index(inner.storage).sa_code_size() + 4 * graph.nb_neighbors(0))
    return int(index.sa_code_size())


def write_files(
    choice: Choice, snapshot: Snapshot, budget: MemoryBudget, workplace: Workplace, version: int
) -> list[FileRecord]:
    """Make the faiss index of all rows and write it, in several files where one would not fit in the budget.

    All files share one training; together they find what one would.
    """
    import faiss

    rows, dimension = snapshot.stored_rows, snapshot.dimension
    name = first_name = workplace.next_name("index", version)
    if choice.kind == "flat":
        record = write_flat(workplace.folder / name, dimension, rows, snapshot.read_blocks(0, rows))
        return [FileRecord(name, 0, rows, **record)]
    index = train(choice, snapshot, budget.training_rows(dimension))
    row_bytes = KINDS[choice.kind].bytes_per_row(dimension) if choice.kind in KINDS else _code_bytes(index) + 300
    count = math.ceil(rows / min(rows, budget.shard_rows(row_bytes)))
    empty: Any = faiss.serialize_index(index) if count > 1 else None
    borders = [rows * number // count for number in range(count + 1)]
    files = []
    for number, (first, last) in enumerate(itertools.pairwise(borders)):
        if number:
            index = faiss.deserialize_index(empty)
            name = workplace.next_shard(first_name, number)
        for block in snapshot.read_blocks(first, last):
            index.add(np.ascontiguousarray(block, np.float32))
        files.append(FileRecord(name, first, last - first, **write_index(workplace.folder / name, index)))
        del index
    return files


def write_flat(path: Path, dimension: int, rows: int, blocks: Iterator[np.ndarray]) -> Record:
    """Write a faiss `IndexFlatIP` without holding it in memory; `faiss.read_index` opens it.

    The header is the one faiss itself writes for two small indexes, with the row count put in; should a faiss release
    write another layout, the index is made in memory instead.

    Args:
        path: The file.
        dimension: D.
        rows: N.
        blocks: Unit vectors, float32, adding up to (N, D).
    """
    import faiss

    def serialised(count: int) -> bytes:
        index = faiss.IndexFlatIP(dimension)
        index.add(np.zeros((count, dimension), np.float32))
        return faiss.serialize_index(index).tobytes()

    def header(count: int, template: bytes) -> bytes:
        head = bytearray(template[: len(template) - 4 * dimension])
        head[8:16] = struct.pack("<q", count)
        head[-8:] = struct.pack("<Q", count * dimension)
        return bytes(head)

    one, three = serialised(1), serialised(3)
    if header(3, one) == three[: len(three) - 12 * dimension] and header(1, one) == one[: len(one) - 4 * dimension]:
        with replacing(path) as file:
            file.write(header(rows, one))
            for block in blocks:
                file.write(np.ascontiguousarray(block, np.float32))
            return file.record()
    index = faiss.IndexFlatIP(dimension)
    for block in blocks:
        index.add(np.ascontiguousarray(block, np.float32))
    return write_index(path, index)


def write_index(path: Path, index: Any) -> Record:
    """Write a faiss index, atomically, and return its size and SHA-256."""
    import faiss

    with replacing_by_name(path) as temporary:
        faiss.write_index(index, str(temporary))
        return record_of(temporary)


def read_index(path: Path) -> Any:
    """Open a faiss file, mapped into memory where faiss can.

    Raises:
        FileNotFoundError: If it is not there.
    """
    import faiss

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: restore it from a copy, or make it anew with reindex()")
    flags = getattr(faiss, "IO_FLAG_MMAP_IFC", 0)  # faiss 1.11 and newer
    try:
        return faiss.read_index(str(path), flags)
    except RuntimeError:
        return faiss.read_index(str(path))


def cells_of(index: Any) -> int:
    """IVF cells of a faiss index; 0 for one without."""
    import faiss

    inner = _innermost(index)
    return int(inner.nlist) if isinstance(inner, faiss.IndexIVF) else 0


def can_select(index: Any) -> bool:
    """Whether the index searches among chosen rows only."""
    import faiss

    inner = _behind_transform(index)
    return isinstance(inner, (faiss.IndexIVF, faiss.IndexHNSW, faiss.IndexFlat, faiss.IndexScalarQuantizer))


def candidates(
    shards: Sequence[tuple[int, Any]],
    queries: np.ndarray,
    count: int,
    parameters: dict[str, int],
    allowed: np.ndarray | None,
) -> np.ndarray:
    """Rows that may be among the nearest, (Q, count); -1 where there are no more.

    No state of an index is changed, so threads may search with different parameters.

    Args:
        shards: faiss indexes with the number of their first row.
        queries: Unit vectors, (Q, D).
        count: Candidates per query.
        parameters: nprobe, efSearch.
        allowed: Rows that may be found, bool (N,); None: all. Needs `can_select`.
    """
    import faiss

    queries = np.ascontiguousarray(queries, np.float32)
    found, scores = [], []
    for first, index in shards:
        mask = None if allowed is None else allowed[first : first + index.ntotal]
        settings = search_settings(index, count, parameters, mask)
        values, rows = index.search(queries, min(count, index.ntotal), params=settings)
        found.append(np.where(rows < 0, rows, rows + first))
        scores.append(-values if index.metric_type == faiss.METRIC_INNER_PRODUCT else values)
    if len(found) == 1:
        return found[0]
    rows, values = np.concatenate(found, axis=1), np.concatenate(scores, axis=1)
    order = np.argsort(values, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(rows, order, axis=1)


def search_settings(index: Any, count: int, parameters: dict[str, int], allowed: np.ndarray | None) -> Any:
    """The faiss search parameters of one search."""
    import faiss as untyped

    faiss: Any = untyped
    options: dict[str, Any] = {}
    if allowed is not None:
        options["sel"] = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))

    def settings_of(one: Any) -> Any:
        if isinstance(one, faiss.IndexPreTransform):
            inner = settings_of(faiss.downcast_index(one.index))
            return None if inner is None else faiss.SearchParametersPreTransform(index_params=inner)
        if isinstance(one, faiss.IndexRefine):
            inner = settings_of(faiss.downcast_index(one.base_index))
            refined = {"k_factor": one.k_factor, "base_index_params": inner}
            return None if inner is None else faiss.IndexRefineSearchParameters(**refined)
        if isinstance(one, faiss.IndexIVF):
            return faiss.SearchParametersIVF(nprobe=min(parameters.get("nprobe", 1), one.nlist), **options)
        if isinstance(one, faiss.IndexHNSW):
            return faiss.SearchParametersHNSW(efSearch=max(parameters.get("efSearch", 16), count), **options)
        return faiss.SearchParameters(**options) if options else None

    return settings_of(index)


def parameters_of(index: Any) -> tuple[str, ...]:
    """Names of the search parameters that a faiss index has."""
    import faiss

    inner = _innermost(index)
    if isinstance(inner, faiss.IndexIVF):
        return ("nprobe", "rerank")
    return ("efSearch", "rerank") if isinstance(inner, faiss.IndexHNSW) else ("rerank",)


def parameter_grid(index: Any, rows: int) -> list[dict[str, int]]:
    """Search parameters worth trying, for `tune`."""
    import faiss

    inner = _innermost(index)
    reranks = [1, 2, 4, 8, 16, 32, 64, 128]
    if isinstance(inner, faiss.IndexIVF):
        probes = [2**power for power in range(int(math.log2(inner.nlist)) + 1)]
        return [{"nprobe": probe, "rerank": rerank} for probe in probes for rerank in reranks]
    if isinstance(inner, faiss.IndexHNSW):
        return [{"efSearch": 2**power, "rerank": rerank} for power in range(4, 11) for rerank in reranks[:5]]
    return [{"rerank": rerank} for rerank in [*reranks, 256, 512] if rerank == 1 or rerank * 10 <= rows]
