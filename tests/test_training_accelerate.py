"""Sharded over two processes, a training step gives the loss and the gradients of one process."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.models import make_base

ROOT = Path(__file__).parents[1]

STEP = """
import os, sys
import torch
import torch.distributed as dist
from peft import LoraConfig
from torch.distributed._tensor import DTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn.functional import all_gather
from ubmoe_st import UBMoETransformer

base, out, half = sys.argv[1:4]
ranks = int(os.environ.get("WORLD_SIZE", 1))
rank = int(os.environ.get("RANK", 0))
module = UBMoETransformer.from_base(base)
model = module.model.requires_grad_(False).train()
model.config.use_cache = False
torch.manual_seed(0)
model.add_adapter(LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False))
if ranks > 1:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert any(isinstance(parameter, DTensor) for parameter in model.parameters()), "nothing is sharded"
generator = torch.Generator().manual_seed(1)
ids = torch.randint(3, 40, (8, 2, 9), generator=generator)[rank * 8 // ranks : (rank + 1) * 8 // ranks]
vectors = [torch.nn.functional.normalize(model(ids[:, side]).last_hidden_state.mean(1), dim=-1) for side in (0, 1)]
anchors, positives = vectors
if ranks > 1:
    positives = torch.cat(all_gather(positives.contiguous()))
targets = torch.arange(len(anchors)) + rank * len(anchors)
loss = torch.nn.functional.cross_entropy(20 * anchors @ positives.T, targets)
if ranks == 1:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    first = torch.nn.functional.cross_entropy(20 * anchors[:4] @ positives.T, targets[:4])
    torch.save(dict(zip(trained, torch.autograd.grad(first, trained.values(), retain_graph=True))), half)
loss.backward()
gradients = {}
for name, parameter in model.named_parameters():
    if parameter.requires_grad:
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
loss = loss.detach()
if ranks > 1:
    dist.all_reduce(loss)
    loss /= ranks
if rank == 0:
    torch.save((loss, gradients), out)
if ranks > 1:
    dist.destroy_process_group()
"""


def test_fsdp2_on_two_processes_equals_one(tmp_path):
    """FSDP averages over the processes, and the loss of each is the mean of its rows: the same mean over all."""
    base = make_base(tmp_path / "base")
    script = tmp_path / "step.py"
    script.write_text(STEP)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    for name, how in (("one", []), ("two", launch)):
        command = [sys.executable, *how, str(script), str(base), str(tmp_path / name), str(tmp_path / "half")]
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
    (loss, gradients), (sharded_loss, sharded), half = (torch.load(tmp_path / name) for name in ("one", "two", "half"))
    assert torch.isclose(loss, sharded_loss, rtol=1e-5)
    assert set(gradients) == set(sharded)
    assert len(gradients) == 3 * 3 * 2
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-6, name
        assert distance(sharded[name], gradient) < 1e-5, name
        # What a wrong average would give is far outside: a sum instead of a mean, and the half of one process.
        assert distance(2 * sharded[name], gradient) > 0.1, name
        assert distance(half[name], gradient) > 0.1, name


def distance(tensor, reference):
    """||a - b|| / ||b||: sums in another order differ by the size of the tensor, not of each of its elements."""
    return ((tensor - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("name", ["fsdp2", "deepspeed-zero3"])
def test_accelerate_reads_the_configs(name):
    from accelerate.commands.config.config_args import load_config_from_file

    file = ROOT / "training" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert config.mixed_precision == "bf16"
    written = yaml.safe_load(file.read_text())
    section = config.fsdp_config if name == "fsdp2" else config.deepspeed_config
    assert section == written["fsdp_config" if name == "fsdp2" else "deepspeed_config"]
