"""What `save` writes is what the model is: its claims, its low-rank form, its dtype; and it opens."""

from __future__ import annotations

import json
import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from helpers.models import TEXTS, random_experts
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from ubmoe_st import UBMoE, UBMoETransformer, upcycle
from ubmoe_st import checkpoint as layout
from ubmoe_st.checkpoint import CheckpointError

IDS = torch.arange(4, 12)[None]


def step(model, pick=lambda name: True):
    """One step of an optimizer, as a stock trainer makes it, over the parameters that `pick` takes."""
    trained = [parameter for name, parameter in model.named_parameters() if pick(name) and parameter.requires_grad]
    assert trained
    optimizer = torch.optim.SGD(trained, lr=0.5)
    features = model.preprocess(TEXTS)
    (model(features)["sentence_embedding"] ** 3).sum().backward()
    optimizer.step()


def merge_into(lm, layer):
    """A random PEFT adapter merged into a model."""
    config = LoraConfig(r=2, target_modules=[layer], init_lora_weights=False)
    get_peft_model(lm, config).merge_and_unload()


def change_all(model):
    step(model)


def change_attention_of_the_encoder(model):
    merge_into(model[0].model, "q_proj")


def change_attention_of_the_generator(model):
    before = model.encode(TEXTS)
    merge_into(model.generator, "q_proj")
    assert not np.array_equal(model.encode(TEXTS), before)


def change_the_original_experts(model):
    merge_into(model.generator, "up_proj")


def merge_safely_into_the_original_experts(model):
    """With `safe_merge`, PEFT puts another tensor in the place of the weight's data."""
    adapter = LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    get_peft_model(model.generator, adapter).merge_and_unload(safe_merge=True)


def lose_digits(model):
    model.half().float()


@pytest.mark.parametrize(
    "change",
    [
        change_all,
        change_attention_of_the_encoder,
        change_attention_of_the_generator,
        change_the_original_experts,
        merge_safely_into_the_original_experts,
        lose_digits,
    ],
)
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_changed_generator_claims_no_base(checkpoint, tmp_path, change, low_memory):
    if low_memory and change is change_all:
        pytest.skip("the same as without, as far as shared weights go")
    folder = shutil.copytree(checkpoint, tmp_path / "m")
    assert "exactly like its base" in (folder / "README.md").read_text()
    model = UBMoE(str(folder), low_memory=low_memory)
    change(model)
    logits = model.generator(IDS).logits
    with pytest.warns(UserWarning, match="no longer generates exactly like base"):
        model.save(str(folder))
    section = json.loads((folder / layout.GENERATOR_CONFIG).read_text())["ubmoe"]
    assert section["base_model"] == ""
    assert section["base_sha256"] == {}
    card = (folder / "README.md").read_text()
    assert "exactly like" not in card
    assert "changed" in card
    again = UBMoE(str(folder), verify=True)
    if change is not lose_digits:  # buffers lost some, too
        assert torch.equal(again.generator(IDS).logits, logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.save(str(tmp_path / "again"))
    assert UBMoE(str(tmp_path / "again")).ubmoe_config.base_model == ""


@pytest.mark.parametrize("low_memory", [False, True])
def test_an_untouched_generator_keeps_its_base(base, checkpoint, tmp_path, low_memory):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = UBMoE(str(checkpoint), low_memory=low_memory).to(dtype)
        if not low_memory:
            with torch.no_grad():
                model[0].model.layers[1].mlp.up_proj.weight.add_(0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("error" if low_memory else "ignore")
            model.save(str(tmp_path / str(dtype)))
        again = UBMoE(str(tmp_path / str(dtype)))
        assert again.ubmoe_config.base_model == "base"
        assert again.ubmoe_config.base_sha256 == UBMoE(str(checkpoint)).ubmoe_config.base_sha256
        reference = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        assert torch.equal(again.generator(IDS).logits, reference(IDS).logits)


@pytest.mark.parametrize("how", ["train", "merge", "replace"])
def test_changed_experts_are_saved_as_dense_ones(checkpoint, tmp_path, how):
    folder = shutil.copytree(checkpoint, tmp_path / "m")
    model = UBMoE(str(folder))
    if how == "train":
        step(model, lambda name: ".mlp." in name)
    elif how == "merge":
        merge_into(model[0].model, "down_proj")
    else:
        ffn = {k: t * 1.01 for k, t in model[0].model.state_dict().items() if ".mlp." in k}
        model[0].set_dense_experts(ffn)
    vectors = model.encode(TEXTS)
    with pytest.warns(UserWarning, match="are dense now"):
        model.save(str(folder))
    again = UBMoE(str(folder), verify=True)
    assert np.array_equal(again.encode(TEXTS), vectors)
    assert again.ubmoe_config.expert_rank is None
    assert again.ubmoe_config.base_model == "base"
    assert not (folder / layout.DELTA_FILE).exists()
    assert "dense" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="dense"):
        UBMoE(str(folder), low_memory=True)
    with pytest.warns(UserWarning, match="dense now"), pytest.raises(ValueError, match="dense"):
        model[0].use_low_memory()


def test_low_rank_experts_that_were_trained_in_low_rank_form_are_saved(checkpoint, tmp_path):
    model = UBMoE(str(checkpoint), low_memory=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    step(model)
    vectors = model.encode(TEXTS)
    assert np.abs(vectors - UBMoE(str(checkpoint)).encode(TEXTS)).max() > 1e-3
    model.save(str(tmp_path / "m"))
    for low_memory in (False, True):
        assert np.abs(UBMoE(str(tmp_path / "m"), low_memory=low_memory).encode(TEXTS) - vectors).max() < 1e-5
    assert UBMoE(str(tmp_path / "m")).ubmoe_config.base_model == "base"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unchanged_low_rank_experts_stay_low_rank(checkpoint, tmp_path, dtype):
    model = UBMoE(str(checkpoint)).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save(str(tmp_path / "m"))
    assert UBMoE(str(tmp_path / "m"), low_memory=True).ubmoe_config.expert_rank == 2


def compiled(model):
    model[0].model = torch.compile(model[0].model, backend="eager")
    return model


def one_compiled_layer(model):
    layer = model[0].model.layers[1]
    layer.mlp = torch.compile(layer.mlp, backend="eager")
    return model


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


class Packed(torch.Tensor):
    """As torchao's: a tensor that few operators take."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.equal:
            raise NotImplementedError("a packed tensor equals nothing")
        return super().__torch_function__(func, types, args, kwargs)


def tensors_of_another_class(model):
    linear = model[0].model.layers[0].self_attn.q_proj
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Packed))
    return model


def integers(model):
    """As bitsandbytes with 8 bits."""
    linear = model[0].model.layers[0].self_attn.q_proj
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    return model


def one_view_in_half(model):
    model.generator.half()
    return model


def adapter_in_the_generator(model):
    get_peft_model(model.generator, LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    return model


def another_layer_in_the_generator(model):
    attention = model.generator.model.layers[1].self_attn
    attention.q_proj = nn.Linear(32, 32, bias=False)
    return model


def another_head(model):
    model.generator.lm_head = nn.Linear(32, 48, bias=False)
    return model


CHANGES = [
    compiled,
    one_compiled_layer,
    quantised,
    tensors_of_another_class,
    integers,
    one_view_in_half,
    adapter_in_the_generator,
    another_layer_in_the_generator,
    another_head,
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("low_memory", [False, True])
def test_what_would_not_open_replaces_nothing(checkpoint, tmp_path, change, low_memory):
    if low_memory and change is one_view_in_half:
        pytest.skip("without weights of its own, the generator takes the encoder along")
    folder = shutil.copytree(checkpoint, tmp_path / "m")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    model = change(UBMoE(str(folder), low_memory=low_memory))
    with pytest.raises(CheckpointError, match=r"nothing was written.*Save a model before"):
        model.save(str(folder))
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("with_file", [False, True])
def test_the_defaults_of_the_generator_are_saved_as_they_are(checkpoint, tmp_path, with_file):
    """What a caller has set there, as stock models save it; and nothing where nothing was set."""
    folder = shutil.copytree(checkpoint, tmp_path / "m")
    (folder / "generator" / "generation_config.json").unlink(missing_ok=True)
    if with_file:
        GenerationConfig(max_new_tokens=7).save_pretrained(folder / "generator")
    model = UBMoE(str(folder))
    model.generate("the cat", max_new_tokens=2)
    model.save(str(tmp_path / "same"))
    file = tmp_path / "same" / "generator" / "generation_config.json"
    assert file.exists() == with_file
    model.generator.generation_config.update(do_sample=True, temperature=0.5, max_new_tokens=3)
    model.save(str(tmp_path / "other"))
    found = UBMoE(str(tmp_path / "other")).generator.generation_config
    assert (found.do_sample, found.temperature, found.max_new_tokens) == (True, 0.5, 3)


def test_a_missing_head_is_named(checkpoint_of, tmp_path):
    folder = shutil.copytree(checkpoint_of("llama-untied"), tmp_path / "m")
    tensors = load_file(folder / layout.UNI_FILE)
    layout.save_tensors({k: t for k, t in tensors.items() if k != "lm_head.weight"}, folder / layout.UNI_FILE)
    with pytest.raises(CheckpointError, match=r"model-uni\.safetensors: lm_head\.weight is missing"):
        UBMoE(str(folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_config_names_the_dtype_of_the_weights(checkpoint, tmp_path, dtype):
    UBMoE(str(checkpoint)).to(dtype).save(str(tmp_path / "m"))
    for file in ("config.json", layout.GENERATOR_CONFIG):
        assert json.loads((tmp_path / "m" / file).read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert SentenceTransformer(str(tmp_path / "m"))[0].model.dtype == dtype
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m" / "generator").dtype == dtype


@pytest.mark.skipif(os.name == "nt", reason="no umask on Windows")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_weights_have_the_mode_that_the_umask_leaves(base, tmp_path, mask, mode):
    module = UBMoETransformer.from_base(base)
    module.set_low_rank_experts(random_experts(module))
    modules = [module, Pooling(32), Normalize()]
    old = os.umask(mask)
    try:
        UBMoE(modules=modules, device="cpu").save(str(tmp_path / "ours"))
        SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "stock"))
    finally:
        os.umask(old)
    files = [p for p in tmp_path.rglob("*.safetensors")]
    assert len(files) == 8
    assert {p.stat().st_mode & 0o777 for p in files} == {mode}


def test_an_adapter_alone_replaces_no_checkpoint(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "m")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    model = UBMoE(str(folder))
    model.add_adapter(LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    with pytest.raises(FileExistsError, match="holds a checkpoint"):
        model.save(str(folder))
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    for _ in range(2):
        model.save(str(tmp_path / "adapter"))
    with pytest.raises(CheckpointError, match=r"is a PEFT adapter.*load_adapter"):
        UBMoE(str(tmp_path / "adapter"))
    again = UBMoE(str(folder))
    again.load_adapter(str(tmp_path / "adapter"))
    assert np.array_equal(again.encode(TEXTS), model.encode(TEXTS))


@pytest.mark.parametrize("view", ["encoder", "generator"])
def test_a_deleted_adapter_leaves_nothing_behind(checkpoint, tmp_path, view):
    model = UBMoE(str(checkpoint))
    vectors = model.encode(TEXTS)
    network = model[0].model if view == "encoder" else model.generator
    network.add_adapter(LoraConfig(r=2, target_modules=["up_proj", "q_proj"], init_lora_weights=False))
    network.delete_adapter("default")
    model.save(str(tmp_path / "m"))
    again = UBMoE(str(tmp_path / "m"))
    assert np.array_equal(again.encode(TEXTS), vectors)
    assert again.ubmoe_config.expert_rank == 2


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_resized_embeddings_are_saved(checkpoint_of, tmp_path, architecture):
    model = UBMoE(str(checkpoint_of(architecture)))
    vectors = model.encode(TEXTS)
    model.generator.resize_token_embeddings(60)
    assert np.array_equal(model.encode(TEXTS), vectors)
    logits = model.generator(IDS).logits
    with pytest.warns(UserWarning, match="no longer generates exactly like base"):
        model.save(str(tmp_path / "m"))
    again = UBMoE(str(tmp_path / "m"))
    assert torch.equal(again.generator(IDS).logits, logits)
    assert logits.shape[-1] == again[0].model.config.vocab_size == 60


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_was_not_resized_with_the_embeddings_is_named(checkpoint_of, tmp_path):
    for used in (False, True):
        model = UBMoE(str(checkpoint_of("qwen3")))
        if used:
            model.generate("the", max_new_tokens=1)
        model[0].model.resize_token_embeddings(60)
        with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape"):
            model.save(str(tmp_path / "m"))
        assert not (tmp_path / "m").exists()
        if not used:
            with pytest.raises(ValueError, match=r"resize by `model\.generator`"):
                model.generate("the")


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_checkpoint_that_is_only_read_is_saved_as_the_same_bytes(checkpoint, tmp_path, low_memory):
    """Also in another dtype, where the experts merged anew would be rounded twice."""
    for dtype in ("float32", "bfloat16"):
        UBMoE(str(checkpoint), model_kwargs={"dtype": dtype}).save(str(tmp_path / "first"))
        model = UBMoE(str(tmp_path / "first"), low_memory=low_memory)
        model.generate("the", max_new_tokens=1)
        model.save(str(tmp_path / "again"))
        first, again = (
            {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.safetensors")}
            for folder in (tmp_path / "first", tmp_path / "again")
        )
        assert first == again
        assert len(first) == 4


@pytest.mark.parametrize("name", [".", "", ".."])
def test_the_current_directory_is_not_replaced(checkpoint, tmp_path, monkeypatch, name):
    here = tmp_path / "a" / "b"
    here.mkdir(parents=True)
    (here / "README.md").write_text("mine")
    monkeypatch.chdir(here)
    with pytest.raises(FileExistsError, match="is the current directory"):
        UBMoE(str(checkpoint)).save(name)
    assert [p.name for p in here.iterdir()] == ["README.md"]


def test_an_older_checkpoint_leaves_nothing_of_its_own(base, tmp_path):
    """Neither modules, tokenizer files and templates, nor notices; with and without a list of them."""
    with_notices = shutil.copytree(base, tmp_path / "experts")
    (with_notices / "NOTICE").write_text("of the first")
    dense = [Pooling(32), Dense(32, 16), Normalize()]
    old = {"vocab.txt", "additional_chat_templates", "chat_template.jinja", "2_Dense", "NOTICE", "LICENSE.first"}
    plain = shutil.copytree(base, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    mine = {"notes.txt", ".git", "2_data", "2_Dense.md", "tokenizer_notes.json", "LICENSE"}
    for listed in (True, False):
        cp = upcycle(base, with_notices, out=tmp_path / f"cp-{listed}", modules=dense)
        assert (cp / "NOTICE").read_text() == "of the first"
        (cp / "vocab.txt").write_text("x")
        (cp / "additional_chat_templates").mkdir()
        (cp / "additional_chat_templates" / "tool_use.jinja").write_text("x")
        (cp / "LICENSE.first").write_text("x")
        if listed:
            layout.write_sums(cp)
        else:
            (cp / layout.SUMS_FILE).unlink()
        for name in mine - {"LICENSE"}:
            (cp / name).mkdir() if name in (".git", "2_data") else (cp / name).write_text("mine")
        (cp / ".git" / "HEAD").write_text("mine")
        assert old < {entry.name for entry in cp.iterdir()}
        upcycle(plain, out=cp, overwrite=True)
        found = {entry.name for entry in cp.iterdir()}
        assert not found & old
        assert mine - {"LICENSE"} < found
        assert (cp / ".git" / "HEAD").read_text() == "mine"
        layout.verify_sums(cp)
        fresh = upcycle(plain, out=tmp_path / f"fresh-{listed}")
        assert found - mine == {entry.name for entry in fresh.iterdir()}
        with pytest.raises(ValueError, match="no chat template"):
            UBMoE(str(cp)).generate([[{"role": "user", "content": "the cat"}]])


def test_a_folder_that_was_no_checkpoint_keeps_its_licence_and_readme(checkpoint, tmp_path):
    names = ("LICENSE", "NOTICE.md", "README.md", "setup.py", ".gitignore")
    for name in names:
        (tmp_path / name).write_text("mine")
    UBMoE(str(checkpoint)).save(str(tmp_path), create_model_card=False)
    assert all((tmp_path / name).read_text() == "mine" for name in names)
    layout.verify_sums(tmp_path)
    UBMoE(str(tmp_path)).save(str(tmp_path), create_model_card=False)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert "README.md" in layout.verify_sums(tmp_path)
    assert (tmp_path / "LICENSE").read_text() == "mine"  # by now given along with the model
    model = UBMoE(str(tmp_path))
    change_all(model)
    with pytest.warns(UserWarning, match="no longer generates exactly like base"):
        model.save(str(tmp_path), create_model_card=False)
    assert not (tmp_path / "README.md").exists()  # it would say what is true of the older one


def test_a_card_is_kept_as_long_as_it_is_right(checkpoint, base, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "m")
    with (folder / "README.md").open("a") as card:
        card.write("\nSpearman 73.5\n")
    UBMoE(str(folder), low_memory=True).save(str(tmp_path / "low"))
    UBMoE(str(folder), model_kwargs={"dtype": torch.bfloat16}).save(str(tmp_path / "half"))
    text = (folder / "README.md").read_text()
    assert (tmp_path / "low" / "README.md").read_text() == text == (tmp_path / "half" / "README.md").read_text()
    UBMoE(str(folder)).save(str(tmp_path / "n"), model_name="owner/mine", train_datasets=["a/pairs"])
    named = (tmp_path / "n" / "README.md").read_text()
    assert 'UBMoE("owner/mine")' in named
    assert "ubmoe-tiny" not in named
    assert "Spearman 73.5" in named
    assert ModelCard(named).data.datasets == ["a/pairs"]
    for rank in (2, 3):
        model = UBMoE(str(folder))
        model[0].set_low_rank_experts({k: (a + 0.1, b) for k, (a, b) in random_experts(model[0], rank).items()})
        model.save(str(tmp_path / f"other-{rank}"))
        written = (tmp_path / f"other-{rank}" / "README.md").read_text()
        assert f"low-rank, rank {rank}" in written
        assert "Spearman" not in written


def test_a_card_is_not_kept_over_another_layer_behind_the_encoder(checkpoint, tmp_path):
    parts = list(UBMoE(str(checkpoint)))
    UBMoE(modules=[*parts[:-1], Dense(32, 8), parts[-1]]).save(str(tmp_path / "m"))
    with (tmp_path / "m" / "README.md").open("a") as card:
        card.write("\nSpearman 73.5\n")
    changes = {
        "same": lambda model: None,
        "half": lambda model: model.half(),
        "tuned": lambda model: model[2].linear.weight.data.mul_(1.01),
        "pooled": lambda model: setattr(model[1], "pooling_mode", "cls"),
        "bare": lambda model: model.pop(2),
    }
    for name, change in changes.items():
        model = UBMoE(str(tmp_path / "m"))
        change(model)
        model.save(str(tmp_path / name))
        kept = "Spearman" in (tmp_path / name / "README.md").read_text()
        assert kept == (name in ("same", "half")), name


def test_what_a_plain_model_around_the_module_saves_is_opened(base, tmp_path):
    modules = [UBMoETransformer.from_base(base), Pooling(32, "mean"), Normalize()]
    plain = SentenceTransformer(modules=modules, device="cpu")
    plain.save_pretrained(str(tmp_path / "plain"))
    found = UBMoE(str(tmp_path / "plain"), device="cpu")
    assert np.abs(found.encode(TEXTS) - plain.encode(TEXTS)).max() < 1e-6
    found.save(str(tmp_path / "again"))
    stock = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    assert np.abs(stock.encode(TEXTS) - plain.encode(TEXTS)).max() < 1e-5
