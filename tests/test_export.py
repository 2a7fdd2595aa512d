"""Exports of any format: what is refused, what is replaced, and what is never touched."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
from helpers.engines import tree
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from ubmoe_st.cli import app
from ubmoe_st.export import core, export


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["export", *(str(argument) for argument in arguments)])
    assert result.exit_code == 1, result.output
    # In this process progress bars may have been chosen long ago; the error is what comes after them.
    error = result.stderr[result.stderr.index("error:") :]
    assert len(error.strip().splitlines()) == 1, result.stderr
    return error


def test_command_line(checkpoint, tmp_path):
    arguments = ["export", str(checkpoint), str(tmp_path / "out"), "--view", "generator"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["view"], facts["format"], facts["kept_fp32"]) == ("generator", "hf", [])
    assert "exists" in refused(*arguments[1:])
    assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0
    assert CliRunner().invoke(app, [*arguments, "--format", "coreml"]).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere/at/all", "out"), "no local folder"),
        (("{model}", "out", "--quantize", "int8"), "format hf cannot be written as int8"),
        (("{model}", "out", "--format", "gguf"), "a name that ends in .gguf"),
        (("{model}", "out.gguf", "--format", "gguf"), "byte-level BPE"),
        (("{gemma}", "out.gguf", "--format", "gguf"), "convert_hf_to_gguf.py"),
        (("{model}", "{model}", "--overwrite"), "is a checkpoint"),
        (("{model}", "out", "--format", "openvino", "--view", "generator", "--quantize", "int8"), "--format gguf"),
        (("{model}", "out", "--format", "onnx", "--quantize", "int8", "--calibration", "no.txt"), "does not exist"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(arguments, message, checkpoint_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {"model": checkpoint_of("llama"), "gemma": checkpoint_of("gemma2")}
    assert message in refused(*(argument.format(**folders) for argument in arguments))
    assert list(tmp_path.iterdir()) == []
    assert (folders["model"] / "SHA256SUMS").is_file()


@pytest.mark.parametrize(("format", "name"), [("onnx", "onnxscript"), ("openvino", "openvino"), ("gguf", "gguf")])
def test_a_missing_library_names_the_extra(format, name, checkpoint, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda x, *rest: None if x == name else find(x, *rest))
    with pytest.raises(ImportError, match=rf"{name}.*pip install 'ubmoe-st\[{format}\]'"):
        export(checkpoint, tmp_path / "out.gguf", format=format)


def test_an_interrupted_export_leaves_the_old_one(checkpoint, tmp_path, monkeypatch):
    export(checkpoint, tmp_path / "out")
    before = {name: (tmp_path / "out" / name).read_bytes() for name in tree(tmp_path / "out")}

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(core, "write_safetensors", fail)
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, tmp_path / "out", view="generator", overwrite=True)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in tree(tmp_path / "out")} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_overwriting_leaves_no_part_of_another_export(checkpoint, tmp_path):
    export(checkpoint, tmp_path / "out")
    export(checkpoint, tmp_path / "out", view="generator", overwrite=True)
    export(checkpoint, tmp_path / "fresh", view="generator")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_overwriting_leaves_what_others_put_there(checkpoint, tmp_path):
    export(checkpoint, tmp_path / "out")
    kept = {"notes.md": "mine", "generator/plan.txt": "mine, too", "1_Pooling.txt": "no part"}
    for name, text in kept.items():
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    export(checkpoint, tmp_path / "out", view="generator", overwrite=True)
    assert {name: (tmp_path / "out" / name).read_text() for name in kept} == kept
    assert "1_Pooling/config.json" not in tree(tmp_path / "out")


@pytest.mark.parametrize("options", [{"calibration": ["a"]}, {"peak_limit": 2.0}])
@pytest.mark.parametrize("kind", [{}, {"format": "onnx"}, {"format": "gguf", "quantize": "int8"}])
def test_what_only_int8_graphs_measure_is_refused_elsewhere(checkpoint, tmp_path, options, kind):
    with pytest.raises(ValueError, match=rf"^{next(iter(options))} is of int8 of onnx and openvino, .*: leave it out$"):
        export(checkpoint, tmp_path / "out.gguf", **kind, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("options", [{}, {"view": "generator"}, {"format": "multivector"}, {"format": "peft"}])
def test_terms_and_licence_go_with_an_export(checkpoint_of, tmp_path, options, said):
    folder = shutil.copytree(checkpoint_of("gemma3"), tmp_path / "m")
    card = folder / "README.md"
    assert "\nlicense: gemma\n" in card.read_text()
    card.write_text("---\nlicense: other\nlicense_name: mine\n---\n" if said else "none")
    (folder / "NOTICE").write_text("of the base")
    (folder / "GEMMA_TERMS.md").write_text("terms")
    export(folder, tmp_path / "out", **options)
    assert (tmp_path / "out" / "NOTICE").read_text() == "of the base"
    assert (tmp_path / "out" / "GEMMA_TERMS.md").read_text() == "terms"
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data["license"], data.get("license_name")) == (("other", "mine") if said else ("gemma", None))
    assert "Gemma Terms of Use" in (tmp_path / "out" / "README.md").read_text()
    export(checkpoint_of("llama"), tmp_path / "plain", **options)
    assert "license" not in ModelCard.load(tmp_path / "plain" / "README.md").data.to_dict()
