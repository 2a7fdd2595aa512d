"""What the released models are: `python -m benchmarks.models --model models/ubmoe-135m`.

Writes `models-<row>.json`: base, parameters, dimension, and how the `bi` experts were trained, as the checkpoint itself
says. Rows with such a file are the released ones: the first table of the README lists them, the others mark them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.options import ResultsFolder
from benchmarks.results import RESULTS, ResultFile, command_line, fingerprint, one_line_errors, run_record
from ubmoe_st.checkpoint import facts as checkpoint_facts
from ubmoe_st.checkpoint import read_config


def describe(path: Path) -> dict[str, Any]:
    """What `ubmoe info` and the configuration of a checkpoint say, as the table wants it.

    Raises:
        CheckpointError: If a file is missing, truncated or not valid.
        FileNotFoundError: If the folder is not a checkpoint.
    """
    facts = checkpoint_facts(path)
    parameters, base = facts["parameters"], facts["base"]
    return {
        "base": base["name"],
        "base_origin": base["origin"],
        "base_millions": parameters["base"] / 1e6,
        "added_millions": parameters["added"] / 1e6,
        "added_percent": parameters["added_percent"],
        "dimension": facts["dimension"],
        "training": read_config(path).training or "unknown",
    }


def run(path: Path, out: str | Path = RESULTS, command: str = "") -> Path:
    """Describe one checkpoint in `models-<row>.json`; its row is the name of the folder."""
    record = run_record(
        command, seed=0, fingerprint=fingerprint(path, without="generator"), dtype="none", prompt="none", pooling="none"
    )
    file = ResultFile(Path(out) / f"models-{path.name}.json", benchmark="models", row=path.name, run=record)
    file.add(label=path.name, facts=describe(path))
    return file.path


app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[list[Path] | None, typer.Option(help="Checkpoint folder; repeat for more.")] = None,
    out: ResultsFolder = RESULTS,
) -> None:
    """Describe released checkpoints for the tables."""
    with one_line_errors():
        for path in model or [Path("models/ubmoe-135m")]:
            typer.echo(f"wrote {run(path, out, command_line('benchmarks.models'))}")


if __name__ == "__main__":
    app()
