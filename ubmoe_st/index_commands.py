"""`ubmoe index`, `search`, `ask`, `tune` and the changes of an index: their options, and what they print."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ubmoe_st.answers import answer, find, hit_table, one_line, search_options
from ubmoe_st.terminal import (
    JsonFlag,
    NewTokens,
    Overwrite,
    RoutingOption,
    TruncateDim,
    err,
    errors_in_one_line,
    load_model,
    only_for,
    out,
    say,
    say_json,
    say_stream,
    status,
)

if TYPE_CHECKING:
    from ubmoe_st.index import Hit

INDEX_FILE = "index_info.json"

# Not required: else a missing query would be taken for a missing index folder.
IndexFolders = Annotated[
    list[Path] | None, typer.Argument(metavar="INDEX", help="Index folders, at least one.", show_default=False)
]
FilterOption = Annotated[
    str | None,
    typer.Option("--filter", metavar="JSON", help='Metadata that entries must have, e.g. \'{"year": {">=": 1990}}\'.'),
]
Duplicate = Literal["raise", "skip", "upsert"]
Mode = Literal["dense", "bm25", "hybrid"]
RerankOption = Annotated[
    str | None,
    typer.Option(
        metavar="N|METHOD",
        help="New order of the first results: likelihood, yes_no (base model), maxsim (token vectors); N: likelihood.",
    ),
]
CandidatesOption = Annotated[int | None, typer.Option(min=1, help="Number of results to rerank; by default 20.")]
MovedModel = Annotated[str | None, typer.Option(help="Checkpoint folder or Hub id of the model, if it moved.")]
Corpus = Annotated[
    str, typer.Argument(help="Corpus: .jsonl, .csv or .parquet file, folder, hf:NAME#split.", show_default=False)
]
IndexFolder = Annotated[Path, typer.Argument(metavar="INDEX", help="Index folder.", show_default=False)]
BadRow = Annotated[Literal["raise", "skip"], typer.Option(help="What to do with an unusable row.")]


@errors_in_one_line
def index(
    corpus: Corpus,
    model: Annotated[str, typer.Option(help="Checkpoint folder or Hub id.", show_default=False)],
    out_dir: Annotated[Path, typer.Option("--out", help="Index folder to write.", show_default=False)],
    kind: Annotated[str, typer.Option(help="Kind of index: auto, flat, int8, hnsw, ivf-pq, binary, ...")] = "auto",
    id_field: Annotated[str, typer.Option("--id", help="Field of the corpus with the id.")] = "id",
    text_field: Annotated[str, typer.Option("--text", help="Field of the corpus with the text.")] = "text",
    title_field: Annotated[str, typer.Option("--title", help="Field of the corpus with the title.")] = "title",
    chunk_tokens: Annotated[int | None, typer.Option(help="Length of chunks, in tokens; by default uncut.")] = None,
    overlap_tokens: Annotated[int, typer.Option(help="Number of tokens that neighbouring chunks share.")] = 0,
    late_chunking: Annotated[bool, typer.Option("--late-chunking", help="Pool chunks from whole documents.")] = False,
    on_duplicate: Annotated[Duplicate, typer.Option(help="What to do with a repeated id.")] = "raise",
    on_bad_row: BadRow = "raise",
    truncate_dim: TruncateDim = None,
    memory_budget: Annotated[str | None, typer.Option("--memory", help="Memory budget of the build, e.g. 1GB.")] = None,
    faiss_file: Annotated[
        bool | None, typer.Option("--faiss/--no-faiss", help="Write a faiss file; by default for a small index.")
    ] = None,
    bm25: Annotated[bool, typer.Option("--bm25", help="Also build a BM25 index, for hybrid search.")] = False,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="Where to embed: here, or on Ray actors.")] = "local",
    workers: Annotated[int | None, typer.Option(min=1, help="Number of Ray actors; by default 2.")] = None,
    worker_gpus: Annotated[float | None, typer.Option(min=0, help="Number of GPUs of a Ray actor.")] = None,
    overwrite: Overwrite = False,
    as_json: JsonFlag = False,
) -> None:
    """Build a search index over a corpus; run again after an interruption, it goes on where it was."""
    only_for("ray", engine, workers=workers, worker_gpus=worker_gpus)
    loaded: Any = model if engine == "ray" else load_model(model)
    from ubmoe_st.index import EmbeddingIndex

    built = EmbeddingIndex.build(
        loaded,
        corpus,
        out_dir,
        kind=kind,
        id_field=id_field,
        text_field=text_field,
        title_field=title_field,
        chunk_tokens=chunk_tokens,
        overlap_tokens=overlap_tokens,
        late_chunking=late_chunking,
        on_duplicate=on_duplicate,
        on_bad_row=on_bad_row,
        truncate_dim=truncate_dim,
        memory_budget=memory_budget,
        faiss_file=faiss_file,
        engine=engine,
        workers=workers or 2,
        worker_resources={"num_gpus": worker_gpus} if worker_gpus else None,
        overwrite=overwrite,
        progress=not as_json and err.is_terminal,
        model_id=_remembered(model),
    )
    if bm25 and built.info["bm25"] is None:
        built.build_bm25()
    cut = sum(source.get("entries_cut", 0) for source in built.info["sources"])
    facts = {"index": str(out_dir), "rows": len(built), "dimension": built.dimension, "kind": built.kind, "cut": cut}
    if as_json:
        say_json({**facts, "why": built.info["index"]["why"]})
    else:
        end = f"; of {cut:,} the model reads only the beginning: cut them with --chunk-tokens" if cut else ""
        if kind not in ("auto", built.kind):
            end += f"; {built.info['index']['why']}"
        say(f"{len(built):,} entries, {built.dimension} dimensions, {built.kind} -> {out_dir}{end}")


@errors_in_one_line
def add(
    path: IndexFolder,
    corpus: Corpus,
    id_field: Annotated[str | None, typer.Option("--id", help="Field with the id; by default as built.")] = None,
    text_field: Annotated[str | None, typer.Option("--text", help="Field with the text; by default as built.")] = None,
    title_field: Annotated[str | None, typer.Option("--title", help="Field with the title; as built.")] = None,
    on_duplicate: Annotated[
        Duplicate, typer.Option(help="What to do with an id that is there; upsert replaces its entry.")
    ] = "raise",
    on_bad_row: BadRow = "raise",
    bm25: Annotated[bool, typer.Option("--bm25/--no-bm25", help="Make the index's BM25 part anew, if any.")] = True,
    model: MovedModel = None,
    as_json: JsonFlag = False,
) -> None:
    """Add the rows of a corpus to an index, cut and embedded as it was built; run again, it goes on where it was."""
    from ubmoe_st.index import EmbeddingIndex

    opened = EmbeddingIndex.open(path)
    opened.use_model(_model_of(opened, model))
    new = opened.add(
        corpus,
        on_duplicate=on_duplicate,
        on_bad_row=on_bad_row,
        id_field=id_field,
        text_field=text_field,
        title_field=title_field,
        progress=not as_json and err.is_terminal,
    )
    # By what the part covers, not by what was new: a run before may have been killed in between.
    part = opened.info["bm25"]
    if bm25 and part is not None and part["rows"] < opened.info["stored_rows"]:
        with status("making the BM25 part anew"):
            opened.build_bm25()
    _report_change(opened, {"added": new}, f"{new:,} entries added", as_json)


@errors_in_one_line
def delete(
    path: IndexFolder,
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids; a document's takes all its chunks.")],
    missing_ok: Annotated[bool, typer.Option("--missing-ok", help="Pass over ids that are not there.")] = False,
    namespace: Annotated[
        Literal["document", "chunk"] | None, typer.Option(help="Whose ids they are; by default what there is.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Take entries out of an index by their ids. Nothing finds them any more; `ubmoe compact` gives the disk back."""
    from ubmoe_st.index import EmbeddingIndex

    opened = EmbeddingIndex.open(path)
    gone = opened.delete(ids, missing_ok=missing_ok, namespace=namespace)
    _report_change(opened, {"deleted": gone}, f"{gone:,} entries deleted", as_json)


@errors_in_one_line
def compact(
    path: IndexFolder,
    memory_budget: Annotated[str | None, typer.Option("--memory", help="Memory budget, e.g. 1GB.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write an index anew without deleted and replaced rows, and take added ones into its faiss and BM25 parts."""
    from ubmoe_st.index import EmbeddingIndex

    opened = EmbeddingIndex.open(path)
    with status("writing the index anew"):
        opened.compact(memory_budget=memory_budget)
    _report_change(opened, {}, "written anew", as_json)


@errors_in_one_line
def discard(path: IndexFolder, as_json: JsonFlag = False) -> None:
    """Throw away an addition that was stopped and is not to be finished. What is committed stays."""
    from ubmoe_st.index import EmbeddingIndex

    opened = EmbeddingIndex.open(path)
    there = opened.discard_unfinished()
    _report_change(opened, {"discarded": there}, "thrown away" if there else "there is no unfinished addition", as_json)


def _report_change(index: Any, facts: dict[str, Any], said: str, as_json: bool) -> None:
    if as_json:
        say_json({"index": str(index.path), **facts, "rows": len(index), "version": index.version})
    else:
        say(f"{said}: {len(index):,} entries in {index.path}")


@errors_in_one_line
def search(
    paths: IndexFolders = None,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="Text to look for.", show_default=False)] = "",
    k: Annotated[int, typer.Option("-k", min=1, help="Number of results.")] = 10,
    mode: Annotated[Mode, typer.Option(help="Way to search; bm25 and hybrid need a BM25 index.")] = "dense",
    where: FilterOption = None,
    rerank: RerankOption = None,
    candidates: CandidatesOption = None,
    model: MovedModel = None,
    as_json: JsonFlag = False,
) -> None:
    """Find the nearest entries of one index, or of several together."""
    folders = _index_folders(paths, query, "QUERY")
    if mode != "dense" and len(folders) > 1:
        raise ValueError(
            f"--mode {mode} searches one index, got {len(folders)}: search them one by one, or --mode dense"
        )
    options: dict[str, Any] = {"filter": _filter(where), **_reranking(rerank, candidates)}
    if mode != "dense":
        options["mode"] = mode
    opened = _open_index(folders, model)
    if mode != "dense" and opened.info["bm25"] is None:
        raise ValueError(
            f"{folders[0]} has no BM25 part: add one by repeating its `ubmoe index` command with --bm25, then search "
            f"with --mode {mode}"
        )
    hits = find(opened, query, k, **options)
    if as_json:
        say_json([_hit_facts(hit, len(folders) > 1) for hit in hits])
    elif hits:
        out.print(hit_table(hits))
    else:
        say("nothing was found")


@errors_in_one_line
def ask(
    paths: IndexFolders = None,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="Text to answer.", show_default=False)] = "",
    k: Annotated[int, typer.Option("-k", min=1, help="Number of entries to answer from.")] = 3,
    max_new_tokens: NewTokens = 160,
    where: FilterOption = None,
    rerank: RerankOption = None,
    candidates: CandidatesOption = None,
    routing: RoutingOption = None,
    model: MovedModel = None,
    as_json: JsonFlag = False,
) -> None:
    """Answer a question from the entries of an index (or several), with the same weights, and cite them.

    An index with a BM25 part is searched by vectors and words together.
    """
    folders = _index_folders(paths, question, "QUESTION")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "routing": routing}
    spec = _filter(where)
    order = _reranking(rerank, candidates)
    opened = _open_index(folders, model)
    hits = find(opened, question, k, filter=spec, **search_options(opened), **order)
    if spec is not None and not hits:
        raise ValueError(f"no entry passes --filter {where}, so there is nothing to answer from")
    if as_json:
        text = answer(opened.model, question, hits, **options)
        sources = [{"number": number, **_hit_facts(hit, len(folders) > 1)} for number, hit in enumerate(hits, 1)]
        say_json({"question": question, "answer": text, "entries": sources})
        return
    say_stream(answer(opened.model, question, hits, stream=True, **options))
    say("")
    for number, hit in enumerate(hits, 1):
        say(f"[{number}] {one_line(hit.id)}  ({hit.score:.3f})")


@errors_in_one_line
def tune(
    path: IndexFolder,
    recall: Annotated[float, typer.Option(min=0.0, max=1.0, help="Recall@k to reach, against brute force.")] = 0.95,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of results that recall looks at.")] = 10,
    as_json: JsonFlag = False,
) -> None:
    """Find the fastest search parameters that reach a recall, and keep them in the index."""
    from ubmoe_st.index import EmbeddingIndex

    with status("measuring against brute force"):
        report = EmbeddingIndex.open(path).tune(recall, k=k)
    if as_json:
        say_json(report.as_dict())
    else:
        state = "reached" if report.reached else "not reached"
        say(f"recall {report.chosen.recall:.3f} ({state}) with {report.chosen.parameters}")
    if not report.reached:
        raise typer.Exit(1)


def _index_folders(paths: Sequence[Path] | None, query: str, name: str) -> list[Path]:
    """The index folders of a search; refuses one whose query was forgotten, so that a folder stands in its place."""
    if paths and not query.strip():
        raise ValueError(f"{name} is empty: say what to look for")
    forgotten = bool(query) and os.path.isfile(os.path.join(query, INDEX_FILE))
    if forgotten or not paths:
        missing = name if forgotten or os.path.isdir(query) else "INDEX"
        got = " ".join([*map(str, paths or ()), query])
        raise typer.BadParameter(f"expected INDEX... {name}, got {got!r} alone", param_hint=missing)
    return list(paths)


def _open_index(paths: Sequence[Path], model: str | None) -> Any:
    from ubmoe_st.index import EmbeddingIndex, IndexGroup

    first = EmbeddingIndex.open(paths[0])
    together: Any = first if len(paths) == 1 else IndexGroup([first, *map(EmbeddingIndex.open, paths[1:])])
    together.use_model(_model_of(first, model))
    return together


def _model_of(index: Any, moved: str | None) -> Any:
    """The model of an index, which reads as many tokens of a text as when the index was built."""
    model = load_model(moved or index.find_model())
    if (limit := index.info["model"]["max_tokens"]) is not None:
        model.max_seq_length = limit
    return model


def _reranking(rerank: str | None, candidates: int | None) -> dict[str, Any]:
    given = {"rerank": int(rerank) if rerank and rerank.isdecimal() else rerank, "candidates": candidates}
    return {name: value for name, value in given.items() if value is not None}


def _hit_facts(hit: Hit, several: bool) -> dict[str, Any]:
    """Of a result for JSON: where it is from, if it is a chunk, or if there are several indexes."""
    names = ["id", "score", "text", *(["parent", "start", "end"] if hit.parent is not None else [])]
    names += [name for name in ("title", "metadata") if getattr(hit, name)] + (["index"] if several else [])
    return {name: getattr(hit, name) for name in names}


def _filter(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        spec = json.loads(text)
    except ValueError as error:
        raise ValueError(f'--filter: expected JSON such as \'{{"lang": "en"}}\', got {text!r} ({error})') from error
    if not isinstance(spec, dict):
        raise ValueError(f'--filter: expected a JSON object such as \'{{"lang": "en"}}\', got {text!r}')
    return spec


def _remembered(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).is_dir() else model
