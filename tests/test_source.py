"""The generator is that of the checkpoint which was loaded, whatever becomes of its folder."""

from __future__ import annotations

import copy
import pickle
import shutil

import pytest
import torch
from helpers.models import make_base, make_checkpoint
from transformers import AutoModelForCausalLM

from ubmoe_st import UBMoE, UBMoETransformer
from ubmoe_st.checkpoint import CheckpointError

IDS = torch.arange(4, 12)[None]


@pytest.fixture
def expected(base):
    return AutoModelForCausalLM.from_pretrained(base)(IDS).logits


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A checkpoint of the same shape and other weights."""
    folder = tmp_path_factory.mktemp("other")
    base = make_base(folder / "base")
    lm = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(0.5)
    lm.save_pretrained(base)
    return make_checkpoint(base, folder / "ubmoe-tiny")


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_folder_that_is_moved_deleted_or_replaced(checkpoint, other, tmp_path, monkeypatch, expected, low_memory):
    shutil.copytree(checkpoint, tmp_path / "a" / "m")
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    moved, deleted, replaced = (UBMoE("m", low_memory=low_memory) for _ in range(3))
    monkeypatch.chdir(tmp_path / "b")
    assert torch.equal(moved.generator(IDS).logits, expected)
    shutil.rmtree(tmp_path / "a" / "m")
    assert torch.equal(deleted.generator(IDS).logits, expected)
    shutil.copytree(other, tmp_path / "a" / "m")
    assert torch.equal(replaced.generator(IDS).logits, expected)
    assert not torch.equal(UBMoE(str(tmp_path / "a" / "m")).generator(IDS).logits, expected)
    replaced.save(str(tmp_path / "saved"))
    assert torch.equal(UBMoE(str(tmp_path / "saved")).generator(IDS).logits, expected)


def test_a_base_that_is_gone(tmp_path, expected):
    base = make_base(tmp_path / "base")
    module = UBMoETransformer.from_base(base)
    shutil.rmtree(base)
    assert torch.equal(module.generator()(IDS).logits, expected)


def test_a_copy_in_another_process_refuses_other_files(checkpoint, other, tmp_path, expected):
    folder = shutil.copytree(checkpoint, tmp_path / "m")
    model = UBMoE(str(folder))
    data = pickle.dumps(model)
    assert torch.equal(pickle.loads(data).generator(IDS).logits, expected)
    shutil.rmtree(folder)
    shutil.copytree(other, folder)
    with pytest.raises(CheckpointError, match="load the model again"):
        _ = pickle.loads(data).generator
    assert torch.equal(copy.deepcopy(model).generator(IDS).logits, expected)


@pytest.mark.parametrize("low_memory", [False, True])
def test_first_use_in_inference_mode_leaves_ordinary_tensors(checkpoint, low_memory):
    model = UBMoE(str(checkpoint), low_memory=low_memory)
    with torch.inference_mode():
        first = model.generate("the cat", max_new_tokens=2)
    generator = model.generator
    assert not any(tensor.is_inference() for tensor in (*generator.parameters(), *generator.buffers()))
    loss = generator(IDS, labels=IDS).loss
    loss.backward()
    assert generator.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    assert model.generate("the cat", max_new_tokens=2) == first


def test_a_copy_does_not_follow_what_is_merged_into_the_original(checkpoint, base, expected):
    for model in (UBMoE(str(checkpoint))[0], UBMoETransformer.from_base(base)):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            model.generator().model.layers[0].mlp.up_proj.weight.data += 1
        assert not torch.equal(model.generator()(IDS).logits, expected)
        assert torch.allclose(twin.generator()(IDS).logits, expected, atol=1e-5)


def test_encoding_keeps_the_generator(checkpoint):
    """Stock `encode` moves the model to its device in each call, which changes nothing."""
    model = UBMoE(str(checkpoint))
    generator = model.generator
    model.encode("the cat")
    assert model.generator is generator
    # A move that changes something is followed by the one that is held.
    assert generator.dtype == torch.float32
    assert model.to(torch.bfloat16).generator.dtype == generator.dtype == torch.bfloat16
