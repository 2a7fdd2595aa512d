"""What `docs/scaling.md` says of memory, measured.

    python -m benchmarks.scaling build --folder runs/scaling     # 2.4B in five bf16 shards, under a limit of memory
    python -m benchmarks.scaling train --base smollm2-135m       # one training step against `ubmoe plan`

`build` writes 4.7 GB of synthetic weights and 13 GB of checkpoint and export into the folder, for you to delete.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ubmoe_st import UBMoETransformer, shards, upcycle
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


def memory(kind: str) -> int:
    """A figure of `/proc/self/status` such as `VmHWM` (peak resident) or `RssAnon`, bytes."""
    found = re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    if found is None:
        raise OSError(f"/proc/self/status names no {kind}: this needs Linux")
    return int(found[1]) * 1024


def make_base(folder: Path, tokenizer: Path) -> Path:
    """A synthetic base of 2.4B parameters in shards, and low-rank experts of rank 16 beside it.

    Args:
        folder: Gets `base/` and `experts.safetensors`.
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
    experts = {
        name: (torch.full((16, wide), 0.01).half(), torch.full((out, 16), 0.01).half())
        for name, (wide, out) in shape.linears.items()
    }
    save_low_rank(experts, folder / "experts.safetensors", {})
    return base


def measure_build(folder: Path, base: Path, limit_gb: float) -> None:
    """Upcycle and export under a limit of private memory; prints a line of JSON for each."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (int(limit_gb * 1e9), int(limit_gb * 1e9)))
    before, out = memory("VmHWM"), folder / "checkpoint"
    for step, work in (
        ("upcycle", lambda: upcycle(base, folder / "experts.safetensors", out=out, overwrite=True)),
        ("export hf", lambda: export(out, folder / "encoder", overwrite=True)),
    ):
        start = time.process_time()
        work()
        report = {"step": step, "limit_gb": limit_gb, "before": before, "peak": memory("VmHWM")}
        sys.stdout.write(json.dumps(report | {"cpu_s": round(time.process_time() - start)}) + "\n")


def measure_training(base: str, batch: int, tokens: int, rank: int = 16) -> dict[str, Any]:
    """One step with PEFT in fp32: bytes that autograd kept, and the peak of private memory, against the plan."""
    from peft import LoraConfig

    module = UBMoETransformer.from_base(base, dtype=torch.float32)
    model = module.model.requires_grad_(False).train()
    model.config.use_cache = False
    model.add_adapter(LoraConfig(r=rank, target_modules=["gate_proj", "up_proj", "down_proj"], use_rslora=True))
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    weights = sum(parameter.nbytes for parameter in model.parameters())
    start, peak, done, kept = memory("RssAnon"), [0], threading.Event(), {}

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], memory("RssAnon"))

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor.untyped_storage().nbytes()
        return tensor

    watcher = threading.Thread(target=watch)
    watcher.start()
    ids = torch.randint(10, model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        vectors = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.mean(1)
        loss = (vectors @ vectors.T).logsumexp(1).sum()
    loss.backward()
    optimizer.step()
    done.set()
    watcher.join()
    path = module.base.path if module.base else base
    planned = plan(path, Setting(rank=rank, batch=batch, text_tokens=tokens))["training"]
    real = weights + peak[0] - start
    return {"kept": sum(kept.values()), "real": real, "planned": planned, "ratio": planned["total"] / real}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="memory of building and exporting")
    build.add_argument("--folder", type=Path, required=True)
    build.add_argument("--tokenizer", type=Path, default=Path("models/ubmoe-135m"), help="folder of any tokenizer")
    build.add_argument("--limit-gb", type=float, default=2.5, help="of private memory")
    train = commands.add_parser("train", help="memory of a training step")
    train.add_argument("--base", default="smollm2-135m")
    train.add_argument("--batch", type=int, default=8)
    train.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args(arguments)
    if options.command == "build":
        base = options.folder / "base"
        if not (base / "model.safetensors.index.json").is_file():
            make_base(options.folder, options.tokenizer)
        measure_build(options.folder, base, options.limit_gb)
    else:
        sys.stdout.write(json.dumps(measure_training(options.base, options.batch, options.tokens)) + "\n")


if __name__ == "__main__":
    main()
