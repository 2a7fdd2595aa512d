"""What `docs/scaling.md` says of memory, measured.

    python -m benchmarks.scaling build --folder runs/scaling     # 2.4B in five bf16 shards, under a limit of memory
    python -m benchmarks.scaling build --folder runs/scaling-1.5b --base qwen2.5-coder-1.5b --limit-gb 2   # a real one
    python -m benchmarks.scaling memory --base smollm2-135m --checkpoint models/ubmoe-135m    # against `ubmoe plan`

`build` writes 4.7 GB of synthetic weights and 13 GB of checkpoint and export into the folder, for you to delete; of a
real base 2.7 times its size.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.process import status_bytes
from ubmoe_st import UBMoE, UBMoETransformer, shards, upcycle
from ubmoe_st.bases import Base, resolve_base, stock_config
from ubmoe_st.experts import save_low_rank
from ubmoe_st.export import export
from ubmoe_st.planning import Setting, Shape, plan

SIZES: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2560,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
SHARD_BYTES = 1_000_000_000
EXPERTS_FILE = "experts.safetensors"


def make_base(folder: Path, tokenizer: Path) -> None:
    """A synthetic base of 2.4B parameters in shards.

    Args:
        folder: Gets `base/`.
        tokenizer: Folder of a tokenizer to copy.
    """
    from transformers import LlamaConfig

    base = folder / "base"
    base.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**SIZES)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(base)
    for file in tokenizer.glob("token*"):
        (base / file.name).write_bytes(file.read_bytes())
    shape = Shape(config)
    block = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def make(size: torch.Size, seed: int) -> Tensor:
        return block.roll(977 * seed).repeat(-(-size.numel() // block.numel()))[: size.numel()].reshape(size)

    parts: list[dict[str, tuple[shards.Spec, Any]]] = [{}]
    for seed, (name, tensor) in enumerate(shape.lm.state_dict().items()):
        if sum(spec.bytes for spec, _ in parts[-1].values()) > SHARD_BYTES:
            parts.append({})
        spec = shards.spec_of(tuple(tensor.shape), torch.bfloat16)
        parts[-1][name] = spec, partial(make, tensor.shape, seed)
    places: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        shard = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        shards.write_tensors(base / shard, shards.LazyTensors(part))
        places |= dict.fromkeys(part, shard)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def make_experts(base: Path, file: Path) -> None:
    """Low-rank experts of rank 16 for a base, of random numbers that change its vectors and leave their size.

    Args:
        base: Folder of the base.
        file: To write.
    """
    generator = torch.Generator().manual_seed(0)
    experts = {
        name: (
            (torch.randn(16, wide, generator=generator) / wide**0.5).half(),
            (torch.randn(out, 16, generator=generator) * 0.01).half(),
        )
        for name, (wide, out) in Shape(stock_config(base)).linears.items()
    }
    save_low_rank(experts, file, {})


def measure_build(folder: Path, base: Base, limit_gb: float) -> None:
    """Upcycle and export under a limit of private memory; prints a line of JSON for each.

    Args:
        folder: Where the results go.
        base: The base.
        limit_gb: What may be private beyond what the libraries have taken, mapped files that could be written included.
    """
    import resource

    limit = status_bytes("VmData") + int(limit_gb * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    before, out = status_bytes("VmHWM"), folder / "checkpoint"
    for step, work in (
        ("upcycle", lambda: upcycle(base, folder / EXPERTS_FILE, out=out, overwrite=True)),
        ("export hf", lambda: export(out, folder / "encoder", overwrite=True)),
    ):
        start = time.process_time()
        work()
        report = {"step": step, "limit_gb": limit_gb, "before": before, "peak": status_bytes("VmHWM")}
        sys.stdout.write(json.dumps(report | {"cpu_s": round(time.process_time() - start)}) + "\n")


def allocated(work: Callable[[], object]) -> int:
    """Most bytes that a piece of work has at a time beyond what was there before it, counted at torch's own allocator.

    On a CPU nothing else is exact: the process keeps freed pieces for later, so its size says what it once needed and
    what it could not give back.
    """
    gc.collect()  # what earlier work left in cycles is not given back, and counted, while this one runs
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    results: Any = recorded.profiler and recorded.profiler.kineto_results
    changes = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def training_peak(base: str | Path, setting: Setting) -> int:
    """Bytes of the weights, and the most that one training step with PEFT and AdamW has beside them.

    Args:
        base: As for `UBMoETransformer.from_base`.
        setting: Its rank, precision (`float32` or `bf16-mixed`), batch, tokens and checkpointing.
    """
    from peft import LoraConfig

    model = UBMoETransformer.from_base(base, dtype=torch.float32).model.requires_grad_(False).train()
    model.config.use_cache = False
    names = sorted({name.rpartition(".")[2] for name in Shape(model.config).linears})
    model.add_adapter(LoraConfig(r=setting.rank or 16, target_modules=names, use_rslora=True))
    if setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    ids = torch.randint(3, model.config.vocab_size, (setting.batch, setting.text_tokens))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # a batch of texts is padded, and then attention copies keys and values

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "bf16-mixed"):
            vectors = model(input_ids=ids, attention_mask=mask).last_hidden_state.mean(1)
            loss = (vectors @ vectors.T).logsumexp(1).sum()
        loss.backward()
        optimizer.step()

    return sum(parameter.nbytes for parameter in model.parameters()) + allocated(step)


def serving_peaks(checkpoint: str | Path, setting: Setting) -> dict[str, int]:
    """Bytes of the weights, and the most that one batch of `encode` and one `generate` have beside them.

    Args:
        checkpoint: A UBMoE checkpoint with low-rank experts.
        setting: Its batch and tokens; prompt and answer are of `context_tokens` together.
    """
    return {"encoding": _encoding_peak(checkpoint, setting), "generating": _generating_peak(checkpoint, setting)}


def _encoding_peak(checkpoint: str | Path, setting: Setting) -> int:
    model = UBMoE(str(checkpoint))
    backbone: Any = model[0].model
    ids = torch.randint(3, backbone.config.vocab_size, (setting.batch, setting.text_tokens))

    def encode() -> None:
        with torch.inference_mode():
            model({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    encode()  # what is made once, at first
    return sum(parameter.nbytes for parameter in backbone.parameters()) + allocated(encode)


def _generating_peak(checkpoint: str | Path, setting: Setting) -> int:
    model = UBMoE(str(checkpoint), low_memory=True)
    lm: Any = model.generator
    ids = torch.randint(3, lm.config.vocab_size, (setting.generate_batch, setting.context_tokens - 4))

    def generate() -> None:
        lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False)

    return int(model.memory_report()["total"]) + allocated(generate)


def measure_memory(base: str, checkpoint: str | None, setting: Setting) -> None:
    """Print a line of JSON for each kind of work: bytes measured, bytes planned, and planned / measured."""
    for name, checkpointing in (("training", False), ("training with checkpointing", True)):
        wanted = replace(setting, checkpointing=checkpointing)
        _say(name, training_peak(base, wanted), plan(base, wanted, dtype=torch.float32)["training"]["total"], wanted)
    if checkpoint is not None:
        planned = plan(base, setting, dtype=torch.float32)
        for name, measured in serving_peaks(checkpoint, setting).items():
            _say(name, measured, planned[name]["total"], setting)


def _say(name: str, measured: int, planned: int, setting: Setting) -> None:
    shown = {"work": name, "measured": measured, "planned": planned, "ratio": round(planned / measured, 3)}
    shown |= {key: getattr(setting, key) for key in ("batch", "text_tokens", "rank", "precision", "context_tokens")}
    sys.stdout.write(json.dumps(shown) + "\n")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="memory of building and exporting")
    build.add_argument("--folder", type=Path, required=True)
    build.add_argument("--base", help="folder, Hub id or short name; by default one of 2.4B is made")
    build.add_argument("--tokenizer", type=Path, default=Path("models/ubmoe-135m"), help="folder of any tokenizer")
    build.add_argument("--limit-gb", type=float, default=1.4, help="of private memory, beside the libraries")
    peaks = commands.add_parser("memory", help="memory of training, encoding and generating against the plan")
    peaks.add_argument("--base", default="smollm2-135m")
    peaks.add_argument("--checkpoint", help="of that base, for encoding and generating")
    peaks.add_argument("--batch", type=int, default=8)
    peaks.add_argument("--tokens", type=int, default=64)
    peaks.add_argument("--context", type=int, default=512)
    options = parser.parse_args(arguments)
    if options.command == "build":
        made = options.folder / "base"
        if not options.base and not (made / "model.safetensors.index.json").is_file():
            make_base(options.folder, options.tokenizer)
        options.folder.mkdir(parents=True, exist_ok=True)
        base = resolve_base(options.base or made)
        make_experts(base.path, options.folder / EXPERTS_FILE)
        measure_build(options.folder, base, options.limit_gb)
    else:
        setting = Setting(batch=options.batch, text_tokens=options.tokens, context_tokens=options.context)
        measure_memory(options.base, options.checkpoint, setting)


if __name__ == "__main__":
    main()
