"""Over a quantised base, generation is that of the equally quantised base, and the experts go on working."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.models import TEXTS
from transformers import AutoModelForCausalLM

from ubmoe_st import EmbeddingIndex, UBMoE
from ubmoe_st.index.embedder import weights_fingerprint

quantization = pytest.importorskip("torchao.quantization", reason="needs the extra quantize")
IDS = torch.arange(4, 14)[None]


def in_four_bits():
    """The packing that torchao computes with on a CPU; groups of 32, as wide as the tiny models' layers can be cut."""
    workflow = pytest.importorskip("torchao.prototype.quantization.int4.inference_workflow")
    return workflow.PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)


def in_eight_bits():
    """The default."""


@pytest.mark.parametrize("architecture", ["llama", "llama-untied", "phi3-fused", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("config", "most"), [(in_eight_bits, 0.1), (in_four_bits, 0.5)])
def test_generation_is_that_of_the_equally_quantised_base(base_of, checkpoint_of, architecture, dtype, config, most):
    reference = AutoModelForCausalLM.from_pretrained(base_of(architecture), dtype=dtype).eval()
    plain = reference(IDS).logits
    # The head stays as it is: with tied embeddings it is the embedding.
    quantization.quantize_(reference.get_decoder(), config() or quantization.Int8WeightOnlyConfig())
    model = UBMoE(str(checkpoint_of(architecture)), low_memory=True, model_kwargs={"dtype": dtype})
    model.generator  # noqa: B018 - a generator that was built before must not be used any more
    vectors, report = model.encode(TEXTS), model.memory_report()
    model.quantize_base(config())
    with torch.inference_mode():
        expected = reference(IDS).logits
        assert torch.equal(model.generator(IDS).logits, expected)
    assert not torch.equal(expected, plain), "nothing was quantised"
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generator.generate(IDS, **options), reference.generate(IDS, **options))
    moved = np.abs(model.encode(TEXTS) - vectors).max()
    assert 0 < moved < most
    quantised = model.memory_report()
    real = sum(
        part.nbytes
        for parameter in reference.parameters()
        for part in (
            [getattr(parameter, name) for name in parameter.__tensor_flatten__()[0]]
            if hasattr(parameter, "__tensor_flatten__")
            else [parameter]
        )
    )
    assert quantised["base"] == real
    assert quantised["bi"] == report["bi"]
    assert quantised["uni"] < report["uni"]


def test_an_index_is_built_with_a_quantised_base(checkpoint, tmp_path):
    model = UBMoE(str(checkpoint), low_memory=True)
    model.quantize_base()
    rows = [{"id": str(number), "text": text} for number, text in enumerate(TEXTS)]
    index = EmbeddingIndex.build(model, rows, tmp_path / "index")
    assert index.search(TEXTS[1], 1)[1] == [["1"]]
    before = weights_fingerprint(model)
    assert before == weights_fingerprint(model)
    layer = next(m for m in model.modules() if hasattr(getattr(m, "weight", None), "__tensor_flatten__"))
    part = getattr(layer.weight, layer.weight.__tensor_flatten__()[0][0])
    part.view(-1)[0] += 1
    assert weights_fingerprint(model) != before
    layer.weight = torch.nn.Parameter(-layer.weight.dequantize(), requires_grad=False)
    with pytest.raises(ValueError, match="not the model"):
        index.search(TEXTS[1], 1)


def test_merged_experts_and_saving_are_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="low_memory=True"):
        UBMoE(str(checkpoint)).quantize_base()
    model = UBMoE(str(checkpoint), low_memory=True)
    model.quantize_base()
    with pytest.raises(ValueError, match="save before quantising"):
        model.save(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
