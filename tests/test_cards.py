"""Cards say how to load what lies beside them, and their code runs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

from ubmoe_st import UBMoE, UBMoEConfig
from ubmoe_st.cards import (
    card_on_the_hub,
    card_with_datasets,
    check_front_matter,
    export_card,
    model_card,
    renamed_card,
)
from ubmoe_st.export import export

CONFIG = UBMoEConfig(base_model="owner/base", base_architecture="LlamaForCausalLM", base_origin="hub", expert_rank=4)


def code(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def front(card: str) -> dict:
    return ModelCard(card).data.to_dict()


def test_the_card_of_a_checkpoint(checkpoint, tmp_path):
    """Each of its three ways to load opens the folder that the card lies in."""
    card = (checkpoint / "README.md").read_text()
    assert card == model_card(UBMoE(str(checkpoint)).ubmoe_config, "ubmoe-tiny")
    assert len(code(card)) == 3
    (tmp_path / "ubmoe-tiny").symlink_to(checkpoint)
    script = "\n".join(code(card))
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


def test_front_matter_names_a_base_only_where_it_is_one_of_the_hub():
    card = model_card(CONFIG, "mine")
    assert front(card)["base_model"] == "owner/base"
    assert "low-rank, rank 4" in card
    for config in (None, UBMoEConfig("base", "LlamaForCausalLM", "folder")):
        assert "base_model" not in front(model_card(config, "mine"))
        assert "base_model" not in front(export_card(config, {}, "encoder", "hf", None))


@pytest.mark.parametrize("view", ["encoder", "generator"])
def test_the_card_of_an_export_names_prompts_where_there_are_some(view):
    prompts = {"query": "find: ", "document": ""}
    card = export_card(CONFIG, prompts, view, "onnx", "int8")
    assert front(card)["pipeline_tag"] == ("sentence-similarity" if view == "encoder" else "text-generation")
    assert "exported as onnx, int8." in card
    assert ("query: 'find: '" in card) == (view == "encoder")
    assert "Prompts" not in export_card(CONFIG, {"document": ""}, view, "onnx", None)


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_the_card_of_a_graph_asks_for_what_the_graph_has(format):
    assert '"sentence_embedding"' in export_card(CONFIG, {}, "encoder", format, None)
    card = export_card(CONFIG, {"query": "find: "}, "encoder", format, None, "last_hidden_state")
    assert '"last_hidden_state"' in card
    assert "sentence_embedding" not in card
    assert "yours to pool" in card


def test_a_card_on_the_hub_names_the_repository():
    card = model_card(CONFIG, "models/mine")
    published = card_on_the_hub(f'{card}"mine-2"', "mine", "org/mine")
    assert '"models/mine"' in card
    assert published.count('"org/mine"') == 3
    assert '("org/mine", subfolder="generator")' in published
    assert '"mine-2"' in published


def test_a_card_on_the_hub_leaves_the_ids_of_others():
    places = ['"{0}"', '"models/{0}"', '"./{0}"', '"a/b/{0}"', '"me/mine"', '"{0}/generator"']
    others = '"google/gemma-3-270m" "google/gemma-3-270m/generator" "gemma-3-270m-it"'
    for place in places:
        published = card_on_the_hub(f"{place.format('gemma-3-270m')} {others}", "gemma-3-270m", "me/mine")
        mine = '"me/mine", subfolder="generator"' if "generator" in place else '"me/mine"'
        assert published == f"{mine} {others}"


def test_a_kept_card_takes_another_name_and_datasets(tmp_path):
    card = model_card(CONFIG, "old") + '\n"old-2" "older" "owner/base"\n'
    renamed = renamed_card(card, "owner/mine")
    assert renamed == model_card(CONFIG, "owner/mine") + '\n"old-2" "older" "owner/base"\n'
    assert renamed_card("no code", "owner/mine") == "no code"
    assert "datasets" not in front(card)
    again = card_with_datasets(card_with_datasets(card, ["a/x"]), ["a/x", "a/y"])
    assert front(again) == {**front(card), "datasets": ["a/x", "a/y"]}
    assert again.endswith(card.rpartition("---\n")[2])


def test_front_matter_that_the_hub_would_refuse(tmp_path):
    check_front_matter("---\nlicense: mit\n---\ntext", tmp_path / "card.md")
    with pytest.raises(ValueError, match=r"front matter of .*card\.md is not valid"):
        check_front_matter("---\ntags: [\n---\ntext", tmp_path / "card.md")


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs the extra onnx")
def test_readme_of_an_export_runs(checkpoint, tmp_path):
    for view, format in (("encoder", "hf"), ("encoder", "onnx"), ("generator", "hf")):
        folder = tmp_path / f"{view}-{format}"
        export(checkpoint, folder, view=view, format=format)
        script = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
        run = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-2000:]
        assert run.stdout.strip()
