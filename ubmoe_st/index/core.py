"""`EmbeddingIndex`: the public face of the package."""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..configuration import check_count
from ..forking import ForkSafeLock
from . import changes
from .budget import MemoryBudget, search_mebibytes
from .build import SEGMENT_ROWS, build_index
from .corpus import Corpus, CorpusFields, id_text, id_texts
from .embedder import Embedder, check_probes, query_vectors
from .export import export_parquet
from .filters import Filter
from .kinds import FEWEST_ROWS, Request, choose
from .manifest import Manifest
from .progress import ProgressCallback
from .ray_engine import RayEngine
from .rerank import Method, search_rows
from .search import Hit, Mode, Searcher, SearchSettings
from .storage import problems_of, require_libraries
from .store import Entry, Namespace, Snapshot, open_snapshot
from .tuning import TuningReport, tune
from .windows import OnBadRow, OnDuplicate, PipelineOptions

logger = logging.getLogger(__name__)

DTYPES = ("float32", "float16")
Identities = str | int | Iterable[str | int]


class EmbeddingIndex:
    """A searchable folder of unit vectors, ids and texts, made by one embedding model.

    Opening maps files into memory and reads none of them; an open index is a snapshot that later writes, by this or
    another process, do not disturb (`refresh` moves on). Scores are cosines. Make one with `build` or `open`.
    """

    def __init__(
        self, snapshot: Snapshot, embedder: Embedder | None = None, settings: SearchSettings | None = None
    ) -> None:
        self._searcher = Searcher(snapshot, settings)
        self._embedder = embedder
        self._lock = ForkSafeLock()

    @property
    def _snapshot(self) -> Snapshot:
        return self._searcher.snapshot

    @property
    def searcher(self) -> Searcher:
        """What finds rows in the version that this object reads now; it stays with that version."""
        return self._searcher

    def _move_to(self, snapshot: Snapshot) -> None:
        embedder, searcher = self._embedder, Searcher(snapshot, self._searcher.settings)
        other_probes = not np.array_equal(snapshot.probes, self._snapshot.probes)
        if embedder is not None and other_probes:
            try:
                check_probes(embedder.probes(), snapshot.probes)
            except ValueError:
                logger.warning(
                    "%s was built anew with another model: that is loaded for a text, if use_model() is not given it",
                    snapshot.folder,
                )
                embedder = None
        if embedder is not None:
            embedder.take_limit(snapshot.manifest.model.max_tokens)
        with self._lock:
            self._searcher = searcher
            # What another thread has loaded meanwhile is the model of the version before.
            if other_probes and (embedder is None or self._embedder is not embedder):
                self._embedder = None

    @classmethod
    def build(
        cls,
        model: Any,
        corpus: Any,
        out: str | os.PathLike[str],
        *,
        id_field: str | None = "id",
        text_field: str = "text",
        title_field: str | None = "title",
        metadata_fields: Sequence[str] | None = None,
        max_row_bytes: int = 4 << 20,
        chunk_tokens: int | None = None,
        overlap_tokens: int = 0,
        late_chunking: bool = False,
        with_title: bool = True,
        on_duplicate: OnDuplicate = "raise",
        on_bad_row: OnBadRow = "raise",
        kind: str = "auto",
        search_memory_budget: int | str | None = None,
        memory_budget: int | str | None = None,
        faiss_file: bool | None = None,
        dtype: str = "float32",
        truncate_dim: int | None = None,
        batch_tokens: int | None = None,
        window_tokens: int | None = None,
        segment_rows: int = SEGMENT_ROWS,
        overwrite: bool = False,
        progress: bool | ProgressCallback = False,
        model_id: str | None = None,
        engine: Literal["local", "ray"] = "local",
        workers: int = 2,
        worker_resources: dict[str, Any] | None = None,
    ) -> EmbeddingIndex:
        """The index of a corpus, built in a stream: memory does not grow with the corpus.

        Killed at any moment and called again with the same arguments it goes on where it was, and the vectors are
        byte for byte those of an uninterrupted run. Called again after it has finished it only opens the index.

        Args:
            model: A `SentenceTransformer` (or an object with its `encode`), or a folder or Hub id to load.
            corpus: A .jsonl(.gz), .csv, .tsv or .parquet file, a folder of those or of text files (no hidden ones),
                `hf:NAME#split`, or an iterable of mappings (or strings). To resume, give the same rows in the same
                order.
            out: The index folder.
            id_field: Field with the id, a string or an integer. None numbers the rows, as it does where a row is a
                string; rows that are added later go on where these end.
            text_field: Field with the text.
            title_field: Field with the title, where a row has one.
            metadata_fields: Fields kept for filters and results; None keeps all others.
            max_row_bytes: A larger row is a bad row.
            chunk_tokens: Cut documents into chunks of this many tokens, or fewer where the title takes room the model
                needs; ids become `id#0`, `id#1`, ... None: documents stay whole, and
                `info["sources"][n]["entries_cut"]` counts those of which the model reads only the beginning, if any.
            overlap_tokens: Tokens that neighbouring chunks share.
            late_chunking: Let the model read a document in one piece, with full attention, and pool the vectors of its
                chunks from that. What is longer than the model reads goes in pieces of whole chunks that overlap by a
                quarter; a chunk is taken from where it has more around it. Takes the memory of the longest piece.
            with_title: Let the model read the title on a line before the text.
            on_duplicate: An id met again: `raise`, `skip` (the first stays) or `upsert` (the last wins).
            on_bad_row: `raise`, or `skip` and report in `bad_rows.txt` and `info["sources"]`.
            kind: `auto` (chosen by rows, dimension and memory; `info["index"]["why"]` tells), `flat`, `int8`, `hnsw`,
                `hnsw-int8`, `ivf-flat`, `ivf-pq`, `binary`, or `faiss:FACTORY` with a faiss factory string.
            search_memory_budget: Memory the index may take when searched, `"4GB"` or bytes, for `auto`. None: a quarter
                of the machine's.
            memory_budget: Memory the build may take beside the model and the libraries, `"512MB"` or bytes, whatever
                the size of the corpus: bounds windows, batches, the training sample and the making of the index, which
                becomes several faiss files where one would not fit. None: half of the machine's.
            faiss_file: Whether a flat index, which is searched in the stored vectors, has a faiss file, too, for other
                programs. None: up to 50,000 rows.
            dtype: Type of the stored vectors, float32 or float16.
            truncate_dim: Keep only the first dimensions (Matryoshka). None: `model.truncate_dim`, if any.
            batch_tokens: Tokens per batch, padding included. None: 4,096, or fewer if the budget is small.
            window_tokens: Tokens between two commits: what a kill can cost. None: 65,536.
            segment_rows: Rows per segment folder.
            overwrite: Replace an index that is already there (only once the new one is whole), and throw away an
                unfinished build that does not match.
            progress: True draws a progress bar on standard error; a callable gets a `BuildProgress` per batch.
            model_id: Folder or Hub id to remember for `open`; None asks the model.
            engine: `local`, or `ray` to embed on the actors of a Ray cluster (`ray.init` first to choose which).
            workers: Ray actors, each with a copy of the model.
            worker_resources: What an actor takes, for `ray.remote`: `{"num_gpus": 1}`. None: one CPU.

        Raises:
            CorpusError: For a bad row with its line number, an empty corpus, or one that changed since the build began.
            ValueError: For wrong arguments, a changed model, or an index that is already there.
            RuntimeError: If another writer is at work in `out`.
        """
        require_libraries()
        if isinstance(metadata_fields, str):
            raise TypeError(f"metadata_fields is a list of names, got the text {metadata_fields!r}")
        metadata = tuple(metadata_fields) if metadata_fields is not None else None
        fields = CorpusFields(id_field, text_field, title_field, metadata, max_row_bytes)
        given = {"batch_tokens": batch_tokens, "window_tokens": window_tokens}
        sizes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        options = PipelineOptions(
            chunk_tokens=chunk_tokens,
            overlap_tokens=overlap_tokens,
            late_chunking=late_chunking,
            with_title=with_title,
            on_duplicate=on_duplicate,
            on_bad_row=on_bad_row,
            **sizes,
        )
        if dtype not in DTYPES:
            raise ValueError(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
        check_count("segment_rows", segment_rows)
        budget = MemoryBudget.of(memory_budget)
        budget.check_row(max_row_bytes)
        request = Request(kind, budget, search_mebibytes(search_memory_budget), faiss_file)
        choose(kind, FEWEST_ROWS, 64)  # refuses an unknown kind before hours of embedding
        if engine not in ("local", "ray"):
            raise ValueError(f"engine is local or ray, got {engine!r}")
        rows = Corpus(corpus, fields)
        embedder = Embedder(model, model_id, truncate_dim)

        def ray_engine() -> RayEngine:
            sent = os.fspath(model) if isinstance(model, (str, os.PathLike)) else embedder.model
            return RayEngine(sent, embedder.truncate_dim, workers, worker_resources)

        snapshot = build_index(
            Path(out).absolute(),
            embedder,
            rows,
            options,
            request,
            sizes=sizes,
            dtype=dtype,
            segment_rows=operator.index(segment_rows),
            overwrite=overwrite,
            progress=progress,
            engine=ray_engine if engine == "ray" else None,
        )
        return cls(snapshot, embedder)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, model: Any = None, verify: bool = False, truncate_dim: int | None = None
    ) -> EmbeddingIndex:
        """An index that was built before.

        Args:
            path: The index folder.
            model: The model for text queries, an object or a folder or Hub id. None loads the remembered one with
                stock sentence-transformers when the first text query comes.
            verify: Check every file against its SHA-256 first.
            truncate_dim: Not needed: the index knows its own. Refused when it differs.

        Raises:
            FileNotFoundError: If there is no finished index.
            ValueError: If a file is missing, truncated or changed, or the model is another one.
        """
        require_libraries()
        snapshot = open_snapshot(Path(path).absolute())
        own = snapshot.manifest.model.truncate_dim
        if truncate_dim is not None and truncate_dim != own:
            raise ValueError(f"the index was built with truncate_dim={own}, got {truncate_dim}")
        index = cls(snapshot)
        if verify and (problems := index.verify()):
            raise ValueError(f"{path} is damaged: " + "; ".join(problems))
        if model is not None:
            index.use_model(model)
        return index

    def __len__(self) -> int:
        return len(self._snapshot)

    def __contains__(self, identity: object) -> bool:
        name = id_text(identity)
        spaces: tuple[Namespace, ...] = ("document", "chunk")
        return name is not None and any(self._snapshot.rows_of(name, space) for space in spaces)

    def __iter__(self) -> Iterator[str]:
        return self._snapshot.ids()

    def __repr__(self) -> str:
        return f"EmbeddingIndex({str(self.path)!r}, rows={len(self):,}, dimension={self.dimension}, kind={self.kind!r})"

    @property
    def path(self) -> Path:
        """The index folder."""
        return self._snapshot.folder

    @property
    def info(self) -> dict[str, Any]:
        """The content of `index_info.json` for this snapshot."""
        return self._snapshot.info

    @property
    def dimension(self) -> int:
        """Dimensions of the stored vectors."""
        return self._snapshot.dimension

    @property
    def kind(self) -> str:
        """The index kind, `flat` for exact search."""
        return self._snapshot.manifest.index.kind

    @property
    def version(self) -> int:
        """The committed version this object reads."""
        return self._snapshot.manifest.version

    @property
    def model(self) -> Any:
        """The embedding model; loaded from where it was when the index was built, if none was given."""
        return self._loaded().model

    def use_model(self, model: Any) -> None:
        """Take `model` for text queries, after checking that it is the one the index was built with.

        The same weights in another dtype or in low-memory form pass: probe texts embedded at build time must come out
        at a cosine of at least 0.998. A model given by its folder or Hub id reads as many tokens as that of the build.

        Raises:
            ValueError: If it is another model, has another dimension, or reads fewer tokens than that of the build.
        """
        stored = self._snapshot.manifest.model
        embedder = Embedder(model, truncate_dim=stored.truncate_dim, max_tokens=stored.max_tokens)
        embedder.check_limit(stored.max_tokens)
        check_probes(embedder.probes(), self._snapshot.probes)
        self._embedder = embedder

    def find_model(self) -> str:
        """The folder or Hub id of the model this index was built with; also after both were moved together.

        Raises:
            ValueError: If the model is gone, or was never known.
        """
        return self._snapshot.manifest.model.find(self.path)

    def check_same_model(self, other: EmbeddingIndex) -> None:
        """Refuse when `other` was built with another model, prompt or number of dimensions.

        Raises:
            ValueError: Saying what differs.
        """
        check_probes(self._snapshot.probes, other._snapshot.probes)

    @property
    def embedder(self) -> Embedder:
        """The embedding model, with what the index needs of it.

        Raises:
            ValueError: If its weights or prompts have changed so much since that it is another model.
        """
        embedder = self._loaded()
        check_probes(embedder.probes_of_now(), self._snapshot.probes)
        return embedder

    def _loaded(self) -> Embedder:
        with self._lock:
            if self._embedder is None:
                self.use_model(self.find_model())
            if self._embedder is None:
                raise ValueError("no model: open the index with model=...")
            return self._embedder

    def refresh(self) -> bool:
        """Move to the newest committed version; True if there was a newer one."""
        if Manifest.read(self.path).is_version(self._snapshot.manifest):
            return False
        self._move_to(open_snapshot(self.path))
        return True

    def query_vectors(self, queries: Any) -> np.ndarray:
        """Queries as unit vectors of this index, float32, (Q, D).

        Args:
            queries: A text, a list of texts, or vectors of shape (D,) or (Q, D).

        Raises:
            TypeError: If it is something else, naming the position.
            ValueError: If the dimension is not the index's, or a vector is zero or not finite.
        """
        return query_vectors(queries, self.dimension, lambda: self.embedder)

    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        filter: Filter | None = None,
        mode: Mode = "dense",
        weight: float | None = None,
        exact: bool = False,
        parameters: dict[str, int] | None = None,
        rerank: int | Method | None = None,
        candidates: int | None = None,
    ) -> tuple[np.ndarray, list[list[str]]]:
        """Cosines and ids of the nearest entries of each query, best first; equal scores in corpus order.

        Args:
            queries: A text, a list of texts, or vectors (Q, D).
            k: How many; where fewer entries can be found, all of them.
            filter: Only entries whose metadata passes: `{"lang": "en"}`, `{"lang": ["en", "de"]}`,
                `{"year": {">=": 1990, "<": 2000}}` (all conditions must hold), or a function of the metadata. A row
                has `id`, `title` and `parent` there too, where it has no field of its own of that name.
            mode: `dense`, `bm25` (needs `build_bm25`), or `hybrid`: both, joined by their ranks or by `weight`. The
                order is then that of BM25 or of the fusion; scores are cosines in every mode. `bm25` finds only entries
                that share a word with the query; its shorter results end in NaN scores and empty ids.
            weight: Share of the cosines, 0 to 1, in a sum of both scores, for `hybrid`. None: reciprocal rank fusion.
            exact: Compare with every entry, whatever the kind of index.
            parameters: nprobe (IVF), efSearch (HNSW), rerank instead of the stored ones; those not named stay as
                stored. One that the index does not have is refused; a flat one is exact with any.
            rerank: `likelihood` or `yes_no`: the first results come in the order of `model.rank`, which reads query and
                text together. `maxsim`: in the order of MaxSim over token vectors, which the encoder computes of the
                candidates at query time. A number: `likelihood` of so many. Scores stay cosines. None: no new order.
            candidates: How many of the first results `rerank` puts in a new order. None: 20.

        Returns:
            Scores, float32, (Q, K), and ids, Q lists of K.
        """
        searcher = self.searcher
        first = (filter, mode, weight, exact, parameters)
        scores, rows = self._search_rows(searcher, queries, k, rerank, candidates, *first)
        names = iter(searcher.snapshot.ids_at(rows[rows >= 0]))
        return scores, [[next(names) if row >= 0 else "" for row in line] for line in rows.tolist()]

    def search_entries(
        self,
        queries: Any,
        k: int = 10,
        *,
        filter: Filter | None = None,
        mode: Mode = "dense",
        weight: float | None = None,
        exact: bool = False,
        parameters: dict[str, int] | None = None,
        rerank: int | Method | None = None,
        candidates: int | None = None,
    ) -> list[list[Hit]]:
        """The nearest entries of each query with texts, spans and metadata, best first. Arguments as in `search`."""
        searcher = self.searcher
        first = (filter, mode, weight, exact, parameters)
        scores, rows = self._search_rows(searcher, queries, k, rerank, candidates, *first)
        return [
            [searcher.hit_at(row, score) for row, score in zip(line.tolist(), values.tolist()) if row >= 0]
            for line, values in zip(rows, scores)
        ]

    def _search_rows(self, searcher: Searcher, *arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        return search_rows(searcher, lambda: self.embedder, self.query_vectors, *arguments)

    def entries(self, ids: Identities, *, namespace: Namespace | None = None) -> list[Entry]:
        """The entries with these ids, in their order; the id of a document gives all its chunks.

        Args:
            ids: One or many, texts or whole numbers.
            namespace: Whether they are ids of a `document` or of a `chunk`. None: what there is.

        Raises:
            KeyError: If an id is not in the index.
            ValueError: If an id is that of a document and of a chunk, and `namespace` is None.
        """
        snapshot = self._snapshot
        return [snapshot.entry_at(row) for row in snapshot.rows_named(id_texts(ids), namespace)]

    def texts(self, ids: Identities, *, namespace: Namespace | None = None) -> list[str]:
        """The texts of `entries(ids)`."""
        return [entry.text for entry in self.entries(ids, namespace=namespace)]

    def vectors(self, ids: Identities, *, namespace: Namespace | None = None) -> np.ndarray:
        """The stored vectors of `entries(ids)`, float32, (N, D)."""
        snapshot = self._snapshot
        return snapshot.vectors_at(snapshot.rows_named(id_texts(ids), namespace))

    def verify(self) -> list[str]:
        """Everything that is wrong with the `files` of this version, as sentences; empty when all is well."""
        return problems_of(self.path, self._snapshot.manifest.files())

    def files(self) -> list[str]:
        """The files of this version whose size and SHA-256 are on record, relative to `path`."""
        return [name for name, _ in self._snapshot.manifest.files()]

    def add(
        self,
        corpus: Any,
        *,
        on_duplicate: OnDuplicate = "raise",
        on_bad_row: OnBadRow = "raise",
        id_field: str | None = None,
        text_field: str | None = None,
        title_field: str | None = None,
        progress: bool | ProgressCallback = False,
    ) -> int:
        """Index more rows with the model and the options of the build; the number of entries that are new.

        Streams and resumes as `build` does: killed and called again with the same corpus it goes on, and where that
        corpus was the last thing added (killed right after, or called twice) nothing is done. New entries are found at
        once, by exact comparison, until `reindex` or `compact` takes them into an approximate index. Readers that are
        open keep their version.

        Args:
            corpus: As in `build`.
            on_duplicate: An id that is there already: `raise`, `skip` or `upsert` (replaces the old entry).
            on_bad_row: As in `build`.
            id_field: Field with the id, where it is another than in the build.
            text_field: The same for the text.
            title_field: The same for the title.
            progress: As in `build`.

        Raises:
            CorpusError: As in `build`.
            RuntimeError: If another writer is at work.
            ValueError: If the model is another one, or reads more or fewer tokens than that of the build.
        """
        snapshot, entries = changes.add(
            self.path,
            self.embedder,
            corpus,
            on_duplicate=on_duplicate,
            on_bad_row=on_bad_row,
            fields={"id": id_field, "text": text_field, "title": title_field},
            progress=progress,
        )
        self._move_to(snapshot)
        return entries

    def upsert(self, corpus: Any, **options: Any) -> int:
        """`add(corpus, on_duplicate="upsert")`: rows with a known id replace what was there."""
        return self.add(corpus, on_duplicate="upsert", **options)

    def delete(self, ids: Identities, *, missing_ok: bool = False, namespace: Namespace | None = None) -> int:
        """Take entries out of the index; the number of entries gone. The id of a document takes all its chunks.

        The rows stay on disk until `compact`, but nothing finds them. Arguments as in `entries`.

        Raises:
            KeyError: If an id is not there and `missing_ok` is false; nothing is deleted then.
            ValueError: As `entries`; nothing is deleted then.
        """
        snapshot, entries = changes.delete(self.path, id_texts(ids), missing_ok, namespace)
        self._move_to(snapshot)
        return entries

    def compact(self, *, memory_budget: int | str | None = None) -> None:
        """Write the index anew without deleted and replaced rows, in full segments, and make its index again.

        Args:
            memory_budget: As in `build`.
        """
        self._move_to(changes.compact(self.path, MemoryBudget.of(memory_budget)))

    def reindex(
        self,
        kind: str = "auto",
        *,
        search_memory_budget: int | str | None = None,
        memory_budget: int | str | None = None,
        faiss_file: bool | None = None,
    ) -> str:
        """Make another kind of index over the same vectors; the sentence that explains the choice.

        `reindex("flat", faiss_file=True)` writes all vectors as one `IndexFlatIP` for other programs.

        Args:
            kind: As in `build`.
            search_memory_budget: As in `build`.
            memory_budget: As in `build`.
            faiss_file: As in `build`.
        """
        budget = MemoryBudget.of(memory_budget)
        request = Request(kind, budget, search_mebibytes(search_memory_budget), faiss_file)
        self._move_to(changes.reindex(self.path, request))
        return self._snapshot.manifest.index.why

    def build_bm25(self) -> None:
        """Add a BM25 part over all entries, for `mode="bm25"` and `mode="hybrid"`; needs bm25s.

        Entries added later are found by their vectors only, until this is called again or `compact` is.
        """
        self._move_to(changes.build_bm25(self.path))

    def tune(
        self,
        recall: float = 0.95,
        *,
        k: int = 10,
        queries: Any = None,
        held_back: int = 200,
        seed: int = 0,
        save: bool = True,
    ) -> TuningReport:
        """Find the fastest search parameters that reach a recall against brute force, and keep them in the index.

        Args:
            recall: Wanted recall@k.
            k: Results per query.
            queries: Texts or vectors that are like the real queries. None holds back rows of the index.
            held_back: How many rows to hold back.
            seed: Of their choice.
            save: Store the parameters, if the recall is reached.

        Raises:
            ValueError: If the index is flat.
        """
        vectors = None if queries is None else self.query_vectors(queries)
        report = tune(self._searcher, recall, k, vectors, held_back, seed)
        if save and report.reached:
            self._move_to(changes.keep_parameters(self.path, report, self._snapshot.manifest))
        return report

    def export_parquet(self, path: str | os.PathLike[str]) -> int:
        """Write every entry with its vector as one Parquet file (for Qdrant, Milvus, LanceDB); the number of rows."""
        return export_parquet(self._snapshot, Path(path))

    def discard_unfinished(self) -> bool:
        """Throw away an addition that was stopped; True if there was one. What is committed stays."""
        return changes.discard_unfinished(self.path)
