"""Many clients at one server: throughput against a plain loop, latency, errors, memory.

    python -m benchmarks.serving --model models/ubmoe-135m

Clients embed one sentence at a time, as fast as they are answered; one in 32 requests continues a text. Beside it, in a
process of its own and before and after, a loop that embeds the same sentences one by one. Times of a busy machine say
little, so ratios are of processor seconds, too.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.process import in_process
from training.data import data_folder, sts_pairs

GENERATE_EVERY = 32


def sentences(data: Path, count: int) -> list[str]:
    """Sentences of the STS benchmark's development set."""
    first, second, _ = sts_pairs("STSB-dev", data)
    return [text for pair in zip(first, second) for text in pair][:count]


def plain_loop(model: str, texts: list[str], seconds: float, threads: int) -> dict[str, float]:
    """Texts in each second and processor second of `encode`, one text at a time."""
    import torch

    from ubmoe_st import UBMoE

    torch.set_num_threads(threads)
    loaded = UBMoE(model, device="cpu", low_memory=True)
    loaded.encode(texts[:4])
    began, processor, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        loaded.encode(texts[count % len(texts)])
        count += 1
    return {
        "per_second": count / (time.perf_counter() - began),
        "per_processor_second": count / (time.process_time() - processor),
    }


async def clients(address: str, texts: list[str], many: int, seconds: float) -> dict[str, Any]:
    """What `many` clients see."""
    import httpx

    ends = time.perf_counter() + seconds
    seconds_of: dict[str, list[float]] = {"embeddings": [], "completions": []}
    errors: list[str] = []

    async def one(number: int, client: httpx.AsyncClient) -> None:
        count = number
        while time.perf_counter() < ends:
            count += 1
            body: dict[str, Any] = {"input": texts[count * 7 % len(texts)], "encoding_format": "base64"}
            path = "embeddings"
            if count % GENERATE_EVERY == 0:
                path, body = "completions", {"prompt": texts[count % len(texts)], "max_tokens": 16}
            began = time.perf_counter()
            answer = await client.post(f"{address}/{path}", json=body)
            seconds_of[path].append(time.perf_counter() - began)
            if answer.status_code != 200:
                errors.append(f"{answer.status_code} {answer.text[:200]}")

    limits = httpx.Limits(max_connections=many, max_keepalive_connections=many)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        await asyncio.gather(*(one(number, client) for number in range(many)))
    found: dict[str, Any] = {"clients": many, "seconds": seconds, "errors": len(errors), "first_errors": errors[:3]}
    for path, times in seconds_of.items():
        p50, p95 = np.percentile(times, [50, 95]) if times else (float("nan"),) * 2
        found[path] = {"requests": len(times), "per_second": len(times) / seconds, "p50_s": p50, "p95_s": p95}
    return found


def served(
    model: str, engine: str, texts: list[str], many: int, seconds: float, threads: int, gguf: str | None = None
) -> dict[str, Any]:
    """A server under load: what the clients see, its memory, and its texts in each processor second."""
    import psutil

    command = [sys.executable, "-m", "ubmoe_st.cli", "serve", model, "--engine", engine, "--port", "0"]
    command += ["--threads", str(threads), "--max-waiting", "256", *(["--gguf", gguf] if gguf else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None:
                raise RuntimeError("the server has no output")
            address = process.stdout.readline().strip()
            watched = psutil.Process(process.pid)
            asyncio.run(clients(address, texts, many, seconds / 6))
            memory = [watched.memory_info().rss / 1e6]
            before = sum(watched.cpu_times()[:2])
            found = asyncio.run(clients(address, texts, many, seconds))
            used = sum(watched.cpu_times()[:2]) - before
            memory.append(watched.memory_info().rss / 1e6)
        finally:
            process.terminate()
    found |= {"engine": engine, "rss_mb_after_warm_up_and_at_the_end": memory, "processor_seconds": used}
    return found


def main(
    model: str = "models/ubmoe-135m",
    engine: str = "torch",
    many: Annotated[int, typer.Option("--clients", min=1)] = 64,
    seconds: Annotated[float, typer.Option(min=1)] = 60.0,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    gguf: str | None = None,
    data: Path | None = None,
) -> None:
    """Measure and print JSON."""
    texts = sentences(data_folder(data), 512)
    before = in_process(plain_loop, model, texts, seconds / 4, threads)
    found = served(model, engine, texts, many, seconds, threads, gguf)
    after = in_process(plain_loop, model, texts, seconds / 4, threads)
    loop = {key: (before[key] + after[key]) / 2 for key in before}
    found["plain_loop"] = loop
    found["embeddings_against_plain_loop"] = found["embeddings"]["per_second"] / loop["per_second"]
    typer.echo(json.dumps(found, indent=2))


if __name__ == "__main__":
    typer.run(main)
