"""How near to its own matrix products a checkpoint computes: by length, one text at a time, generating, training.

Everything of one step is measured in one process and in turns: the system, its peer, and the products of all linear
layers with as many tokens, whose GFLOP/s are the ceiling. With one thread the clock is processor time, so that a busy
machine changes little; a ratio is the median of the ratios of the turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any

import numpy as np

CEILING = "matmul"
LABELS = {
    CEILING: "the products of its linear layers",
    "ubmoe": "UBMoE",
    "stock": "SentenceTransformer, same folder",
    "bf16": "UBMoE, compute=bf16",
    "int8": "UBMoE, compute=int8",
    "generator": "UBMoE.generator",
    "base": "the base model",
    "training": "experts, forward and backward",
}
Turn = Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        lengths: Of texts, in tokens.
        tokens: Of the texts of one length together; one text at least.
        mixed: Documents of mixed length.
        calls: Encoded lines of the latency.
        prompt: Tokens of the prompt.
        new_tokens: Decoded after it.
        rounds: Turns of each system.
    """

    lengths: tuple[int, ...] = (16, 64, 256, 1024, 4096)
    tokens: int = 4096
    mixed: int = 32
    calls: int = 100
    prompt: int = 256
    new_tokens: int = 32
    rounds: int = 5

    @classmethod
    def quick(cls) -> Sizes:
        """For a look, in minutes."""
        return cls((16, 64, 256), 256, 2, 10, 64, 6, 2)


def in_turns(turns: dict[str, Turn], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each system in each round, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, turn in turns.items():
            began = clock()
            turn()
            if number:
                seconds[name].append(clock() - began)
    return seconds


def products(network: Any, tokens: int) -> tuple[Turn, float]:
    """The products of all linear layers of a network with so many tokens, and their GFLOP."""
    import torch
    from torch import nn

    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    inputs = {size: torch.randn(tokens, size) for size in {layer.in_features for layer in layers}}

    def turn() -> None:
        with torch.inference_mode():
            for layer in layers:
                nn.functional.linear(inputs[layer.in_features], layer.weight)

    return turn, sum(2e-9 * tokens * layer.in_features * layer.out_features for layer in layers)


def text_of(model: Any, words: str, tokens: int) -> str:
    """A text of about so many tokens, special ones included."""
    special = len(model.token_ids(""))
    ids = model.token_ids(words)[special:]
    return model.tokenizer.decode(list(islice(cycle(ids), max(1, tokens - special))))


def scores_of(
    task: str, seconds: dict[str, list[float]], amount: float, metric: str, peer: str, gflop: float
) -> list[dict[str, Any]]:
    """What was measured in turns, as scores.

    Args:
        task: What was done.
        seconds: Of each system by round; with `CEILING`.
        amount: What is divided by the seconds: tokens, texts.
        metric: Its unit for a second.
        peer: System that ratios are to.
        gflop: Of the products.
    """
    ceiling = np.asarray(seconds[CEILING])
    scores = []
    for name, values in seconds.items():
        found = np.asarray(values)
        rates = amount / found if name != CEILING else gflop / found
        score: dict[str, Any] = {"task": task, "split": name, "label": LABELS[name], "n": len(values)}
        score |= {"metric": metric if name != CEILING else "GFLOP/s", "value": float(np.median(rates))}
        score |= {"low": float(rates.min()), "high": float(rates.max()), "share": float(np.median(ceiling / found))}
        if name != CEILING:
            score |= {"ratio": float(np.median(np.asarray(seconds[peer]) / found)), "ratio_to": LABELS[peer]}
        scores.append(score)
    return scores


def encoders(path: str) -> tuple[dict[str, Any], dict[str, float]]:
    """The systems that encode, and how many seconds each took to load."""
    from sentence_transformers import SentenceTransformer

    from ubmoe_st import UBMoE

    found: dict[str, Any] = {}
    seconds: dict[str, float] = {}

    def load(name: str, make: Turn) -> None:
        began = time.process_time()
        try:
            found[name] = make()
        except ValueError:  # this processor has no such instructions
            return
        seconds[name] = time.process_time() - began

    load("stock", lambda: SentenceTransformer(path, device="cpu"))
    load("ubmoe", lambda: UBMoE(path, device="cpu"))
    for compute in ("bf16", "int8"):
        load(compute, partial(UBMoE, path, device="cpu", low_memory=_is_low_rank(found), compute=compute))
    return found, seconds


def _is_low_rank(found: dict[str, Any]) -> bool:
    config = found["ubmoe"].ubmoe_config
    return bool(config is not None and config.expert_rank)


def measure_encoding(
    path: str, texts: Sequence[str], line: str, sizes: Sizes, threads: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Encoding by length, of mixed documents and line by line; loading. In this process.

    Args:
        path: The checkpoint.
        texts: Documents of mixed length.
        line: A query.
        sizes: How much.
        threads: How many.

    Returns:
        Scores, and what they were measured with.
    """
    import torch

    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    models, loading = encoders(path)
    model = models["ubmoe"]
    network = model[0].model
    longest = network.config.max_position_embeddings
    scores = [
        {"task": "load", "split": name, "label": LABELS[name], "metric": "s", "value": value, "n": 1}
        | {"ratio": loading["stock"] / value, "ratio_to": LABELS["stock"]}
        for name, value in loading.items()
    ]

    def add(task: str, rows: list[str], limit: int) -> None:
        for one in models.values():
            one.max_seq_length = limit
        tokens = sum(min(limit, len(model.token_ids(row))) for row in rows)
        turns: dict[str, Turn] = {name: partial(one.encode, rows, batch_size=32) for name, one in models.items()}
        turns[CEILING], gflop = products(network, tokens)
        scores.extend(scores_of(task, in_turns(turns, sizes.rounds, clock), tokens, "tokens/s", "stock", gflop))

    for length in sizes.lengths:
        if length <= longest:
            text = text_of(model, " ".join(texts), length)
            add(f"encode, {length} tokens", [text] * max(1, sizes.tokens // length), length)
    add("encode, mixed", list(texts[: sizes.mixed]), min(512, longest))
    turns: dict[str, Turn] = {name: partial(one.encode, line) for name, one in models.items()}
    turns[CEILING], gflop = products(network, len(model.token_ids(line)))
    seconds = in_turns(turns, sizes.calls, clock)
    for score in scores_of("one line", seconds, 1, "ms", "stock", gflop):
        if score["metric"] == "ms":
            p50, p95 = np.percentile(np.asarray(seconds[score["split"]]) * 1000, [50, 95])
            score |= {"value": float(p50), "p95": float(p95)}
            del score["low"], score["high"]
        scores.append(score)
    kept = {name: len(one.compute.kept) for name, one in models.items() if name in ("bf16", "int8")}
    return scores, {"kept_layers": kept}


def measure_generating(path: str, base: str, sizes: Sizes, threads: int) -> list[dict[str, Any]]:
    """Reading a prompt, decoding after it, and a training step of the experts. In this process.

    Args:
        path: The checkpoint.
        base: The untouched base, the peer.
        sizes: How much.
        threads: How many.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from ubmoe_st import UBMoE

    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    model = UBMoE(path, device="cpu")
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=model.generator.dtype)
    lms: dict[str, Any] = {"generator": model.generator, "base": reference}
    ids = torch.arange(3, 3 + sizes.prompt)[None]

    def read(lm: Any) -> Any:
        with torch.inference_mode():
            return lm(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    def decode(lm: Any, past: Any) -> None:
        with torch.inference_mode():
            for _ in range(sizes.new_tokens):  # the cache grows from turn to turn, for each system alike
                lm(input_ids=ids[:, :1], past_key_values=past, use_cache=True)

    turns: dict[str, Turn] = {name: partial(read, lm) for name, lm in lms.items()}
    turns[CEILING], gflop = products(model.generator.model, sizes.prompt)
    scores = scores_of("prefill", in_turns(turns, sizes.rounds, clock), sizes.prompt, "tokens/s", "base", gflop)
    pasts = {name: read(lm) for name, lm in lms.items()}
    turns = {name: partial(decode, lm, pasts[name]) for name, lm in lms.items()}
    one, gflop = products(model.generator, 1)
    turns[CEILING] = lambda: [one() for _ in range(sizes.new_tokens)]
    seconds = in_turns(turns, sizes.rounds, clock)
    scores += scores_of("decode", seconds, sizes.new_tokens, "tokens/s", "base", gflop * sizes.new_tokens)
    views: Any = model[0]
    for name, parameter in views.model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    batch = {"input_ids": ids.expand(4, -1), "attention_mask": torch.ones(4, sizes.prompt, dtype=torch.long)}

    def step() -> None:
        views(dict(batch))["token_embeddings"].square().mean().backward()
        views.model.zero_grad()

    turns = {"training": step}
    turns[CEILING], gflop = products(views.model, 4 * sizes.prompt)
    seconds = in_turns(turns, sizes.rounds, clock)
    return scores + scores_of("training step", seconds, 4 * sizes.prompt, "tokens/s", "training", gflop)
