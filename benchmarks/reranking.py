"""Reranking by the same weights: `python -m benchmarks.reranking --model models/ubmoe-270m --collection adi`.

The first results of four searches (the model's vectors, BM25, and both joined by RRF and by weight) as they are, and in
the order of `UBMoE.rank` by likelihood and by yes and no, and of MaxSim. A pair of query and document is computed once
for all searches that found it; milliseconds are those of a pair, times the candidates. Finished methods are kept.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from benchmarks import data as local
from benchmarks.data import DOLLY_DEV
from benchmarks.options import DataDir, ResultsFolder
from benchmarks.results import RESULTS, ResultFile, command_line, nearest, one_line_errors, run_record
from benchmarks.retrieval import (
    METRICS,
    Ranking,
    matches,
    rank_bm25,
    rank_rrf,
    rank_weighted,
    row_of,
    score,
    weight_or_best,
)
from training.data import data_folder
from ubmoe_st.serving.loading import Dtype

if TYPE_CHECKING:
    from benchmarks.data import Collection
    from benchmarks.peers import Encoder

logger = logging.getLogger(__name__)

Method = Literal["none", "likelihood", "yes_no", "maxsim"]
METHODS: tuple[Method, ...] = get_args(Method)
FIRST = {"dense": "vectors", "bm25": "BM25", "rrf": "both, RRF", "weighted": "both, weighted"}
"""First stages, with their names in the table."""
CANDIDATES = 20
"""First results that are put in a new order."""

Scores = dict[str, dict[str, float]]
"""Query id to document id to score, of pairs that were computed."""


def first_queries(collection: Collection, count: int | None) -> Collection:
    """The collection with its first queries alone. None: all."""
    kept = dict(list(collection.queries.items())[:count])
    return replace(collection, queries=kept, relevance={query: collection.relevance[query] for query in kept})


def first_stages(dense: Ranking, sparse: Ranking, weight: float) -> dict[str, Ranking]:
    """The rankings of `FIRST`."""
    return {
        "dense": dense,
        "bm25": sparse,
        "rrf": rank_rrf(dense, sparse),
        "weighted": rank_weighted(dense, sparse, weight),
    }


def best(found: Mapping[str, float], count: int) -> list[str]:
    """The first documents of one query."""
    return sorted(found, key=lambda document: -found[document])[:count]


def reordered(ranking: Ranking, scores: Scores, candidates: int) -> Ranking:
    """The first `candidates` documents of each query in the order of `scores`, then the others as they were."""
    moved: Ranking = {}
    for query, found in ranking.items():
        order = best(found, len(found))
        head = sorted(order[:candidates], key=lambda document: -scores[query][document])
        moved[query] = {document: -float(place) for place, document in enumerate([*head, *order[candidates:]])}
    return moved


def pair_scores(model: Any, method: Method, collection: Collection, pairs: Mapping[str, Sequence[str]]) -> Scores:
    """Scores of a reranking method.

    Args:
        model: A `UBMoE`.
        method: One of `METHODS` other than `none`.
        collection: The texts.
        pairs: Documents to compute for each query.
    """
    from ubmoe_st.multi_vector import multi_vector_encoder

    encoder = multi_vector_encoder(model) if method == "maxsim" else None
    found: Scores = {}
    for query, names in pairs.items():
        texts = [collection.documents[name] for name in names]
        asked = collection.queries[query]
        if not texts:
            values = []
        elif encoder is not None:
            said: Any = encoder.encode_document(texts, show_progress_bar=False)
            values = encoder.similarity(encoder.encode_query([asked], show_progress_bar=False), said)[0].tolist()
        else:
            ranked = model.rank(asked, texts, method=method)
            values = [result["score"] for result in sorted(ranked, key=lambda result: result["corpus_id"])]
        found[query] = dict(zip(names, values))
    return found


def run(
    encoder: Encoder,
    collections: Sequence[Collection],
    *,
    dev: Collection | None = None,
    weight: float | None = None,
    methods: Sequence[Method] = METHODS,
    candidates: int = CANDIDATES,
    queries: int | None = None,
    out: str | Path = RESULTS,
    indexes: str | Path = "runs/indexes",
    seed: int = 0,
    resamples: int = 1000,
    command: str = "",
    say: Callable[[str], None] = logger.info,
) -> Path:
    """Measure one model and write `reranking-<row>.json` after each method of each collection.

    Args:
        encoder: From `peers.open_encoder`, with a `UBMoE` as its model.
        collections: From `data.open_collection`.
        dev: What the weight of the vectors is chosen on.
        weight: Share of the vectors. None: the best on `dev`.
        methods: Ways to rerank.
        candidates: Results to put in a new order.
        queries: Only so many queries of each collection, for a quick look. None: all.
        out: Folder of the result file.
        indexes: Folder for the indexes; those of `benchmarks.retrieval` are used again.
        seed: Of the bootstrap.
        resamples: Draws of the bootstrap.
        command: Recorded as it is.
        say: Takes one line per method.

    Returns:
        The result file.

    Raises:
        ValueError: If there is neither a weight nor a set to choose it on.
    """
    row = row_of(encoder, indexes)

    def both(collection: Collection) -> tuple[Ranking, Ranking]:
        return row.rank(collection), matches(rank_bm25(collection))

    chosen = weight_or_best(weight, dev, both)
    record = run_record(
        command,
        seed=seed,
        packages=("bm25s", "ir-measures"),
        dtype=encoder.dtype,
        prompt=encoder.prompt,
        pooling=encoder.pooling,
        fingerprint=encoder.fingerprint,
    )
    facts = {"label": encoder.label, "supervision": encoder.supervision, "weight": chosen, "limit": queries}
    ending = f"-first{queries}" if queries else ""
    name = Path(out) / f"reranking-{encoder.row}{ending}.json"
    file = ResultFile(name, benchmark="reranking", row=encoder.row, run=record, **facts)
    for whole in collections:
        collection = first_queries(whole, queries)
        stages: dict[str, Ranking] = {}
        for method in methods:
            wanted = {"task": collection.name, "method": method, "candidates": 0 if method == "none" else candidates}
            if all(file.find(**wanted, first=first, weight=chosen) for first in FIRST):
                say(f"{encoder.row} {collection.name} {method}: kept")
                continue
            stages = stages or first_stages(*both(collection), chosen)
            pairs = {
                query: list(dict.fromkeys(name for one in stages.values() for name in best(one[query], candidates)))
                for query in collection.queries
            }
            start = time.perf_counter()
            scores = {} if method == "none" else pair_scores(encoder.model, method, collection, pairs)
            seconds = time.perf_counter() - start
            count = sum(map(len, pairs.values()))
            cost = {"ms_per_query": 0.0 if method == "none" else 1000 * seconds / max(1, count) * candidates}
            new = []
            for first, ranking in stages.items():
                order = reordered(ranking, scores, candidates) if scores else ranking
                value = score(collection, order, seed=seed, resamples=resamples)[0]
                new.append({**value, **wanted, **cost, "first": first, "weight": chosen, "data": "local"})
            file.add(*new)
            file.add(tables={f"reranking-{encoder.row}{ending}": make_table(file.content["scores"])})
            shown = ", ".join(f"{one['first']} {one['value']:.1f}" for one in new)
            say(f"{encoder.row} {collection.name} {method}: {METRICS[0]} {shown}; {count} pairs in {seconds:.0f} s")
    return file.path


def make_table(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A line for each first stage and method, two columns for each collection."""
    tasks = list(dict.fromkeys(one["task"] for one in scores))
    cells = {(one["first"], one["method"], one["candidates"], one["task"]): one for one in scores}
    columns = ["first search", "reranked by", "candidates"]
    for task in tasks:
        columns += [f"{task} {METRICS[0]}", f"{task} ms/query"]
    rows = []
    order = sorted(dict.fromkeys(key[:3] for key in cells), key=lambda key: list(FIRST).index(key[0]))
    for first, method, candidates in order:
        row: list[Any] = [FIRST[first], method, str(candidates or "")]
        for task in tasks:
            one = cells.get((first, method, candidates, task))
            row += [one and float(one["value"]), f"{one['ms_per_query']:.0f}" if one and candidates else None]
        rows.append(row)
    return {"columns": columns, "rows": rows}


app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[list[str] | None, typer.Option(help="Checkpoint folder; repeat for more.")] = None,
    collection: Annotated[
        list[str] | None, typer.Option(help=f"{DOLLY_DEV}, or a folder under retrieval/; repeat for more.")
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(METHODS)}; repeat for more.")] = None,
    candidates: Annotated[int, typer.Option(min=1, help="Results to put in a new order.")] = CANDIDATES,
    queries: Annotated[int | None, typer.Option(min=1, help="Only so many queries, for a quick look.")] = None,
    weight: Annotated[
        float | None, typer.Option(min=0, max=1, help=f"Share of the vectors; default: the best on {DOLLY_DEV}.")
    ] = None,
    data_dir: DataDir = None,
    out: ResultsFolder = RESULTS,
    indexes: Annotated[Path, typer.Option(help="Folder for the indexes.")] = Path("runs/indexes"),
    seed: int = 0,
    threads: Annotated[int | None, typer.Option(help="torch threads; default: torch's choice.")] = None,
    device: str = "cpu",
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype of the weights of both views; default: as stored.")] = None,
) -> None:
    """Measure searches with and without reranking by the same weights; finished methods are kept."""
    import torch

    from benchmarks.peers import open_encoder
    from ubmoe_st import UBMoE

    if threads:
        torch.set_num_threads(threads)
    with one_line_errors():
        folder = data_folder(data_dir)
        known = local.collections(folder)
        for kind, name, names in [("collection", one, known) for one in collection or []] + [
            ("method", one, list(METHODS)) for one in method or []
        ]:
            if name not in names:
                raise ValueError(f"Expected a {kind} of {', '.join(names)}, got {name!r} ({nearest(name, names)}).")
        dev = local.dolly_dev(folder) if weight is None and DOLLY_DEV in known else None
        for name in model or ["models/ubmoe-135m"]:
            model_kwargs = {"dtype": dtype} if dtype else None
            opened = UBMoE(name, device=device, model_kwargs=model_kwargs)
            encoder = replace(open_encoder(name, device=device), model=opened)
            methods: Any = [one for one in METHODS if one in (method or METHODS)]
            if method is None and not encoder.model.tokenizer.chat_template:
                typer.echo(f"{encoder.row}: without yes_no, which asks a chat, and there is no chat template")
                methods.remove("yes_no")
            run(
                encoder,
                [local.open_collection(folder, one) for one in collection or known],
                dev=dev,
                weight=weight,
                methods=methods,
                candidates=candidates,
                queries=queries,
                out=out,
                indexes=indexes,
                seed=seed,
                command=command_line("benchmarks.reranking"),
                say=typer.echo,
            )


if __name__ == "__main__":
    app()
