"""Released models: what a tiny checkpoint says of itself, counted again from its tensors."""

import pytest
from helpers.models import random_experts
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks import models
from benchmarks.results import read_json
from ubmoe_st import UBMoETransformer, upcycle
from ubmoe_st.checkpoint import DELTA_FILE
from ubmoe_st.upcycling import export_experts


def test_a_row_is_what_the_checkpoint_says(checkpoint, base, tmp_path):
    content = read_json(models.run(checkpoint, tmp_path))
    facts = content["facts"]
    stock = AutoModelForCausalLM.from_pretrained(base)
    assert facts["base_millions"] * 1e6 == sum(p.numel() for p in stock.parameters())
    added = sum(tensor.numel() for tensor in load_file(checkpoint / DELTA_FILE).values())
    assert facts["added_millions"] * 1e6 == pytest.approx(added)
    assert added > 0
    assert facts["dimension"] == stock.config.hidden_size
    assert content["row"] == content["label"] == checkpoint.name


def test_the_word_for_training_is_that_of_the_experts(base, tmp_path):
    """An adapter folder that names its teacher gives a checkpoint, and a row, that name it."""
    module = UBMoETransformer.from_base(base)
    module.set_low_rank_experts(random_experts(module))
    export_experts(module, tmp_path / "experts", recipe={"training": "distilled from a teacher"})
    upcycle(str(base), str(tmp_path / "experts"), out=str(tmp_path / "model"))
    assert models.describe(tmp_path / "model")["training"] == "distilled from a teacher"


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a UBMoE checkpoint"):
        models.describe(tmp_path)
