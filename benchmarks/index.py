"""Measures `EmbeddingIndex` at corpus scale.

Two parts, both written to one JSON file:

* `kinds`: vectors of real shape (embedded texts, or given ones, extended by perturbation to the wanted number of rows):
  build time, bytes per row, recall@10 against brute force, queries per second, resident memory, for each kind.
* `build`: from text to index, streaming build against the plain loop `encode` + `IndexFlatIP`, and against autofaiss
  where it is installed: rows per second and peak resident memory, each in a process of its own.

    python benchmarks/index.py --model models/ubmoe-135m --corpus ../shared/data/train/docs-enwiki2015-sample.jsonl.gz
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

K = 10


def status_mb(name: str) -> float:
    """A memory figure of this process, MiB: VmHWM is the peak, RssAnon what is no mapped file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {name}: this benchmark measures memory on Linux")


def peak_mb() -> float:
    """Largest resident memory this process has had, MiB; `getrusage` would count the parent's, too."""
    return status_mb("VmHWM")


class Table:
    """An "encoder" whose vectors are made beforehand: text `N` is row N of a memory-mapped file."""

    def __init__(self, path: Path) -> None:
        self.prompts: dict[str, str] = {}
        self._vectors = np.load(path, mmap_mode="r")
        self._other = np.random.default_rng(0).normal(size=self._vectors.shape[1]).astype(np.float32)

    def encode(self, inputs: list[str], **_: Any) -> np.ndarray:
        """Vectors of row numbers; other texts (the probes) share one."""
        rows = [int(text) if text.isdigit() else -1 for text in inputs]
        return np.stack([self._vectors[row] if row >= 0 else self._other for row in rows])


def real_vectors(model: str | None, corpus: Path | None, count: int, seed: int) -> tuple[np.ndarray, str]:
    """Vectors of real texts, or clustered noise where no model is given, and how they were made."""
    if model is None or corpus is None:
        generator = np.random.default_rng(seed)
        spectrum = 1.0 / np.sqrt(1.0 + np.arange(384))
        vectors = generator.normal(size=(count, 384)) * spectrum
        return vectors.astype(np.float32), "gaussian, 384 dimensions, falling spectrum (no model given)"
    from sentence_transformers import SentenceTransformer

    texts = list(sentences(corpus, count))
    vectors = SentenceTransformer(model).encode_document(texts, batch_size=32, show_progress_bar=True)
    return np.asarray(vectors, np.float32), f"{len(texts):,} sentences of {corpus.name} by {Path(model).name}"


def sentences(corpus: Path, count: int) -> Iterator[str]:
    """Sentences of a corpus, up to `count`."""
    from ubmoe_st.index import Corpus

    done = 0
    for document in Corpus(corpus):
        for sentence in getattr(document, "text", "").replace("\n", " ").split(". "):
            if 30 <= len(sentence) <= 300:
                yield sentence
                done += 1
                if done == count:
                    return


def extended(seeds: np.ndarray, rows: int, noise: float, path: Path, seed: int) -> None:
    """Write `rows` unit vectors: convex mixtures of two seed vectors plus noise, so none is a copy of another."""
    generator = np.random.default_rng(seed)
    unit = seeds / np.linalg.norm(seeds, axis=1, keepdims=True)
    out = np.lib.format.open_memmap(path, "w+", np.float32, (rows, seeds.shape[1]))
    scale = noise / np.sqrt(seeds.shape[1])
    for start in range(0, rows, 20_000):
        count = min(20_000, rows - start)
        first, second = generator.integers(len(unit), size=(2, count))
        share = generator.uniform(0.5, 1.0, size=(count, 1))
        block = share * unit[first] + (1 - share) * unit[second]
        block += scale * generator.normal(size=block.shape)
        out[start : start + count] = block / np.linalg.norm(block, axis=1, keepdims=True)
    out.flush()


def measure_kind(
    folder: Path, vectors: Path, tuning: np.ndarray, queries: np.ndarray, truth: np.ndarray, kind: str, recall: float
) -> dict[str, Any]:
    """Build one kind over the stored vectors, tune it with other queries, and measure it in this (fresh) process."""
    from ubmoe_st.index import EmbeddingIndex

    index = EmbeddingIndex.open(folder, model=Table(vectors))
    began = time.perf_counter()
    index.reindex(kind)
    made = time.perf_counter() - began
    found: dict[str, Any] = {
        "kind": index.kind,
        "factory": index.info["index"]["factory"],
        "rows": len(index),
        "make_index_s": round(made, 1),
        "bytes_per_row": round(index.info["index"]["bytes"] / len(index), 1),
    }
    if index.kind != "flat":
        report = index.tune(recall, k=K, queries=tuning)
        found |= {"parameters": report.chosen.parameters, "tuned_recall": round(report.chosen.recall, 4)}
    index = EmbeddingIndex.open(folder, model=Table(vectors))
    before = status_mb("RssAnon")
    index.search(queries[:2], K)
    began = time.perf_counter()
    rows = np.array([[int(name) for name in line] for line in index.search(queries, K)[1]])
    batch_seconds = time.perf_counter() - began
    single = min(50, len(queries))
    began = time.perf_counter()
    for query in queries[:single]:
        index.search(query, K)
    one_seconds = time.perf_counter() - began
    hits = [len(np.intersect1d(a, b)) for a, b in zip(rows, truth)]
    return found | {
        "recall_at_10": round(float(np.mean(hits)) / K, 4),
        "queries_per_s_batch": round(len(queries) / batch_seconds, 1),
        "queries_per_s_single": round(single / one_seconds, 1),
        "search_memory_mb": round(status_mb("RssAnon") - before, 1),
    }


def kinds_part(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The table of index kinds."""
    from ubmoe_st.index import EmbeddingIndex

    seeds, origin = real_vectors(arguments.model, arguments.corpus, arguments.seed_rows, arguments.seed)
    held = min(arguments.queries, len(seeds) // 8)
    queries, tuning = seeds[-held:], seeds[-2 * held : -held]
    vectors = work / "vectors.npy"
    extended(seeds[: -2 * held], arguments.rows, arguments.noise, vectors, arguments.seed)
    began = time.perf_counter()
    corpus = ({"id": str(n), "text": str(n)} for n in range(arguments.rows))
    folder = work / "index"
    index = EmbeddingIndex.build(Table(vectors), corpus, folder, kind="flat", dtype=arguments.dtype)
    stored = time.perf_counter() - began
    began = time.perf_counter()
    truth = np.array([[int(name) for name in line] for line in index.search(queries, K, exact=True)[1]])
    brute = time.perf_counter() - began
    table = []
    for kind in arguments.kinds.split(","):
        row = in_process(measure_kind, folder, vectors, tuning, queries, truth, kind, arguments.recall)
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
        table.append(row)
    return {
        "vectors": f"{origin}, extended to {arguments.rows:,} rows by mixing pairs and noise {arguments.noise}",
        "queries": held,
        "store_rows_s": round(stored, 1),
        "brute_force_s": round(brute, 2),
        "dtype": arguments.dtype,
        "kinds": table,
    }


def streaming(model: str, corpus: Path, out: Path) -> dict[str, Any]:
    """Text to index with `EmbeddingIndex.build`."""
    from ubmoe_st.index import EmbeddingIndex

    encoder = load(model)
    before = peak_mb()
    began = time.perf_counter()
    index = EmbeddingIndex.build(encoder, corpus, out, kind="flat", with_title=False)
    return cost("streaming build", len(index), time.perf_counter() - began, before)


def plain_loop(model: str, corpus: Path, out: Path) -> dict[str, Any]:
    """Text to index with `encode` and `IndexFlatIP`, all in memory."""
    import faiss

    encoder = load(model)
    before = peak_mb()
    began = time.perf_counter()
    rows = [json.loads(line) for line in corpus.open(encoding="utf-8")]
    vectors = encoder.encode_document([row["text"] for row in rows], batch_size=32, normalize_embeddings=True)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    out.mkdir()
    faiss.write_index(index, str(out / "index.faiss"))
    (out / "ids.json").write_text(json.dumps([row["id"] for row in rows]))
    return cost("plain loop", len(rows), time.perf_counter() - began, before)


def with_autofaiss(model: str, corpus: Path, out: Path) -> dict[str, Any]:
    """Text to index with `encode` and autofaiss."""
    from autofaiss import build_index

    encoder = load(model)
    before = peak_mb()
    began = time.perf_counter()
    rows = [json.loads(line) for line in corpus.open(encoding="utf-8")]
    vectors = encoder.encode_document([row["text"] for row in rows], batch_size=32, normalize_embeddings=True)
    build_index(vectors, str(out) + ".faiss", str(out) + ".json", max_index_memory_usage="4G", metric_type="ip")
    return cost("autofaiss", len(rows), time.perf_counter() - began, before)


def load(model: str) -> Any:
    """A model folder or Hub id; `table:FILE` stands for vectors made beforehand (measures all but the model)."""
    if model.startswith("table:"):
        table = Table(Path(model.removeprefix("table:")))
        table.encode_document = lambda texts, **_: table.encode(texts)  # type: ignore[attr-defined]
        return table
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(model)


def cost(name: str, rows: int, seconds: float, before: float) -> dict[str, Any]:
    """One line of the build table."""
    return {
        "how": name,
        "rows": rows,
        "seconds": round(seconds, 1),
        "rows_per_s": round(rows / seconds, 1),
        "peak_memory_above_model_mb": round(peak_mb() - before, 1),
    }


def build_part(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Streaming against the plain loop, and autofaiss if it is there."""
    corpus = work / "texts.jsonl"
    model = arguments.model
    if model is None or arguments.corpus is None:
        model = f"table:{work / 'vectors.npy'}"
        texts: Iterator[str] = (str(n) for n in range(arguments.rows))
    else:
        texts = sentences(arguments.corpus, arguments.build_rows)
    with corpus.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts))
    table = []
    for name, run in (("loop", plain_loop), ("stream", streaming), ("autofaiss", with_autofaiss)):
        if name == "autofaiss" and shutil.which("autofaiss") is None:
            table.append({"how": "autofaiss", "skipped": "not installed"})
            continue
        table.append(in_process(run, model, corpus, work / f"built-{name}"))
        sys.stdout.write(json.dumps(table[-1]) + "\n")
        sys.stdout.flush()
    return table


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function run in a fresh process, so that memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    """Parse the command line, run both parts and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; without one the vectors are noise of embedding-like shape")
    parser.add_argument("--corpus", type=Path, help="jsonl(.gz) corpus with real texts")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the kinds part")
    parser.add_argument("--seed-rows", type=int, default=20_000, help="texts embedded as seeds of those rows")
    parser.add_argument("--build-rows", type=int, default=5_000, help="texts of the build part")
    parser.add_argument("--queries", type=int, default=500, help="held-back seeds as queries; as many for tuning")
    parser.add_argument("--kinds", default="flat,int8,hnsw,hnsw-int8,ivf-flat,ivf-pq,binary")
    parser.add_argument("--recall", type=float, default=0.96, help="recall the search parameters are tuned to")
    parser.add_argument("--noise", type=float, default=0.35, help="length of the perturbation")
    parser.add_argument("--dtype", default="float32", help="type of the stored vectors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", default="kinds,build")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-index"), help="scratch folder, emptied first")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/index.json"))
    arguments = parser.parse_args()
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    import faiss

    result: dict[str, Any] = {
        "command": "python benchmarks/index.py " + " ".join(sys.argv[1:]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cpus": os.cpu_count(), "threads": faiss.omp_get_max_threads(), "machine": platform.machine()},
        "versions": {"faiss": faiss.__version__, "numpy": np.__version__, "python": platform.python_version()},
    }
    if "kinds" in arguments.parts:
        result["search"] = kinds_part(arguments, arguments.work)
    if "build" in arguments.parts:
        result["build"] = build_part(arguments, arguments.work)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(arguments.work)


if __name__ == "__main__":
    main()
