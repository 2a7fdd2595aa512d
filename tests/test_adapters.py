"""An adapter gives what PEFT's own merge gives, to the last bit, or is refused with the reason."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.models import TEXTS, make_base
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from transformers import AutoModel, AutoModelForCausalLM

from ubmoe_st import UBMoE, UBMoETransformer, upcycle
from ubmoe_st.upcycling import export_experts

FFN = ["gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(4, 12)[None]


def randomise(model):
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name and "magnitude" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def save_adapter(base, folder, on="lm", **options):
    loader = AutoModelForCausalLM if on == "lm" else AutoModel
    tuned = get_peft_model(loader.from_pretrained(base), LoraConfig(**{"r": 4, "target_modules": FFN, **options}))
    randomise(tuned)
    tuned.save_pretrained(folder)
    return folder


def merged_by_peft(base, folder, on="lm", dtype=torch.float32):
    loader = AutoModelForCausalLM if on == "lm" else AutoModel
    merged = PeftModel.from_pretrained(loader.from_pretrained(base, dtype=dtype), folder).merge_and_unload()
    return {k.removeprefix("model."): t for k, t in merged.state_dict().items() if ".mlp." in k}


def check(base, folder, out, on="lm", low_rank=True, **options):
    expected = merged_by_peft(base, folder, on, options.get("dtype", torch.float32))
    model = UBMoE(str(upcycle(base, folder, out=out, **options)), verify=True)
    found = model[0].model.state_dict()
    plain = AutoModel.from_pretrained(base, dtype=options.get("dtype", torch.float32)).state_dict()
    assert len(expected) >= 9
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert any(not torch.equal(plain[key], tensor) for key, tensor in expected.items())
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=options.get("dtype", torch.float32))
    assert torch.equal(model.generator(IDS).logits, reference(IDS).logits)
    assert (model.ubmoe_config.expert_rank is not None) == low_rank
    if low_rank and "dtype" not in options:
        assert np.abs(UBMoE(str(out), low_memory=True).encode(TEXTS) - model.encode(TEXTS)).max() < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"alpha_pattern": {r"layers\.0\.mlp\.up_proj": 32}, "rank_pattern": {r"layers\.2\.mlp\.gate_proj": 7}},
        {"alpha_pattern": {"model.layers.1.mlp.up_proj": 32}, "rank_pattern": {"model.layers.1.mlp.up_proj": 2}},
        {"target_modules": r"model\.layers\.[02]\.mlp\.(gate|down)_proj"},
        {"target_modules": ["model.layers.0.mlp.up_proj", "model.layers.2.mlp.down_proj"]},
        {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"target_modules": "all-linear", "exclude_modules": r".*self_attn.*|lm_head"},
        {"use_rslora": True, "lora_dropout": 0.1, "lora_alpha": 3},
        {"init_lora_weights": "gaussian"},
    ],
)
def test_any_selection_and_scale_is_that_of_peft(base, tmp_path, options):
    check(base, save_adapter(base, tmp_path / "adapter", **options), tmp_path / "out")


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_initialisations_that_change_the_base(base, tmp_path, start):
    """They have no low-rank form on the original FFNs: dense."""
    check(base, save_adapter(base, tmp_path / "adapter", init_lora_weights=start), tmp_path / "out", low_rank=False)


def test_an_adapter_of_an_encoder_by_full_names(base, tmp_path):
    options = {"target_modules": r"layers\.1\.mlp\.(up|down)_proj", "alpha_pattern": {"layers.1.mlp.up_proj": 20}}
    check(base, save_adapter(base, tmp_path / "adapter", "encoder", **options), tmp_path / "out", "encoder")


def test_fused_layers_biases_and_another_dtype(base_of, tmp_path):
    fused = base_of("phi3-fused")
    adapter = save_adapter(fused, tmp_path / "1", target_modules=["gate_up_proj", "down_proj"])
    expected = merged_by_peft(fused, adapter)
    found = UBMoE(str(upcycle(fused, adapter, out=tmp_path / "o1")))[0].model.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    untied = base_of("llama-untied")
    check(untied, save_adapter(untied, tmp_path / "2"), tmp_path / "o2")
    tuned = save_adapter(untied, tmp_path / "3", lora_bias=True)
    check(untied, tuned, tmp_path / "o3", low_rank=False)
    expected = merged_by_peft(untied, tmp_path / "2", dtype=torch.bfloat16)
    out = upcycle(untied, tmp_path / "2", out=tmp_path / "o4", dtype=torch.bfloat16)
    found = UBMoE(str(out))[0].model.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_what_cannot_be_taken_is_refused_in_one_line(base, tmp_path):
    adapters = {
        name: save_adapter(base, tmp_path / name) for name in ("bin", "dora", "niter", "gone", "less", "more", "five")
    }
    (adapters["bin"] / "adapter_model.safetensors").rename(adapters["bin"] / "adapter_model.bin")
    (adapters["gone"] / "adapter_model.safetensors").unlink()
    edit(adapters["dora"], use_dora=True)
    edit(adapters["niter"], init_lora_weights="pissa_niter_4")
    edit(adapters["five"], base_model_name_or_path=5)
    tensors = load_file(adapters["less"] / "adapter_model.safetensors")
    first = sorted(tensors)[0]
    save_file({k: t for k, t in tensors.items() if k != first}, adapters["less"] / "adapter_model.safetensors")
    save_file({**tensors, "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 32)},
              adapters["more"] / "adapter_model.safetensors")  # fmt: skip
    ia3 = IA3Config(target_modules=FFN, feedforward_modules=FFN)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), ia3).save_pretrained(tmp_path / "ia3")
    head = LoraConfig(r=4, target_modules=FFN, modules_to_save=["norm"])
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), head)
    with torch.no_grad():
        tuned.base_model.model.model.norm.modules_to_save["default"].weight.add_(0.1)
    tuned.save_pretrained(tmp_path / "norm")
    wide = make_base(tmp_path / "wide" / "base", intermediate_size=64)
    adapters["shape"] = save_adapter(wide, tmp_path / "shape")
    edit(adapters["shape"], base_model_name_or_path=None)
    for name, message in {
        "bin": "adapter_model.bin, a pickle",
        "gone": "adapter_model.safetensors is missing",
        "dora": "DoRA adapter, expected plain LoRA",
        "niter": "pissa_niter_4, which changes the base",
        "less": "is missing, though adapter_config.json asks for it",
        "five": "expected a name as base_model_name_or_path, got 5",
        "more": "layers.9.mlp.up_proj.lora_A.weight is no part",
        "ia3": "IA3 adapter, expected LoRA",
        "norm": "changes norm",
        "shape": "PEFT cannot merge the adapter .* size mismatch",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            upcycle(base, tmp_path / name, out=tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_named(base, tmp_path):
    other = make_base(tmp_path / "elsewhere")
    moved = shutil.copytree(base, tmp_path / "moved")
    check(base, save_adapter(moved, tmp_path / "a"), tmp_path / "o1")
    lm = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        lm.model.norm.weight.mul_(2)
    lm.save_pretrained(other)
    adapter = save_adapter(other, tmp_path / "b")
    with pytest.raises(ValueError, match=r"trained on .*elsewhere, not on base"):
        upcycle(base, adapter, out=tmp_path / "o2")
    upcycle(base, adapter, out=tmp_path / "o2", allow_base_mismatch=True)
    edit(adapter, base_model_name_or_path="org/llama")
    with pytest.warns(UserWarning, match="trained on org/llama, not on base"):
        upcycle(base, adapter, out=tmp_path / "o3")
    edit(adapter, base_model_name_or_path=str(tmp_path / "gone" / "base"))  # may have held anything
    with pytest.warns(UserWarning, match="trained on .*gone/base, not on base; the two are taken for the same"):
        upcycle(base, adapter, out=tmp_path / "o4")
    for gone in (str(tmp_path / "gone" / "checkpoint"), "models/ubmoe-135m"):  # its experts would be lost
        edit(adapter, base_model_name_or_path=gone)
        with pytest.raises(ValueError, match=rf"trained on {gone}, not on base, and nothing is there now"):
            upcycle(base, adapter, out=tmp_path / "o5")
    assert upcycle(base, adapter, out=tmp_path / "o5", allow_base_mismatch=True).is_dir()


@pytest.mark.parametrize("low_rank", [True, False])
def test_training_goes_on_from_released_experts(base, tmp_path, low_rank):
    """A LoRA adapter on a checkpoint, then `upcycle`: the vectors of the model in training, nothing of it lost."""
    start = UBMoETransformer.from_base(base)
    if low_rank:
        experts = {f"layers.{n}.mlp.up_proj": (torch.randn(2, 32) * 0.3, torch.randn(48, 2) * 0.3) for n in range(3)}
        start.set_low_rank_experts(experts)
    else:
        state = start.model.state_dict()
        start.set_dense_experts({k: t + torch.randn_like(t) * 0.05 for k, t in state.items() if ".mlp." in k})
    dense = Dense(32, 8, activation_function=torch.nn.Identity())
    modules = [start, Pooling(32, "lasttoken"), dense, Normalize()]
    released = tmp_path / "released"
    UBMoE(modules=modules, prompts={"query": "the "}, device="cpu").save(str(released))
    model = UBMoE(str(released))
    before = model.encode(TEXTS)
    model[0].model.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=FFN))
    randomise(model)
    model[0].model.save_pretrained(tmp_path / "adapter")
    model.eval()
    expected = model.encode(TEXTS)
    assert np.abs(expected - before).max() > 1e-2
    out = upcycle(base, tmp_path / "adapter", out=tmp_path / "out")
    again = UBMoE(str(out), verify=True)
    assert np.abs(again.encode(TEXTS) - expected).max() < 1e-5
    assert again.prompts["query"] == "the "
    merged = merged_by_peft(released, tmp_path / "adapter", "encoder")
    assert all(torch.equal(again[0].model.state_dict()[key], tensor) for key, tensor in merged.items())
    assert torch.equal(again.generator(IDS).logits, AutoModelForCausalLM.from_pretrained(base)(IDS).logits)
    if not low_rank:
        with pytest.raises(ValueError, match="dense experts"):
            export_experts(model[0], tmp_path / "experts")
        return
    assert again.ubmoe_config.expert_rank == 5
    assert np.abs(UBMoE(str(out), low_memory=True).encode(TEXTS) - expected).max() < 1e-5
    export_experts(model[0], tmp_path / "experts", dtype=torch.float32)
    by_experts = UBMoE(str(upcycle(base, tmp_path / "experts", out=tmp_path / "o2", modules=list(again)[1:])))
    assert np.abs(by_experts.encode(TEXTS) - expected).max() < 1e-5


def test_a_checkpoint_as_experts_keeps_what_is_behind_the_encoder(base, tmp_path):
    start = UBMoETransformer.from_base(base)
    start.set_dense_experts({k: t * 1.1 for k, t in start.model.state_dict().items() if ".mlp." in k})
    settings = {"prompts": {"query": "the "}, "truncate_dim": 8, "similarity_fn_name": "dot"}
    model = UBMoE(modules=[start, Pooling(32, "lasttoken"), Normalize()], device="cpu", **settings)
    model.save(str(tmp_path / "one"))
    two = UBMoE(str(upcycle(base, tmp_path / "one", out=tmp_path / "two")))
    assert np.array_equal(two.encode_query(TEXTS), model.encode_query(TEXTS))
    assert two.encode_query(TEXTS).shape == (len(TEXTS), 8)
    assert two.similarity_fn_name == "dot"


def test_the_stock_trainer_goes_on_with_an_adapter_and_finds_its_best(checkpoint, tmp_path):
    """Adapter and trained modules behind the encoder come from its checkpoint, all else from what it was trained on."""

    def trained(out, steps, resume=None, **options):
        torch.manual_seed(0)
        model = UBMoE(str(checkpoint), device="cpu")
        model = UBMoE(modules=[model[0], Pooling(32, "mean"), Dense(32, 8)])
        model.add_adapter(LoraConfig(r=4, target_modules=FFN))
        before = model.encode(TEXTS)
        args = SentenceTransformerTrainingArguments(
            str(tmp_path / out), max_steps=steps, per_device_train_batch_size=2, save_strategy="steps", save_steps=1,
            learning_rate=2e-2, lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True, **options,
        )  # fmt: skip
        data = Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]})
        trainer = SentenceTransformerTrainer(
            model, args, train_dataset=data, eval_dataset=data, loss=MultipleNegativesRankingLoss(model)
        )
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / resume))
        return trainer, before, model.encode(TEXTS)

    _, before, whole = trained("whole", 4)
    _, _, half = trained("half", 2)
    _, _, resumed = trained("resumed", 4, "half/checkpoint-2")
    np.testing.assert_allclose(resumed, whole, atol=1e-5)
    assert min(np.abs(half - before).max(), np.abs(whole - half).max()) > 1e-2, "nothing was trained: vacuous"
    # The loss is worst where it was least: the first checkpoint is the best one.
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "greater_is_better": True}
    trainer, _, found = trained("best", 3, metric_for_best_model="eval_loss", **best)
    number = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    _, _, expected = trained("until", number)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert number < 3, "the best are the last ones: vacuous"
