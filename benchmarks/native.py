"""llama.cpp against torch behind the same interface: `python -m benchmarks.native --model models/ubmoe-135m`.

Speed by processor time of one thread, in turns; the vectors of STSB-dev beside each other; memory in a process of
its own. What is measured is kept: the command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.options import Checkpoint, DataDir, ResultsFolder
from benchmarks.process import in_process, status_bytes
from benchmarks.results import (
    RESULTS,
    ResultFile,
    bootstrap_spearman,
    command_line,
    fingerprint,
    interval,
    one_line_errors,
    run_record,
    spearman,
)
from training.data import data_folder, sts_pairs

logger = logging.getLogger(__name__)

PROMPTS = ("The capital of France is", "Once upon a time there was a small", "The three most important rules are")
NEW_TOKENS = 24
PEER = "torch fp32"
NATIVE = "llama.cpp"
STEPS = {"loaded": "both views loaded", "short": "after short texts", "long": "after a text of 500 tokens"}
"""Where memory is read."""


def generation_rate(engine: Any, prompt: str) -> float:
    """Greedy tokens in each second of processor time, reading the prompt included."""
    from ubmoe_st.serving import Sampling

    found: list[int] = []
    began = time.process_time()
    sampling = Sampling(NEW_TOKENS, temperature=0)

    def keep(token: int) -> bool:
        found.append(token)
        return True

    engine.generate_tokens(engine.continuation_ids(prompt), sampling, keep)
    return len(found) / (time.process_time() - began)


def embed(engine: Any, texts: Sequence[str]) -> tuple[np.ndarray, float]:
    """Vectors of N texts, (N, D), and tokens embedded in each second of processor time."""
    tokens = engine.tokenize(texts, None)
    began = time.process_time()
    vectors = engine.embed(tokens)
    return vectors, sum(len(text.ids) for text in tokens) / (time.process_time() - began)


def compare(engines: dict[str, Any], pairs: tuple[list[str], list[str], list[float]], batch: int, seed: int) -> Any:
    """Scores of both engines.

    Args:
        engines: `PEER` and `NATIVE`.
        pairs: N first and second sentences, and what people said of them.
        batch: Pairs embedded at a time.
        seed: Of the bootstrap.
    """
    first, second, gold = pairs
    rates: dict[tuple[str, str], list[float]] = {(task, name): [] for task in ("generate", "embed") for name in engines}
    for engine in engines.values():  # the first call of each makes what later ones use again
        generation_rate(engine, PROMPTS[0])
        embed(engine, first[:1])
    for prompt in PROMPTS:
        for name, engine in engines.items():
            rates["generate", name].append(generation_rate(engine, prompt))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in engines}
    for row in range(0, len(first), batch):
        for name, engine in engines.items():
            vectors, rate = embed(engine, first[row : row + batch] + second[row : row + batch])
            parts[name].append(vectors.reshape(2, -1, vectors.shape[1]))
            rates["embed", name].append(rate)
    scores = [
        {"task": task, "split": name, "metric": "tokens/s", "n": len(found), "value": statistics.median(found)}
        | {"ratio": statistics.median(mine / peer for mine, peer in zip(found, rates[task, PEER]))}
        for (task, name), found in rates.items()
    ]
    joined = {name: np.concatenate(found, axis=1) for name, found in parts.items()}  # (2, N, D)
    for name, (left, right) in joined.items():
        found = (left * right).sum(-1).tolist()
        low, high = interval(bootstrap_spearman(gold, found, seed=seed))
        value = spearman(gold, found)
        scores.append({"task": "STSB-dev", "split": name, "metric": "spearman x100", "n": len(first), "value": value})
        scores[-1] |= {"low": low, "high": high}
    cosines = (joined[PEER] * joined[NATIVE]).sum(-1)
    for metric, value in (("smallest cosine", cosines.min()), ("mean cosine", cosines.mean())):
        scores.append({"task": "STSB-dev", "split": NATIVE, "metric": metric, "n": cosines.size, "value": float(value)})
    return scores


def memory(model: str, gguf: str | None) -> dict[str, int]:
    """Resident bytes of a process with both views in llama.cpp, above that process before it.

    Args:
        model: Checkpoint.
        gguf: Its base; None: as `NativeUBMoE.from_checkpoint` finds it.

    Returns:
        By step of `STEPS`; `file`: size of the GGUF, bytes.
    """
    from ubmoe_st.serving import NativeUBMoE

    before = status_bytes("VmRSS")
    engine = NativeUBMoE.from_checkpoint(model, gguf=gguf, threads=1)
    found = {"file": engine.parts.gguf.stat().st_size, "loaded": status_bytes("VmRSS") - before}
    engine.encode(["a short text", "and another one"])
    generation_rate(engine, PROMPTS[0])
    found["short"] = status_bytes("VmRSS") - before
    engine.encode("the wing of an aeroplane in a slipstream " * 100)
    found["long"] = status_bytes("VmRSS") - before
    return found


def run(
    model: str | Path,
    pairs: tuple[list[str], list[str], list[float]],
    *,
    gguf: Path | None = None,
    batch: int = 8,
    seed: int = 0,
    out: str | Path = RESULTS,
    command: str = "",
    measure: Callable[..., dict[str, int]] | None = None,
    say: Callable[[str], None] = logger.info,
) -> Path:
    """Measure one checkpoint and write `native-<row>.json`; what is there is kept.

    Args:
        model: Checkpoint folder with low-rank experts.
        pairs: From `sts_pairs`.
        gguf: The base GGUF. None: as `NativeUBMoE.from_checkpoint` finds it.
        batch: Pairs embedded at a time.
        seed: Of the bootstrap.
        out: Folder of the result file.
        command: Recorded as it is.
        measure: Runs `memory`; None: in a process of its own.
        say: Takes one line per part.

    Returns:
        The result file.

    Raises:
        ImportError: If llama.cpp is not installed.
        ValueError: If it cannot embed with this checkpoint.
    """
    import torch

    from ubmoe_st import UBMoE
    from ubmoe_st.serving import NativeUBMoE, TorchEngine

    torch.set_num_threads(1)
    row = Path(model).name
    file_name = Path(out) / f"native-{row}.json"
    facts: dict[str, Any] = {"dtype": "float32, the GGUF's", "prompt": "", "pooling": "", "data": "local"}
    record = run_record(
        command, seed=seed, packages=("llama-cpp-py-sync", "xllamacpp"), fingerprint=fingerprint(model), **facts
    )
    file = ResultFile(file_name, benchmark="native", row=row, run=record, label=row)

    def add(scores: list[dict[str, Any]]) -> None:
        file.add(*scores)
        file.add(tables={f"native-{row}": make_table(file.content["scores"])})

    if file.find(task="memory"):
        say(f"{row} memory: kept")
    else:
        found = (measure or (lambda *task: in_process(memory, *task)))(str(model), str(gguf) if gguf else None)
        size = found.pop("file")
        add(
            [
                {"task": "memory", "split": NATIVE, "method": step, "metric": "MiB", "value": value / 2**20, "n": 1}
                | {"ratio": value / size}
                for step, value in found.items()
            ]
        )
        say(f"{row} memory: {', '.join(f'{step} {value / size:.2f}x the file' for step, value in found.items())}")
    if file.find(task="STSB-dev", n=len(pairs[0])):
        say(f"{row} STSB-dev: kept")
        return file.path
    engines: dict[str, Any] = {
        PEER: TorchEngine(UBMoE(str(model), device="cpu", low_memory=True), "torch"),
        NATIVE: NativeUBMoE.from_checkpoint(model, gguf=gguf, threads=1),
    }
    add(compare(engines, pairs, batch, seed))
    return file.path


def make_table(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A line for what was measured, a column for each engine, and the ratio of the two."""
    cells = {(one["task"], one["split"], one["metric"]): one for one in scores if one["task"] != "memory"}
    rows: list[list[Any]] = []
    for label, task, metric in (
        ("generation, tokens/s", "generate", "tokens/s"),
        ("embedding, tokens/s", "embed", "tokens/s"),
        ("STSB-dev, Spearman x100", "STSB-dev", "spearman x100"),
    ):
        peer, native = (cells.get((task, name, metric)) for name in (PEER, NATIVE))
        if peer and native:
            ratio = f"{native['ratio']:.2f}x" if "ratio" in native else f"{native['value'] - peer['value']:+.2f}"
            rows.append([label, float(peer["value"]), float(native["value"]), ratio])
    for metric in ("smallest cosine", "mean cosine"):
        if one := cells.get(("STSB-dev", NATIVE, metric)):
            rows.append([f"{metric} of the vectors of {one['n']:,} sentences", None, f"{one['value']:.4f}", ""])
    for one in scores:
        if one["task"] == "memory":
            label = f"memory above the interpreter, {STEPS[one['method']]}"
            rows.append([label, None, f"{one['value']:.0f} MiB", f"{one['ratio']:.2f}x the GGUF"])
    return {"columns": ["", PEER, NATIVE, "ratio or difference"], "rows": rows}


app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Checkpoint = Path("models/ubmoe-135m"),
    pairs: Annotated[int, typer.Option(min=2, help="Number of STSB-dev pairs.")] = 1500,
    batch: Annotated[int, typer.Option(min=1, help="Pairs embedded at a time.")] = 8,
    gguf: Annotated[Path | None, typer.Option(help="Base GGUF; default the one the checkpoint was made of.")] = None,
    data_dir: DataDir = None,
    out: ResultsFolder = RESULTS,
    seed: int = 0,
) -> None:
    """Measure both views in llama.cpp beside torch, one thread each; finished parts are kept."""
    with one_line_errors():
        run(
            model,
            sts_pairs("STSB-dev", data_folder(data_dir), pairs),
            gguf=gguf,
            batch=batch,
            seed=seed,
            out=out,
            command=command_line("benchmarks.native"),
            say=typer.echo,
        )


if __name__ == "__main__":
    app()
