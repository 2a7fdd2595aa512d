"""Dimensions x precision: `python -m benchmarks.dimensions --model models/ubmoe-135m`.

What a vector keeps when it is cut to its leading dimensions (sentence-transformers' `truncate_dim`) and stored as
float32, int8 or bits (its `quantize_embeddings`): STSBenchmark dev, nDCG@10 of the retrieval development set, bytes per
vector. Texts are encoded once; both sides of a comparison have the same form. int8 codes are compared by cosine, with
the ranges of each dimension over all texts of the task; bits by the share that is equal.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import numpy as np
import typer

from benchmarks import data as local
from benchmarks.data import DOLLY_DEV
from benchmarks.options import DataDir, ResultsFolder
from benchmarks.results import (
    RESULTS,
    ResultFile,
    bootstrap_spearman,
    command_line,
    interval,
    one_line_errors,
    run_record,
    spearman,
)
from benchmarks.retrieval import DEPTH, TEST_COLLECTIONS, Ranking, score
from training.data import data_folder

if TYPE_CHECKING:
    from benchmarks.data import Collection
    from benchmarks.peers import Encoder

logger = logging.getLogger(__name__)

Precision = Literal["float32", "int8", "binary"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DIMENSIONS = (384, 256, 128, 64)
"""Beside all of them; those that a model does not have are left out."""
STS_DEV = "STSBenchmark"


def reduced(vectors: np.ndarray, dimension: int | None, precision: Precision) -> np.ndarray:
    """Vectors as they are stored.

    Args:
        vectors: (N, D), fp32.
        dimension: Leading dimensions that are kept. None: all.
        precision: Of the stored numbers; `binary` packs eight dimensions into a byte.

    Returns:
        (N, K) as float32 of length 1 or as int8 codes, or (N, K / 8) bytes.
    """
    from sentence_transformers.util import quantize_embeddings, truncate_embeddings

    kept = truncate_embeddings(vectors, dimension)
    kept = kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), 1e-12)
    stored: Any = quantize_embeddings(kept, "ubinary" if precision == "binary" else precision)
    return np.asarray(stored)


def similarities(first: np.ndarray, second: np.ndarray, precision: Precision) -> np.ndarray:
    """Similarity of each row of `first` with each of `second`, both from `reduced`, (N, M)."""
    if precision == "binary":
        first, second = (np.unpackbits(rows, axis=1).astype(np.float32) * 2 - 1 for rows in (first, second))
    else:
        first, second = (
            rows.astype(np.float32) / np.maximum(np.linalg.norm(rows.astype(np.float32), axis=1, keepdims=True), 1e-12)
            for rows in (first, second)
        )
    return first @ second.T


def forms(width: int, dimensions: Sequence[int] = DIMENSIONS) -> list[tuple[int, Precision]]:
    """Dimension and precision of each row of the table, for vectors of `width` dimensions."""
    kept = [width, *(dimension for dimension in dimensions if dimension < width)]
    return [(dimension, precision) for dimension in kept for precision in PRECISIONS]


def sts_scores(
    vectors: np.ndarray, gold: Sequence[float], dimension: int, precision: Precision, *, seed: int, resamples: int
) -> dict[str, Any]:
    """Spearman x100 of the pairs of rows 2n and 2n + 1 of `vectors`, (2N, D), with the gold scores."""
    stored = reduced(vectors, dimension, precision)
    found = [float(similarities(a[None], b[None], precision)[0, 0]) for a, b in zip(stored[::2], stored[1::2])]
    draws = bootstrap_spearman(gold, found, seed=seed, resamples=resamples)
    low, high = interval(draws)
    value = spearman(gold, found)
    spread = {"low": low, "high": high, "sd": float(draws.std()), "n": len(gold)}
    return {"task": STS_DEV, "split": "validation", "metric": "cosine_spearman", "value": value, **spread}


def ranked(
    collection: Collection, queries: np.ndarray, documents: np.ndarray, dimension: int, precision: Precision
) -> Ranking:
    """The ranking by similarity; ties in the order of the documents.

    Args:
        collection: Its texts.
        queries: Vectors of its queries, (Q, D).
        documents: Vectors of its documents, (N, D).
        dimension: Leading dimensions that are kept.
        precision: As in `reduced`.
    """
    stored = reduced(np.concatenate([documents, queries]), dimension, precision)
    table = similarities(stored[len(documents) :], stored[: len(documents)], precision)
    names = list(collection.documents)
    order = np.argsort(-table, axis=1, kind="stable")[:, :DEPTH]
    return {
        query: {names[number]: float(values[number]) for number in line}
        for query, line, values in zip(collection.queries, order, table)
    }


def run(
    encoder: Encoder,
    folder: Path,
    *,
    collections: Sequence[str] = (DOLLY_DEV,),
    dimensions: Sequence[int] = DIMENSIONS,
    out: str | Path = RESULTS,
    batch_size: int = 32,
    seed: int = 0,
    resamples: int = 1000,
    command: str = "",
    say: Callable[[str], None] = logger.info,
) -> Path:
    """Measure every form of an encoder's vectors and write `dimensions-<row>.json` after each task.

    Args:
        encoder: From `peers.open_encoder`.
        folder: The data folder.
        collections: Of `data.collections`.
        dimensions: Leading dimensions, beside all.
        out: Folder of the result file.
        batch_size: Texts per batch.
        seed: Of the bootstrap.
        resamples: Draws of the bootstrap.
        command: Recorded as it is.
        say: Takes one line per task.

    Returns:
        The result file.
    """
    model: Any = encoder.model
    record = run_record(
        command,
        seed=seed,
        packages=("ir-measures", "scipy"),
        dtype=encoder.dtype,
        prompt=encoder.prompt,
        pooling=encoder.pooling,
        fingerprint=encoder.fingerprint,
    )
    file = ResultFile(
        Path(out) / f"dimensions-{encoder.row}.json",
        benchmark="dimensions",
        row=encoder.row,
        run=record,
        label=encoder.label,
        supervision=encoder.supervision,
    )
    table = forms(int(model.get_embedding_dimension()), dimensions)

    def encoded(method: Callable[..., Any], texts: Sequence[str]) -> np.ndarray:
        vectors: np.ndarray = method(list(texts), batch_size=batch_size, convert_to_numpy=True).astype(np.float32)
        return vectors

    for name in (STS_DEV, *collections):
        if all(file.find(task=name, dimension=dimension, precision=precision) for dimension, precision in table):
            say(f"{encoder.row} {name}: kept")
            continue
        scores = []
        options: dict[str, Any] = {"seed": seed, "resamples": resamples}
        if name == STS_DEV:
            pairs = local.sts_pairs(folder, STS_DEV, "validation")
            vectors = encoded(model.encode, [t for both in zip(pairs["sentence1"], pairs["sentence2"]) for t in both])
            found = {form: sts_scores(vectors, pairs["score"], *form, **options) for form in table}
        else:
            whole = local.open_collection(folder, name)  # a document without text has no vector, and is not found
            collection = replace(whole, documents={key: text for key, text in whole.documents.items() if text.strip()})
            queries = encoded(model.encode_query, [*collection.queries.values()])
            documents = encoded(model.encode_document, [*collection.documents.values()])
            found = {
                form: score(collection, ranked(collection, queries, documents, *form), **options)[0] for form in table
            }
        for (dimension, precision), one in found.items():
            size = reduced(np.eye(2, table[0][0], dtype=np.float32), dimension, precision)[0].nbytes
            scores.append({**one, "dimension": dimension, "precision": precision, "bytes": size, "data": "local"})
        file.add(*scores)
        file.add(tables={f"dimensions-{encoder.row}": make_table(file.content["scores"])})
        say(f"{encoder.row} {name}: {scores[0]['value']:.2f} in full, {scores[-1]['value']:.2f} in the smallest form")
    return file.path


def make_table(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One line for each form, a column for each task."""
    tasks = list(dict.fromkeys(one["task"] for one in scores))
    labels = {STS_DEV: "STSB-dev", **{task: f"{task} nDCG@10" for task in tasks if task != STS_DEV}}
    cells = {(one["dimension"], one["precision"], one["task"]): one for one in scores}
    rows = []
    for dimension, precision, size in dict.fromkeys((o["dimension"], o["precision"], o["bytes"]) for o in scores):
        found = [cells.get((dimension, precision, task)) for task in tasks]
        rows.append([str(dimension), precision, str(size), *(one and float(one["value"]) for one in found)])
    return {"columns": ["dimensions", "precision", "bytes/vector", *(labels[task] for task in tasks)], "rows": rows}


app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[list[str] | None, typer.Option(help="Checkpoint folder or peer; repeat for more.")] = None,
    test_sets: Annotated[bool, typer.Option(help=f"Also {', '.join(TEST_COLLECTIONS)}, for the final table.")] = False,
    data_dir: DataDir = None,
    base: Annotated[str | None, typer.Option(help="Base model of the base-* peers; default $UBMOE_BASE.")] = None,
    out: ResultsFolder = RESULTS,
    batch_size: int = 32,
    seed: int = 0,
    threads: Annotated[int | None, typer.Option(help="torch threads; default: torch's choice.")] = None,
    device: str = "cpu",
) -> None:
    """Measure vectors cut to fewer dimensions and stored in fewer bits; finished tasks are kept."""
    import torch

    from benchmarks.peers import open_encoder

    if threads:
        torch.set_num_threads(threads)
    with one_line_errors():
        folder = data_folder(data_dir)
        for name in model or ["models/ubmoe-135m"]:
            run(
                open_encoder(name, base=base, device=device),
                folder,
                collections=(DOLLY_DEV, *(TEST_COLLECTIONS if test_sets else ())),
                out=out,
                batch_size=batch_size,
                seed=seed,
                command=command_line("benchmarks.dimensions"),
                say=typer.echo,
            )


if __name__ == "__main__":
    app()
