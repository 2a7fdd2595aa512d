"""Generation quality through EleutherAI's lm-eval: `python -m benchmarks.generation --base FOLDER`.

The tasks are lm-eval's own, on local files with `--data-dir` (`lm_tasks`). The untouched base and the generator view
(`uni`, `router`) run through the same `HFLM` in one command. Answered requests are kept in a database, finished tasks
in the result file: the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.lm_tasks import DEVIATIONS, METRICS, TASKS, build_tasks, task_manager
from benchmarks.options import Checkpoint, DataDir, ResultsFolder
from benchmarks.results import (
    RESULTS,
    ResultFile,
    bootstrap,
    bootstrap_mean,
    command_line,
    fingerprint,
    interval,
    one_line_errors,
    run_record,
)
from training.data import data_folder

logger = logging.getLogger(__name__)

MMLU_PER_SUBJECT = 20
MAX_TOKENS = 2048
MIN_PREFIX = 16
"""Tokens that all requests must begin with before it pays to keep them."""


def choose_samples(sizes: Mapping[str, int], limit: int | None, seed: int) -> dict[str, list[int]]:
    """Seeded row numbers per task, sorted; all rows where `limit` is None or not smaller.

    A task's choice depends on its name, size, limit and seed alone, so it is the same in every run.
    """
    chosen = {}
    for name, size in sizes.items():
        if limit is None or limit >= size:
            chosen[name] = list(range(size))
            continue
        own = int.from_bytes(sha256(f"{seed}:{name}".encode()).digest()[:8], "little")
        chosen[name] = sorted(int(row) for row in np.random.default_rng(own).choice(size, limit, replace=False))
    return chosen


def count_tokens(tasks: Mapping[str, Any], samples: Mapping[str, Sequence[int]], tokenizer: Any) -> int:
    """Tokens the model must read for these tasks: contexts shared by one-token answers are read once."""
    total = 0
    for name, task in tasks.items():
        task.build_all_requests(samples=list(samples[name]), rank=0, world_size=1)
        seen: set[str] = set()
        for request in task.instances:
            text = "".join(part for part in request.args if isinstance(part, str))
            if len(request.args) == 2 and len(request.args[1].strip()) == 1:
                if request.args[0] in seen:
                    continue
                seen.add(request.args[0])
            total += len(tokenizer(text)["input_ids"])
    return total


def evaluate(
    lm: Any,
    name: str,
    tasks: Mapping[str, Any],
    samples: Mapping[str, list[int]],
    *,
    seed: int,
    cache: str | None = None,
    resamples: int = 1000,
) -> list[dict[str, Any]]:
    """Scores of one entry of `TASKS` with bootstrap intervals, outcome per sample and a digest of all answers.

    Args:
        lm: An lm-eval model.
        name: Entry of `TASKS`.
        tasks: From `build_tasks`.
        samples: From `choose_samples`.
        seed: Of the bootstrap.
        cache: Database of answered requests, without ending; None: none.
        resamples: Draws of the bootstrap.

    Raises:
        RuntimeError: If the outcomes do not give lm-eval's own value.
    """
    from lm_eval import simple_evaluate

    result = simple_evaluate(
        lm,
        tasks=list(tasks.values()),
        samples=dict(samples),
        bootstrap_iters=0,
        use_cache=cache,
        task_manager=task_manager(),
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    if result is None:
        raise RuntimeError("Expected results from lm-eval, got none; run it in the main process.")
    logged = {task: sorted(result["samples"][task], key=lambda sample: sample["doc_id"]) for task in sorted(tasks)}
    digest = sha256(repr([[s["filtered_resps"] for s in logged[task]] for task in logged]).encode()).hexdigest()
    common = {"task": name, "answers_sha256": digest}
    scores = []
    for metric in METRICS.get(name, ("acc",)):
        outcomes = [sample[metric] for task in logged for sample in logged[task]]
        reported = {task: float(result["results"][task][f"{metric},none"]) for task in logged}
        if metric == "word_perplexity":
            losses, words = np.asarray([o[0] for o in outcomes]), np.asarray([o[1] for o in outcomes])

            def perplexity(rows: np.ndarray, losses: np.ndarray = losses, words: np.ndarray = words) -> float:
                return math.exp(-losses[rows].sum() / words[rows].sum())

            value = perplexity(np.arange(len(outcomes)))
            expected = reported[next(iter(reported))]
            draws = bootstrap(perplexity, len(outcomes), seed=seed, resamples=resamples)
            kept: Any = [[round(float(loss), 3), int(count)] for loss, count in outcomes]
        else:
            numbers = [100 * float(outcome) for outcome in outcomes]
            value = float(np.mean(numbers))
            expected = 100 * sum(reported[task] * len(logged[task]) for task in logged) / len(numbers)
            draws = bootstrap_mean(numbers, seed=seed, resamples=resamples)
            binary = all(number in (0.0, 100.0) for number in numbers)
            kept = "".join("1" if n else "0" for n in numbers) if binary else [round(n, 3) for n in numbers]
        if abs(value - expected) > 1e-6 * max(1.0, abs(expected)):
            raise RuntimeError(
                f"Expected lm-eval's {name} {metric} {expected}, got {value} from its samples. Report it."
            )
        low, high = interval(draws)
        scores.append(
            {
                **common,
                "metric": metric,
                "value": value,
                "low": low,
                "high": high,
                "sd": float(draws.std()),
                "n": len(outcomes),
                "outcomes": kept,
            }
        )
    return scores


def open_lm(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """lm-eval's `HFLM` of a causal language model, which reads what all requests begin with only once.

    TruthfulQA puts the same six examples before each answer: nine tenths of its tokens. Their keys and values are
    kept from batch to batch, and the logits returned begin behind them, which `HFLM` allows for.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer.
        batch_size: Requests per batch.
    """
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import DynamicCache

    class SharedPrefixLM(HFLM):
        limit = 0
        kept: tuple[Any, Any] = (None, None)
        computed = 0

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            contexts = [context for _, context, _ in requests]
            shared = min(map(len, contexts), default=0)
            for context in contexts:
                while context[:shared] != contexts[0][:shared]:
                    shared -= 1
            # The last token of a context predicts the first one of the answer, so it is always read.
            self.limit = min(shared, min(map(len, contexts), default=0) - 1)
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            prefix = inps[:1, : self.limit]
            # Rows cut to the model's length have lost their beginning.
            if self.limit < MIN_PREFIX or not bool((inps[:, : self.limit] == prefix).all()):
                self.computed += inps.numel()
                return super()._model_call(inps, attn_mask, labels)
            with torch.no_grad():
                if self.kept[0] is None or not torch.equal(self.kept[0], prefix):
                    self.kept = (prefix.clone(), self.model(prefix, use_cache=True).past_key_values)
                    self.computed += prefix.numel()
                cache = DynamicCache(config=self.model.config)
                for number, layer in enumerate(self.kept[1].layers):
                    rows = (part.expand(len(inps), -1, -1, -1) for part in (layer.keys, layer.values))
                    cache.update(*rows, number)
                rest = inps[:, self.limit :]
                self.computed += rest.numel()
                return self.model(rest, past_key_values=cache, use_cache=True).logits

    return SharedPrefixLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        max_length=min(MAX_TOKENS, model.config.max_position_embeddings),
    )


def run(
    model: Any,
    tokenizer: Any,
    *,
    row: str,
    label: str,
    routing: str,
    mark: str,
    base_row: str = "base",
    tasks: Sequence[str] = TASKS,
    folder: Path | None = None,
    out: str | Path = RESULTS,
    cache: str | Path | None = None,
    seed: int = 0,
    limit: int | None = None,
    mmlu_per_subject: int | None = MMLU_PER_SUBJECT,
    batch_size: int = 8,
    resamples: int = 1000,
    command: str = "",
    say: Callable[[str], None] = logger.info,
) -> Path:
    """Evaluate one causal language model and write `generation-<row>.json` after each task.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer.
        row: Name of the row.
        label: How the tables call it.
        routing: `base`, `uni` or `router`, for the record.
        mark: Fingerprint of the weights.
        base_row: Row of the untouched base that this one is compared with.
        tasks: Entries of `TASKS` or names of lm-eval.
        folder: Local data folder; None: official data.
        out: Folder of the result files.
        cache: Folder for answered requests; None: none kept.
        seed: Of samples and bootstrap.
        limit: Samples per task, seeded; None: all.
        mmlu_per_subject: Samples per MMLU subject, seeded; None: all. A smaller `limit` wins.
        batch_size: Requests per batch.
        resamples: Draws of the bootstrap.
        command: Recorded as it is.
        say: Takes one line per task.

    Returns:
        The result file.
    """
    lm = open_lm(model, tokenizer, batch_size)
    record = run_record(
        command,
        seed=seed,
        packages=("lm-eval",),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        prompt="none",
        pooling="none",
        fingerprint=mark,
        routing=routing,
        batch_size=batch_size,
    )
    file = ResultFile(
        Path(out) / f"generation-{row}.json",
        benchmark="generation",
        row=row,
        run=record,
        label=label,
        routing=routing,
        base_row=base_row,
    )
    for position, name in enumerate(tasks, start=1):
        counts = [count for count in (limit, mmlu_per_subject if name == "mmlu" else None) if count is not None]
        rows = min(counts) if counts else None
        source = "local" if folder else "official"
        if found := file.find(task=name, data=source, limit=rows, seed=seed):
            say(f"{position}/{len(tasks)} {row} {name}: {found['value']:.2f} (kept)")
            continue
        start = time.perf_counter()
        built = build_tasks(name, folder)
        samples = choose_samples({key: len(task.eval_docs) for key, task in built.items()}, rows, seed)
        database = str(Path(cache) / f"{row}-{mark.replace('/', '-')}") if cache else None
        scores = evaluate(lm, name, built, samples, seed=seed, cache=database, resamples=resamples)
        facts: dict[str, Any] = {
            "data": source,
            "seed": seed,
            "limit": rows,
            "seconds": round(time.perf_counter() - start, 1),
        }
        facts["samples"] = "all" if rows is None else samples
        if folder and name in DEVIATIONS:
            facts["deviation"] = DEVIATIONS[name]
        file.add(*({**score, **facts} for score in scores))
        say(f"{position}/{len(tasks)} {row} {name}: {scores[0]['value']:.2f} in {facts['seconds']:.0f} s")
    return file.path


app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Checkpoint = Path("models/ubmoe-135m"),
    base: Annotated[
        str | None,
        typer.Option(help="The untouched base; default $UBMOE_BASE, else that of the checkpoint."),
    ] = None,
    base_row: Annotated[str, typer.Option(help="Row of the base, another for each base.")] = "base",
    rows: Annotated[
        list[str] | None, typer.Option(help="base, uni, router; repeat for more. Default: base and uni.")
    ] = None,
    tasks: Annotated[list[str] | None, typer.Option(help=f"Of lm-eval; default: {', '.join(TASKS)}.")] = None,
    data_dir: DataDir = None,
    online: Annotated[bool, typer.Option(help="Fetch the official data from the Hub instead.")] = False,
    out: ResultsFolder = RESULTS,
    cache: Annotated[Path, typer.Option(help="Folder of answered requests, for resuming.")] = Path("runs/lm-cache"),
    seed: int = 0,
    limit: Annotated[int | None, typer.Option(help="Samples per task, seeded; their ids are stored.")] = None,
    mmlu_per_subject: Annotated[int, typer.Option(help="Samples per MMLU subject, seeded.")] = MMLU_PER_SUBJECT,
    batch_size: int = 8,
    threads: Annotated[int | None, typer.Option(help="torch threads; default: torch's choice.")] = None,
    count: Annotated[bool, typer.Option(help="Only count the tokens of each task for one row.")] = False,
) -> None:
    """Measure generation with lm-eval, base and UBMoE side by side; an interrupted command can be run again."""
    import torch

    from benchmarks.peers import base_folder, open_generator
    from ubmoe_st.checkpoint import read_config

    for name in ("lm-eval", "lm_eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if threads:
        torch.set_num_threads(threads)
    wanted = tasks or list(TASKS)
    with one_line_errors():
        base_name = base_folder(base, model)
        folder = None if online else data_folder(data_dir)
        if count:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(base_name)
            for name in wanted:
                built = build_tasks(name, folder)
                part = min(limit or mmlu_per_subject, mmlu_per_subject) if name == "mmlu" else limit
                samples = choose_samples({key: len(task.eval_docs) for key, task in built.items()}, part, seed)
                number = sum(map(len, samples.values()))
                typer.echo(f"{name}: {number} samples, {count_tokens(built, samples, tokenizer):,} tokens")
            return
        routings = rows or ["base", "uni"]
        # Before the first of hours: every row can be measured.
        for routing in routings:
            if routing not in ("base", "uni", "router"):
                raise ValueError(f"Expected base, uni or router, got {routing!r}. Check --rows.")
            if routing == "router" and model.is_dir() and read_config(model).router is None:
                raise ValueError(f"{model} has no token routers; leave out --rows router, or train them first")
        for routing in routings:
            path = base_name if routing == "base" else str(model)
            lm, lm_tokenizer = open_generator(path, routing=routing)
            row = {"base": base_row, "uni": model.name, "router": f"{model.name}-router"}[routing]
            of_base = "base model" if base_row == "base" else f"base model ({base_row})"
            label = {"base": of_base}.get(routing, f"{model.name}, {routing}")
            run(
                lm,
                lm_tokenizer,
                row=row,
                label=label,
                routing=routing,
                base_row=base_row,
                mark=f"{fingerprint(path) if Path(path).is_dir() else path}/{routing}",
                tasks=wanted,
                folder=folder,
                out=out,
                cache=cache,
                seed=seed,
                limit=limit,
                mmlu_per_subject=mmlu_per_subject,
                batch_size=batch_size,
                command=command_line("benchmarks.generation"),
                say=typer.echo,
            )
            del lm


if __name__ == "__main__":
    app()
