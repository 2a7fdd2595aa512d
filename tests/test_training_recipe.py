"""Recipes: what is refused and in which words, `--set`, the shipped ones."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("peft")

from helpers.training import make_recipe, make_training_data

from training import contrastive
from training.command import check_same_recipe, read_recipe
from training.recipe import ContrastiveRecipe, Mixture, RouterRecipe

RECIPES = Path(__file__).parent.parent / "training" / "recipes"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_training_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def recipe(base, data, tmp_path, monkeypatch):
    monkeypatch.setenv("UBMOE_DATA", str(data))
    return make_recipe(base, data, tmp_path / "run")


def test_a_recipe_without_noise_is_refused(recipe):
    with pytest.raises(ValueError, match="nothing to learn"):
        recipe(ffn_dropout=0.0)


def test_another_recipe_is_refused_where_something_was_trained(recipe, tmp_path):
    check_same_recipe(recipe(rank=4), tmp_path)
    check_same_recipe(recipe(), tmp_path)  # the first one trained nothing
    (tmp_path / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    check_same_recipe(recipe(trainer={"max_steps": 9}), tmp_path)
    with pytest.raises(ValueError, match="another 'rank'"):
        check_same_recipe(recipe(rank=4), tmp_path)
    with pytest.raises(ValueError, match=r"another 'trainer\.seed'"):
        check_same_recipe(recipe(trainer={"seed": 9}), tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: here\nout: there\npooling: meen\n", "pooling must be one of"),
        ("base: here\nout: there\nhead: outputt\n", "head must be one of training, output"),
        ("- base\n", "expected `key: value` lines"),
        ("base: [\n", "error: "),
        (None, "No such file"),
    ],
)
def test_a_bad_recipe_is_one_line(tmp_path, capsys, text, said):
    file = tmp_path / "recipe.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as ended:
        contrastive.main([str(file)])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_recipes_are_valid(file):

    if "checkpoint" in file.read_text():
        assert read_recipe(RouterRecipe, file).kind == "soft"
        return
    found = read_recipe(ContrastiveRecipe, file, ["trainer.max_steps=7", "train=ffn"])
    assert found.trainer["max_steps"] == 7
    assert found.sentences is None or isinstance(found.sentences, Mixture)


def test_wrong_recipes_are_refused(tmp_path, recipe):
    (tmp_path / "r.yaml").write_text("base: b\nout: o\nsentences: {files: {}}\nffn_dropout: 0.1\n")
    assert read_recipe(ContrastiveRecipe, tmp_path / "r.yaml").rank == 16
    changed = read_recipe(ContrastiveRecipe, tmp_path / "r.yaml", ["trainer.learning_rate=1e-3"])
    assert changed.trainer["learning_rate"] == 0.001
    with pytest.raises(ValueError, match="unknown key 'learning_rat'"):
        read_recipe(ContrastiveRecipe, tmp_path / "r.yaml", ["learning_rat=3"])
    with pytest.raises(ValueError, match="sentences: unknown key 'coun'"):
        read_recipe(ContrastiveRecipe, tmp_path / "r.yaml", ["sentences.coun=3"])
    with pytest.raises(ValueError, match="key=value"):
        read_recipe(ContrastiveRecipe, tmp_path / "r.yaml", ["rank"])
    with pytest.raises(ValueError, match="train must be one of"):
        recipe(train="mlp")
    with pytest.raises(ValueError, match="teacher"):
        recipe(loss="distillation")
