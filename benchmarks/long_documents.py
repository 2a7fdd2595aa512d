"""Long documents, late chunking against chunks alone: `python -m benchmarks.long_documents --model models/ubmoe-135m`.

One document of each length, of articles one after the other, indexed by `EmbeddingIndex.build` either way: seconds, and
peak memory above the loaded model, without mapped files. Every measurement is a process of its own. *Pieces* are what
the model reads of it.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import data as local
from benchmarks.options import DataDir
from benchmarks.process import in_process, peak_of, status_bytes
from benchmarks.results import RESULTS, ResultFile, command_line, fingerprint, one_line_errors, run_record
from training.data import data_folder

logger = logging.getLogger(__name__)

LENGTHS = (512, 1024, 2048, 4096, 8192)
"""Tokens of a document, up to."""
WAYS = {"late": "late, in one piece", "late-512": "late, in pieces of 512", "alone": "chunks alone"}
CHUNK_TOKENS = 128


def long_text(folder: Path, tokenizer: Any, tokens: int) -> str:
    """A text of about so many tokens: documents of the Cranfield collection, one after the other."""
    whole = "\n\n".join(t for t in local.read_collection(folder / "retrieval" / "cranfield").documents.values() if t)
    read = tokenizer(whole[: 12 * tokens], add_special_tokens=False, return_offsets_mapping=True, truncation=False)
    offsets = read["offset_mapping"][: tokens - 2]
    return whole[: offsets[-1][1]]


def worker(task: dict[str, Any]) -> dict[str, Any]:
    """One measurement in this process.

    Args:
        task: `model`, `folder` of the data, `length` in tokens, `way`, `threads`.

    Returns:
        `seconds`, `peak` in bytes above the loaded model, and how many `chunks` and `pieces` there were.
    """
    import torch

    from ubmoe_st import EmbeddingIndex, UBMoE

    torch.set_num_threads(task["threads"])
    model: Any = UBMoE(task["model"], device="cpu")
    text = long_text(Path(task["folder"]), model.tokenizer, task["length"])
    model.max_seq_length = 512 if task["way"] == "late-512" else max(LENGTHS)
    model.encode("a text to begin with")
    read: list[int] = []
    model[0].register_forward_pre_hook(lambda module, arguments: read.append(len(arguments[0]["input_ids"])))
    with tempfile.TemporaryDirectory() as out:
        options: dict[str, Any] = {
            "chunk_tokens": CHUNK_TOKENS,
            "late_chunking": task["way"] != "alone",
            "kind": "flat",
        }
        EmbeddingIndex.build(model, [{"id": "short", "text": "a text to begin with"}], Path(out) / "first", **options)
        read.clear()
        before, start = status_bytes("RssAnon"), time.perf_counter()
        with peak_of("RssAnon") as peak:
            index = EmbeddingIndex.build(model, [{"id": "long", "text": text}], Path(out) / "index", **options)
        seconds = time.perf_counter() - start
    # The texts by which the index knows its model are embedded once as documents and once as queries.
    pieces = sum(read) - 8
    return {"seconds": seconds, "peak": max(0, peak[0] - before), "chunks": len(index), "pieces": pieces}


def run(
    model: str,
    folder: Path,
    *,
    lengths: Sequence[int] = LENGTHS,
    ways: Sequence[str] = tuple(WAYS),
    threads: int = 1,
    out: str | Path = RESULTS,
    command: str = "",
    measure: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    say: Callable[[str], None] = logger.info,
) -> Path:
    """Measure each length in each way and write `long-<row>.json` after each; what is there is kept.

    Args:
        model: Checkpoint folder.
        folder: The data folder.
        lengths: Tokens.
        ways: Of `WAYS`.
        threads: torch threads.
        out: Folder of the result file.
        command: Recorded as it is.
        measure: Runs `worker` on a task; None: in a process of its own.
        say: Takes one line per measurement.

    Returns:
        The result file.
    """
    measure = measure or (lambda task: in_process(worker, task))
    row = Path(model).name
    record = run_record(
        command, seed=0, fingerprint=fingerprint(model, without="generator"), dtype="float32", prompt="", pooling=""
    )
    file = ResultFile(Path(out) / f"long-{row}.json", benchmark="long", row=row, run=record, label=row)
    for length in lengths:
        for way in ways:
            if file.find(task="long", method=way, length=length):
                say(f"{row} {length} {way}: kept")
                continue
            found = measure({"model": model, "folder": str(folder), "length": length, "way": way, "threads": threads})
            file.add(
                {"task": "long", "metric": "s", "method": way, "length": length, "value": found["seconds"], **found}
            )
            file.add(tables={f"long-{row}": make_table(file.content["scores"])})
            mebibytes = found["peak"] / 2**20
            say(f"{row} {length} {way}: {found['seconds']:.1f} s, {mebibytes:.0f} MiB, {found['pieces']} pieces")
    return file.path


def make_table(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A line for each length and way."""
    rows = []
    for one in sorted(scores, key=lambda one: (one["length"], list(WAYS).index(one["method"]))):
        memory = f"{one['peak'] / 2**20:,.0f}"
        facts = [str(one["chunks"]), str(one["pieces"]), float(one["seconds"]), memory]
        rows.append([f"{one['length']:,}", WAYS[one["method"]], *facts])
    return {"columns": ["tokens", "way", "chunks", "pieces", "s", "peak above the model, MiB"], "rows": rows}


app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="Checkpoint folder.")] = "models/ubmoe-135m",
    length: Annotated[list[int] | None, typer.Option(min=16, help="Tokens of a document; repeat for more.")] = None,
    way: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(WAYS)}; repeat for more.")] = None,
    data_dir: DataDir = None,
    out: Annotated[Path, typer.Option(help="Folder of the result file.")] = RESULTS,
    threads: Annotated[int, typer.Option(min=1, help="torch threads.")] = 1,
) -> None:
    """Measure late chunking by the length of a document; finished measurements are kept."""
    with one_line_errors():
        if unknown := [one for one in way or [] if one not in WAYS]:
            raise ValueError(f"Expected a way of {', '.join(WAYS)}, got {unknown[0]!r}.")
        run(
            model,
            data_folder(data_dir),
            lengths=length or LENGTHS,
            ways=way or tuple(WAYS),
            threads=threads,
            out=out,
            command=command_line("benchmarks.long_documents"),
            say=typer.echo,
        )


if __name__ == "__main__":
    app()
