"""Vectors for classifiers, against stock transformers and numpy."""

from __future__ import annotations

import copy
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import ARCHITECTURES, TEXTS, random_experts, save_with_head
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import AutoModel, AutoTokenizer

from training.classification import inner_states
from training.command import has_bf16
from ubmoe_st import UBMoE, upcycle
from ubmoe_st.checkpoint import HEAD_FILE, CheckpointError, check_checkpoint, facts, verify_sums
from ubmoe_st.classification import ClassificationHead, last_states, read_head, save_head
from ubmoe_st.compute import processor_flags
from ubmoe_st.files import sha256_of
from ubmoe_st.upcycling import HEAD_NAME, export_experts

LAYER, SHARE, LENGTH, EXTRA = 2, 0.6, 3.0, 5


def make_head(width: int = 32, layer: int = LAYER) -> ClassificationHead:
    torch.manual_seed(3)
    return ClassificationHead(layer, SHARE, nn.Linear(width, EXTRA), LENGTH)


@pytest.fixture(scope="module")
def headed_of(checkpoint_of, tmp_path_factory):
    made: dict[str, Path] = {}

    def get(architecture: str = "llama") -> Path:
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp("headed") / architecture
            save_with_head(checkpoint_of(architecture), made[architecture], LENGTH)
        return made[architecture]

    return get


@pytest.fixture(scope="module")
def headed(headed_of):
    return headed_of("llama")


def expected(folder: Path, texts: list[str]) -> np.ndarray:
    """By stock transformers, one text at a time: mean of the last layer, and the last token of an inner one."""
    encoder, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    head = load_file(folder / HEAD_FILE)
    rows = []
    for text in texts:
        with torch.no_grad():
            found = encoder(torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True)
        own = found.last_hidden_state[0].numpy().mean(0)
        added = head["weight"].numpy() @ found.hidden_states[LAYER][0, -1].numpy() + head["bias"].numpy()
        row = np.concatenate([own / np.linalg.norm(own), SHARE * added / np.linalg.norm(added)])
        rows.append(LENGTH * row / np.linalg.norm(row))
    return np.array(rows)


# Not of Qwen: transformers gives its checkpoints a tokenizer of its own, which knows none of the tiny vocabulary.
@pytest.mark.parametrize("architecture", sorted(name for name in ARCHITECTURES if "qwen" not in name))
def test_vectors_are_those_of_stock_layers(headed_of, architecture):
    folder = headed_of(architecture)
    model = UBMoE(str(folder), device="cpu")
    found = model.encode(TEXTS, task="classification")
    wanted = expected(folder, TEXTS)
    assert found.shape == (len(TEXTS), 32 + EXTRA)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert np.ptp(wanted[:, 32:], axis=0).min() > 0.01, "the added part is the same for all texts"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batches_change_nothing(headed, side):
    model = UBMoE(str(headed), device="cpu")
    model.tokenizer.padding_side = side
    texts = [" ".join(TEXTS * n) for n in (1, 4, 2, 1)] + TEXTS
    wanted = np.concatenate([model.encode([text], task="classification") for text in texts])
    model[0].pass_tokens = 1  # a batch falls into groups of rows
    calls: list[int] = []
    model[0].model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    np.testing.assert_allclose(model.encode(texts, task="classification", batch_size=8), wanted, atol=1e-5)
    assert len(calls) > 1, "the batch was computed in one piece"


def test_plain_vectors_and_generation_stay_as_they_are(checkpoint, headed):
    plain, with_head = UBMoE(str(checkpoint), device="cpu"), UBMoE(str(headed), device="cpu")
    for task in (None, "query", "document"):
        assert np.array_equal(plain.encode(TEXTS, task=task), with_head.encode(TEXTS, task=task))
    assert np.array_equal(plain.encode(TEXTS), SentenceTransformer(str(headed), device="cpu").encode(TEXTS))
    assert plain.generate("the cat", max_new_tokens=4) == with_head.generate("the cat", max_new_tokens=4)
    size = 32 * EXTRA + EXTRA
    assert with_head.memory_report()["bi"] - plain.memory_report()["bi"] == 4 * size
    without, found = facts(checkpoint), facts(headed)
    assert found["parameters"]["added"] - without["parameters"]["added"] == size
    assert found["bytes"]["classification"] == (headed / HEAD_FILE).stat().st_size
    assert "classification" not in without["bytes"]


def test_threads_with_and_without_the_task_do_not_meet(headed):
    model = UBMoE(str(headed), device="cpu")
    wanted = {task: model.encode(TEXTS, task=task) for task in (None, "classification")}
    wrong: list[object] = []

    def work(task: str | None) -> None:
        for _ in range(15):
            found = model.encode(TEXTS, task=task)
            if found.shape != wanted[task].shape or not np.allclose(found, wanted[task], atol=1e-6):
                wrong.append(task)

    threads = [threading.Thread(target=work, args=(task,)) for task in (None, "classification") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_it_goes_with_every_form_of_the_model(headed, tmp_path):
    model = UBMoE(str(headed), device="cpu")
    wanted = model.encode(TEXTS, task="classification")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(twin.encode(TEXTS, task="classification"), wanted)
    half = UBMoE(str(headed), device="cpu").to(torch.bfloat16)
    np.testing.assert_allclose(half.encode(TEXTS, task="classification"), wanted, atol=0.1)
    model.save(str(tmp_path / "again"))
    assert verify_sums(tmp_path / "again")
    assert (tmp_path / "again" / HEAD_FILE).read_bytes() == (headed / HEAD_FILE).read_bytes()


@pytest.mark.skipif(not processor_flags()["avx2"], reason="int8 products need AVX2")
def test_fast_products_give_nearly_the_same(headed):
    exact = UBMoE(str(headed), device="cpu").encode(TEXTS, task="classification")
    model = UBMoE(str(headed), device="cpu", compute="int8")
    assert model.compute.used == "int8"
    found = model.encode(TEXTS, task="classification")
    assert found.shape == exact.shape
    assert (found * exact).sum(1).min() > 0.98 * LENGTH**2


def test_a_build_takes_the_head_that_lies_beside_the_experts(base, checkpoint, tmp_path):
    model = UBMoE(str(checkpoint), device="cpu")
    rank2 = random_experts(model[0])
    model[0].set_low_rank_experts(rank2)
    experts = export_experts(model[0], tmp_path / "experts")
    save_head(make_head(), experts / HEAD_NAME, torch.float16)
    built = upcycle(base, experts, out=tmp_path / "built")
    again = upcycle(base, built, out=tmp_path / "again")
    for folder in (built, again):
        found = UBMoE(str(folder), device="cpu", low_memory=True).encode(TEXTS, task="classification")
        np.testing.assert_allclose(found, expected(folder, TEXTS), atol=2e-5)
    opened = UBMoE(str(built), device="cpu")
    opened[0].set_low_rank_experts(rank2)
    with pytest.raises(ValueError, match="has none"):  # it was fitted to the experts of before
        opened.encode(TEXTS, task="classification")


def test_what_cannot_be_asked_for_is_refused(checkpoint, headed):
    with pytest.raises(ValueError, match="has none"):
        UBMoE(str(checkpoint), device="cpu").encode(TEXTS, task="classification")
    with pytest.raises(ValueError, match="cannot be cut to 8"):
        UBMoE(str(headed), device="cpu").encode(TEXTS, task="classification", truncate_dim=8)
    with pytest.raises(ValueError, match="cannot be cut to 8"):
        UBMoE(str(headed), device="cpu", truncate_dim=8).encode(TEXTS, task="classification")
    model = UBMoE(str(headed), device="cpu")
    for head in (make_head(layer=4), make_head(width=31)):
        with pytest.raises(ValueError, match="3 layers of width 32"):
            model[0].set_classification_head(head)
    with pytest.raises(ValueError, match="layer from 1"):
        make_head(layer=0)


def test_a_damaged_file_is_named(headed, tmp_path):
    folder = shutil.copytree(headed, tmp_path / "c")
    file = folder / HEAD_FILE
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    with pytest.raises(CheckpointError, match=r"classification\.safetensors"):
        check_checkpoint(folder)
    save_file({"weight": torch.zeros(3, 31), "bias": torch.zeros(3)}, file)
    with pytest.raises(CheckpointError, match=r"expected `weight` \(K, D\)"):
        UBMoE(str(folder), device="cpu")
    for strange in (make_head(layer=9), make_head(width=31)):
        save_head(strange, file)
        for look in (check_checkpoint, UBMoE):
            with pytest.raises(CheckpointError, match=r"classification\.safetensors.*3 layers of width 32"):
                look(str(folder))
    for metadata, weight in (({"layer": "2"}, torch.zeros(3, 32)), ({}, torch.full((3, 32), torch.nan))):
        facts = {"format": "ubmoe-classification", "share": "0.6", "layer": "2", "length": "1.0"} | metadata
        if metadata:
            facts.pop("share")
        save_file({"weight": weight, "bias": torch.zeros(3)}, file, facts)
        with pytest.raises(CheckpointError, match="holds no classification head"):
            UBMoE(str(folder), device="cpu")
    with pytest.raises(FileNotFoundError):
        read_head(tmp_path / "nothing.safetensors")


def test_numbers_that_do_not_open_again_are_not_saved(headed, tmp_path):
    model = UBMoE(str(headed), device="cpu")
    model[0].classification.linear.weight.data.fill_(1e6)
    model.half()
    with pytest.raises(ValueError, match="not finite"):
        model.save(str(tmp_path / "out"))
    assert not (tmp_path / "out" / "modules.json").exists()


def test_of_several_heads_each_reads_its_own_layer(checkpoint, headed, tmp_path):
    """Also a fit beside a head that reads another layer."""
    model, fresh = UBMoE(str(headed), device="cpu"), UBMoE(str(checkpoint), device="cpu")
    for one in (model, fresh):
        one[0].set_classification_head(make_head(layer=1))
    found = model.encode(TEXTS, task="classification")
    np.testing.assert_array_equal(found, fresh.encode(TEXTS, task="classification"))
    assert np.abs(found - UBMoE(str(headed), device="cpu").encode(TEXTS, task="classification")).max() > 0.1
    with torch.no_grad():
        stock = AutoModel.from_pretrained(headed).eval()(
            torch.tensor([model.token_ids(TEXTS[0])]), output_hidden_states=True
        )
    states = inner_states(UBMoE(str(headed), device="cpu")[0], TEXTS[:1], 1)
    limit = 0.05 if has_bf16(on_cpu=True) else 1e-5
    assert (states[0] - stock.hidden_states[1][0, -1]).norm() < limit * states.norm()
    assert (states[0] - stock.hidden_states[2][0, -1]).norm() > 0.1 * states.norm()


def test_a_head_of_one_model_is_not_that_of_another(checkpoint):
    head = make_head()
    first, second = UBMoE(str(checkpoint), device="cpu"), UBMoE(str(checkpoint), device="cpu")
    for model in (first, second):
        model[0].set_classification_head(head)
    first.half()
    assert second[0].classification.linear.weight.dtype == head.linear.weight.dtype == torch.float32


@pytest.mark.parametrize("what", ["training", "adapter"])
def test_another_encoder_has_the_head_no_more(headed, tmp_path, caplog, what):
    model = UBMoE(str(headed), device="cpu")
    model.encode(TEXTS, task="classification")
    if what == "training":
        model.train()
        model(model.preprocess(TEXTS))["sentence_embedding"].sum().backward()
    else:
        model.add_adapter(LoraConfig(target_modules=["up_proj"], task_type="FEATURE_EXTRACTION"))
    assert "fitted to the encoder as it was" in caplog.text
    with pytest.raises(ValueError, match="has none"):
        model.encode(TEXTS, task="classification")
    if what == "training":
        model.save(str(tmp_path / "out"))
        assert not (tmp_path / "out" / HEAD_FILE).exists()


def test_a_projection_is_trained_without_harm_to_the_head(headed):
    model = UBMoE(str(headed), device="cpu").train()
    model[0].requires_grad_(False)
    model(model.preprocess(TEXTS))
    assert model.encode(TEXTS, task="classification").shape[1] == 32 + EXTRA


def test_a_head_belongs_to_its_experts(base, checkpoint, tmp_path):
    """It goes with them as a folder and as a file, and not with others."""
    model = UBMoE(str(checkpoint), device="cpu")
    folders = []
    for name, scale in (("a", 0.1), ("b", 0.2)):
        model[0].set_low_rank_experts(random_experts(model[0], scale=scale))
        model[0].set_classification_head(make_head())
        folders.append(export_experts(model[0], tmp_path / name))
    assert read_head(folders[0] / HEAD_NAME).fitted_to == sha256_of(folders[0] / "bi_delta.safetensors")
    for number, experts in enumerate((folders[0], folders[0] / "bi_delta.safetensors")):
        built = upcycle(base, experts, out=tmp_path / f"built{number}")
        assert UBMoE(str(built), device="cpu").encode(TEXTS, task="classification").shape[1] == 32 + EXTRA
    shutil.copy(folders[0] / HEAD_NAME, folders[1] / HEAD_NAME)
    with pytest.raises(ValueError, match="fitted to other experts"):
        upcycle(base, folders[1], out=tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_a_task_that_nobody_knows_is_refused(headed):
    model = UBMoE(str(headed), device="cpu")
    with pytest.raises(ValueError, match="'Classification'"):
        model.encode(TEXTS, task="Classification")
    with pytest.raises(ValueError, match="cannot be cut to 8"):
        model.encode(
            TEXTS,
            None,
            None,
            32,
            False,
            "sentence_embedding",
            "float32",
            True,
            False,
            None,
            False,
            8,
            task="classification",
        )
    assert model.encode_query(TEXTS).shape == model.encode_document(TEXTS).shape == (len(TEXTS), 32)


def test_last_states_of_a_flat_batch():
    states = torch.arange(12.0).reshape(1, 6, 2)
    found = last_states(states, {"cu_seq_lens_q": torch.tensor([0, 2, 6], dtype=torch.int32)})
    assert found.tolist() == [[2, 3], [10, 11]]
