"""Text to index in three ways, each in a process of its own; `benchmarks.index` calls it. Needs numpy alone to start.

    python benchmarks/index_systems.py SYSTEM '{"model": ..., "corpus": ..., "out": ..., "budget": ...}'

prints one JSON line: rows, seconds, and the peak of resident memory above what there was before the first row was read.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def status_mb(name: str) -> float:
    """A memory figure of this process, MiB: VmRSS is what is resident, VmHWM the most that ever was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {name}: this benchmark measures memory on Linux")


class Table:
    """A free "encoder": a text that begins with `N` has row N of a .npy file as its vector.

    It stands for a model that costs neither time nor memory. Rows are read and not mapped, because the pages of a map
    would count as memory of whoever encodes.

    Args:
        path: A C-order float32 file, (N, D).
    """

    def __init__(self, path: str | Path) -> None:
        self.prompts: dict[str, str] = {}
        mapped = np.load(path, mmap_mode="r")
        self.rows, self.dimension = mapped.shape
        self._offset = int(mapped.offset)
        self._file = os.open(path, os.O_RDONLY)
        self._other = np.random.default_rng(0).normal(size=self.dimension).astype(np.float32)

    def encode(self, inputs: list[str], **_: Any) -> np.ndarray:
        """Vectors, (N, D); texts without a number (the probes of an index) share one."""
        return np.stack([self._vector(text) for text in inputs])

    encode_document = encode

    def _vector(self, text: str) -> np.ndarray:
        number = text.split(" ", 1)[0]
        if not number.isdigit():
            return self._other
        size = 4 * self.dimension
        return np.frombuffer(os.pread(self._file, size, self._offset + int(number) * size), np.float32)


def load(model: str) -> Any:
    """A model folder or Hub id; `table:FILE` is a free encoder."""
    if model.startswith("table:"):
        return Table(model.removeprefix("table:"))
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(model)


def encoded(encoder: Any, corpus: str) -> tuple[list[str], np.ndarray]:
    """What the plain loop does: all rows in a list, all vectors in an array."""
    with open(corpus, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    vectors = encoder.encode_document([row["text"] for row in rows], batch_size=32, normalize_embeddings=True)
    return [row["id"] for row in rows], np.asarray(vectors, np.float32)


def plain_loop(encoder: Any, corpus: str, out: str, budget: str) -> dict[str, Any]:
    """`encode` and `IndexFlatIP`."""
    import faiss

    ids, vectors = encoded(encoder, corpus)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    faiss.write_index(index, f"{out}.faiss")
    Path(f"{out}.json").write_text(json.dumps(ids))
    return {"rows": len(ids), "index": "Flat"}


def with_autofaiss(encoder: Any, corpus: str, out: str, budget: str) -> dict[str, Any]:
    """`encode` and autofaiss, which chooses the kind itself."""
    from autofaiss import build_index

    ids, vectors = encoded(encoder, corpus)
    _, facts = build_index(
        vectors,
        f"{out}.faiss",
        f"{out}.infos.json",
        max_index_memory_usage="4G",
        current_memory_available="8G",
        metric_type="ip",
        verbose=40,
    )
    Path(f"{out}.json").write_text(json.dumps(ids))
    return {"rows": len(ids), "index": (facts or {}).get("index_key", "")}


def streaming(encoder: Any, corpus: str, out: str, budget: str, kind: str = "flat") -> dict[str, Any]:
    """`EmbeddingIndex.build` of the same index, with a faiss file."""
    from ubmoe_st.index import EmbeddingIndex

    index = EmbeddingIndex.build(
        encoder, corpus, out, kind=kind, faiss_file=True, with_title=False, memory_budget=budget
    )
    return {"rows": len(index), "index": index.info["index"]["factory"]}


def streaming_auto(encoder: Any, corpus: str, out: str, budget: str) -> dict[str, Any]:
    """`EmbeddingIndex.build`, which chooses the kind itself."""
    return streaming(encoder, corpus, out, budget, "auto")


SYSTEMS: dict[str, Callable[..., dict[str, Any]]] = {
    "plain loop": plain_loop,
    "streaming": streaming,
    "plain loop, autofaiss": with_autofaiss,
    "streaming, auto": streaming_auto,
}


def main() -> None:
    """Run one system."""
    arguments = json.loads(sys.argv[2])
    encoder = load(arguments.pop("model"))
    encoder.encode_document(["warm up"])
    import pyarrow as pa

    pa.array(["a"])  # with faiss, the libraries that every system loads or could load
    import faiss

    faiss.IndexFlatIP(4).add(np.zeros((1, 4), np.float32))
    before = status_mb("VmRSS")
    began = time.perf_counter()
    found = SYSTEMS[sys.argv[1]](encoder, **arguments)
    seconds = time.perf_counter() - began
    facts = {**found, "seconds": seconds, "peak_mb": max(0.0, status_mb("VmHWM") - before)}
    sys.stdout.write("\n" + json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
