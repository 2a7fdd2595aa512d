"""Retrieval on BEIR-layout folders: `python -m benchmarks.retrieval --model models/ubmoe-135m --base ...`.

Every dense system runs through `EmbeddingIndex` with its own prompts; BM25 (`bm25s`) and the other peers run in the
same command on the same documents. nDCG@10, Recall@100 and MRR@10 are those of `ir-measures`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from benchmarks import data as local
from benchmarks.data import DOLLY_DEV
from benchmarks.options import DataDir, ResultsFolder
from benchmarks.results import (
    RESULTS,
    ResultFile,
    bootstrap_mean,
    command_line,
    interval,
    nearest,
    one_line_errors,
    run_record,
)
from training.data import data_folder
from training.embedders import NAMED
from ubmoe_st.serving.command import ComputeOption

if TYPE_CHECKING:
    from benchmarks.data import Collection
    from benchmarks.peers import Encoder

logger = logging.getLogger(__name__)

TEST_COLLECTIONS = ("cranfield", "cisi", "adi")
COLLECTIONS = (DOLLY_DEV, *TEST_COLLECTIONS)
"""What choices are made on, and what is for the final tables."""
METRICS = ("nDCG@10", "R@100", "RR@10")
"""Names in ir-measures; RR@10 is the MRR@10 of the tables."""
DEPTH = 100
BM25 = "bm25"
SYSTEMS = (BM25, "all-MiniLM-L6-v2", "base-causal", "base-prompted")

Ranking = dict[str, dict[str, float]]
"""Query id to document id to score."""

RRF_CONSTANT = 60
WEIGHTS = tuple(step / 10 for step in range(11))
"""Shares of the vectors that `choose_weight` tries."""


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
                "split": local.split_of(collection.name),
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


def rank_rrf(first: Ranking, second: Ranking, depth: int = DEPTH) -> Ranking:
    """Reciprocal rank fusion of two rankings: a document has the sum of 1 / (60 + rank), ranks counted from 1."""
    fused: Ranking = {}
    for query in first:
        points: dict[str, float] = {}
        for ranking in (first, second):
            found = sorted(ranking.get(query, {}).items(), key=lambda item: -item[1])
            for rank, (document, _) in enumerate(found, start=1):
                points[document] = points.get(document, 0.0) + 1 / (RRF_CONSTANT + rank)
        fused[query] = _best(points, depth)
    return fused


def rank_weighted(dense: Ranking, sparse: Ranking, weight: float, depth: int = DEPTH) -> Ranking:
    """`weight` x dense + (1 - weight) x sparse, the scores of each query scaled to 0 to 1.

    A document that one of the two did not find has 0 there.
    """
    fused: Ranking = {}
    for query in dense:
        points: dict[str, float] = {}
        for share, ranking in ((weight, dense), (1 - weight, sparse)):
            found = ranking.get(query, {})
            low, high = min(found.values(), default=0.0), max(found.values(), default=0.0)
            for document, value in found.items():
                scaled = (value - low) / (high - low) if high > low else 1.0
                points[document] = points.get(document, 0.0) + share * scaled
        fused[query] = _best(points, depth)
    return fused


def _best(points: Mapping[str, float], depth: int) -> dict[str, float]:
    return dict(sorted(points.items(), key=lambda item: -item[1])[:depth])


def choose_weight(collection: Collection, dense: Ranking, sparse: Ranking) -> float:
    """The share of the vectors in `rank_weighted` with the best mean nDCG@10, of `WEIGHTS`; the middle of equals."""
    found = {}
    for weight in WEIGHTS:
        by_query = measure(collection, rank_weighted(dense, sparse, weight))[METRICS[0]]
        found[weight] = round(float(np.mean(list(by_query.values()))), 6)
    best = [weight for weight, value in found.items() if value == max(found.values())]
    return best[len(best) // 2]


@dataclass(frozen=True)
class Row:
    """A row of the table: how it ranks, and what its file says of it."""

    name: str
    label: str
    supervision: str
    rank: Callable[[Collection], Ranking]
    facts: dict[str, Any]


def row_of(system: Encoder | str, indexes: str | Path) -> Row:
    """The row of BM25 or of an opened encoder, whose indexes are kept under `indexes`."""
    if isinstance(system, str):
        facts: dict[str, Any] = {"dtype": "none", "prompt": "none", "pooling": "none", "fingerprint": "bm25s"}
        return Row(system, "BM25", "none", rank_bm25, facts)
    numbers = "" if system.dtype == "float32" else f"-{system.dtype}".replace(", ", "-").replace(" ", "-")
    name = f"{system.row}-{system.fingerprint}{numbers}".replace("/", "-")
    facts = {
        "dtype": system.dtype,
        "prompt": system.prompt,
        "pooling": system.pooling,
        "fingerprint": system.fingerprint,
        "max_tokens": system.model.max_seq_length,
    }

    def rank(collection: Collection) -> Ranking:
        return rank_dense(system.model, collection, Path(indexes) / collection.name / name)

    return Row(system.row, system.label, system.supervision, rank, facts)


def matches(sparse: Ranking) -> Ranking:
    """A BM25 ranking without the documents that share no word with the query, whose order means nothing."""
    return {query: {name: value for name, value in found.items() if value > 0} for query, found in sparse.items()}


def weight_or_best(
    weight: float | None, dev: Collection | None, rank: Callable[[Collection], tuple[Ranking, Ranking]]
) -> float:
    """The share of the vectors that was given, else the best on a set.

    Args:
        weight: The one given.
        dev: What it is chosen on where none is.
        rank: The rankings of a set by vectors and by BM25.

    Raises:
        ValueError: If there is neither a weight nor a set.
    """
    if weight is not None:
        return weight
    if dev is None:
        raise ValueError(f"Expected a weight or a set to choose it on, got neither. Give --weight, or {DOLLY_DEV}.")
    return choose_weight(dev, *rank(dev))


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
        collections: From `data.open_collection`.
        out: Folder of the result files.
        indexes: Folder for the indexes, kept so that an interrupted run goes on.
        seed: Of the bootstrap.
        resamples: Draws of the bootstrap.
        command: Recorded as it is.
        say: Takes one line per collection.

    Returns:
        The result file.
    """
    row = row_of(system, indexes)
    return _measure_row(row, collections, out=out, seed=seed, resamples=resamples, command=command, say=say)


def run_hybrid(
    encoder: Encoder,
    collections: Sequence[Collection],
    *,
    dev: Collection | None = None,
    weight: float | None = None,
    out: str | Path = RESULTS,
    indexes: str | Path = "runs/indexes",
    seed: int = 0,
    resamples: int = 1000,
    command: str = "",
    say: Callable[[str], None] = logger.info,
) -> list[Path]:
    """Measure vectors joined with BM25, by rank and by weight, as `run` does; two rows.

    Args:
        encoder: An opened encoder.
        collections: From `data.open_collection`.
        dev: What the weight is chosen on.
        weight: Share of the vectors; None: the best on `dev`.
        out: Folder of the result files.
        indexes: Folder for the indexes; those of `run` are used again.
        seed: Of the bootstrap.
        resamples: Draws of the bootstrap.
        command: Recorded as it is.
        say: Takes one line per collection.

    Returns:
        The result files.

    Raises:
        ValueError: If there is neither a weight nor a set to choose it on.
    """
    row = row_of(encoder, indexes)
    known: dict[str, Ranking] = {}

    def both(collection: Collection) -> tuple[Ranking, Ranking]:
        if collection.name not in known:
            known[collection.name] = row.rank(collection)
        return known[collection.name], matches(rank_bm25(collection))

    chosen = weight_or_best(weight, dev, both)
    say(f"{row.name}: weight of the vectors {chosen}" + (f", the best on {DOLLY_DEV}" if weight is None else ""))
    fusions: dict[str, tuple[str, Callable[[Collection], Ranking], dict[str, Any]]] = {
        "rrf": ("RRF", lambda collection: rank_rrf(*both(collection)), {}),
        "weighted": (
            "weighted",
            lambda collection: rank_weighted(*both(collection), chosen),
            {"weight": chosen, "weight_chosen_on": DOLLY_DEV if weight is None else None},
        ),
    }
    paths = []
    for name, (label, rank, facts) in fusions.items():
        mark = "/".join([row.facts["fingerprint"], "bm25s", name, *map(str, facts.values())])
        label = f"{row.label} + BM25, {label}"
        fused = Row(f"{row.name}-{name}", label, row.supervision, rank, {**row.facts, "fingerprint": mark})
        options: dict[str, Any] = {"out": out, "seed": seed, "resamples": resamples, "command": command, "say": say}
        paths.append(_measure_row(fused, collections, facts={"fusion": name, **facts}, **options))
    return paths


def _measure_row(
    row: Row,
    collections: Sequence[Collection],
    *,
    out: str | Path,
    seed: int,
    resamples: int,
    command: str,
    say: Callable[[str], None],
    facts: Mapping[str, Any] | None = None,
) -> Path:
    packages = ("bm25s", "ir-measures", "pytrec-eval-terrier", "faiss-cpu")
    record = run_record(command, seed=seed, packages=packages, **row.facts)
    file = ResultFile(
        Path(out) / f"retrieval-{row.name}.json",
        benchmark="retrieval",
        row=row.name,
        run=record,
        label=row.label,
        supervision=row.supervision,
        **(facts or {}),
    )
    for collection in collections:
        if found := file.find(task=collection.name, metric=METRICS[0]):
            say(f"{row.name} {collection.name}: nDCG@10 {found['value']:.2f} (kept)")
            continue
        start = time.perf_counter()
        scores = score(collection, row.rank(collection), seed=seed, resamples=resamples)
        seconds = round(time.perf_counter() - start, 1)
        file.add(*({**one, "data": "local", "seconds": seconds} for one in scores))
        file.add(averages=averages(file.content["scores"]))
        say(f"{row.name} {collection.name}: nDCG@10 {scores[0]['value']:.2f} in {seconds:.0f} s")
    return file.path


def averages(scores: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """`nDCG@10`: the mean over the three test collections, when all are there."""
    found = {one["task"]: one for one in scores if one["metric"] == METRICS[0]}
    if any(name not in found for name in TEST_COLLECTIONS):
        return {}
    parts = [found[name] for name in TEST_COLLECTIONS]
    value = float(np.mean([part["value"] for part in parts]))
    deviation = float(np.sqrt(sum(part["sd"] ** 2 for part in parts))) / len(parts)
    spread = {"low": value - 1.96 * deviation, "high": value + 1.96 * deviation, "sd": deviation}
    return {METRICS[0]: {"value": value, **spread, "n": len(parts)}}


app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[list[str] | None, typer.Option(help="Checkpoint folder; repeat for more rows.")] = None,
    peers: Annotated[str, typer.Option(help="Peers, comma-separated.")] = ",".join(SYSTEMS),
    collection: Annotated[
        list[str] | None, typer.Option(help=f"{DOLLY_DEV}, or a folder under retrieval/; repeat for more.")
    ] = None,
    hybrid: Annotated[bool, typer.Option(help="Also each --model joined with BM25, by RRF and by weight.")] = True,
    weight: Annotated[
        float | None, typer.Option(min=0, max=1, help=f"Share of the vectors; default: the best on {DOLLY_DEV}.")
    ] = None,
    data_dir: DataDir = None,
    base: Annotated[str | None, typer.Option(help="Base model of the base-* peers; default $UBMOE_BASE.")] = None,
    out: ResultsFolder = RESULTS,
    indexes: Annotated[Path, typer.Option(help="Folder for the indexes.")] = Path("runs/indexes"),
    seed: int = 0,
    threads: Annotated[int | None, typer.Option(help="torch threads; default: torch's choice.")] = None,
    device: str = "cpu",
    compute: ComputeOption = "stored",
) -> None:
    """Measure retrieval against peers in one run; finished collections are kept."""
    import torch

    from benchmarks.peers import open_encoder

    if threads:
        torch.set_num_threads(threads)
    with one_line_errors():
        folder = data_folder(data_dir)
        known = local.collections(folder)
        wanted = collection or [name for name in COLLECTIONS if name in known or name != DOLLY_DEV]
        for name in wanted:
            if name not in known:
                raise ValueError(
                    f"Expected {DOLLY_DEV} or a folder under retrieval/, got {name!r} ({nearest(name, known)})."
                )
        loaded = [local.open_collection(folder, name) for name in wanted]
        dev = local.dolly_dev(folder) if hybrid and weight is None and DOLLY_DEV in known else None
        if hybrid and model and weight is None and dev is None:
            raise ValueError(f"There is no {DOLLY_DEV} to choose a weight on: give --weight, or --no-hybrid.")
        options: dict[str, Any] = {
            "out": out,
            "indexes": indexes,
            "seed": seed,
            "command": command_line("benchmarks.retrieval"),
            "say": typer.echo,
        }
        for name in [*filter(None, peers.split(",")), *(model or [])]:
            system = BM25 if name == BM25 else open_encoder(name, base=base, device=device, compute=compute)
            run(system, loaded, **options)
            if hybrid and not isinstance(system, str) and name in (*NAMED, *(model or [])):
                run_hybrid(system, loaded, dev=dev, weight=weight, **options)


if __name__ == "__main__":
    app()
