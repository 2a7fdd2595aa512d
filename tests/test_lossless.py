"""The comparison with the base finds what differs, whatever it is, and nothing where nothing does."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.models import ARCHITECTURES, TEXTS, make_base
from safetensors.torch import load_file
from tokenizers import processors
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ubmoe_st import UBMoE
from ubmoe_st import checkpoint as layout
from ubmoe_st.cards import model_card
from ubmoe_st.cli import app
from ubmoe_st.experts import TokenRouter
from ubmoe_st.lossless import compare


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_a_checkpoint_equals_its_base(base_of, checkpoint_of, architecture):
    report = UBMoE(str(checkpoint_of(architecture))).check_lossless(base_of(architecture))
    assert report.ok, report.checks
    assert report.same_files is True
    assert len(report.checks) == 14


def spoil(folder, name, change):
    file = folder / name
    tensors = load_file(file)
    change(tensors)
    layout.save_tensors(tensors, file)


def scale(key, factor):
    return lambda tensors: tensors.update({key: tensors[key] * factor})


@pytest.mark.parametrize(
    ("architecture", "file", "key", "expected"),
    [
        ("llama", layout.UNI_FILE, "layers.1.mlp.up_proj.weight", "weights"),
        ("llama", layout.SHARED_FILE, "layers.0.self_attn.q_proj.weight", "logits of one row"),
        ("llama-untied", layout.UNI_FILE, "lm_head.weight", "lm_head"),
    ],
)
def test_a_changed_tensor_is_named(base_of, checkpoint_of, tmp_path, architecture, file, key, expected):
    folder = shutil.copytree(checkpoint_of(architecture), tmp_path / "m")
    spoil(folder, file, scale(key, 1.01))
    report = UBMoE(str(folder)).check_lossless(base_of(architecture))
    assert not report.ok
    assert report.checks[expected]
    assert key in report.checks["weights"]
    assert report.checks["encoder sees later tokens"] is None


def test_what_no_weight_says_is_found_by_what_is_computed(base, checkpoint):
    """Attention, activation, another norm: the weights are equal, the outputs not."""
    reference = AutoModelForCausalLM.from_pretrained(base).eval()
    generator = UBMoE(str(checkpoint)).generator
    generator.model.layers[0].mlp.act_fn = nn.GELU()
    checks = compare(generator, reference)
    assert checks["weights"] is None
    assert checks["lm_head"] is None
    assert all(checks[name] for name in checks if name.startswith("logits"))
    generator = UBMoE(str(checkpoint)).generator
    generator.config.is_causal = False
    assert compare(generator, reference)["generator is causal"] == "a token sees a later one"
    model = UBMoE(str(checkpoint))
    model[0].model.config.is_causal = True
    report = model.check_lossless(base)
    assert report.checks.pop("encoder sees later tokens") == "the token at position 0 does not see that at position 4"
    assert not any(report.checks.values())


def test_another_architecture_and_a_base_that_nobody_names(base_of, checkpoint, tmp_path):
    report = UBMoE(str(checkpoint)).check_lossless(base_of("qwen3"))
    assert "LlamaForCausalLM" in report.checks["architecture"]
    assert report.same_files is False
    with pytest.raises(ValueError, match=r"the base base is not found here; say where it is with base="):
        UBMoE(str(checkpoint)).check_lossless()
    model = UBMoE(str(checkpoint))
    model.ubmoe_config.base_model = ""
    with pytest.raises(ValueError, match="names no base"):
        model.check_lossless()


def test_the_command_exits_with_1_where_something_differs(base, checkpoint, tmp_path, monkeypatch):
    def run(*args):
        return CliRunner().invoke(app, ["verify", *map(str, args)])

    result = run(checkpoint, "--lossless", "--base", base)
    assert result.exit_code == 0, result.output
    assert "DIFFERS" not in result.stdout
    folder = shutil.copytree(checkpoint, tmp_path / "m")
    spoil(folder, layout.UNI_FILE, scale("layers.0.mlp.up_proj.weight", 1 + 1e-6))
    result = run(folder, "--lossless", "--base", base)
    assert result.exit_code == 1
    assert "DIFFERS" in result.stdout
    result = run(folder, "--lossless", "--base", base, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["ok"] is False
    assert "layers.0.mlp.up_proj.weight" in report["checks"]["weights"]
    monkeypatch.chdir(tmp_path)
    make_base(tmp_path / "base")  # where the recorded name leads to
    assert run(checkpoint, "--lossless").exit_code == 0
    missing = run(checkpoint, "--base", base)
    assert missing.exit_code == 1
    assert "--lossless" in missing.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_another_dtype(base, checkpoint, dtype):
    assert UBMoE(str(checkpoint), model_kwargs={"dtype": dtype}).check_lossless(base).ok


def differing(model, base):
    report = model.check_lossless(base)
    assert report.ok == (not any(report.checks.values()))
    return {name for name, difference in report.checks.items() if difference}


def test_a_tokenizer_that_is_not_that_of_the_base_differs(base, checkpoint, tmp_path):
    model = UBMoE(str(checkpoint))
    assert not differing(model, base)
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    model.save(str(tmp_path / "m"))
    changed = UBMoE(str(tmp_path / "m"))
    assert changed.generate(TEXTS[0]) != UBMoE(str(checkpoint)).generate(TEXTS[0])
    assert differing(changed, base) == {"tokens of texts"}
    model = UBMoE(str(checkpoint))
    model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert differing(model, base) == {"chat template"}
    bare = shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    assert differing(UBMoE(str(checkpoint)), bare) == {"tokens of texts"}


def test_a_checkpoint_that_generates_by_its_router_is_not_said_to_be_its_base(base, checkpoint, tmp_path):
    model = UBMoE(str(checkpoint))
    state = {
        f"layers.{layer}.router.{name}": tensor
        for layer in range(3)
        for name, tensor in TokenRouter(32, "soft").state_dict().items()
    }
    model[0].set_routers(state, "soft")
    model.save(str(tmp_path / "uni"))
    model.ubmoe_config.routing = "router"
    model.save(str(tmp_path / "router"))
    assert not differing(UBMoE(str(tmp_path / "uni")), base)
    assert differing(UBMoE(str(tmp_path / "router")), base) == {"default routing"}
    like = [model_card(UBMoE(str(tmp_path / kind)).ubmoe_config, "m") for kind in ("uni", "router")]
    assert "generates exactly like its base" in like[0]
    assert 'generates by `router` routing, and with `routing="uni"` exactly like its base' in like[1]
