"""Dependence on real documents: `python -m benchmarks.dependence --base FOLDER --model models/ubmoe-135m`.

For the base, for the `bi` experts of a checkpoint (the FFN-trained model) and for finished trainings of
`benchmarks.ablation` (`--run runs/ablation/attention`), in the four length buckets of the paper. Finished rows are
kept. The plot has every bucket; the report draws `docs/dependence.svg` with the longest one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import data as local
from benchmarks.options import DataDir
from benchmarks.results import RESULTS, ResultFile, command_line, fingerprint, one_line_errors, run_record
from training.data import data_folder

logger = logging.getLogger(__name__)

DOCUMENTS = "docs-enwiki2015-sample"
PER_BUCKET = 50
PLOT = Path("runs/dependence.svg")


def documents(folder: Path, name: str = DOCUMENTS) -> list[str]:
    """Texts of the documents in `train/<name>.jsonl.gz`."""
    return [str(row["text"]) for row in local.read_jsonl(folder / "train" / f"{name}.jsonl.gz")]


def open_row(kind: str, path: str) -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    Args:
        kind: `base` (a plain decoder), `model` (the `bi` experts of a checkpoint, causally), or `run` (a finished
            training, its weights in the causal model).
        path: Its folder.

    Raises:
        ValueError: If the kind is unknown.
    """
    from benchmarks.peers import open_generator

    if kind == "base":
        return open_generator(path, routing="base")
    if kind == "model":
        return open_generator(path, routing="bi")
    if kind != "run":
        raise ValueError(f"Expected base, model or run, got {kind!r}.")
    from transformers import AutoTokenizer

    from training.contrastive import load_run
    from training.student import causal_model, encoder_of
    from ubmoe_st.bases import resolve_base

    recipe, model = load_run(path)
    base = resolve_base(recipe.base)
    return causal_model(encoder_of(model), base), AutoTokenizer.from_pretrained(base.path)


def make_table(rows: Mapping[str, Mapping[str, Any]], buckets: Sequence[str]) -> dict[str, Any]:
    """`main / before / after` by model and bucket."""

    def cell(one: Mapping[str, Any] | None) -> str | None:
        return None if one is None else f"{one['main']:.2f} / {one['before']:.2f} / {one['after']:.2f}"

    lines = [[label, *(cell(row["buckets"].get(bucket)) for bucket in buckets)] for label, row in rows.items()]
    return {"columns": ["model", *(f"{bucket} tokens" for bucket in buckets)], "rows": lines}


def run(
    models: Mapping[str, tuple[str, str]],
    texts: Iterable[str],
    *,
    out: str | Path = RESULTS,
    plot: str | Path | None = PLOT,
    per_bucket: int = PER_BUCKET,
    buckets: Sequence[tuple[int, int]] | None = None,
    command: str = "",
    say: Callable[[str], None] = logger.info,
) -> Path:
    """Measure each model on the same documents and write `dependence.json` after each.

    Args:
        models: Kind and path by label, see `open_row`.
        texts: The documents.
        out: Folder of the result file.
        plot: SVG file; None: none.
        per_bucket: Documents per bucket.
        buckets: Lengths in tokens; None: those of the paper.
        command: Recorded as it is.
        say: Takes one line per model.
    """
    from ubmoe_st.dependence import BUCKETS, BucketDependence, dependence, plot_dependence

    texts = list(texts)
    wanted = list(buckets or BUCKETS)
    names = [f"{low}-{high}" for low, high in wanted]
    digest = sha256(repr((texts, per_bucket, names)).encode()).hexdigest()[:12]
    record = run_record(
        command, seed=0, fingerprint=digest, dtype="float32", prompt="none", pooling="none", per_bucket=per_bucket
    )
    file = ResultFile(Path(out) / "dependence.json", benchmark="dependence", row="dependence", run=record)
    done = file.rows
    for label, (kind, folder) in models.items():
        mark = fingerprint(folder) if Path(folder).is_dir() else folder
        if done.get(label, {}).get("fingerprint") == mark:
            say(f"{label}: kept")
            continue
        lm, tokenizer = open_row(kind, folder)
        found = dependence(lm, texts, tokenizer=tokenizer, buckets=wanted, per_bucket=per_bucket)
        done[label] = {"fingerprint": mark, "buckets": {name: one.to_dict() for name, one in found.items()}}
        file.add(rows=done, tables={"dependence": make_table(done, names)})
        say(f"{label}: after {', '.join(f'{name}: {one.after:.2f}' for name, one in found.items())}")
    if plot is not None:
        Path(plot).parent.mkdir(parents=True, exist_ok=True)
        drawn = {
            label: {name: BucketDependence(**one) for name, one in row["buckets"].items()}
            for label, row in done.items()
        }
        plot_dependence(drawn, plot)
    return file.path


app = typer.Typer(add_completion=False)


@app.command()
def main(
    base: Annotated[
        str | None,
        typer.Option(help="The untouched base; default $UBMOE_BASE, else that of the checkpoint."),
    ] = None,
    model: Annotated[Path | None, typer.Option(help="UBMoE checkpoint: its bi experts, causally.")] = None,
    runs: Annotated[list[Path] | None, typer.Option("--run", help="Folder of a finished training; repeatable.")] = None,
    data_dir: DataDir = None,
    out: Annotated[Path, typer.Option(help="Folder of the result file.")] = RESULTS,
    plot: Annotated[Path, typer.Option(help="SVG file.")] = PLOT,
    per_bucket: Annotated[int, typer.Option(help="Documents per length bucket.")] = PER_BUCKET,
) -> None:
    """Measure dependence for base, checkpoint and trainings; an interrupted command can be run again."""
    from benchmarks.ablation import ROWS
    from benchmarks.peers import base_folder

    with one_line_errors():
        texts = documents(data_folder(data_dir))  # A missing file is said before a base is unpacked.
        models = {"base": ("base", base_folder(base, model))}
        if model is not None:
            models[model.name] = ("model", str(model))
        for folder in runs or []:
            row = folder.name if folder.name in ROWS else folder.name.replace("-", "+")
            models[ROWS.get(row, folder.name)] = ("run", str(folder))
        path = run(
            models, texts, out=out, plot=plot, per_bucket=per_bucket,
            command=command_line("benchmarks.dependence"), say=typer.echo,
        )  # fmt: skip
    typer.echo(f"wrote {path} and {plot}")


if __name__ == "__main__":
    app()
