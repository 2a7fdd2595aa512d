"""Exports as folders open in stock transformers and sentence-transformers, and agree with the checkpoint."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.engines import in_process, tree
from helpers.models import TEXTS
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModelForCausalLM, AutoTokenizer

from ubmoe_st import UBMoE, upcycle
from ubmoe_st.checkpoint import facts
from ubmoe_st.export import export
from ubmoe_st.export.folders import _write_tokenizer

ST_SCRIPT = """
import json, sys
import torch
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
with torch.no_grad():
    a, b = (model[0].auto_model(torch.tensor([[4, 5, 6, last]])).last_hidden_state[0, 0] for last in (7, 8))
print(json.dumps({"vectors": model.encode(json.loads(sys.argv[2])).tolist(), "full": not torch.equal(a, b)}))
"""


def test_hf_encoder_in_stock_sentence_transformers(checkpoint, tmp_path):
    facts = export(checkpoint, tmp_path / "out")
    found = in_process(ST_SCRIPT, tmp_path / "out", json.dumps(TEXTS))
    expected = UBMoE(str(checkpoint)).encode(TEXTS)
    assert np.abs(np.array(found["vectors"]) - expected).max() < 1e-6
    assert found["full"]
    assert facts["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert not any(name.startswith("generator") for name in tree(tmp_path / "out"))


def test_hf_encoder_files_hold_the_keys_that_servers_read(checkpoint, tmp_path):
    """vLLM: architectures, is_causal, module types, pooling. text-embeddings-inference: its own names of the same."""
    export(checkpoint, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["LlamaModel"]
    assert config["is_causal"] is False
    assert config["use_bidirectional_attention"] is True
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert {"hidden_act", "initializer_range", "max_position_embeddings", "num_key_value_heads"} <= config.keys()
    modules = json.loads((tmp_path / "out/modules.json").read_text())
    assert [entry["type"].removeprefix("sentence_transformers.models.") for entry in modules] == [
        "Transformer",
        "Pooling",
        "Normalize",
    ]
    pooling = json.loads((tmp_path / "out/1_Pooling/config.json").read_text())
    assert pooling["word_embedding_dimension"] == 32
    assert [key for key, value in pooling.items() if value is True] == ["pooling_mode_mean_tokens", "include_prompt"]
    bert = json.loads((tmp_path / "out/sentence_bert_config.json").read_text())
    assert bert == {"max_seq_length": UBMoE(str(checkpoint)).max_seq_length, "do_lower_case": False}
    tokenizer = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_an_export_keeps_the_dimensions_that_the_checkpoint_keeps(checkpoint, tmp_path):
    UBMoE(str(checkpoint), truncate_dim=8).save(str(tmp_path / "cut"))
    export(tmp_path / "cut", tmp_path / "out")
    found = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS)
    assert np.abs(found - UBMoE(str(tmp_path / "cut")).encode(TEXTS)).max() < 1e-6
    assert found.shape == (len(TEXTS), 8)
    assert facts(tmp_path / "cut")["dimension"] == 8


@pytest.mark.parametrize("architecture", ["llama", "llama-untied", "gemma3"])
def test_hf_generator_is_the_base(architecture, checkpoint_of, base_of, tmp_path):
    export(checkpoint_of(architecture), tmp_path / "out", view="generator")
    ids = torch.tensor([[4, 5, 6, 7, 8]])
    base = AutoModelForCausalLM.from_pretrained(base_of(architecture))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(found(ids).logits, base(ids).logits)
        other = UBMoE(str(checkpoint_of(architecture))).generator_for("bi")
        assert not torch.equal(other(ids).logits, base(ids).logits)
    assert torch.equal(found.generate(ids, max_new_tokens=6), base.generate(ids, max_new_tokens=6))
    assert "ubmoe" not in json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize("modes", [("mean", "max"), ("cls", "mean"), ("lasttoken", "mean")])
def test_several_poolings_keep_their_order(modes, checkpoint, tmp_path):
    model = UBMoE(str(checkpoint))
    UBMoE(modules=[model[0], Pooling(32, modes)]).save(str(tmp_path / "several"))
    export(tmp_path / "several", tmp_path / "out")
    found = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS)
    expected = UBMoE(str(tmp_path / "several")).encode(TEXTS)
    assert found.shape == (len(TEXTS), 64)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(expected[:, :32] - expected[:, 32:]).max() > 0.1, "both halves are the same: vacuous"


def test_the_generator_reads_as_much_as_its_base(base, tmp_path):
    """The limit of a checkpoint is that of its encoder."""
    cut = upcycle(base, None, out=tmp_path / "cut", max_seq_length=8)
    export(cut, tmp_path / "out", view="generator")
    text = "the cat sits " * 9
    expected, found = (
        AutoTokenizer.from_pretrained(path)(text, truncation=True)["input_ids"] for path in (base, tmp_path / "out")
    )
    assert found == expected
    assert len(AutoTokenizer.from_pretrained(cut)(text, truncation=True)["input_ids"]) == 8 < len(found)


def test_a_graph_is_cut_at_the_side_of_its_tokenizer(checkpoint, tmp_path):
    model = UBMoE(str(checkpoint))
    for side in ("Left", "Right"):
        model.tokenizer.truncation_side = side.lower()
        (tmp_path / side).mkdir()
        _write_tokenizer(model, tmp_path / side, batches=True)
        assert json.loads((tmp_path / side / "tokenizer.json").read_text())["truncation"]["direction"] == side
