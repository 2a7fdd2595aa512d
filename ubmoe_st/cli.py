"""`ubmoe`: the command line. Heavy imports happen inside the commands, so `--help` answers at once."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError

if TYPE_CHECKING:
    from ubmoe_st.index import Hit
    from ubmoe_st.model import UBMoE

app = typer.Typer(
    help="One model that embeds like a dedicated embedder and generates exactly like the LLM it came from.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
out = Console()
err = Console(stderr=True)

MAX_CALIBRATION_TEXTS = 300

ANSWER_PROMPT = (
    "Answer the question with the help of the numbered entries. Name the entry you used in square brackets.\n\n"
    "{entries}\n\nQuestion: {question}"
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
ModelFolder = Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint folder or Hub id.", show_default=False)]
IndexFolders = Annotated[list[Path], typer.Argument(metavar="INDEX", help="Index folders.", show_default=False)]
FilterOption = Annotated[
    str | None,
    typer.Option("--filter", metavar="JSON", help='Only entries with this metadata, e.g. \'{"year": {">=": 1990}}\'.'),
]
RoutingOption = Annotated[
    Literal["uni", "bi", "router"], typer.Option(help="Expert that generates; `uni` is the base model.")
]


def command(name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose expected errors are one line on standard error and exit code 1."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                _quiet_libraries()
                function(*args, **kwargs)
            except KeyboardInterrupt:
                err.print("interrupted", style="red")
                raise typer.Exit(130) from None
            except (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
                message = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
                err.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
                raise typer.Exit(1) from None

        return app.command(name)(run)

    return register


def _quiet_libraries() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "" if err.is_terminal else "1")


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """One model that embeds like a dedicated embedder and generates exactly like the LLM it came from."""
    if version:
        from ubmoe_st import __version__

        out.print(__version__, highlight=False)
        raise typer.Exit


@command()
def build(
    base: Annotated[str, typer.Argument(help="Folder, .gguf file, Hub id or `smollm2-135m`.", show_default=False)],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder to write.", show_default=False)],
    experts: Annotated[
        Path | None, typer.Option(help="bi experts: low-rank folder or file, PEFT adapter, or fine-tuned folder.")
    ] = None,
    routers: Annotated[Path | None, typer.Option(help="Trained token routers (.safetensors).")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Of the weights; default: the base's.")
    ] = None,
    max_seq_length: Annotated[int | None, typer.Option(min=1, help="Longest input of encode, tokens.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a folder that is not empty.")] = False,
    allow_base_mismatch: Annotated[bool, typer.Option(help="Take experts trained on other base weights.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Turn a decoder into a checkpoint that embeds and generates."""
    if not overwrite and out_dir.is_dir() and any(out_dir.iterdir()):
        raise FileExistsError(f"{out_dir} is not empty; choose another folder, or pass --overwrite")
    with _status(f"building {out_dir} from {base}"):
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
    facts = _facts(out_dir)
    if as_json:
        _print_json(facts)
    else:
        out.print(f"wrote {out_dir}: {facts['base']['name']}, {_mb(facts['bytes']['stored'])} stored")


@command()
def info(path: ModelFolder, as_json: JsonFlag = False) -> None:
    """Show what a checkpoint holds, from its headers alone."""
    facts = _facts(Path(path))
    if as_json:
        _print_json(facts)
        return
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        if isinstance(value, dict):
            shown = ", ".join(f"{k} {_mb(v) if key == 'bytes' else v}" for k, v in value.items() if k != "sha256")
        else:
            shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        table.add_row(key.replace("_", " "), shown)
    for name, digest in facts["base"]["sha256"].items():
        table.add_row("base sha256", f"{name} {digest}")
    out.print(table)


@command()
def encode(
    path: ModelFolder,
    source: Annotated[Path, typer.Argument(metavar="INPUT", help=".txt (a text a line) or .jsonl (field `text`).")],
    out_file: Annotated[Path, typer.Option("--out", help=".npy or .parquet.", show_default=False)],
    prompt_name: Annotated[str | None, typer.Option(help="Prompt of the checkpoint, e.g. query.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    truncate_dim: Annotated[int | None, typer.Option(min=1)] = None,
    as_json: JsonFlag = False,
) -> None:
    """Embed the texts of a file."""
    if out_file.suffix not in {".npy", ".parquet"}:
        raise ValueError(f"--out must end in .npy or .parquet, got {out_file.name}")
    if out_file.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ImportError("--out in parquet needs pyarrow: pip install 'ubmoe-st[index]', or write .npy")
    texts = [text for _, text in _read_texts(source)]
    if not texts:
        raise ValueError(f"{source} holds no texts")
    model = _load(path)
    vectors: Any = model.encode(
        list(texts),
        prompt_name=prompt_name,
        batch_size=batch_size,
        truncate_dim=truncate_dim,
        show_progress_bar=not as_json and err.is_terminal,
    )
    with _atomic_file(out_file) as temporary:
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
        _print_json(facts)
    else:
        out.print(f"{len(texts):,} texts, {vectors.shape[1]} dimensions -> {out_file}")


@command()
def generate(
    path: ModelFolder,
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; none: chat.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    routing: RoutingOption = "uni",
    chat: Annotated[bool, typer.Option(help="Send the prompt through the chat template.")] = False,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="Sample at this temperature.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
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
        _chat(model, options)
        return
    request = [{"role": "user", "content": prompt}] if chat else prompt
    if as_json:
        _print_json({"prompt": prompt, "text": model.generate(request, **options), "routing": routing})
    else:
        _print_stream(model.generate(request, stream=True, **options))


@command()
def index(
    corpus: Annotated[str, typer.Argument(help="jsonl with id, text and optional title; csv, parquet, folder, ...")],
    model: Annotated[str, typer.Option(help="Checkpoint folder or Hub id.", show_default=False)],
    out_dir: Annotated[Path, typer.Option("--out", help="Index folder.", show_default=False)],
    kind: Annotated[str, typer.Option(help="auto, flat, int8, hnsw, ivf-flat, ivf-pq, binary, ...")] = "auto",
    id_field: Annotated[str, typer.Option("--id")] = "id",
    text_field: Annotated[str, typer.Option("--text")] = "text",
    title_field: Annotated[str, typer.Option("--title")] = "title",
    chunk_tokens: Annotated[int | None, typer.Option(help="Cut documents into chunks of so many tokens.")] = None,
    overlap_tokens: Annotated[int, typer.Option(help="Tokens that neighbouring chunks share.")] = 0,
    on_duplicate: Annotated[Literal["raise", "skip", "upsert"], typer.Option(help="An id met again.")] = "raise",
    on_bad_row: Annotated[Literal["raise", "skip"], typer.Option(help="A row that cannot be used.")] = "raise",
    truncate_dim: Annotated[int | None, typer.Option(min=1)] = None,
    memory: Annotated[
        str | None, typer.Option(help="What the build may take beside the model, like 512MB; default: half.")
    ] = None,
    faiss_file: Annotated[
        bool | None, typer.Option("--faiss/--no-faiss", help="A faiss file beside a flat index; default: if small.")
    ] = None,
    bm25: Annotated[bool, typer.Option("--bm25", help="Index the words, too, for hybrid search.")] = False,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="ray: on the actors of a Ray cluster.")] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Ray actors.")] = 2,
    overwrite: Annotated[bool, typer.Option(help="Replace an index that is there.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Build a search index over a corpus; run again after an interruption, it goes on where it was."""
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
        on_duplicate=on_duplicate,
        on_bad_row=on_bad_row,
        truncate_dim=truncate_dim,
        memory_budget=memory,
        faiss_file=faiss_file,
        engine=engine,
        workers=workers,
        overwrite=overwrite,
        progress=not as_json and err.is_terminal,
        model_id=_remembered(model),
    )
    if bm25 and built.info["bm25"] is None:
        built.build_bm25()
    facts = {"index": str(out_dir), "rows": len(built), "dimension": built.dimension, "kind": built.kind}
    if as_json:
        _print_json(facts)
    else:
        out.print(f"{len(built):,} entries, {built.dimension} dimensions, {built.kind} -> {out_dir}")


@command()
def search(
    paths: IndexFolders,
    query: Annotated[str, typer.Argument(help="What to look for.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Results.")] = 10,
    mode: Annotated[
        Literal["dense", "bm25", "hybrid"], typer.Option(help="bm25 and hybrid: of one index that has a BM25 part.")
    ] = "dense",
    where: FilterOption = None,
    model: Annotated[str | None, typer.Option(help="Where the model is now, if it moved.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Find the nearest entries of one index, or of several together."""
    if mode != "dense" and len(paths) > 1:
        raise ValueError(f"--mode {mode} searches one index, got {len(paths)}: search them one by one, or --mode dense")
    options: dict[str, Any] = {"filter": _filter(where)} | ({"mode": mode} if mode != "dense" else {})
    hits = _open_index(paths, model).search_entries(query, k, **options)[0]
    if as_json:
        _print_json([_hit_facts(hit) for hit in hits])
    else:
        out.print(hit_table(hits))


@command()
def ask(
    paths: IndexFolders,
    question: Annotated[str, typer.Argument(help="What to answer.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Entries to answer from.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 160,
    where: FilterOption = None,
    routing: RoutingOption = "uni",
    model: Annotated[str | None, typer.Option(help="Where the model is now, if it moved.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Answer a question from the entries of an index (or several), with the same weights, and cite them."""
    spec = _filter(where)
    opened = _open_index(paths, model)
    hits = opened.search_entries(question, k, filter=spec)[0]
    chat = answer_prompt(question, hits)
    if as_json:
        text = opened.model.generate(chat, max_new_tokens=max_new_tokens, routing=routing)
        sources = [_hit_facts(hit) for hit in hits]
        _print_json({"question": question, "answer": text, "entries": sources})
        return
    _print_stream(opened.model.generate(chat, max_new_tokens=max_new_tokens, routing=routing, stream=True))
    out.print()
    for number, hit in enumerate(hits, 1):
        out.print(f"[{number}] {hit.id}  ({hit.score:.3f})", markup=False, highlight=False)


@command()
def tune(
    path: Annotated[Path, typer.Argument(metavar="INDEX", help="Index folder.")],
    recall: Annotated[float, typer.Option(min=0.0, max=1.0, help="Wanted recall@k against brute force.")] = 0.95,
    k: Annotated[int, typer.Option("-k", min=1)] = 10,
    as_json: JsonFlag = False,
) -> None:
    """Find the fastest search parameters that reach a recall, and keep them in the index."""
    from ubmoe_st.index import EmbeddingIndex

    with _status("measuring against brute force"):
        report = EmbeddingIndex.open(path).tune(recall, k=k)
    if as_json:
        _print_json(report.as_dict())
    else:
        state = "reached" if report.reached else "not reached"
        out.print(f"recall {report.chosen.recall:.3f} ({state}) with {report.chosen.parameters}", highlight=False)
    if not report.reached:
        raise typer.Exit(1)


@command()
def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Checkpoint or index folder.")], as_json: JsonFlag = False
) -> None:
    """Check every byte of a checkpoint or an index against its checksums."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder")
    with _status(f"verifying {path}"):
        if (path / "index_info.json").is_file():
            from ubmoe_st.index import EmbeddingIndex

            checked = len(EmbeddingIndex.open(path, verify=True).files())
        else:
            from ubmoe_st.checkpoint import verify_sums

            checked = len(verify_sums(path))
    if as_json:
        _print_json({"path": str(path), "ok": True, "files": checked})
    else:
        out.print(f"{path}: all {checked} files are as they were written")


@command()
def export(
    path: ModelFolder,
    out_path: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write; a .gguf file for gguf.", show_default=False)
    ],
    view: Annotated[
        Literal["encoder", "generator"], typer.Option(help="What embeds, or what generates (the base model).")
    ] = "encoder",
    format: Annotated[
        Literal["hf", "gguf", "onnx", "openvino"],
        typer.Option(help="transformers, llama.cpp, onnxruntime or OpenVINO."),
    ] = "hf",
    quantize: Annotated[
        Literal["f16", "int8"] | None, typer.Option(help="int8: gguf, and encoders as onnx or openvino; f16: gguf.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help=".txt or .jsonl of texts like yours, to measure activations for int8.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is there.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write one view of a checkpoint as a plain model for other tools."""
    texts = None
    if calibration is not None:
        texts = [text for _, text in _read_texts(calibration) if text.strip()][:MAX_CALIBRATION_TEXTS]
    with _status(f"exporting the {view} of {path} as {format}"):
        from ubmoe_st.export import export as write

        facts = write(
            path, out_path, view=view, format=format, quantize=quantize, calibration=texts, overwrite=overwrite
        )
    if as_json:
        _print_json(facts)
        return
    kept = f", {len(facts['kept_fp32'])} layers kept in fp32" if facts["kept_fp32"] else ""
    out.print(f"wrote {out_path}: {_mb(facts['bytes'])}{kept}", soft_wrap=True, highlight=False)


@command()
def push(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint folder.", show_default=False)],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Hub id, owner/name.", show_default=False)],
    revision: Annotated[str | None, typer.Option(help="Branch; made if it does not exist.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
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
            _print_json({"repo": repo, "files": files, "bytes": sum(sizes.values())})
            return
        table = Table("file", show_edge=False, box=None)
        table.add_column("bytes", justify="right")
        for upload in uploads:
            table.add_row(upload.path, f"{upload.size:,}")
        out.print(table)
        total = f"{_mb(sum(sizes.values()))} without repetitions"
        out.print(f"{len(uploads)} files, {total}, to {repo}; nothing was uploaded", soft_wrap=True, highlight=False)
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
        _print_json({"repo": commit.repo_url.repo_id, "commit": commit.oid, "url": commit.pr_url or commit.commit_url})
    else:
        out.print(f"published: {commit.pr_url or commit.commit_url}", soft_wrap=True, highlight=False)


def hit_table(hits: Sequence[Hit], title: str | None = None) -> Table:
    """Search results for a person."""
    table = Table(title=title, title_justify="left", show_lines=False)
    table.add_column("score", justify="right")
    table.add_column("id", style="cyan", overflow="fold")
    table.add_column("text", ratio=1)
    for hit in hits:
        text = " ".join(hit.text.split())
        table.add_row(f"{hit.score:.3f}", hit.id, text if len(text) < 160 else text[:157] + "...")
    return table


def answer_prompt(question: str, hits: Sequence[Hit]) -> list[dict[str, str]]:
    """A chat that asks for an answer from search results."""
    entries = "\n".join(
        f"[{n}] {hit.title or hit.id}: {' '.join(hit.text.split())[:600]}" for n, hit in enumerate(hits, 1)
    )
    return [{"role": "user", "content": ANSWER_PROMPT.format(entries=entries, question=question)}]


def _load(path: str) -> UBMoE:
    with _status(f"loading {path}"):
        from ubmoe_st.model import UBMoE

        return UBMoE(path)


def _open_index(paths: Sequence[Path], model: str | None) -> Any:
    from ubmoe_st.index import EmbeddingIndex, IndexGroup

    opened = [EmbeddingIndex.open(path) for path in paths]
    remembered = opened[0].info["model"].get("id")
    name = model or remembered
    if not name:
        raise ValueError(f"{paths[0]} does not remember its model; give it with --model")
    if model is None and not Path(name).is_dir() and Path(name).is_absolute():
        raise FileNotFoundError(f"the model of {paths[0]} was at {name}, which is gone; give its place with --model")
    together: Any = opened[0] if len(opened) == 1 else IndexGroup(opened)
    together.use_model(_load(name))
    return together


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


def _facts(path: Path) -> dict[str, Any]:
    from ubmoe_st import checkpoint as layout

    if not layout.is_checkpoint(path):
        raise FileNotFoundError(f"{path} is not a UBMoE checkpoint; make one with `ubmoe build BASE --out {path}`")
    config = layout.read_config(path)
    stock = json.loads((path / "config.json").read_text(encoding="utf-8"))
    parts = {
        "shared": layout.SHARED_FILE,
        "bi": layout.BI_FILE,
        "uni": layout.UNI_FILE,
        "delta": layout.DELTA_FILE,
        "router": layout.ROUTER_FILE,
    }
    parts = {name: file for name, file in parts.items() if (path / file).is_file()}
    shapes = {name: layout.read_shapes(path, file) for name, file in parts.items()}
    count = {name: sum(_product(shape) for shape in tensors.values()) for name, tensors in shapes.items()}
    files = [file for file in path.rglob("*") if file.is_file()]
    extra = count.get("delta") or count["bi"]
    base_parameters = count["shared"] + count["uni"]
    modules = json.loads((path / "modules.json").read_text(encoding="utf-8"))
    return {
        "name": path.resolve().name,
        "architecture": config.base_architecture,
        "layers": stock["num_hidden_layers"],
        "dimension": _dimension(path, modules, stock["hidden_size"]),
        "expert_rank": config.expert_rank,
        "routing": config.routing,
        "router": config.router,
        "parameters": {
            "stored": sum(count.values()),
            "active_encoding": count["shared"] + count["bi"],
            "active_generating": base_parameters,
            "base": base_parameters,
            "added": extra + count.get("router", 0),
            "added_percent": round(100 * (extra + count.get("router", 0)) / base_parameters, 2),
        },
        "bytes": {
            "stored": sum(file.stat().st_size for file in files),
            **{name: (path / file).stat().st_size for name, file in parts.items()},
        },
        "base": {"name": config.base_model, "origin": config.base_origin, "sha256": config.base_sha256},
        "layout_version": config.layout_version,
        "versions": config.versions,
    }


def _dimension(path: Path, modules: list[dict[str, Any]], hidden: int) -> int:
    for module in reversed(modules):
        file = path / module["path"] / "config.json"
        if module["path"] and file.is_file():
            settings = json.loads(file.read_text(encoding="utf-8"))
            if "out_features" in settings:
                return int(settings["out_features"])
    return hidden


def _product(shape: Iterable[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _read_texts(source: Path) -> Iterator[tuple[int, str]]:
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist")
    with open(source, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if source.suffix != ".jsonl":
                yield number, line.rstrip("\n")
                continue
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{source}, line {number}: not valid JSON ({error.msg})") from error
            text = row.get("text") if isinstance(row, dict) else row
            if not isinstance(text, str):
                raise ValueError(f"{source}, line {number}: expected a field `text` with a string")
            yield number, text


@contextlib.contextmanager
def _atomic_file(target: Path) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(descriptor)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def _chat(model: UBMoE, options: dict[str, Any]) -> None:
    messages: list[dict[str, str]] = []
    err.print("chat; an empty line ends it", style="dim")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            break
        if not text:
            break
        messages.append({"role": "user", "content": text})
        messages.append(
            {"role": "assistant", "content": _print_stream(model.generate(messages, stream=True, **options))}
        )


def _print_stream(pieces: Any) -> str:
    text = ""
    for piece in pieces:
        text += piece
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return text


@contextlib.contextmanager
def _status(text: str) -> Iterator[None]:
    if err.is_terminal:
        with err.status(text):
            yield
    else:
        yield


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


if __name__ == "__main__":
    app()
