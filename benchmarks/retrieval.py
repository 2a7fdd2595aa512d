"""Retrieval on BEIR-layout folders: `python -m benchmarks.retrieval --model models/ubmoe-135m --base ...`.

Every dense system runs through `EmbeddingIndex` with its own prompts; BM25 (`bm25s`) and the other peers run in the
same command on the same documents. nDCG@10, Recall@100 and MRR@10 are those of `ir-measures`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from benchmarks import data as local
from benchmarks.results import RESULTS, ResultFile, bootstrap_mean, command_line, interval, nearest, run_record
from training.data import data_folder

if TYPE_CHECKING:
    from benchmarks.data import Collection
    from benchmarks.peers import Encoder

logger = logging.getLogger(__name__)

COLLECTIONS = ("cranfield", "cisi", "adi")
METRICS = ("nDCG@10", "R@100", "RR@10")
"""Names in ir-measures; RR@10 is the MRR@10 of the tables."""
DEPTH = 100
BM25 = "bm25"
SYSTEMS = (BM25, "all-MiniLM-L6-v2", "base-causal", "base-prompted")

Ranking = dict[str, dict[str, float]]
"""Query id to document id to score."""


def rank_bm25(collection: Collection, depth: int = DEPTH) -> Ranking:
    """BM25 ranking by `bm25s` with its defaults (Lucene variant, k1 1.5, b 0.75, English stop words, no stemming)."""
    import bm25s

    ids = list(collection.documents)
    retriever = bm25s.BM25()
    retriever.index(
        bm25s.tokenize(list(collection.documents.values()), stopwords="en", show_progress=False), show_progress=False
    )
    tokens = bm25s.tokenize(list(collection.queries.values()), stopwords="en", show_progress=False)
    rows, scores = retriever.retrieve(tokens, k=min(depth, len(ids)), show_progress=False)
    return {
        query: {ids[int(row)]: float(score) for row, score in zip(line, values)}
        for query, line, values in zip(collection.queries, rows, scores)
    }


def rank_dense(model: Any, collection: Collection, out: str | Path, depth: int = DEPTH) -> Ranking:
    """Ranking through `EmbeddingIndex`; a build that was interrupted goes on.

    Args:
        model: A `SentenceTransformer`.
        collection: Documents and queries; documents without any text cannot be found and are left out.
        out: Folder of the index.
        depth: Documents per query.
    """
    from ubmoe_st import EmbeddingIndex

    rows = [{"id": key, "text": text} for key, text in collection.documents.items() if text.strip()]
    index = EmbeddingIndex.build(model, rows, out, progress=True)
    scores, found = index.search(list(collection.queries.values()), min(depth, len(rows)))
    return {
        query: {identity: float(score) for identity, score in zip(line, values)}
        for query, line, values in zip(collection.queries, found, scores)
    }


def measure(collection: Collection, ranking: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Value of each metric for each query, from ir-measures; a query without results counts 0."""
    import ir_measures

    metrics = [ir_measures.parse_measure(name) for name in METRICS]
    values: dict[str, dict[str, float]] = {name: dict.fromkeys(collection.queries, 0.0) for name in METRICS}
    relevance = {query: collection.relevance[query] for query in collection.queries}
    for result in ir_measures.iter_calc(metrics, relevance, {query: dict(found) for query, found in ranking.items()}):
        values[str(result.measure)][result.query_id] = float(result.value)
    return values


def score(
    collection: Collection, ranking: Mapping[str, Mapping[str, float]], *, seed: int, resamples: int = 1000
) -> list[dict[str, Any]]:
    """Metrics x100 of one ranking with bootstrap intervals over the queries; `outcomes` are the values per query."""
    scores = []
    for name, by_query in measure(collection, ranking).items():
        values = [100 * by_query[query] for query in collection.queries]
        draws = bootstrap_mean(values, seed=seed, resamples=resamples)
        low, high = interval(draws)
        scores.append(
            {
                "task": collection.name,
                "split": "test",
                "metric": name,
                "value": float(np.mean(values)),
                "low": low,
                "high": high,
                "sd": float(draws.std()),
                "n": len(values),
                "outcomes": [round(value, 2) for value in values],
            }
        )
    return scores


def run(
    system: Encoder | str,
    collections: Sequence[Collection],
    *,
    out: str | Path = RESULTS,
    indexes: str | Path = "runs/indexes",
    seed: int = 0,
    resamples: int = 1000,
    command: str = "",
    say: Callable[[str], None] = logger.info,
) -> Path:
    """Measure one system on collections and write `retrieval-<row>.json` after each of them.

    Args:
        system: `bm25` or an opened encoder.
        collections: From `data.read_collection`.
        out: Folder of the result files.
        indexes: Folder for the indexes, kept so that an interrupted run goes on.
        seed: Of the bootstrap.
        resamples: Draws of the bootstrap.
        command: Recorded as it is.
        say: Takes one line per collection.

    Returns:
        The result file.
    """
    facts: dict[str, Any]
    if isinstance(system, str):
        row, label, supervision = system, "BM25", "none"
        facts = {"dtype": "none", "prompt": "none", "pooling": "none", "fingerprint": "bm25s"}
    else:
        row, label, supervision = system.row, system.label, system.supervision
        facts = {
            "dtype": system.dtype,
            "prompt": system.prompt,
            "pooling": system.pooling,
            "fingerprint": system.fingerprint,
            "max_tokens": system.model.max_seq_length,
        }
    record = run_record(
        command, seed=seed, packages=("bm25s", "ir-measures", "pytrec-eval-terrier", "faiss-cpu"), **facts
    )
    file = ResultFile(
        Path(out) / f"retrieval-{row}.json",
        benchmark="retrieval",
        row=row,
        run=record,
        label=label,
        supervision=supervision,
    )
    for collection in collections:
        if found := file.find(task=collection.name, metric=METRICS[0]):
            say(f"{row} {collection.name}: nDCG@10 {found['value']:.2f} (kept)")
            continue
        start = time.perf_counter()
        if isinstance(system, str):
            ranking = rank_bm25(collection)
        else:
            name = f"{row}-{system.fingerprint}".replace("/", "-")
            ranking = rank_dense(system.model, collection, Path(indexes) / collection.name / name)
        scores = score(collection, ranking, seed=seed, resamples=resamples)
        seconds = round(time.perf_counter() - start, 1)
        file.add(*({**one, "data": "local", "seconds": seconds} for one in scores))
        say(f"{row} {collection.name}: nDCG@10 {scores[0]['value']:.2f} in {seconds:.0f} s")
    return file.path


app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[list[str] | None, typer.Option(help="Checkpoint folder; repeat for more rows.")] = None,
    peers: Annotated[str, typer.Option(help="Peers, comma-separated.")] = ",".join(SYSTEMS),
    collection: Annotated[list[str] | None, typer.Option(help="Folder under retrieval/; repeat for more.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Local data; default $UBMOE_DATA or ../shared/data.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model of the base-* peers; default $UBMOE_BASE.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = RESULTS,
    indexes: Annotated[Path, typer.Option(help="Folder for the indexes.")] = Path("runs/indexes"),
    seed: int = 0,
    threads: Annotated[int | None, typer.Option(help="torch threads; default: torch's choice.")] = None,
    device: str = "cpu",
) -> None:
    """Measure retrieval against peers in one run; finished collections are kept."""
    import torch

    from benchmarks.peers import open_encoder

    if threads:
        torch.set_num_threads(threads)
    try:
        folder = data_folder(data_dir)
        known = local.collections(folder)
        for name in collection or COLLECTIONS:
            if name not in known:
                raise ValueError(f"Expected a folder under retrieval/, got {name!r} ({nearest(name, known)}).")
        loaded = [local.read_collection(folder / "retrieval" / name) for name in collection or COLLECTIONS]
        for name in [*filter(None, peers.split(",")), *(model or [])]:
            system = BM25 if name == BM25 else open_encoder(name, base=base, device=device)
            run(
                system,
                loaded,
                out=out,
                indexes=indexes,
                seed=seed,
                command=command_line("benchmarks.retrieval"),
                say=typer.echo,
            )
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
