"""`ubmoe`: the command line. Heavy imports happen inside the commands, so `--help` answers at once."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from ubmoe_st.files import replacing_by_name
from ubmoe_st.index_commands import INDEX_FILE, add, ask, compact, delete, discard, index, search, tune
from ubmoe_st.plan_command import plan
from ubmoe_st.serving.command import ComputeOption, serve
from ubmoe_st.serving.loading import Dtype
from ubmoe_st.terminal import (
    JsonFlag,
    NewTokens,
    Overwrite,
    RoutingOption,
    TruncateDim,
    check_out_file,
    converse,
    err,
    errors_in_one_line,
    load_model,
    megabytes,
    out,
    read_texts,
    say,
    say_json,
    say_stream,
    status,
)

app = typer.Typer(
    help="One model that embeds like a dedicated embedder and generates exactly like the LLM it came from.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
MAX_CALIBRATION_TEXTS = 300

ModelFolder = Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint folder or Hub id.", show_default=False)]
View = Literal["encoder", "generator"]
Format = Literal["hf", "multivector", "cross-encoder", "gguf", "onnx", "openvino", "peft", "gguf-lora"]

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
    base: Annotated[
        str, typer.Argument(help="Folder, .gguf file, Hub id or short name, e.g. `smollm2-135m`.", show_default=False)
    ],
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
    model = load_model(path, compute=compute)
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
                # Not by `np.save`, whose error on a full disk does not say that it is full.
                rows = np.ascontiguousarray(vectors)
                np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(rows))
                file.write(rows.view(np.uint8).data)
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
    routing: RoutingOption = None,
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
    model = load_model(path)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "routing": routing}
    if temperature is not None:
        options |= {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    if seed is not None:
        import torch

        drawn = bool(temperature) if temperature is not None else model.generator.generation_config.do_sample
        if not drawn:
            raise ValueError("--seed: the likeliest token is taken and nothing is drawn; add --temperature, e.g. 0.8")
        torch.manual_seed(seed)
    if prompt is None:
        converse(model, options)
        return
    request = [{"role": "user", "content": prompt}] if chat else prompt
    if as_json:
        say_json({"prompt": prompt, "text": model.generate(request, **options), "routing": routing or model.routing})
    else:
        say_stream(model.generate(request, stream=True, **options))


for command in (index, add, delete, compact, discard, search, ask, tune):
    app.command()(command)


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
    model = load_model(str(path))
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


if __name__ == "__main__":
    app()
