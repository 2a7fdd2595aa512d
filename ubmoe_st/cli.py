"""`ubmoe`: the command line. Heavy imports happen inside the commands, so `--help` answers at once."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from ubmoe_st.answers import answer, find, hit_table, one_line, search_options
from ubmoe_st.files import replacing_by_name
from ubmoe_st.plan_command import plan
from ubmoe_st.serving.command import ComputeOption, serve
from ubmoe_st.terminal import (
    check_out_file,
    converse,
    err,
    errors_in_one_line,
    megabytes,
    only_for,
    out,
    read_texts,
    say,
    say_json,
    say_stream,
    status,
)

if TYPE_CHECKING:
    from ubmoe_st.index import Hit
    from ubmoe_st.model import UBMoE

app = typer.Typer(
    help="One model that embeds like a dedicated embedder and generates exactly like the LLM it came from.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
MAX_CALIBRATION_TEXTS = 300
INDEX_FILE = "index_info.json"

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
ModelFolder = Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint folder or Hub id.", show_default=False)]
# Not required: else a missing query would be taken for a missing index folder.
IndexFolders = Annotated[
    list[Path] | None, typer.Argument(metavar="INDEX", help="Index folders, at least one.", show_default=False)
]
FilterOption = Annotated[
    str | None,
    typer.Option("--filter", metavar="JSON", help='Metadata that entries must have, e.g. \'{"year": {">=": 1990}}\'.'),
]
RoutingOption = Annotated[
    Literal["uni", "bi", "router"], typer.Option(help="Expert that generates; `uni` is the base model.")
]
Dtype = Literal["float32", "bfloat16", "float16"]
Duplicate = Literal["raise", "skip", "upsert"]
Mode = Literal["dense", "bm25", "hybrid"]
View = Literal["encoder", "generator"]
Format = Literal["hf", "multivector", "cross-encoder", "gguf", "onnx", "openvino", "peft", "gguf-lora"]
RerankOption = Annotated[
    str | None,
    typer.Option(
        metavar="N|METHOD",
        help="New order of the first results: likelihood, yes_no (base model), maxsim (token vectors); N: likelihood.",
    ),
]
CandidatesOption = Annotated[int | None, typer.Option(min=1, help="Number of results to rerank; by default 20.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Largest number of tokens to generate.")]
TruncateDim = Annotated[int | None, typer.Option(min=1, help="Number of leading dimensions to keep; by default all.")]
MovedModel = Annotated[str | None, typer.Option(help="Checkpoint folder or Hub id of the model, if it moved.")]
Overwrite = Annotated[bool, typer.Option(help="Replace what is there.")]

app.command()(plan)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """One model that embeds like a dedicated embedder and generates exactly like the LLM it came from."""
    if version:
        from ubmoe_st import __version__

        say(__version__)
        raise typer.Exit


@app.command()
@errors_in_one_line
def build(
    base: Annotated[str, typer.Argument(help="Folder, .gguf file, Hub id or `smollm2-135m`.", show_default=False)],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder to write.", show_default=False)],
    experts: Annotated[Path | None, typer.Option(help="Trained bi experts: folder, file or PEFT adapter.")] = None,
    routers: Annotated[Path | None, typer.Option(help="Trained token routers (.safetensors).")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Weight dtype; by default that of the base.")] = None,
    max_seq_length: Annotated[int | None, typer.Option(min=1, help="Longest text to embed, in tokens.")] = None,
    overwrite: Overwrite = False,
    allow_base_mismatch: Annotated[bool, typer.Option(help="Accept experts of other base weights.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Turn a decoder into a checkpoint that embeds and generates."""
    if not overwrite and out_dir.is_dir() and any(out_dir.iterdir()):
        raise FileExistsError(f"{out_dir} is not empty; choose another folder, or pass --overwrite")
    with status(f"building {out_dir} from {base}"):
        from ubmoe_st import checkpoint
        from ubmoe_st.upcycling import upcycle

        upcycle(
            base,
            experts,
            out=out_dir,
            dtype=dtype,
            routers=routers,
            max_seq_length=max_seq_length,
            overwrite=overwrite,
            allow_base_mismatch=allow_base_mismatch,
        )
    facts = checkpoint.facts(out_dir)
    if as_json:
        say_json(facts)
    else:
        say(f"wrote {out_dir}: {facts['base']['name']}, {megabytes(facts['bytes']['stored'])} stored")


@app.command()
@errors_in_one_line
def info(path: ModelFolder, as_json: JsonFlag = False) -> None:
    """Show what a checkpoint holds, from its headers alone."""
    with status(f"reading {path}"):
        from ubmoe_st.hub import facts_of

        facts = facts_of(path)
    if as_json:
        say_json(facts)
        return
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        if isinstance(value, dict):
            shown = ", ".join(f"{k} {megabytes(v) if key == 'bytes' else v}" for k, v in value.items() if k != "sha256")
        else:
            shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        table.add_row(key.replace("_", " "), Text(shown))
    for name, digest in facts["base"]["sha256"].items():
        table.add_row("base sha256", Text(f"{name} {digest}"))
    out.print(table)


@app.command()
@errors_in_one_line
def encode(
    path: ModelFolder,
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="Texts: .txt, one a line, or .jsonl with `text`.")],
    out_file: Annotated[Path, typer.Option("--out", help="File to write, .npy or .parquet.", show_default=False)],
    prompt_name: Annotated[str | None, typer.Option(help="Name of a prompt of the checkpoint, e.g. `query`.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of texts embedded at a time.")] = 32,
    truncate_dim: TruncateDim = None,
    compute: ComputeOption = "stored",
    as_json: JsonFlag = False,
) -> None:
    """Embed the texts of a file."""
    check_out_file(out_file, (".npy", ".parquet"))
    if out_file.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ImportError("--out in parquet needs pyarrow: pip install 'ubmoe-st[index]', or write .npy")
    texts = read_texts(source)
    if not texts:
        raise ValueError(f"{source} holds no texts")
    model = _load(path, compute=compute)
    if truncate_dim is not None and truncate_dim > (dimension := model.get_embedding_dimension() or 0):
        raise ValueError(f"truncate_dim={truncate_dim} is more than the model's {dimension} dimensions")
    vectors: Any = model.encode(
        texts,
        prompt_name=prompt_name,
        batch_size=batch_size,
        truncate_dim=truncate_dim,
        show_progress_bar=not as_json and err.is_terminal,
    )
    out_file.parent.mkdir(parents=True, exist_ok=True)
    with replacing_by_name(out_file, unique=True) as temporary:
        if out_file.suffix == ".npy":
            import numpy as np

            with open(temporary, "wb") as file:
                np.save(file, vectors)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
            pq.write_table(pa.table({"text": texts, "embedding": column}), temporary)
    facts = {"rows": len(texts), "dimension": int(vectors.shape[1]), "out": str(out_file)}
    if as_json:
        say_json(facts)
    else:
        say(f"{len(texts):,} texts, {vectors.shape[1]} dimensions -> {out_file}")


@app.command()
@errors_in_one_line
def generate(
    path: ModelFolder,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="Text to continue; without one, a chat begins.", show_default=False),
    ] = None,
    max_new_tokens: NewTokens = 256,
    routing: RoutingOption = "uni",
    chat: Annotated[bool, typer.Option(help="Send the prompt through the chat template.")] = False,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Sampling temperature; 0 always takes the likeliest token.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Random seed for sampling.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Continue a text, or chat when no prompt is given."""
    if prompt is None and as_json:
        raise ValueError("--json answers one prompt: give a PROMPT")
    model = _load(path)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "routing": routing}
    if temperature is not None:
        options |= {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    if prompt is None:
        converse(model, options)
        return
    request = [{"role": "user", "content": prompt}] if chat else prompt
    if as_json:
        say_json({"prompt": prompt, "text": model.generate(request, **options), "routing": routing})
    else:
        say_stream(model.generate(request, stream=True, **options))


@app.command()
@errors_in_one_line
def index(
    corpus: Annotated[str, typer.Argument(help="Corpus: .jsonl, .csv or .parquet file, folder, hf:NAME#split.")],
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
    on_bad_row: Annotated[Literal["raise", "skip"], typer.Option(help="What to do with an unusable row.")] = "raise",
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
    loaded: Any = model if engine == "ray" else _load(model)
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
        say_json(facts)
    else:
        end = f"; of {cut:,} the model reads only the beginning: cut them with --chunk-tokens" if cut else ""
        say(f"{len(built):,} entries, {built.dimension} dimensions, {built.kind} -> {out_dir}{end}")


@app.command()
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
        say_json([_hit_facts(hit) for hit in hits])
    elif hits:
        out.print(hit_table(hits))
    else:
        say("nothing was found")


@app.command()
@errors_in_one_line
def ask(
    paths: IndexFolders = None,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="Text to answer.", show_default=False)] = "",
    k: Annotated[int, typer.Option("-k", min=1, help="Number of entries to answer from.")] = 3,
    max_new_tokens: NewTokens = 160,
    where: FilterOption = None,
    rerank: RerankOption = None,
    candidates: CandidatesOption = None,
    routing: RoutingOption = "uni",
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
        sources = [{"number": number, **_hit_facts(hit)} for number, hit in enumerate(hits, 1)]
        say_json({"question": question, "answer": text, "entries": sources})
        return
    say_stream(answer(opened.model, question, hits, stream=True, **options))
    say("")
    for number, hit in enumerate(hits, 1):
        say(f"[{number}] {one_line(hit.id)}  ({hit.score:.3f})")


@app.command()
@errors_in_one_line
def tune(
    path: Annotated[Path, typer.Argument(metavar="INDEX", help="Index folder.")],
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


@app.command()
@errors_in_one_line
def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Checkpoint or index folder.")],
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Compare what a checkpoint generates with its base instead.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(help="Base to compare with: folder, .gguf file, Hub id or short name; by default the recorded."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check every byte of a checkpoint or an index against its checksums, or a checkpoint against its base."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder")
    if base is not None and not lossless:
        raise ValueError("--base is what --lossless compares with: give both")
    if lossless:
        _verify_lossless(path, base, as_json)
        return
    with status(f"verifying {path}"):
        if (path / INDEX_FILE).is_file():
            from ubmoe_st.index import EmbeddingIndex

            checked = len(EmbeddingIndex.open(path, verify=True).files())
        else:
            from ubmoe_st.checkpoint import verify_sums

            checked = len(verify_sums(path))
    if as_json:
        say_json({"path": str(path), "ok": True, "files": checked})
    else:
        say(f"{path}: all {checked} files are as they were written")


@app.command()
@errors_in_one_line
def export(
    path: ModelFolder,
    out_path: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write; a .gguf file for gguf.", show_default=False)
    ],
    view: Annotated[View, typer.Option(help="View to export: what embeds, or what generates.")] = "encoder",
    format: Annotated[
        Format, typer.Option(help="Format: transformers, llama.cpp, onnxruntime, OpenVINO; or the experts as adapter.")
    ] = "hf",
    quantize: Annotated[
        Literal["f16", "int8"] | None, typer.Option(help="Quantisation: f16 of gguf; int8 of gguf, onnx and openvino.")
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="Texts like yours (.txt, .jsonl), to fit int8.")] = None,
    overwrite: Overwrite = False,
    as_json: JsonFlag = False,
) -> None:
    """Write one view of a checkpoint as a plain model for other tools."""
    texts = None
    if calibration is not None:
        texts = [text for text in read_texts(calibration) if text.strip()][:MAX_CALIBRATION_TEXTS]
    with status(f"exporting the {view} of {path} as {format}"):
        from ubmoe_st.export import export as write

        facts = write(
            path, out_path, view=view, format=format, quantize=quantize, calibration=texts, overwrite=overwrite
        )
    if as_json:
        say_json(facts)
        return
    kept = f", {len(facts['kept_fp32'])} layers kept in fp32" if facts["kept_fp32"] else ""
    say(f"wrote {out_path}: {megabytes(facts['bytes'])}{kept}")


@app.command()
@errors_in_one_line
def push(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint folder.", show_default=False)],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Hub id, owner/name.", show_default=False)],
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; made if it does not exist.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Commit message; a default is made.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    exist_ok: Annotated[bool, typer.Option("--exist-ok", help="Change a repository that has files already.")] = False,
    card: Annotated[Path | None, typer.Option(help="Model card to publish instead of the folder's README.md.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be uploaded, and stop.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Publish a checkpoint on the Hub in one commit; run again after an interruption, it goes on where it was."""
    from ubmoe_st import hub

    if dry_run:
        uploads = hub.plan(path, repo, card=card)
        sizes = {upload.sha256: upload.size for upload in uploads}
        if as_json:
            files = [{"path": upload.path, "bytes": upload.size, "sha256": upload.sha256} for upload in uploads]
            say_json({"repo": repo, "files": files, "bytes": sum(sizes.values())})
            return
        table = Table("file", show_edge=False, box=None)
        table.add_column("bytes", justify="right")
        for upload in uploads:
            table.add_row(Text(upload.path), f"{upload.size:,}")
        out.print(table)
        total = f"{megabytes(sum(sizes.values()))} without repetitions"
        say(f"{len(uploads)} files, {total}, to {repo}; nothing was uploaded")
        return
    if err.is_terminal and not as_json:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "0"
    commit = hub.push(
        path,
        repo,
        revision=revision,
        private=private or None,
        commit_message=message,
        create_pr=create_pr,
        exist_ok=exist_ok,
        card=card,
    )
    if as_json:
        say_json({"repo": commit.repo_url.repo_id, "commit": commit.oid, "url": commit.pr_url or commit.commit_url})
    else:
        say(f"published: {commit.pr_url or commit.commit_url}")


app.command()(errors_in_one_line(serve))


def _verify_lossless(path: Path, base: str | None, as_json: bool) -> None:
    model = _load(str(path))
    with status(f"comparing {path} with its base"):
        report = model.check_lossless(base)
    if as_json:
        say_json({"path": str(path), **report.as_dict()})
    else:
        say(f"{path} against {report.base}:")
        table = Table("check", "result", show_edge=False, box=None)
        for name, difference in report.checks.items():
            table.add_row(name, Text("equal" if difference is None else f"DIFFERS: {difference}"))
        out.print(table)
        if report.same_files is False:
            say(f"the weight files of {report.base} are not those whose SHA-256 the checkpoint records")
    if not report.ok:
        raise typer.Exit(1)


def _load(path: str, **options: Any) -> UBMoE:
    with status(f"loading {path}"):
        from ubmoe_st.model import UBMoE

        return UBMoE(path, **options)


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
    together.use_model(_load(model or first.find_model()))
    return together


def _reranking(rerank: str | None, candidates: int | None) -> dict[str, Any]:
    given = {"rerank": int(rerank) if rerank and rerank.isdecimal() else rerank, "candidates": candidates}
    return {name: value for name, value in given.items() if value is not None}


def _hit_facts(hit: Hit) -> dict[str, Any]:
    facts = {"id": hit.id, "score": hit.score, "text": hit.text}
    return facts | ({"metadata": hit.metadata} if hit.metadata else {})


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


if __name__ == "__main__":
    app()
