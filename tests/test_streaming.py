"""A base passes into a checkpoint one tensor at a time, to the bytes that loading it gives."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import ARCHITECTURES, TEXTS, make_base, random_experts
from safetensors.torch import load_file, save_file
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoConfig, AutoModelForCausalLM

from ubmoe_st import UBMoE, UBMoETransformer, checkpoint, shards, source, upcycle, upcycling
from ubmoe_st.checkpoint import CheckpointError
from ubmoe_st.experts import save_low_rank
from ubmoe_st.export import export
from ubmoe_st.planning import Setting, Shape, plan
from ubmoe_st.streaming import StreamedTransformer, StreamedUBMoE, can_stream
from ubmoe_st.upcycling import export_experts


def files_of(folder):
    """What the checkpoint is made of; SHA256SUMS follows from it, and versions of libraries are equal here."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def both_ways(monkeypatch, tmp_path, base, experts=None, **kwargs):
    assert can_stream(base)
    streamed = files_of(upcycle(base, experts, out=tmp_path / "streamed" / "model", **kwargs))
    with monkeypatch.context() as patched:
        patched.setattr(upcycling, "can_stream", lambda folder: False)
        loaded = files_of(upcycle(base, experts, out=tmp_path / "loaded" / "model", **kwargs))
    assert set(streamed) == set(loaded)
    for name in loaded:
        assert streamed[name] == loaded[name], name
    return tmp_path / "streamed" / "model"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_byte_is_what_loading_the_base_gives(base_of, tmp_path, monkeypatch, architecture):
    base = base_of(architecture)
    module = UBMoETransformer.from_base(base)
    module.set_low_rank_experts(random_experts(module))
    experts = export_experts(module, tmp_path / "experts", recipe={"prompts": {"query": "the "}})
    out = both_ways(monkeypatch, tmp_path, base, experts, dtype=torch.bfloat16)
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    ids = torch.arange(4, 12)[None]
    assert torch.equal(UBMoE(str(out)).generator(ids).logits, reference(ids).logits)


def test_shards_dense_experts_routers_and_copies_of_the_originals(base, tmp_path, monkeypatch):
    lm = AutoModelForCausalLM.from_pretrained(base)
    sharded = tmp_path / "sharded"
    lm.save_pretrained(sharded, max_shard_size="20KB")
    for file in base.glob("token*"):
        (sharded / file.name).write_bytes(file.read_bytes())
    assert len(list(sharded.glob("*.safetensors"))) > 3
    # Some makers put the weights there a second time, under names of their own.
    save_file({"tok_embeddings.weight": torch.zeros(2, 2)}, sharded / "consolidated.safetensors")
    both_ways(monkeypatch, tmp_path / "copies", sharded)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if ".mlp." in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    lm.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    both_ways(monkeypatch, tmp_path / "dense", sharded, tmp_path / "tuned")
    with torch.no_grad():
        lm.model.norm.weight.add_(1)
    lm.save_pretrained(tmp_path / "more")
    with pytest.raises(ValueError, match=r"norm\.weight differs from the base"):
        upcycle(sharded, tmp_path / "more", out=tmp_path / "out")


def test_the_alignment_is_that_of_the_files_that_are_read(base, tmp_path, monkeypatch):
    folder = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    checkpoint.save_tensors(tensors, folder / "model.safetensors", 24)
    checkpoint.save_tensors({"x": torch.zeros(2)}, folder / "consolidated.safetensors", 8)
    out = both_ways(monkeypatch, tmp_path, folder)
    assert checkpoint.data_start(out / checkpoint.SHARED_FILE) % 64 == 24
    planned = plan(folder, Setting(rank=None))["files"]
    assert planned[checkpoint.SHARED_FILE] == (out / checkpoint.SHARED_FILE).stat().st_size
    (folder / checkpoint.INDEX_FILE).write_text('{"weight_map": {"x": "consolidated.safetensors"}}')
    assert checkpoint.weight_files(folder) == [folder / "model.safetensors"]
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()  # what stock transformers reads
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_checkpoints_as_experts_and_terms_beside_experts(base, tmp_path, monkeypatch):
    torch.manual_seed(0)
    module = UBMoETransformer.from_base(base)
    module.set_low_rank_experts(random_experts(module))
    experts = export_experts(module, tmp_path / "experts", recipe={"prompts": {"query": "the "}})
    (experts / "TERMS.md").write_text("terms of the base")
    first = both_ways(monkeypatch, tmp_path / "first", base, experts)
    assert (first / "TERMS.md").read_text() == "terms of the base"
    again = both_ways(monkeypatch, tmp_path / "again", base, first)
    assert (again / "SHA256SUMS").read_bytes() == (first / "SHA256SUMS").read_bytes()
    dense = UBMoETransformer.from_base(base)
    dense.set_dense_experts({key: t for key, t in module.encoder_state().items() if ".mlp." in key})
    UBMoE(modules=[dense, *list(UBMoE(str(first)))[1:]], device="cpu").save(str(tmp_path / "dense"))
    kinds = []
    monkeypatch.setattr(upcycling, "_set_experts", lambda module, *rest: kinds.append(type(module)) or {})
    for path in (first, tmp_path / "dense"):
        upcycle(base, path, out=tmp_path / "kinds" / path.name)
    assert kinds == [StreamedTransformer, UBMoETransformer]


def test_a_base_whose_tensors_have_other_names_is_loaded(base, tmp_path):
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for file in base.iterdir():
        (renamed / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    # As an encoder saves itself: transformers adds the prefix when it loads this as a causal LM.
    save_file(
        {k.removeprefix("model."): t for k, t in tensors.items()}, renamed / "model.safetensors", {"format": "pt"}
    )
    assert not can_stream(renamed)
    ids = torch.arange(4, 12)[None]
    model = UBMoE(str(upcycle(renamed, out=tmp_path / "out")))
    assert torch.equal(model.generator(ids).logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits)


def test_what_has_no_weights_does_not_encode(base, checkpoint_of):
    for module in (StreamedTransformer.from_base(base), StreamedUBMoE(str(checkpoint_of("llama")))[0]):
        assert all(parameter.is_meta for parameter in module.model.parameters())
        with pytest.raises(RuntimeError, match="load it with UBMoE"):
            module(module.preprocess(TEXTS))


def test_files_are_what_the_library_writes(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "b.weight": torch.randn(3, 5),
        "a": torch.randn(7).bfloat16(),
        "half": torch.randn(2, 2).half(),
        "ids": torch.arange(4),
        "scalar": torch.tensor(2.0),
        "none": torch.zeros(0, 4),
        "flag": torch.tensor([True, False]),
        "byte": torch.arange(3, dtype=torch.uint8),
    }
    for alignment in (0, 8, 40):
        shards.write_tensors(tmp_path / "ours.safetensors", tensors, alignment)
        assert checkpoint.data_start(tmp_path / "ours.safetensors") % 64 == alignment
        found = load_file(tmp_path / "ours.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    save_file(tensors, tmp_path / "stock.safetensors", {"format": "pt"})
    data = (tmp_path / "stock.safetensors").read_bytes()
    head = shards.header_bytes(shards.specs_of(tensors), {"format": "pt"})
    assert data.startswith(head)
    assert len(data) == shards.file_bytes(shards.specs_of(tensors), head)
    read = shards.TensorFiles([tmp_path / "stock.safetensors"])
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    (tmp_path / "stock.safetensors").write_bytes(data[:-4])
    with pytest.raises(ValueError, match="truncated"):
        [read[name] for name in read]
    with pytest.raises(ValueError, match="expected it once"):
        shards.TensorFiles([tmp_path / "ours.safetensors"] * 2)


def test_tensors_are_those_of_the_files_that_were_opened(tmp_path, monkeypatch):
    save_file({"a": torch.ones(3), "b": torch.ones(3)}, tmp_path / "x.safetensors")
    save_file({"a": torch.zeros(3), "b": torch.zeros(3)}, tmp_path / "other.safetensors")
    other = (tmp_path / "other.safetensors").read_bytes()
    monkeypatch.chdir(tmp_path)
    read = shards.TensorFiles([Path("x.safetensors")])
    monkeypatch.chdir(tmp_path.parent)
    assert torch.equal(read["a"], torch.ones(3))
    (tmp_path / "other.safetensors").replace(tmp_path / "x.safetensors")
    assert torch.equal(read["b"], torch.ones(3))
    read = shards.TensorFiles([tmp_path / "x.safetensors"])
    assert torch.equal(read["b"], torch.zeros(3))
    (tmp_path / "x.safetensors").write_bytes(other[:-12] + b"\0\0\x80\x3f" * 3)  # into the very file
    os.utime(tmp_path / "x.safetensors", (1, 1))  # as if a while had passed
    with pytest.raises(ValueError, match=r"x\.safetensors was written to while it was read"):
        read["b"]


def test_a_checkpoint_that_is_replaced_meanwhile_is_not_mixed_with_the_other(base, checkpoint_of, tmp_path):
    folder = shutil.copytree(checkpoint_of("llama"), tmp_path / "m")
    expected = UBMoE(str(folder))[0]
    views = StreamedUBMoE(str(folder))[0]
    state = views.encoder_state()
    keys = list(state)
    found = {key: state[key] for key in keys[:2]}
    twin = pickle.dumps(views.source)
    changed = UBMoE(str(folder))
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(0.5)
    with pytest.warns(UserWarning, match="no longer generates exactly like base"):
        changed.save(str(folder))
    found |= {key: state[key] for key in keys[2:]}
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.encoder_state().items())
    assert not torch.equal(UBMoE(str(folder))[0].encoder_state()[keys[-1]], found[keys[-1]])  # it did change
    uni = views.uni_tensors()
    assert all(torch.equal(uni[key], tensor) for key, tensor in expected.uni_tensors().items())
    for source_of_old in (views.source, pickle.loads(twin)):
        with pytest.raises(CheckpointError, match="load the model again"):
            source_of_old.changed({}) if source_of_old is views.source else source_of_old.low_rank()


def test_a_base_that_is_replaced_before_it_is_saved_is_refused(base, tmp_path):
    mine = shutil.copytree(base, tmp_path / "base")
    module = StreamedTransformer.from_base(mine)
    tensors = {key: tensor * 2 for key, tensor in load_file(mine / "model.safetensors").items()}
    save_file(tensors, tmp_path / "other.safetensors", {"format": "pt"})
    (tmp_path / "other.safetensors").replace(mine / "model.safetensors")
    with pytest.raises(CheckpointError, match="load the model again"):
        UBMoE(modules=[module, Pooling(32)], device="cpu").save(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_file_is_replaced_by_tensors_that_are_mapped_from_it(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(50_000.0), "b": torch.ones(3)}, path)
    mapped = load_file(path)
    shards.write_tensors(path, {"a": mapped["a"]})
    assert torch.equal(load_file(path)["a"], torch.arange(50_000.0))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


PEAK = """
import re, sys
from ubmoe_st import upcycle

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

base, experts, small, out = sys.argv[1:]
upcycle(small, out=out + "-small")
before = peak()
upcycle(base, experts, out=out)
print(before, peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_no_weights_are_loaded_or_mapped(base, tmp_path, monkeypatch):
    """Under a limit of address space, as `ulimit` sets it, a mapped file counts as much as one in memory."""
    opened = []
    original = source.safe_open

    def refuse(*args, **kwargs):
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(source.AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(source, "safe_open", lambda file, **kwargs: opened.append(file) or original(file, **kwargs))
    out = upcycle(base, out=tmp_path / "out")
    export(out, tmp_path / "encoder")
    assert opened == []
    with pytest.raises(AssertionError, match="the base was loaded"):
        UBMoETransformer.from_base(base)


def test_memory_holds_a_tensor_and_not_the_model(base, tmp_path):
    """Weights of 365 MB, merged experts too, pass through a process that grows by less than half of that."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 8}
    torch.set_default_dtype(torch.bfloat16)
    try:
        large = make_base(tmp_path / "large", "llama", **sizes)
    finally:
        torch.set_default_dtype(torch.float32)
    weights = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    experts = tmp_path / "experts.safetensors"
    linears = Shape(AutoConfig.from_pretrained(large)).linears
    save_low_rank({k: (torch.full((2, a), 0.1), torch.full((b, 2), 0.1)) for k, (a, b) in linears.items()}, experts, {})
    command = [sys.executable, "-c", PEAK, large, experts, base, tmp_path / "out"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = map(int, run.stdout.split())
    assert weights > 3.5e8
    assert after - before < weights / 2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
