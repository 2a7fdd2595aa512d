"""The command line: names and formats that scripts rely on, and one line for every expected error."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import typer
from helpers.models import TEXTS
from typer.testing import CliRunner

from ubmoe_st import UBMoE
from ubmoe_st.cli import app


def run(*args, code=0, **kwargs):
    result = CliRunner().invoke(app, [str(arg) for arg in args], **kwargs)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [{"id": f"t{n}", "text": text, "title": "the"} for n, text in enumerate(TEXTS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def index(checkpoint, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "index"
    facts = json.loads(run("index", corpus, "--model", checkpoint, "--out", out, "--json").stdout)
    assert facts["rows"] == len(TEXTS)
    return out


def test_plan_counts_what_info_finds(base, checkpoint):
    planned = json.loads(run("plan", base, "--rank", 2, "--json").stdout)
    assert planned["parameters"]["base"] == json.loads(run("info", checkpoint, "--json").stdout)["parameters"]["base"]
    assert planned["setting"]["rank"] == 2
    assert "trained" in run("plan", base / "config.json", "--rank", 0).stdout
    assert "config.json" in run("plan", "./nowhere", code=1).stderr


def test_help_names_the_commands():
    text = subprocess.run([sys.executable, "-m", "ubmoe_st.cli", "--help"], capture_output=True, text=True).stdout
    for name in (
        "build",
        "info",
        "encode",
        "generate",
        "index",
        "add",
        "delete",
        "compact",
        "search",
        "ask",
        "tune",
        "verify",
        "plan",
    ):
        assert name in text


def test_build_and_info(base, tmp_path):
    out = tmp_path / "out"
    run("build", base, "--out", out)
    facts = json.loads(run("info", out, "--json").stdout)
    assert (facts["layers"], facts["dimension"], facts["routing"], facts["expert_rank"]) == (3, 32, "uni", None)
    assert facts["base"]["sha256"].keys() == {"model.safetensors"}
    model = UBMoE(str(out))
    assert facts["parameters"]["base"] == sum(p.numel() for p in model.generator.parameters())
    assert facts["parameters"]["active_encoding"] == sum(p.numel() for p in model[0].model.parameters())
    assert str(facts["layers"]) in run("info", out).stdout
    assert "not empty" in run("build", base, "--out", out, code=1).stderr
    run("build", base, "--out", out, "--overwrite")


def test_info_counts_the_low_rank_parameters(checkpoint):
    parameters = json.loads(run("info", checkpoint, "--json").stdout)["parameters"]
    low_rank = UBMoE(str(checkpoint), low_memory=True)[0].low_rank
    assert parameters["added"] == sum(a.numel() + b.numel() for a, b in low_rank.values())


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_encode(checkpoint, tmp_path, suffix, kind):
    source = tmp_path / f"in{kind}"
    lines = TEXTS if kind == ".txt" else [json.dumps({"text": text}) for text in TEXTS]
    source.write_text("\n".join(lines) + "\n")
    out = tmp_path / f"out{suffix}"
    run("encode", checkpoint, source, "--out", out)
    if suffix == ".npy":
        found = np.load(out)
    else:
        import pyarrow.parquet as pq

        table = pq.read_table(out)
        assert table["text"].to_pylist() == TEXTS
        found = np.array(table["embedding"].to_pylist(), dtype=np.float32)
    assert np.abs(found - UBMoE(str(checkpoint)).encode(TEXTS)).max() < 1e-6


def test_generate(checkpoint):
    expected = UBMoE(str(checkpoint)).generate("the cat", max_new_tokens=6)
    arguments = ("generate", checkpoint, "the cat", "--max-new-tokens", 6, "--routing", "uni")
    assert run(*arguments).stdout.split() == expected.split()
    assert json.loads(run(*arguments, "--json").stdout)["text"] == expected


def test_generate_runs_the_experts_that_the_checkpoint_names(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "other")
    file = tmp_path / "other" / "generator" / "config.json"
    config = json.loads(file.read_text())
    config["ubmoe"]["routing"] = "bi"
    file.write_text(json.dumps(config))
    model = UBMoE(str(checkpoint))
    for named, routing in (((), "bi"), (("--routing", "uni"), "uni")):
        found = json.loads(
            run("generate", tmp_path / "other", "the cat", "--max-new-tokens", 6, *named, "--json").stdout
        )
        assert found["routing"] == routing
        assert found["text"] == model.generate("the cat", max_new_tokens=6, routing=routing)
    assert model.generate("the cat", max_new_tokens=6, routing="bi") != model.generate("the cat", max_new_tokens=6)


def test_a_seed_where_nothing_is_drawn_is_refused(checkpoint):
    arguments = ("generate", checkpoint, "the cat", "--max-new-tokens", 6, "--seed", 5)
    for named in ((), ("--temperature", 0)):
        assert "nothing is drawn; add --temperature" in run(*arguments, *named, code=1).stderr
    drawn = [run(*arguments, "--temperature", 3, "--json").stdout for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_chat_until_an_empty_line(checkpoint):
    result = run("generate", checkpoint, "--max-new-tokens", 3, input="the cat\n\n")
    expected = UBMoE(str(checkpoint)).generate([{"role": "user", "content": "the cat"}], max_new_tokens=3)
    assert expected.split()[0] in result.stdout


def test_search_is_a_json_list_of_id_score_text(index, checkpoint):
    hits = json.loads(run("search", index, TEXTS[1], "-k", 3, "--json").stdout)
    assert [set(hit) for hit in hits] == [{"id", "score", "text", "title"}] * 3
    model = UBMoE(str(checkpoint))
    query, documents = model.encode_query([TEXTS[1]]), model.encode_document([f"the\n{text}" for text in TEXTS])
    scores = (query @ documents.T)[0]
    order = np.argsort(-scores)[:3]
    assert [hit["id"] for hit in hits] == [f"t{n}" for n in order]
    assert np.allclose([hit["score"] for hit in hits], scores[order], atol=1e-5)
    assert hits[0]["id"] in run("search", index, TEXTS[1]).stdout


def test_ask_answers_and_cites(index):
    answer = json.loads(run("ask", index, "the cat", "--max-new-tokens", 4, "--json").stdout)
    assert len(answer["entries"]) == 3
    assert isinstance(answer["answer"], str)
    assert [entry["number"] for entry in answer["entries"]] == [1, 2, 3]
    shown = run("ask", index, "the cat", "--max-new-tokens", 4).stdout
    for entry in answer["entries"]:
        assert f"[{entry['number']}] {entry['id']}  (" in shown


def test_verify_takes_checkpoints_and_indexes(index, checkpoint, tmp_path):
    for folder in (index, checkpoint):
        assert json.loads(run("verify", folder, "--json").stdout)["ok"]
        damaged = shutil.copytree(folder, tmp_path / folder.name)
        file = max((p for p in damaged.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        assert file.name in run("verify", damaged, code=1).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "nowhere"), "not a UBMoE checkpoint"),
        (("build", "./nowhere", "--out", "x"), "does not exist"),
        (("verify", "nowhere"), "is not a folder"),
        (("search", "nowhere", "the"), "nowhere"),
        (("encode", "nowhere", "in.txt", "--out", "x.csv"), "must end in .npy or .parquet"),
    ],
)
def test_expected_errors_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments, code=1)
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_bad_lines_are_named(checkpoint, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "the"}\n{"text": 3}\n')
    assert "line 2" in run("encode", checkpoint, source, "--out", tmp_path / "x.npy", code=1).stderr
    assert not (tmp_path / "x.npy").exists()


def test_a_model_that_moved_is_asked_for(index, checkpoint, tmp_path):
    moved = shutil.copytree(index, tmp_path / "index")
    elsewhere = shutil.copytree(checkpoint, tmp_path / "elsewhere")
    info = json.loads((moved / "index_info.json").read_text())
    info["model"] |= {"folder": str(tmp_path / "gone"), "relative_folder": "../gone"}
    (moved / "index_info.json").write_text(json.dumps(info))
    refused = run("search", moved, "the", code=1).stderr
    assert "--model" in refused
    assert "model=" not in refused
    run("search", moved, "the", "--model", elsewhere)


def test_a_folder_that_moved_with_its_model_needs_no_option(checkpoint, corpus, tmp_path):
    """The same rule as in Python: the model's place is remembered relative to the index, too."""
    (tmp_path / "before").mkdir()
    model = shutil.copytree(checkpoint, tmp_path / "before" / "model")
    run("index", corpus, "--model", model, "--out", tmp_path / "before" / "index")
    expected = run("search", tmp_path / "before" / "index", TEXTS[0], "--json").stdout
    (tmp_path / "before").rename(tmp_path / "after")
    assert run("search", tmp_path / "after" / "index", TEXTS[0], "--json").stdout == expected


@pytest.mark.parametrize(("command", "name"), [("search", "QUERY"), ("ask", "QUESTION")])
def test_what_is_missing_is_named(command, name, index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in ((index,), (index, index)):
        refused = " ".join(run(command, *arguments, code=2).stderr.split())
        assert f"Invalid value for {name}: expected INDEX... {name}, got" in refused
    assert "Invalid value for INDEX" in run(command, "the cat", code=2).stderr
    assert "Invalid value for INDEX" in run(command, code=2).stderr
    for empty in ("", "  "):
        assert f"{name} is empty" in run(command, index, empty, code=1).stderr


def test_nothing_is_answered_from_nothing(index, monkeypatch):
    def generate(*args, **kwargs):
        raise AssertionError("generated from nothing")

    monkeypatch.setattr(UBMoE, "generate", generate)
    for more in ((), ("--json",)):
        result = run("ask", index, "the cat", "--filter", '{"title": "no such"}', *more, code=1)
        assert "no entry passes --filter" in result.stderr
        assert result.stdout == ""
    assert "nothing was found" in run("search", index, "the cat", "--filter", '{"title": "no such"}').stdout
    with pytest.raises(AssertionError, match="generated"):
        run("ask", index, "the cat")


def test_brackets_are_printed_as_they_are(checkpoint, tmp_path):
    """They are no markup in a corpus, in a path, or in what a model's file is called."""
    corpus = tmp_path / "corpus.jsonl"
    rows = [{"id": "[/usr/bin]", "text": "the cat [/usr/bin]"}, {"id": "d[int]", "text": "the dict[str, int] :cat:"}]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "in[/bold]dex"
    assert str(folder) in run("index", corpus, "--model", checkpoint, "--out", folder).stdout.replace("\n", "")
    shown = run("search", folder, "the cat").stdout
    for text in ("[/usr/bin]", "the cat [/usr/bin]", "d[int]", "the dict[str, int] :cat:"):
        assert text in shown
    assert "] [/usr/bin]  (" in run("ask", folder, "the cat", "--max-new-tokens", 2).stdout
    named = tmp_path / "[red]"
    shutil.copytree(checkpoint, named)
    assert "[red]" in run("info", named).stdout


def test_errors_advise_options_of_the_command_line(checkpoint, base, corpus, index, tmp_path):
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"id": "a", "text": "the"}\n' * 2)
    build = ("index", "--model", checkpoint)
    cases = {
        "or replace it with --overwrite": (*build, twice, "--out", index),
        "--on-duplicate skip or the last one with --on-duplicate upsert": (*build, twice, "--out", tmp_path / "x"),
        "--chunk-tokens must be at least 1": (*build, corpus, "--out", tmp_path / "y", "--chunk-tokens", 0),
        "ubmoe build": ("generate", base, "the"),
        "or pass --overwrite": ("build", base, "--out", checkpoint),
    }
    for advice, arguments in cases.items():
        refused = run(*arguments, code=1).stderr
        refused = refused[refused.index("error:") :]  # progress bars of this process may come before
        assert advice in refused
        assert not re.search(r"overwrite=|on_duplicate|chunk_tokens|upcycle\(", refused)


def test_every_help_text_is_a_sentence():
    """It begins with what the option is, and ends."""
    commands = typer.main.get_command(app).commands
    texts = {
        f"{name} {parameter.name}": parameter.help
        for name, command in commands.items()
        for parameter in command.params
        if parameter.name != "help"
    }
    assert len(texts) > 60
    for name, text in texts.items():
        assert text, f"{name} has no help"
        assert re.match(r"[A-Z]", text), f"{name}: {text}"
        assert text.endswith("."), f"{name}: {text}"
        assert not re.match(r"(Of|A|An|The|So|ray:)\b", text), f"{name}: {text}"
    for name, command in commands.items():
        assert command.help.endswith("."), name
