"""llama.cpp against torch behind the same interface: speed in processor time, cosines, Spearman.

python -m benchmarks.native --model models/ubmoe-135m --pairs 24
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.results import one_line_errors
from training.data import data_folder, sts_pairs

PROMPTS = ["The capital of France is", "Once upon a time there was a small"]
NEW_TOKENS = 24


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


def main(
    model: str = "models/ubmoe-135m",
    pairs: Annotated[int, typer.Option(min=1, help="Number of STSB-dev pairs.")] = 1500,
    batch: Annotated[int, typer.Option(min=1, help="Pairs embedded at a time.")] = 8,
    gguf: Path | None = None,
    data: Path | None = None,
) -> None:
    """Measure in turns, one thread each, and print JSON."""
    import torch
    from scipy.stats import spearmanr

    from ubmoe_st import UBMoE
    from ubmoe_st.serving import NativeUBMoE, TorchEngine

    torch.set_num_threads(1)
    with one_line_errors(ImportError):  # a checkpoint that llama.cpp cannot embed with, say
        native = NativeUBMoE.from_checkpoint(model, gguf=gguf, threads=1)
    engines: dict[str, Any] = {
        "torch": TorchEngine(UBMoE(model, device="cpu", low_memory=True), "torch"),
        "llama.cpp": native,
    }
    first, second, scores = sts_pairs("STSB-dev", data_folder(data), pairs)
    found: dict[str, Any] = {name: {"generate": [], "encode": []} for name in engines}
    for prompt in PROMPTS:
        for name, engine in engines.items():
            found[name]["generate"].append(generation_rate(engine, prompt))
    vectors: dict[str, list[np.ndarray]] = {name: [] for name in engines}
    for row in range(0, len(first), batch):
        for name, engine in engines.items():
            texts = engine.tokenize(first[row : row + batch] + second[row : row + batch], None)
            began = time.process_time()
            part = engine.embed(texts)
            found[name]["encode"].append(sum(len(text.ids) for text in texts) / (time.process_time() - began))
            vectors[name].append(part.reshape(2, -1, part.shape[1]))
    joined = {name: np.concatenate(parts, axis=1) for name, parts in vectors.items()}  # (2, N, D)
    for name, (left, right) in joined.items():
        found[name]["encode"] = float(np.mean(found[name]["encode"]))
        found[name]["spearman"] = float(spearmanr((left * right).sum(-1), scores)[0])
    cosines = (joined["torch"] * joined["llama.cpp"]).sum(-1)
    found["cosine"] = {"smallest": float(cosines.min()), "mean": float(cosines.mean())}
    typer.echo(json.dumps(found, indent=2))


if __name__ == "__main__":
    typer.run(main)
