"""Labels of experts: who taught them in any phase, with counts by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers.training import make_recipe, make_teacher, make_training_data
from peft import LoraConfig

from training.averaging import average
from training.contrastive import train
from training.labels import label_of, merged, taught
from training.recipe import ContrastiveRecipe
from training.teacher import other_models
from training.teacher_settings import EmbedderTeacher, LexicalTeacher
from ubmoe_st import UBMoE, upcycle
from ubmoe_st.bases import resolve_base
from ubmoe_st.checkpoint import read_config

A = {"training": "distilled from a", "teachers": [{"name": "a", "share": 1.0, "trained_on": None}]}


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        ("self-distilled", "self-distilled", "self-distilled"),
        ("self-distilled", "unsupervised", "unsupervised"),
        ("distilled from a", "self-distilled", "distilled from a"),
        ("self-distilled", "distilled from a", "distilled from a"),
        ("distilled from a and b", "distilled from c and a", "distilled from a and b and c"),
        ("supervised", "unsupervised", "supervised"),
        ("distilled from a", "supervised", "supervised and distilled from a"),
        ("supervised and distilled from a", "distilled from b", "supervised and distilled from a and b"),
        ("self-distilled, then trained further", "self-distilled",
         "self-distilled, then trained further, then self-distilled"),
        (None, "self-distilled", "unknown, then self-distilled"),
        (None, None, None),
    ],
)  # fmt: skip
def test_two_phases_have_the_teachers_of_both(first, second, wanted):
    assert merged({"training": first}, {"training": second}).get("training") == wanted


@pytest.fixture
def recipe(base, tmp_path):
    make = make_recipe(base, make_training_data(tmp_path), tmp_path / "run")
    return lambda **changes: make(
        **{"loss": "similarity", "head": "training", "ffn_dropout": 0.0, "trainer": {"max_steps": 1}, **changes}
    )


def test_labels_follow_phases_means_and_further_training(base, checkpoint, recipe, tmp_path):
    other = EmbedderTeacher(str(checkpoint), str(tmp_path / "e"), name="a")
    own = make_teacher(tmp_path / "t")
    dense = train(recipe(teacher=other, rank=None, out=str(tmp_path / "dense")))
    assert read_config(dense.checkpoint).training == "distilled from a"
    first = train(recipe(teacher=other))
    experts = tmp_path / "run" / "experts"
    second = train(recipe(teacher=own, init_from=str(experts), out=str(tmp_path / "second")))
    assert read_config(second.checkpoint).training == "distilled from a"
    for folder in (tmp_path / "run", experts, first.checkpoint / "generator"):
        assert label_of(folder, resolve_base(base))["training"] == "distilled from a"
    (tmp_path / "run" / "begun.json").unlink()  # as runs were before it
    assert label_of(tmp_path / "run", resolve_base(base)) == A
    alone = train(recipe(teacher=own, out=str(tmp_path / "alone")))
    assert read_config(alone.checkpoint).training == "self-distilled"
    for share, wanted in ((0.0, "self-distilled"), (0.5, "distilled from a"), (1.0, "distilled from a")):
        average(tmp_path / "alone" / "experts", experts, share, tmp_path / "mean")
        assert json.loads((tmp_path / "mean" / "recipe.json").read_text())["training"] == wanted

    model = UBMoE(str(alone.checkpoint))
    model.save(str(tmp_path / "same"))
    assert read_config(tmp_path / "same").training == "self-distilled"
    model[0].model.add_adapter(LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    model[0].model.save_pretrained(tmp_path / "adapter")
    further = upcycle(base, tmp_path / "adapter", out=tmp_path / "further")
    assert read_config(further).training == "self-distilled, then trained further"
    teacher = EmbedderTeacher(str(further), str(tmp_path / "f"))
    assert other_models(recipe(teacher=teacher), resolve_base(base)) == [teacher]

    model = UBMoE(str(alone.checkpoint))
    with torch.no_grad():
        model[0].model.layers[0].mlp.up_proj.weight.add_(0.1)
    for folder in ("tuned", "tuned"):  # said once, however often it is saved
        model.save(str(tmp_path / folder))
        assert read_config(tmp_path / "tuned").training == "self-distilled, then trained further"
    assert "then trained further" in (tmp_path / "tuned" / "README.md").read_text()


def test_a_share_is_the_mean_over_the_texts(base, recipe, tmp_path):
    """40 sentences with shares 1/4 and 3/4, 10 passages with 1/2 and 1/2; a teacher that is asked nothing is none."""
    first = EmbedderTeacher("x/a", str(tmp_path / "1"))
    second = EmbedderTeacher("x/b", str(tmp_path / "2"), weights={"sentences": 3.0})
    third = EmbedderTeacher("x/c", str(tmp_path / "3"), weights={"sentences": 0.0, "passages": 0.0})
    kinds = ["sentences"] * 40 + ["passages"] * 10
    found = taught(recipe(teacher=[first, second, third]), resolve_base(base), kinds)
    assert found["training"] == "distilled from a and b"
    assert [entry["share"] for entry in found["teachers"]] == [0.3, 0.7]
    letters = LexicalTeacher(str(tmp_path / "l"))
    alone: ContrastiveRecipe = recipe(teacher=[letters, replace(third, weights={"sentences": 0.0})])
    assert taught(alone, resolve_base(base), kinds[:40]) == {"training": "self-distilled"}
