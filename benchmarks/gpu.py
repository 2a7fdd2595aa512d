"""Both views on one GPU: `python -m benchmarks.gpu --model models/ubmoe-135m --base ...`.

Encoding beside the same folder in stock sentence-transformers and all-MiniLM, generation beside the untouched base, a
training step beside what `ubmoe plan` says of its memory. Systems take turns; a rate is the median of its turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.ceiling import Turn, in_turns
from benchmarks.options import Checkpoint, DataDir, ResultsFolder
from benchmarks.results import RESULTS, ResultFile, command_line, fingerprint, one_line_errors, run_record
from benchmarks.speed import PROMPT, sample_texts
from training.data import data_folder

DTYPES = ("float32", "bfloat16")
OFF = "bfloat16 against float32"
RANK = 16
"""Of the experts of a training step."""


def clock_of(device: str) -> Callable[[], float]:
    """Seconds of a clock that is read when the device has done its work."""
    import torch

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def _scores(
    task: str, turns: dict[str, Turn], amounts: dict[str, int], peer: str, rounds: int, device: str
) -> list[dict[str, Any]]:
    """Tokens per second of each system, and the ratio to the peer."""
    seconds = in_turns(turns, rounds, clock_of(device))
    scores = []
    for name, values in seconds.items():
        rates = amounts[name] / np.asarray(values)
        ratios = np.asarray(seconds[peer]) / np.asarray(values)
        score = {"task": task, "split": name, "metric": "tokens/s", "value": float(np.median(rates)), "n": rounds}
        score |= {"low": float(rates.min()), "high": float(rates.max())}
        scores.append({**score, "ratio": float(np.median(ratios)), "ratio_to": peer})
    return scores


def encoding(
    path: str, folder: Path, counts: dict[str, int], rounds: int, seed: int, device: str
) -> list[dict[str, Any]]:
    """Short and long texts, in float32 and bfloat16; one line; and how far bfloat16 and a compiled encoder are off."""
    from sentence_transformers import SentenceTransformer

    from training.embedders import MINILM, embedder_path
    from ubmoe_st import UBMoE

    scores: list[dict[str, Any]] = []
    vectors: dict[str, Any] = {}
    for dtype in DTYPES:
        kwargs: dict[str, Any] = {"device": device, "model_kwargs": {"dtype": dtype}}
        models: dict[str, Any] = {
            "SentenceTransformer, same folder": SentenceTransformer(path, **kwargs),
            "UBMoE": UBMoE(path, **kwargs),
            MINILM: SentenceTransformer(embedder_path(MINILM), **kwargs),
        }
        for kind, count in counts.items():
            texts = sample_texts(folder, kind, count, seed)
            amounts = {
                name: sum(min(len(ids), one.max_seq_length) for ids in one.tokenizer(texts)["input_ids"])
                for name, one in models.items()
            }
            turns: dict[str, Turn] = {
                name: partial(one.encode, texts, batch_size=256, convert_to_tensor=True) for name, one in models.items()
            }
            first = next(iter(models))
            scores += _scores(f"encode {kind}, {dtype}", turns, amounts, first, rounds, device)
        turns = {name: partial(one.encode, PROMPT, convert_to_tensor=True) for name, one in models.items()}
        for name, values in in_turns(turns, 20, clock_of(device)).items():
            value = 1000 * float(np.median(values))
            scores.append({"task": f"one line, {dtype}", "split": name, "metric": "ms", "value": value, "n": 20})
        texts = sample_texts(folder, "short", min(512, counts["short"]), seed)
        vectors[dtype] = models["UBMoE"].encode(texts, convert_to_tensor=True).float()
        if dtype == "bfloat16":
            began = time.perf_counter()
            models["UBMoE"].compile(dynamic=True)
            found = models["UBMoE"].encode(texts, convert_to_tensor=True).float()
            cost = time.perf_counter() - began
            turns = {
                "UBMoE, compiled": partial(models["UBMoE"].encode, texts, batch_size=256),
                "UBMoE": partial(UBMoE(path, **kwargs).encode, texts, batch_size=256),
            }
            tokens = sum(map(len, models["UBMoE"].tokenizer(texts)["input_ids"]))
            scores += _scores("compiled, bfloat16", turns, dict.fromkeys(turns, tokens), "UBMoE", rounds, device)
            scores.append({"task": "compile", "split": "UBMoE", "metric": "s", "value": cost, "n": 1})
            scores.append(_cosine("compiled against eager, bfloat16", found, vectors[dtype]))
        del models
    scores.append(_cosine(OFF, vectors["bfloat16"], vectors["float32"]))
    return scores


def _cosine(task: str, found: Any, wanted: Any) -> dict[str, Any]:
    from torch.nn.functional import cosine_similarity

    least = float(cosine_similarity(found, wanted).min())
    return {"task": task, "split": "UBMoE", "metric": "smallest cosine", "value": least, "n": len(found)}


def generating(path: str, base: str, rounds: int, new_tokens: int, device: str) -> list[dict[str, Any]]:
    """Tokens per second beside the untouched base, and the largest difference of logits in each dtype."""
    import torch
    from transformers import AutoModelForCausalLM

    from ubmoe_st import UBMoE

    scores = []
    for dtype in DTYPES:
        model = UBMoE(path, device=device, model_kwargs={"dtype": dtype})
        reference: Any = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
        reference = reference.to(device).eval()
        lms: dict[str, Any] = {"the base model": reference, "UBMoE.generator": model.generator}
        inputs = model.tokenizer([PROMPT] * 16, return_tensors="pt").to(device)
        options: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        turns: dict[str, Turn] = {name: partial(lm.generate, **inputs, **options) for name, lm in lms.items()}
        amounts = dict.fromkeys(turns, 16 * new_tokens)
        scores += _scores(f"generate, 16 prompts, {dtype}", turns, amounts, "the base model", rounds, device)
        with torch.inference_mode():
            logits = [lm(**inputs).logits for lm in lms.values()]
        off = float((logits[0] - logits[1]).abs().max())
        one = {"task": f"logits, {dtype}", "split": "UBMoE.generator", "metric": "largest difference", "value": off}
        scores.append({**one, "n": logits[0].numel()})
    return scores


def training_step(base: str, texts: int, tokens: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """A step of low-rank experts under bf16 autocast: tokens per second, and peak memory beside `ubmoe plan`."""
    import torch
    from peft import LoraConfig

    from training.student import trained_linears
    from ubmoe_st import UBMoETransformer
    from ubmoe_st.planning import Setting, plan

    module: Any = UBMoETransformer.from_base(base, dtype=torch.float32)
    module.model.config.use_cache = False
    module.model.requires_grad_(False)
    module.model.add_adapter(LoraConfig(r=RANK, target_modules=trained_linears(module.model, "ffn")))
    module.to(device).train()
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.randint(5, 1000, (texts, tokens), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = module(dict(batch))["token_embeddings"].float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    scores = _scores("training step", {"experts": step}, {"experts": texts * tokens}, "experts", rounds, device)
    if device != "cuda":
        return scores
    setting = Setting(batch=texts, text_tokens=tokens, rank=RANK, precision="bf16-mixed")
    peak = torch.cuda.max_memory_allocated()
    wanted = plan(base, setting, dtype="float32")["training"]["total"]
    scores.append({"task": "training memory", "split": "measured", "metric": "MB", "value": peak / 1e6, "n": 1})
    scores[-1] |= {"ratio": peak / wanted, "ratio_to": "ubmoe plan"}
    scores.append({"task": "training memory", "split": "ubmoe plan", "metric": "MB", "value": wanted / 1e6, "n": 1})
    return scores


def table(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """The scores as the report prints them."""
    rows = []
    for score in scores:
        value = f"{score['value']:,.0f}" if score["value"] >= 100 else f"{score['value']:.4g}"
        ratio = (
            f"{score['ratio']:.2f}x {score['ratio_to']}"
            if score.get("ratio_to", score["split"]) != score["split"]
            else ""
        )
        rows.append([score["task"], score["split"], f"{value} {score['metric']}", ratio])
    return {"columns": ["task", "system", "measured", "ratio"], "rows": rows}


app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Checkpoint = Path("models/ubmoe-135m"),
    base: Annotated[str | None, typer.Option(help="The untouched base; default that of the checkpoint.")] = None,
    data_dir: DataDir = None,
    out: ResultsFolder = RESULTS,
    rounds: Annotated[int, typer.Option(help="Turns each system takes.")] = 5,
    new_tokens: Annotated[int, typer.Option(help="New tokens per generation.")] = 64,
    texts: Annotated[int, typer.Option(help="Texts of a training step.")] = 64,
    tokens: Annotated[int, typer.Option(help="Tokens of each of them.")] = 128,
    device: Annotated[str, typer.Option(help="`cpu` shows that the command works; its times say little.")] = "cuda",
    short: Annotated[int, typer.Option(help="Sentences.")] = 4096,
    long: Annotated[int, typer.Option(help="Documents.")] = 1024,
    seed: int = 0,
) -> None:
    """Measure both views of a checkpoint on a GPU beside their peers."""
    import torch

    from benchmarks.peers import base_folder

    with one_line_errors(RuntimeError):
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("expected a GPU that torch sees, got none; benchmarks.speed measures on the processor")
        base_name = base_folder(base, model)
        record = run_record(
            command_line("benchmarks.gpu"),
            seed=seed,
            dtype="float32, bfloat16",
            prompt="none",
            pooling="of each model",
            fingerprint=fingerprint(model),
        )
        file = ResultFile(Path(out) / f"gpu-{model.name}.json", benchmark="gpu", row=model.name, run=record)
        counts = {"short": short, "long": long}
        parts: dict[str, Callable[[], list[dict[str, Any]]]] = {  # by a task that each ends with
            "training step": partial(training_step, base_name, texts, tokens, rounds, device),
            f"logits, {DTYPES[-1]}": partial(generating, str(model), base_name, rounds, new_tokens, device),
            OFF: partial(encoding, str(model), data_folder(data_dir), counts, rounds, seed, device),
        }
        for last, part in parts.items():
            if file.find(task=last):
                typer.echo(f"{model.name} {last}: kept")
            else:
                file.add(*part())
            file.add(tables={f"gpu-{model.name}": table(file.content["scores"])})
        for row in file.content["tables"][f"gpu-{model.name}"]["rows"]:
            typer.echo("  ".join(row))


if __name__ == "__main__":
    app()
