"""The index commands: several folders, the memory budget, faiss files and keywords."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.encoders import HashEncoder
from helpers.models import TEXTS
from typer.testing import CliRunner

from ubmoe_st import UBMoE
from ubmoe_st.answers import VECTORS_SHARE, find
from ubmoe_st.cli import app
from ubmoe_st.index import EmbeddingIndex
from ubmoe_st.multi_vector import multi_vector_encoder

ROWS = [{"id": f"t{n}", "text": text} for n, text in enumerate([*TEXTS, "a blue house", "the old bird"])]


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def made(checkpoint, tmp_path_factory):
    """Indexes of all rows (`whole`) and of two halves (`one`, `two`)."""
    folder = tmp_path_factory.mktemp("cli")
    for name, rows in {"whole": ROWS, "one": ROWS[:3], "two": ROWS[3:]}.items():
        corpus = folder / f"{name}.jsonl"
        corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = ["--memory", "64MB", "--no-faiss"] if name == "whole" else ["--bm25"]
        run("index", corpus, "--model", checkpoint, "--out", folder / name, *flags)
    return folder


def test_several_folders_are_searched_as_one(made):
    whole = json.loads(run("search", made / "whole", "the cat", "-k", 5, "--json").stdout)
    parts = json.loads(run("search", made / "one", made / "two", "the cat", "-k", 5, "--json").stdout)
    assert [hit["id"] for hit in parts] == [hit["id"] for hit in whole]
    assert [hit["score"] for hit in parts] == pytest.approx([hit["score"] for hit in whole], abs=1e-5)
    assert {hit["id"] for hit in parts} & {"t0", "t1", "t2"}
    assert {hit["id"] for hit in parts} & {"t3", "t4", "t5"}
    answer = json.loads(run("ask", made / "one", made / "two", "the cat", "--max-new-tokens", 3, "--json").stdout)
    assert [hit["id"] for hit in answer["entries"]] == [hit["id"] for hit in whole[:3]]


def test_reranking_on_the_command_line(made, checkpoint):
    query = "the cat"
    plain = json.loads(run("search", made / "whole", query, "-k", 6, "--json").stdout)
    found = json.loads(run("search", made / "whole", query, "-k", 3, "--rerank", 6, "--json").stdout)
    ranked = UBMoE(str(checkpoint), device="cpu").rank(query, [hit["text"] for hit in plain], top_k=3)
    assert found == [plain[result["corpus_id"]] for result in ranked] != plain[:3]
    asked = run("ask", made / "whole", query, "--rerank", 6, "--max-new-tokens", 3, "--json").stdout
    assert [hit["id"] for hit in json.loads(asked)["entries"]] == [hit["id"] for hit in found]
    parts = json.loads(run("search", made / "one", made / "two", query, "-k", 3, "--rerank", 6, "--json").stdout)
    assert [hit["id"] for hit in parts] == [hit["id"] for hit in found]
    tokens = ["--rerank", "maxsim", "--candidates", 6, "-k", 6, "--json"]
    by_tokens = json.loads(run("search", made / "whole", query, *tokens).stdout)
    encoder = multi_vector_encoder(UBMoE(str(checkpoint), device="cpu"))
    said = encoder.encode_document([hit["text"] for hit in plain])
    scores = encoder.similarity(encoder.encode_query([query]), said)[0].tolist()
    assert by_tokens == [hit for _, hit in sorted(zip(scores, plain), key=lambda pair: -pair[0])] != plain
    refused = run("search", made / "one", query, "--rerank", "tokens", code=1)
    assert "one of likelihood, yes_no, maxsim; got 'tokens'" in " ".join(refused.output.split())


def test_an_answer_comes_from_words_and_vectors_where_there_are_both(made, monkeypatch):
    pytest.importorskip("bm25s")
    asked = []
    monkeypatch.setattr(
        "ubmoe_st.index_commands.find", lambda *a, **options: asked.append(options) or find(*a, **options)
    )
    for name in ("one", "whole"):
        run("ask", made / name, "the cat", "--max-new-tokens", 1)
    assert asked == [{"filter": None, "mode": "hybrid", "weight": VECTORS_SHARE}, {"filter": None}]


def test_late_chunking_on_the_command_line(made, checkpoint, tmp_path):
    flags = ["--model", checkpoint, "--chunk-tokens", 4, "--out"]
    for name, late in (("late", ["--late-chunking"]), ("alone", [])):
        run("index", made / "whole.jsonl", *flags, tmp_path / name, *late)
    late, alone = (EmbeddingIndex.open(tmp_path / name) for name in ("late", "alone"))
    assert late.info["options"]["late_chunking"] is True
    assert np.abs(late.vectors("t1") - alone.vectors("t1")).max() > 0.01


def test_a_filter_of_the_command_line(checkpoint, tmp_path):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({**row, "n": n}) + "\n" for n, row in enumerate(ROWS)))
    run("index", corpus, "--model", checkpoint, "--out", tmp_path / "i")
    hits = json.loads(run("search", tmp_path / "i", "the cat", "--filter", '{"n": {">=": 3}}', "--json").stdout)
    assert sorted(hit["metadata"]["n"] for hit in hits) == [3, 4, 5]
    for bad in ("n=3", "[3]"):
        outcome = run("search", tmp_path / "i", "the cat", "--filter", bad, code=1)
        assert "--filter: expected" in outcome.output


def test_options_of_the_build_arrive(made):
    info = json.loads((made / "whole" / "index_info.json").read_text())
    assert info["index"]["file"] is None
    assert info["options"]["window_bytes"] == 64_000_000 // 32
    pytest.importorskip("bm25s")
    hits = json.loads(run("search", made / "two", "blue", "--mode", "bm25", "--json").stdout)
    assert [hit["id"] for hit in hits] == ["t4"]


def test_what_does_not_fit_together_is_refused_in_one_line(made, checkpoint):
    cases = {
        "searches one index, got 2": ("search", made / "one", made / "two", "the", "--mode", "hybrid"),
        "repeating its `ubmoe index` command with --bm25": ("search", made / "whole", "the", "--mode", "hybrid"),
        "a size is a number": ("index", made / "one.jsonl", "--model", checkpoint, "--out", "x", "--memory", "lots"),
        "at least 64 MB": ("index", made / "one.jsonl", "--model", checkpoint, "--out", "x", "--memory", "1MB"),
    }
    for message, arguments in cases.items():
        stderr = run(*arguments, code=1).stderr
        error = stderr[stderr.index("error:") :]  # progress bars of this process may come before
        assert message in error
        assert "build_bm25" not in error
        assert "memory_budget" not in error
        assert len(error.strip().splitlines()) == 1


def test_an_index_is_changed_from_the_command_line(checkpoint, tmp_path):
    pytest.importorskip("bm25s")
    for name, rows in {"first": ROWS[:3], "more": ROWS[3:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "other.jsonl").write_text(json.dumps({"key": "t0", "body": "a blue house"}) + "\n")
    folder = tmp_path / "index"
    run("index", tmp_path / "first.jsonl", "--model", checkpoint, "--out", folder, "--bm25")
    first = json.loads(run("add", folder, tmp_path / "more.jsonl", "--json").stdout)
    assert (first["added"], first["rows"]) == (len(ROWS) - 3, len(ROWS))
    assert json.loads(run("add", folder, tmp_path / "more.jsonl", "--json").stdout) == first  # nothing was left to do
    whole = tmp_path / "whole"
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run("index", tmp_path / "all.jsonl", "--model", checkpoint, "--out", whole, "--bm25")

    def found(index, mode):
        return json.loads(run("search", index, "a blue house", "-k", 4, "--mode", mode, "--json").stdout)

    for mode in ("dense", "bm25", "hybrid"):
        ours, expected = found(folder, mode), found(whole, mode)
        assert [hit["id"] for hit in ours] == [hit["id"] for hit in expected]
        assert [hit["score"] for hit in ours] == pytest.approx([hit["score"] for hit in expected], abs=1e-5)
    assert found(folder, "bm25")[0]["id"] == ROWS[-2]["id"]

    refused = run("delete", folder, ROWS[0]["id"], "absent", code=1)
    assert "no entry has the id 'absent': nothing was deleted" in refused.output
    assert len(EmbeddingIndex.open(folder)) == len(ROWS)
    assert "1 entries deleted" in run("delete", folder, ROWS[-2]["id"], "absent", "--missing-ok").output
    assert ROWS[-2]["id"] not in {hit["id"] for hit in found(folder, "dense")}
    refused = run("add", folder, tmp_path / "other.jsonl", "--id", "key", "--text", "body", code=1)
    assert "t0" in refused.output
    run(
        "add",
        folder,
        tmp_path / "other.jsonl",
        "--id",
        "key",
        "--text",
        "body",
        "--on-duplicate",
        "upsert",
        "--no-bm25",
    )
    assert found(folder, "dense")[0]["id"] == "t0"
    assert "t0" not in {hit["id"] for hit in found(folder, "bm25") if hit["text"] == "a blue house"}
    assert json.loads(run("compact", folder, "--json").stdout)["rows"] == len(ROWS) - 1
    assert found(folder, "bm25")[0]["id"] == "t0"


def test_an_unfinished_addition_is_thrown_away_from_the_command_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "a", "text": "the cat"}\n')
    (tmp_path / "b.jsonl").write_text(
        "".join(f'{{"id": "b{n}", "text": "a dog"}}\n' for n in range(9000)) + '{"id": "z"}\n'
    )
    folder = tmp_path / "i"
    EmbeddingIndex.build(HashEncoder(16), tmp_path / "a.jsonl", folder)
    with pytest.raises(ValueError, match="needs a string"):
        EmbeddingIndex.open(folder, model=HashEncoder(16)).add(tmp_path / "b.jsonl")
    result = CliRunner().invoke(app, ["delete", str(folder), "a"])
    assert result.exit_code == 1
    assert "`ubmoe discard`" in result.output
    assert "thrown away: 1 entries" in run("discard", folder).stdout
    assert "no unfinished addition" in run("discard", folder).stdout
    assert json.loads(run("delete", folder, "a", "--json").stdout)["rows"] == 0


def test_a_chunk_or_a_document_is_deleted_from_the_command_line(checkpoint, tmp_path):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"id": name, "text": "the cat"}) + "\n" for name in ("page", "page#0")))
    run("index", corpus, "--model", checkpoint, "--out", tmp_path / "i", "--chunk-tokens", 8)
    refused = " ".join(run("delete", tmp_path / "i", "page#0", code=1).output.split())
    assert "--namespace document" in refused
    run("delete", tmp_path / "i", "page#0", "--namespace", "document")
    assert list(EmbeddingIndex.open(tmp_path / "i")) == ["page#0"]


def test_texts_are_read_on_the_command_line_as_far_as_by_the_build(checkpoint, tmp_path):
    model = UBMoE(str(checkpoint), device="cpu")
    model.max_seq_length = 16
    text = "the cat sits " * 20
    EmbeddingIndex.build(model, [{"id": "old", "text": text}], tmp_path / "i", model_id=str(checkpoint))
    (tmp_path / "c.jsonl").write_text(json.dumps({"id": "new", "text": text}) + "\n")
    run("add", tmp_path / "i", tmp_path / "c.jsonl")
    vectors = EmbeddingIndex.open(tmp_path / "i").vectors(["old", "new"])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)
