"""`--choose`: the table against stock forward passes, what is written, layers as shares of the depth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("peft")

from helpers.training import make_recipe, make_teacher, make_training_data
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

from training import choosing, teacher
from training.data import sts_pairs
from ubmoe_st.bases import resolve_base

RECIPE = """# A comment.
base: {base}
out: {out}
sentences: {{files: {{x: 1.0}}}}
loss: distillation
head: training
teacher:
  folder: {out}/t
  prefix: "the cat sits on the "   # another
  suffix: ' in the'
  layers: [1, 2]
  dimension: 8
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_training_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def recipe(base, data, tmp_path, monkeypatch):
    monkeypatch.setenv("UBMOE_DATA", str(data))
    return make_recipe(base, data, tmp_path / "run")(
        loss="distillation", head="training", teacher=make_teacher(tmp_path)
    )


def by_hand(base, choice, pairs):
    """Reference: one stock forward pass for each text, the formula of the targets in numpy."""
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    texts = list(dict.fromkeys([*pairs[0], *pairs[1]]))
    states = []
    for text in texts:
        ids = tokenizer(choice.teacher.prefix + text + choice.teacher.suffix, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            found = lm(ids, output_hidden_states=True).hidden_states
        states.append(np.stack([found[layer][0, -1].numpy() for layer in choice.layers]))
    x = np.stack(states).astype(np.float64)
    x = x - x.mean(0)
    x = (x / np.linalg.norm(x, axis=-1, keepdims=True)).reshape(len(texts), -1)
    x = x - x.mean(0)
    _, s, v = np.linalg.svd(x, full_matrices=False)
    y = x @ v[:16].T * (s[:16] / s[0]) ** -0.25
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    rows = {text: row for row, text in enumerate(texts)}
    cosines = [y[rows[a]] @ y[rows[b]] for a, b in zip(pairs[0], pairs[1], strict=True)]
    return 100 * spearmanr(cosines, pairs[2]).statistic


def test_the_scores_are_those_of_stock_forward_passes_and_the_best_comes_first(recipe, base, data):
    said: list[str] = []
    found = choosing.choose(recipe, resolve_base(base), tried=3, say=said.append)
    pairs = sts_pairs("STSB-dev", data)
    assert len(found) == 3 * (1 + len(choosing.PROMPTS)) == 3 * len(said)
    assert [choice.mean for choice in found] == sorted((choice.mean for choice in found), reverse=True)
    assert found[0].mean > found[-1].mean + 1
    for choice in (found[0], found[-1]):
        assert choice.scores["STSB-dev"] == pytest.approx(by_hand(base, choice, pairs), abs=0.5)
    assert {choice.prompt for choice in found} == {"recipe", *choosing.PROMPTS}
    assert {layer for choice in found for layer in choice.layers} <= {1, 2, 3}


def test_combinations_are_single_layers_and_equal_steps():
    found = choosing.combinations(range(4, 9))
    assert found[:5] == [(4,), (5,), (6,), (7,), (8,)]
    assert set(found[5:]) == {(4, 5, 6), (5, 6, 7), (6, 7, 8), (4, 6, 8)}


def test_only_write_changes_the_recipe_and_only_prompt_and_layers(base, data, tmp_path, monkeypatch):
    monkeypatch.setenv("UBMOE_DATA", str(data))
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE.format(base=base, out=tmp_path / "out"))
    before = file.read_bytes()
    teacher.main(["--choose", str(file), "--pairs", "12"])
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]
    teacher.main(["--choose", str(file), "--pairs", "12", "--write"])
    old, new = yaml.safe_load(before), yaml.safe_load(file.read_text())
    changed = {key for key in old["teacher"] if old["teacher"][key] != new["teacher"][key]}
    assert "layers" in changed <= {"prefix", "suffix", "layers"}
    assert all(isinstance(layer, float) and 0 < layer <= 1 for layer in new["teacher"]["layers"])
    assert {**old, "teacher": None} == {**new, "teacher": None}
    assert file.read_text().startswith("# A comment.\n")
    file.write_text(before.decode().replace("  layers: [1, 2]\n", "  layers:\n    - 1\n"))
    listed = file.read_bytes()
    with pytest.raises(SystemExit):
        teacher.main(["--choose", str(file), "--pairs", "12", "--write"])
    assert file.read_bytes() == listed


def test_a_recipe_that_is_not_written_stays_and_nothing_beside_it_is_touched(tmp_path, monkeypatch):
    file, other = tmp_path / "r.yaml", tmp_path / "r.tmp"
    file.write_text("teacher:\n  prefix: a\n  suffix: b\n  layers: [1]\n")
    other.write_text("mine")
    choice = choosing.Choice("x", make_teacher(tmp_path / "t"), (1,), {"STSB-dev": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            choosing.write(choice, file)
    assert "prefix: a\n" in file.read_text()
    choosing.write(choice, file)
    assert "prefix: a\n" not in file.read_text()
    assert other.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.tmp", "r.yaml"]


def test_layers_may_be_shares_of_the_depth(base, tmp_path):
    assert teacher.layer_numbers([0.8, 26, 1.0, 0], 30) == [24, 26, 30, 0]
    for wrong in ([], [31], [-1], [1.1]):
        with pytest.raises(ValueError, match="shares of the depth"):
            teacher.layer_numbers(wrong, 30)
    texts = ["the cat sits", "a dog runs in the house"]
    numbers, shares = make_teacher(tmp_path / "numbers"), make_teacher(tmp_path / "shares")
    numbers.layers, shares.layers = [1, 2], [0.333, 0.667]
    expected = teacher.teacher_vectors(base, numbers, texts)
    assert np.array_equal(teacher.teacher_vectors(base, shares, texts), expected)
    assert np.abs(expected[:, 0] - expected[:, 1]).max() > 0.1


def test_a_recipe_without_a_prompted_teacher_is_refused(recipe, base):
    recipe.loss = "MultipleNegativesRankingLoss"
    with pytest.raises(ValueError, match="kind prompted-base"):
        choosing.choose(recipe, resolve_base(base))


@pytest.mark.parametrize(
    "teacher",
    [
        "  prefix: a\n  suffix: b\n  layers: [0.5,\n    0.7]\n",
        "  prefix: a\n    and more\n  suffix: b\n  layers: [1]\n",
        '  prefix: "a\n    and more"\n  suffix: b\n  layers: [1]\n',
        "  prefix: >2\n     a\n  suffix: b\n  layers: [1]\n",
        "  prefix: |+\n    a\n  suffix: b\n  layers: [1]\n",
    ],
)
def test_values_over_several_lines_are_not_half_replaced(teacher, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(f"teacher:\n{teacher}other: 1\n")
    before = file.read_text()
    assert yaml.safe_load(before)["other"] == 1
    choice = choosing.Choice("x", make_teacher(tmp_path / "t"), (1,), {"STSB-dev": 1.0})
    with pytest.raises(ValueError, match="nothing was written"):
        choosing.write(choice, file)
    assert file.read_text() == before


def test_a_comment_behind_a_value_stays_and_a_number_sign_in_a_text_is_none(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text('teacher:\n  prefix: a # why\n  suffix: "b # c"\n  layers: [1]  # these\n')
    choice = choosing.Choice("x", make_teacher(tmp_path / "t"), (1,), {"STSB-dev": 1.0})
    choosing.write(choice, file)
    lines = file.read_text().splitlines()
    assert (lines[1].endswith(" # why"), lines[2].endswith('"'), lines[3].endswith("  # these")) == (True, True, True)
    found = yaml.safe_load(file.read_text())["teacher"]
    assert (found["prefix"], found["suffix"]) == (choice.teacher.prefix, choice.teacher.suffix)
