"""Speed and memory: `python -m benchmarks.speed run --model models/ubmoe-135m --base ...`.

Each system runs in a process of its own (so that its memory is its own), systems take turns, and every ratio is against
a peer named in the same file. Encode throughput counts the tokens of the texts, without padding. What is measured in
turns within one process, beside the ceiling of its matrix products, is in `benchmarks.ceiling`; `--quick` is that
alone.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import data as local
from benchmarks.ceiling import Sizes, measure_encoding, measure_generating
from benchmarks.options import Checkpoint, DataDir, ResultsFolder
from benchmarks.process import in_process
from benchmarks.results import RESULTS, ResultFile, command_line, fingerprint, one_line_errors, run_record
from training.data import data_folder

logger = logging.getLogger(__name__)

ENCODE_SYSTEMS = {"ubmoe": "UBMoE.encode", "stock": "SentenceTransformer, same folder", "minilm": "all-MiniLM-L6-v2"}
GENERATE_SYSTEMS = {"ubmoe": "UBMoE.generate", "router": "UBMoE.generate, router", "base": "the base model"}
MEMORY_SYSTEMS = {
    "ubmoe": "UBMoE, both views",
    "low": "UBMoE, both views, low_memory",
    "two": "encoder and generator as two models",
    "base": "the base model alone",
}
PROMPT = "Explain in a few sentences why the sky is blue."


def sample_texts(folder: Path, kind: str, count: int, seed: int) -> list[str]:
    """A seeded sample of `short` texts (sentences) or `long` ones (documents of the Cranfield collection)."""
    if kind == "short":
        texts = local.sts_pairs(folder, "STSBenchmark", "validation")["sentence1"]
    else:
        texts = [t for t in local.read_collection(folder / "retrieval" / "cranfield").documents.values() if t.strip()]
    rows = np.random.default_rng(seed).choice(len(texts), min(count, len(texts)), replace=False)
    return [texts[row] for row in rows]


def resident_bytes() -> int:
    """Resident memory of this process in bytes."""
    import psutil

    return int(psutil.Process(os.getpid()).memory_info().rss)


def private_bytes() -> int:
    """Memory of this process that is not a mapped file shared with others, in bytes (resident memory elsewhere)."""
    import psutil

    full = psutil.Process(os.getpid()).memory_full_info()
    return int(getattr(full, "uss", full.rss))


def worker(task: dict[str, Any]) -> dict[str, Any]:
    """One measurement in this process.

    Args:
        task: `kind` (encode, generate, memory), `system`, `model`, `base`, `texts`, `repeats`, `new_tokens`, `threads`.

    Returns:
        `seconds` per repeat and `tokens`, or `weights`, `resident` and `private` in bytes.
    """
    import torch

    torch.set_num_threads(task["threads"])
    return {"encode": _encode, "generate": _generate, "memory": _memory}[task["kind"]](task)


def _open_encoder(task: dict[str, Any]) -> Any:
    from sentence_transformers import SentenceTransformer

    from training.embedders import MINILM, embedder_path

    if task["system"] == "minilm":
        return SentenceTransformer(embedder_path(MINILM), device="cpu")
    if task["system"] == "stock":
        return SentenceTransformer(task["model"], device="cpu")
    from ubmoe_st import UBMoE

    return UBMoE(task["model"], device="cpu")


def _encode(task: dict[str, Any]) -> dict[str, Any]:
    model, texts = _open_encoder(task), task["texts"]
    lengths = [len(ids) for ids in model.tokenizer(texts)["input_ids"]]
    tokens = int(sum(min(length, model.max_seq_length or length) for length in lengths))
    model.encode(texts[:8], batch_size=task["batch_size"])
    seconds = []
    for _ in range(task["repeats"]):
        start = time.perf_counter()
        model.encode(texts, batch_size=task["batch_size"])
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "tokens": tokens, "texts": len(texts)}


def _generate(task: dict[str, Any]) -> dict[str, Any]:
    import torch

    from benchmarks.peers import open_generator

    routing = {"ubmoe": "uni", "router": "router", "base": "base"}[task["system"]]
    lm, tokenizer = open_generator(task["base"] if routing == "base" else task["model"], routing=routing)
    model: Any = lm
    inputs = tokenizer(PROMPT, return_tensors="pt")
    count = task["new_tokens"]
    seconds = []
    with torch.inference_mode():
        for repeat in range(task["repeats"] + 1):
            start = time.perf_counter()
            output = model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
            if repeat:
                seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "tokens": int(output.shape[1] - inputs["input_ids"].shape[1])}


def _memory(task: dict[str, Any]) -> dict[str, Any]:
    # All libraries before the first look, so that what is added is the model's.
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModelForCausalLM

    from ubmoe_st import UBMoE

    system = task["system"]
    resident, private = resident_bytes(), private_bytes()
    if system in ("ubmoe", "low"):
        model = UBMoE(task["model"], device="cpu", low_memory=system == "low")
        modules = [model, model.generator]
    elif system == "two":
        encoder = SentenceTransformer(task["model"], device="cpu")
        modules = [encoder, AutoModelForCausalLM.from_pretrained(task["base"], dtype=torch.float32)]
    else:
        modules = [AutoModelForCausalLM.from_pretrained(task["base"], dtype=torch.float32)]
    parameters = {p.data_ptr(): p.numel() * p.element_size() for module in modules for p in module.parameters()}
    for module in modules:  # touch every weight, so that mapped files are in memory
        for parameter in module.parameters():
            parameter.sum()
    weights = sum(parameters.values())
    return {"weights": weights, "resident": resident_bytes() - resident, "private": private_bytes() - private}


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """What `worker` finds in a new process.

    Raises:
        RuntimeError: If it fails, with what was to be measured.
    """
    try:
        return in_process(worker, task)
    except RuntimeError as error:
        raise RuntimeError(f"Expected a measurement of {task['kind']} with {task['system']}, got: {error}") from error


def rates(runs: Sequence[dict[str, Any]], unit: str = "tokens") -> dict[str, float]:
    """Median, smallest and largest rate per second over all repeats of all rounds."""
    values = [run[unit] / seconds for run in runs for seconds in run["seconds"]]
    return {"value": float(np.median(values)), "low": min(values), "high": max(values), "n": len(values)}


def memory_scores(common: dict[str, Any]) -> list[dict[str, Any]]:
    """Memory of each of `MEMORY_SYSTEMS` in a process of its own, in MiB and as a share of the base's.

    Args:
        common: Of a task of `measure`, what does not depend on the system.
    """
    measured = {}
    for system in MEMORY_SYSTEMS:
        try:
            measured[system] = measure({**common, "kind": "memory", "system": system})
        except RuntimeError as error:
            if system != "low":
                raise
            typer.echo(f"memory, {MEMORY_SYSTEMS[system]}: left out ({error})", err=True)
    return [
        {
            "task": "memory",
            "split": system,
            "metric": f"{metric} MiB",
            "label": MEMORY_SYSTEMS[system],
            "value": found[metric] / 2**20,
            "ratio": found[metric] / measured["base"][metric],
            "ratio_to": MEMORY_SYSTEMS["base"],
            "n": 1,
        }
        for system, found in measured.items()
        for metric in ("weights", "resident", "private")
    ]


app = typer.Typer(add_completion=False)


@app.callback()
def commands() -> None:
    """Speed and memory of a checkpoint beside its peers."""


@app.command(name="run")
def main(
    model: Checkpoint = Path("models/ubmoe-135m"),
    base: Annotated[
        str | None,
        typer.Option(help="The untouched base; default $UBMOE_BASE, else that of the checkpoint."),
    ] = None,
    data_dir: DataDir = None,
    out: ResultsFolder = RESULTS,
    rounds: Annotated[int, typer.Option(help="Turns each system takes.")] = 3,
    repeats: Annotated[int, typer.Option(help="Repeats in one turn.")] = 2,
    short: Annotated[int, typer.Option(help="Short texts.")] = 256,
    long: Annotated[int, typer.Option(help="Long texts.")] = 32,
    new_tokens: Annotated[int, typer.Option(help="New tokens per generation.")] = 64,
    batch_size: int = 32,
    threads: int = 1,
    seed: int = 0,
    routers: Annotated[bool, typer.Option(help="Also measure generation with trained routers.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="What is measured in turns, little of it, and memory.")
    ] = False,
) -> None:
    """Measure throughput and memory of a checkpoint beside its peers."""
    from benchmarks.peers import base_folder
    from ubmoe_st.compute import processor_flags

    with one_line_errors(RuntimeError):
        base_name = base_folder(base, model)
        folder = data_folder(data_dir)
        mark = fingerprint(model)
        record = run_record(
            command_line("benchmarks.speed"),
            seed=seed,
            dtype="float32",
            prompt="none",
            pooling="of each model",
            fingerprint=mark,
        )
        record |= {"threads": threads, "processor": processor_flags(), "quick": quick}
        path = Path(out) / f"speed-{model.name}.json"
        if path.exists():  # timings of another day do not belong beside new ones
            path.unlink()
        file = ResultFile(path, benchmark="speed", row=model.name, run=record, label=model.name)
        sizes = Sizes.quick() if quick else Sizes()
        texts = sample_texts(folder, "long", sizes.mixed, seed)
        scores, facts = in_process(measure_encoding, str(model), texts, PROMPT, sizes, threads)
        file.content["run"] |= facts
        file.add(*scores)
        file.add(*in_process(measure_generating, str(model), base_name, sizes, threads))
        common = {
            "model": str(model),
            "base": base_name,
            "threads": threads,
            "repeats": repeats,
            "batch_size": batch_size,
            "new_tokens": new_tokens,
        }
        file.add(*memory_scores(common))
        for done in file.content["scores"]:
            typer.echo(f"{done['task']}, {done['label']}: {done['value']:.3g} {done['metric']}")
        if quick:
            return
        for kind, count in (("short", short), ("long", long)):
            texts = sample_texts(folder, kind, count, seed)
            runs: dict[str, list[dict[str, Any]]] = {system: [] for system in ENCODE_SYSTEMS}
            for _ in range(rounds):
                for system in ENCODE_SYSTEMS:
                    runs[system].append(measure({**common, "kind": "encode", "system": system, "texts": texts}))
            for system, label in ENCODE_SYSTEMS.items():
                for unit in ("tokens", "texts"):
                    score: dict[str, Any] = {"task": f"encode {kind}", "split": system, "metric": f"{unit}/s"}
                    score["label"] = label
                    score |= rates(runs[system], unit)
                    peer = rates(runs["stock"], unit)["value"]
                    file.add({**score, "ratio": score["value"] / peer, "ratio_to": ENCODE_SYSTEMS["stock"]})
                typer.echo(f"encode {kind}, {label}: {rates(runs[system])['value']:.0f} tokens/s")
        systems = [name for name in GENERATE_SYSTEMS if name != "router" or routers]
        runs = {system: [] for system in systems}
        for _ in range(rounds):
            for system in systems:
                runs[system].append(measure({**common, "kind": "generate", "system": system}))
        for system in systems:
            label = GENERATE_SYSTEMS[system]
            score = {"task": "generate", "split": system, "metric": "tokens/s", "label": label}
            score |= rates(runs[system])
            peer = rates(runs["base"])["value"]
            file.add({**score, "ratio": score["value"] / peer, "ratio_to": GENERATE_SYSTEMS["base"]})
            typer.echo(f"generate, {label}: {score['value']:.1f} tokens/s")


if __name__ == "__main__":
    app()
