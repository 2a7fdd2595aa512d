"""What to train: `python -m benchmarks.ablation --base FOLDER`.

Every row trains other modules with the same data, steps and seed (`training/recipes/ablation.yaml`), then STS is
measured on the bidirectional encoder and WikiText-2 on the *causal* model with the same trained weights: what would
become of generation if the weights were shared. Finished rows are kept in `ablation.json`; a training that was
interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from benchmarks.options import DataDir
from benchmarks.results import (
    RESULTS,
    ResultFile,
    command_line,
    fingerprint,
    nearest,
    one_line_errors,
    read_json,
    run_record,
)
from training.data import data_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from benchmarks.peers import Encoder
    from training.recipe import ContrastiveRecipe

logger = logging.getLogger(__name__)

RECIPE = Path("training/recipes/ablation.yaml")
ROWS: dict[str, str] = {
    "base-causal": "base, causal, untrained",
    "base-bidirectional": "base, bidirectional, untrained",
    "ffn": "FFN",
    "attention": "ATT",
    "ffn+attention": "FFN+ATT",
    "embeddings": "EMB",
    "ffn+embeddings": "FFN+EMB",
    "attention+embeddings": "ATT+EMB",
    "all": "ALL",
}
"""Row names, which are the recipe's `train` or a peer, and how the table calls them."""

PAGES_AT_ONCE = 2
"""WikiText-2 windows per batch: the logits of one window of 2,048 tokens over 49k words are 0.4 GB, and lm-eval takes
their logarithms beside them."""

DEFAULT_ROWS = ("base-causal", "base-bidirectional", "ffn", "attention", "ffn+attention", "embeddings", "all")
TABLE = "ablation"


def open_row(row: str, recipe: ContrastiveRecipe) -> tuple[Encoder, PreTrainedModel, float]:
    """Train one row, or take the finished training.

    Args:
        row: Of `ROWS`.
        recipe: The budget; `train` and `out` are set here.

    Returns:
        The encoder, the causal language model with the same weights, seconds of training.
    """
    from benchmarks.peers import MAX_TOKENS, Encoder, open_encoder, open_generator
    from training.command import RECIPE_FILE
    from training.contrastive import SUMMARY_FILE, load_run, train
    from training.resume import TRAINED_FILE
    from training.student import causal_model, encoder_of
    from ubmoe_st.bases import resolve_base

    base = resolve_base(recipe.base)
    if row.startswith("base-"):
        lm, _ = open_generator(str(base.path), routing="base")
        return open_encoder(row, base=str(base.path)), lm, 0.0
    out = Path(recipe.out) / row.replace("+", "-")
    wanted = dataclasses.replace(recipe, train=row, out=str(out))  # type: ignore[arg-type]
    if not (out / TRAINED_FILE).is_file():
        train(wanted, export=False)
    elif (budget := read_json(out / RECIPE_FILE)["trainer"]) != wanted.trainer:
        raise ValueError(
            f"{out} was trained with {budget}, asked for is {wanted.trainer}; delete it, or set another out"
        )
    _, model = load_run(out)
    module = encoder_of(model)
    module.max_seq_length = MAX_TOKENS
    seconds = float(read_json(out / SUMMARY_FILE)["seconds"])
    encoder = Encoder(row, ROWS[row], recipe.supervision, model, row, "none", recipe.pooling)
    return encoder, causal_model(module, base), seconds


def measure(
    encoder: Encoder,
    lm: PreTrainedModel,
    tokenizer: Any,
    names: Sequence[str],
    folder: Path,
    *,
    seed: int,
    limit: int | None,
    pages: int | None,
    batch_size: int,
) -> dict[str, Any]:
    """STS scores by task and the word perplexity on WikiText-2.

    Args:
        encoder: The encoder.
        lm: The causal language model.
        tokenizer: Its tokenizer.
        names: Task names with an optional `:split`.
        folder: Local data folder.
        seed: Of samples.
        limit: STS pairs per task; None: all.
        pages: WikiText-2 pages; None: all.
        batch_size: Texts per batch of the encoder.
    """
    from lm_eval.models.huggingface import HFLM

    from benchmarks import embedding, generation, lm_tasks
    from benchmarks.mteb_model import wrap

    wrapped = wrap(encoder)
    scores: dict[str, float] = {}
    for name in names:
        task_name, split = embedding.split_name(name)
        task = embedding.local_task(task_name, folder, split, limit=limit, seed=seed)
        found = embedding.score_task(
            wrapped, task, split, seed=seed, batch_size=batch_size, resamples=2, progress=False
        )
        scores[name] = found[0]["value"]
    built = lm_tasks.build_tasks("wikitext", folder)
    samples = generation.choose_samples({key: len(task.eval_docs) for key, task in built.items()}, pages, seed)
    length = min(generation.MAX_TOKENS, lm.config.max_position_embeddings)
    hf = HFLM(pretrained=lm, tokenizer=tokenizer, backend="causal", batch_size=PAGES_AT_ONCE, max_length=length)
    perplexity = generation.evaluate(hf, "wikitext", built, samples, seed=seed, resamples=2)[0]["value"]
    return {"scores": scores, "wikitext_word_perplexity": perplexity}


def make_table(rows: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The table of the finished rows, in the order of `ROWS`."""
    columns = ["trained", *names, "average", "WikiText-2 word perplexity, causal"]
    lines = []
    for row, label in ROWS.items():
        if row in rows and all(name in rows[row]["scores"] for name in names):
            values = [float(rows[row]["scores"][name]) for name in names]
            lines.append([label, *values, float(np.mean(values)), float(rows[row]["wikitext_word_perplexity"])])
    return {"columns": columns, "rows": lines}


def run(
    recipe: ContrastiveRecipe,
    rows: Sequence[str],
    names: Sequence[str],
    folder: Path,
    *,
    out: str | Path = RESULTS,
    limit: int | None = None,
    pages: int | None = None,
    batch_size: int = 32,
    command: str = "",
    say: Callable[[str], None] = logger.info,
) -> Path:
    """Train and measure the rows and write `ablation.json` after each.

    Args:
        recipe: The budget of every row.
        rows: Of `ROWS`.
        names: STS tasks.
        folder: Local data folder.
        out: Folder of the result file.
        limit: STS pairs per task; None: all. A limited run has a file of its own.
        pages: WikiText-2 pages; None: all.
        batch_size: Texts per batch.
        command: Recorded as it is.
        say: Takes one line per row.

    Raises:
        ValueError: If a row is unknown.
    """
    from transformers import AutoTokenizer

    from ubmoe_st.bases import resolve_base

    for row in rows:
        if row not in ROWS:
            raise ValueError(f"Expected a row of the ablation, got {row!r} ({nearest(row, ROWS)}). Check --rows.")
    base = resolve_base(recipe.base)
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    seed = int(recipe.trainer.get("seed", 42))
    budget = {k: v for k, v in dataclasses.asdict(recipe).items() if k not in ("train", "out", "base")}
    facts = {"budget": budget, "tasks": list(names), "limit": limit, "pages": pages, "base": fingerprint(base.path)}
    mark = sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    suffix = "-limited" if limit or pages else ""
    record = run_record(
        command, seed=seed, packages=("mteb", "lm-eval", "peft"), fingerprint=mark, dtype="float32",
        prompt="none", pooling=recipe.pooling, **{k: v for k, v in facts.items() if k != "budget"}
    )  # fmt: skip
    name = f"ablation{suffix}"
    file = ResultFile(Path(out) / f"{name}.json", benchmark="ablation", row=name, run=record, budget=budget)
    done = file.rows
    for row in rows:
        if row in done:
            say(f"{row}: kept")
            continue
        start = time.perf_counter()
        encoder, lm, seconds = open_row(row, recipe)
        done[row] = measure(
            encoder, lm, tokenizer, names, folder, seed=seed, limit=limit, pages=pages, batch_size=batch_size
        )
        done[row] |= {"training_seconds": seconds, "seconds": round(time.perf_counter() - start, 1)}
        file.add(rows=done, tables={f"{TABLE}{suffix}": make_table(done, names)})
        average = np.mean(list(done[row]["scores"].values()))
        say(f"{row}: STS {average:.2f}, perplexity {done[row]['wikitext_word_perplexity']:.2f}")
    return file.path


app = typer.Typer(add_completion=False)


@app.command()
def main(
    recipe: Annotated[Path, typer.Option(help="The budget of every row.")] = RECIPE,
    base: Annotated[str | None, typer.Option(help="Base model; default: the recipe's.")] = None,
    rows: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(ROWS)}; repeat for more.")] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="STS tasks or sets; default: sts.")] = None,
    change: Annotated[list[str] | None, typer.Option("--set", help="key=value of the recipe; repeat for more.")] = None,
    data_dir: DataDir = None,
    out: Annotated[Path, typer.Option(help="Folder of the result file.")] = RESULTS,
    limit: Annotated[int | None, typer.Option(help="STS pairs per task (seeded sample), for a quick look.")] = None,
    pages: Annotated[int | None, typer.Option(help="WikiText-2 pages, for a quick look.")] = None,
    batch_size: int = 32,
) -> None:
    """Train and measure each row at one equal budget; an interrupted command can be run again."""
    from benchmarks.embedding import expand
    from training.command import read_recipe
    from training.recipe import ContrastiveRecipe

    for noisy in ("mteb", "lm-eval", "lm_eval"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    with one_line_errors():
        folder = data_folder(data_dir)
        names, _ = expand(tasks or ["sts"], online=False, folder=folder)
        changes = [*(change or []), *([f"base={base}"] if base else [])]
        budget = read_recipe(ContrastiveRecipe, recipe, changes)
        path = run(
            budget, rows or DEFAULT_ROWS, names, folder, out=out, limit=limit, pages=pages, batch_size=batch_size,
            command=command_line("benchmarks.ablation"), say=typer.echo,
        )  # fmt: skip
    typer.echo(f"wrote {path}")


if __name__ == "__main__":
    app()
