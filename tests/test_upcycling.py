"""Every accepted form of base and experts gives a checkpoint; every other is refused with the reason."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from helpers.models import SIZES, TEXTS, make_base, make_checkpoint, make_tokenizer, random_experts
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from transformers import AutoModelForCausalLM, AutoTokenizer

from ubmoe_st import UBMoE, UBMoETransformer, upcycle
from ubmoe_st.bases import resolve_base, save_tokenizer
from ubmoe_st.checkpoint import facts
from ubmoe_st.upcycling import export_experts

FFN = ["gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(4, 14)[None]


def bidirectional(lm):
    """Reference: the stock model with full attention, mean of the last hidden states, normalised."""
    lm.config.is_causal = False
    return vectors_of(lm.get_base_model().model if hasattr(lm, "get_base_model") else lm.model)


def vectors_of(backbone):
    rows = []
    for text in TEXTS:
        ids = make_tokenizer()(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            rows.append(torch.nn.functional.normalize(backbone(ids).last_hidden_state[0].mean(0), dim=0).numpy())
    return np.stack(rows)


def test_a_checkpoint_is_the_same_bytes_with_and_without_a_network(base, tmp_path):
    """transformers keeps the switch of HF_HUB_OFFLINE in the tokenizer's file."""
    files = []
    for offline in (False, True):
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=offline)
        assert tokenizer.init_kwargs["local_files_only"] is offline
        save_tokenizer(tokenizer, tmp_path / str(offline))
        files.append((tmp_path / str(offline) / "tokenizer_config.json").read_bytes())
    assert files[0] == files[1]


def test_without_experts_the_encoder_is_the_base_made_bidirectional(base, tmp_path):
    out = upcycle(base, out=tmp_path / "out")
    expected = bidirectional(AutoModelForCausalLM.from_pretrained(base))
    assert np.abs(UBMoE(str(out)).encode(TEXTS) - expected).max() < 1e-5
    with pytest.raises(ValueError, match="low_memory=False"):
        UBMoE(str(out), low_memory=True)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("on", ["causal-lm", "encoder"])
def test_a_peft_adapter_gives_the_vectors_peft_gives(base, tmp_path, rslora, on):
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=7, use_rslora=rslora, target_modules=FFN, init_lora_weights=False)
    if on == "causal-lm":
        tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        tuned.save_pretrained(tmp_path / "adapter")
        expected = bidirectional(tuned.eval())
    else:
        module = UBMoETransformer.from_base(base)
        module.model.add_adapter(config)
        module.model.save_pretrained(tmp_path / "adapter")
        module.eval()
        expected = vectors_of(module.model)
    out = upcycle(base, tmp_path / "adapter", out=tmp_path / "out")
    plain = bidirectional(AutoModelForCausalLM.from_pretrained(base))
    found = UBMoE(str(out)).encode(TEXTS)
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(found - plain).max() > 1e-2
    assert np.abs(UBMoE(str(out), low_memory=True).encode(TEXTS) - expected).max() < 1e-4


def test_an_adapter_on_attention_is_refused(base, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"self_attn\.q_proj.*shared with the generator"):
        upcycle(base, tmp_path / "adapter", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dense_checkpoint_with_a_tuned_ffn(base, tmp_path):
    tuned = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".mlp." in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    tuned.save_pretrained(tmp_path / "tuned")
    out = upcycle(base, tmp_path / "tuned", out=tmp_path / "out")
    model = UBMoE(str(out))
    assert np.abs(model.encode(TEXTS) - bidirectional(tuned)).max() < 1e-5
    ids = torch.arange(4, 10)[None]
    assert torch.equal(model.generator(ids).logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits)
    with torch.no_grad():
        tuned.model.layers[1].self_attn.k_proj.weight.add_(1e-6)
    tuned.save_pretrained(tmp_path / "worse")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_proj\.weight differs"):
        upcycle(base, tmp_path / "worse", out=tmp_path / "other")


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    ("key", "value"), [("rms_norm_eps", 0.5), ("hidden_act", "gelu"), ("rope_parameters", {"rope_theta": 9.0})]
)
def test_experts_that_were_tuned_in_another_model_are_refused(base, tmp_path, monkeypatch, streamed, key, value):
    if not streamed:
        monkeypatch.setattr("ubmoe_st.upcycling.can_stream", lambda folder: False)
    shutil.copytree(base, tmp_path / "tuned")
    file = tmp_path / "tuned" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"use_cache": False, "pad_token_id": None, "attention_dropout": 0.1}))
    upcycle(base, tmp_path / "tuned", out=tmp_path / "fine")
    file.write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=rf"tuned: {key} of its config is .*, of the base base .*; only FFN weights"):
        upcycle(base, tmp_path / "tuned", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_whose_frequencies_hang_on_the_batch_reads_less(tmp_path):
    """With longrope, the longest text of a batch would change the vectors of the others."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    rope |= {"original_max_position_embeddings": 32, "factor": 4.0}
    base = make_base(tmp_path / "base", "phi3-fused", rope_parameters=rope, original_max_position_embeddings=32)
    model = UBMoE(str(make_checkpoint(base, tmp_path / "checkpoint")))
    assert model.max_seq_length == 32
    short, long = "the cat sits on the mat", " ".join(["the cat dog bird train"] * 12)
    alone = model.encode(short)
    assert np.abs(alone - model.encode([short, long])[0]).max() < 1e-6
    model.max_seq_length = 64
    assert np.abs(alone - model.encode([short, long])[0]).max() > 1e-2, "the batch changes nothing: vacuous"
    with pytest.raises(ValueError, match=r"at most 32 with longrope, .* got 33"):
        upcycle(base, None, out=tmp_path / "longer", max_seq_length=33)
    assert UBMoE(str(upcycle(base, None, out=tmp_path / "less", max_seq_length=16))).max_seq_length == 16


def test_saved_experts_with_a_projection_and_a_recipe(base, tmp_path):
    module = UBMoETransformer.from_base(base)
    module.set_low_rank_experts(random_experts(module))
    projection = Dense(32, 8, activation_function=torch.nn.Identity())
    recipe = {"prompts": {"query": "the "}, "max_seq_length": 64, "pooling": {"mode": "lasttoken"}}
    experts = export_experts(module, tmp_path / "experts", projection=projection, recipe=recipe, dtype=torch.float32)
    out = upcycle(base, experts, out=tmp_path / "out")
    for model in (UBMoE(str(out)), SentenceTransformer(str(out))):
        assert model.prompts["query"] == "the "
        assert model.max_seq_length == 64
        assert model.get_embedding_dimension() == 8
        assert model[1].pooling_mode == "lasttoken"
    assert np.abs(UBMoE(str(out)).encode(TEXTS) - SentenceTransformer(str(out)).encode(TEXTS)).max() < 1e-6
    # The layer is among what was added to the base.
    plain = upcycle(base, export_experts(module, tmp_path / "plain", dtype=torch.float32), out=tmp_path / "without")
    with_layer, without = (facts(folder)["parameters"] for folder in (out, plain))
    assert {key: with_layer[key] - without[key] for key in ("added", "stored", "active_encoding", "base")} == {
        "added": 32 * 8 + 8,
        "stored": 32 * 8 + 8,
        "active_encoding": 32 * 8 + 8,
        "base": 0,
    }


def test_a_base_with_a_head_beside_its_tied_embeddings(base, tmp_path):
    """The same numbers twice are one tensor, also where a tuned copy has them once; others are a head of its own."""
    shutil.copytree(base, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    state = load_file(file)
    embeddings = state["model.embed_tokens.weight"]
    save_file({**state, "lm_head.weight": embeddings.clone()}, file, {"format": "pt"})
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight.add_(0.1)
    tuned.save_pretrained(tmp_path / "tuned")
    upcycle(tmp_path / "base", tmp_path / "tuned", out=tmp_path / "out")
    found = UBMoE(str(tmp_path / "out"))[0].encoder_state()["layers.1.mlp.up_proj.weight"]
    assert torch.equal(found, tuned.model.layers[1].mlp.up_proj.weight)

    save_file({**state, "lm_head.weight": embeddings.flip(0).contiguous()}, file, {"format": "pt"})
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not torch.equal(stock.get_output_embeddings().weight, stock.get_input_embeddings().weight)
    for arguments in ((tmp_path / "base",), (base, tmp_path / "base")):
        with pytest.raises(ValueError, match="tie_word_embeddings to false"):
            upcycle(*arguments, out=tmp_path / "own")
    assert not (tmp_path / "own").exists()
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))
    upcycle(tmp_path / "base", out=tmp_path / "own")
    with torch.inference_mode():
        assert torch.equal(UBMoE(str(tmp_path / "own")).generator(IDS).logits, stock.eval()(IDS).logits)


def test_experts_of_another_base_are_refused(base, tmp_path):
    module = UBMoETransformer.from_base(base)
    module.set_low_rank_experts(random_experts(module))
    experts = export_experts(module, tmp_path / "experts")
    other = make_base(tmp_path / "other", "llama", rope_theta=5000.0)
    weights = transformers.AutoModelForCausalLM.from_pretrained(other)
    weights.model.norm.weight.data.mul_(1.5)
    weights.save_pretrained(other)
    with pytest.raises(ValueError, match="trained on other base weights"):
        upcycle(other, experts, out=tmp_path / "out")
    upcycle(other, experts, out=tmp_path / "out", allow_base_mismatch=True)


def test_a_part_of_a_checkpoint_is_refused_since_its_pooling_would_be_lost(base, checkpoint, tmp_path):
    for part in ("generator/bi_delta.safetensors", "generator"):
        with pytest.raises(ValueError, match=rf"give the whole: {checkpoint}$"):
            upcycle(base, checkpoint / part, out=tmp_path / "out")


def test_dtype_of_the_checkpoint(base, tmp_path):
    out = upcycle(base, out=tmp_path / "out", dtype=torch.bfloat16)
    model = UBMoE(str(out))
    assert model[0].model.dtype == torch.bfloat16
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    ids = torch.arange(4, 10)[None]
    assert torch.equal(model.generator(ids).logits, reference(ids).logits)


def test_origin_and_hash_are_recorded(base, tmp_path):
    import hashlib

    config = UBMoE(str(upcycle(base, out=tmp_path / "out"))).ubmoe_config
    digest = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    assert config.base_sha256 == {"model.safetensors": digest}
    assert config.base_origin == "folder"


def test_a_folder_that_is_not_empty_is_kept(base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite"):
        upcycle(base, out=tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    upcycle(base, out=tmp_path / "out", overwrite=True)
    UBMoE(str(tmp_path / "out"))


def save_refused(tmp_path, config, cls):
    torch.manual_seed(0)
    folder = tmp_path / "refused"
    cls.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_bases_that_cannot_be_split_say_why(tmp_path):
    small = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    cases = [
        (transformers.BertConfig(**small), transformers.AutoModelForMaskedLM, "not a decoder language model"),
        (
            transformers.MixtralConfig(**SIZES, num_local_experts=2),
            transformers.AutoModelForCausalLM,
            "mixture of experts",
        ),
        (
            transformers.T5Config(vocab_size=48, d_model=32, d_ff=48, num_layers=2, num_heads=2, d_kv=8),
            transformers.AutoModelForSeq2SeqLM,
            "encoder-decoder",
        ),
        (
            transformers.GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=2),
            transformers.AutoModelForCausalLM,
            "cannot be split",
        ),
    ]
    for index, (config, cls, message) in enumerate(cases):
        folder = save_refused(tmp_path / str(index), config, cls)
        with pytest.raises(ValueError, match=message):
            upcycle(folder, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_vision_model_is_refused(tmp_path, base):
    import json

    folder = make_base(tmp_path / "vision")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="reads images or sound"):
        upcycle(folder, out=tmp_path / "out")


def test_a_config_that_transformers_does_not_take_is_named(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"hidden_size": "32"}, "'hidden_size' expected int"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"few bits \(gptq\)"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            upcycle(folder, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_that_are_none_are_refused(base, tmp_path):
    for wrong, message in (
        ({"max_seq_length": 3.5}, "max_seq_length must be a whole number"),
        ({"max_seq_length": True}, "max_seq_length must be a whole number"),
        ({"prompts": {"query": 3}}, "prompts must be texts by name"),
        ({"dtype": "floof"}, "dtype must be the name of a torch type"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            upcycle(base, out=tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_experts_in_low_memory_are_not_exchanged(checkpoint):
    module = UBMoE(str(checkpoint), low_memory=True)[0]
    with pytest.raises(ValueError, match="without low_memory"):
        module.set_low_rank_experts({})
    with pytest.raises(ValueError, match="without low_memory"):
        module.set_dense_experts({})


def test_a_checkpoint_is_no_base(base, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="is a UBMoE checkpoint, and a base model is expected: give 'base'"):
        upcycle(checkpoint, out=tmp_path / "out")
    again = UBMoE(str(upcycle(base, checkpoint, out=tmp_path / "again")))
    assert np.array_equal(again.encode(TEXTS), UBMoE(str(checkpoint)).encode(TEXTS))


def test_bases_that_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.bin").write_bytes(b"x")
    for base, message in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "empty", "no config.json"),
        (tmp_path / "file.bin", "is a file"),
        ("model.gguf", "does not exist"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            resolve_base(base)
