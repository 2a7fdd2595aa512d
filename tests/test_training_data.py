"""Texts: drawn by seed, development sets only."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

pytest.importorskip("peft")

from helpers.training import make_training_data

from training.data import (
    DOLLY_DEV_CATEGORIES,
    dolly_dev,
    labelled_texts,
    read_collection,
    read_instructions,
    read_rows,
    read_sentences,
    read_table,
    sts_pairs,
)
from training.mixtures import Mixture, Texts, TextSource
from training.texts import draw

RECIPES = Path(__file__).parent.parent / "training" / "recipes"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_training_data(tmp_path_factory.mktemp("data"))


def test_sentences_are_drawn_by_seed(data):
    mixture = Mixture({str(data / "sentences.txt"): 0.5}, count=60, words=(5, 9))
    drawn = read_sentences(mixture)
    assert drawn == read_sentences(mixture)
    assert drawn != read_sentences(Mixture(**{**mixture.__dict__, "seed": 1}))
    assert 5 < len(drawn) <= 30
    assert all(5 <= len(line.split()) <= 9 for line in drawn)
    with pytest.raises(ValueError, match="development sets only"):
        sts_pairs("STSB-test", data)
    assert len(sts_pairs("STSB-dev", data, 7)[2]) == 7


def test_files_whose_lines_are_no_texts_are_refused(tmp_path):
    """Columns of a .jsonl file are texts; lines of a table would be trained on with their commas and keys."""
    words = "a b c d e f g"
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"{words} {n}"}) for n in range(3)))
    drawn = read_sentences(Mixture({str(tmp_path / "a.jsonl"): 1.0}))
    assert sorted(drawn) == [f"{words} {n}" for n in range(3)]
    (tmp_path / "a.jsonl").write_text(json.dumps({"sentence": words}))
    with pytest.raises(ValueError, match="line 1: expected a text in `text`, got sentence"):
        read_sentences(Mixture({str(tmp_path / "a.jsonl"): 1.0}))
    for name in ("t.csv", "t.json", "t.tsv", "t.parquet", "t.CSV.gz"):
        (tmp_path / name).write_text(f"{words}\n")
        with pytest.raises(ValueError, match=rf"{name}: expected a text file"):
            read_sentences(Mixture({str(tmp_path / name): 1.0}))
        with pytest.raises(ValueError, match=rf"{name}: expected a text file"):
            draw(Texts([TextSource(str(tmp_path / name), count=1)]))


@pytest.mark.parametrize("value", [None, ["a"], 3])
def test_a_pair_without_a_text_is_one_line(tmp_path, value):
    rows = [{"anchor": "a", "positive": "b"}, {"anchor": "a", "positive": value}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"p\.jsonl: expected a text in 'positive' of row 1, got"):
        read_rows(str(tmp_path / "p.jsonl"), ["anchor", "positive"])


def write_gz(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(file, "wt") as out:
        out.write("\n".join(map(json.dumps, rows)))


def test_questions_of_dolly_against_their_own_contexts(tmp_path):
    rows = [
        {
            "instruction": f"ask {n} {name}",
            "input": f"{name} {n} " + "word " * (20 + n),
            "category": name,
            "output": "x",
        }
        for n in range(40)
        for name in (*DOLLY_DEV_CATEGORIES, "open_qa")
    ]
    write_gz(tmp_path / "instruct" / "dolly_partial.jsonl.gz", rows)
    found = dolly_dev(tmp_path, queries=10, documents=30, words=35)
    assert found == dolly_dev(tmp_path, queries=10, documents=30, words=35)
    assert (len(found.queries), len(found.documents), len(found.relevance)) == (10, 30, 10)
    assert all(30 < len(text.split()) <= 35 for text in found.documents.values())
    assert not any("open_qa" in text for text in found.documents.values())
    for query, question in found.queries.items():
        ((document, grade),) = found.relevance[query].items()
        name, number = found.documents[document].split()[:2]
        assert (question, grade) == (f"ask {number} {name}", 1)


def test_tables_collections_and_labels_are_read(tmp_path):
    (tmp_path / "t.tsv").write_text('a\tb\n"x\t\n y \tz\n')
    assert read_table(tmp_path / "t.tsv") == [{"a": '"x', "b": ""}, {"a": " y ", "b": "z"}]
    (tmp_path / "corpus.jsonl").write_text('{"_id": 1, "title": "T", "text": "one"}\n{"_id": 2, "text": "two"}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "which"}\n{"_id": "r", "text": "none"}\n')
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\t1\t2\nr\t2\t0\n")
    found = read_collection(tmp_path)
    assert found.documents == {"1": "T one", "2": "two"}
    assert (found.queries, found.relevance) == ({"q": "which"}, {"q": {"1": 2}})
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n")
    with pytest.raises(ValueError, match="expected a relevant document"):
        read_collection(tmp_path)
    write_gz(
        tmp_path / "classification" / "c.jsonl.gz",
        [{"text": text, "label": label, "split": split} for text, label, split in ("abx", "cax", "dby")],
    )
    assert labelled_texts(tmp_path, "c") == {
        "x": {"text": ["a", "c"], "label": [1, 0]},
        "y": {"text": ["d"], "label": [1]},
    }
    (tmp_path / "corpus.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1: expected a JSON object"):
        read_collection(tmp_path)


@pytest.mark.parametrize(
    "row",
    [{"prompt": "a", "output": "b"}, {"instruction": "a", "output": None}, {"instruction": "a"}, {"instruction": 3}],
)
def test_an_instruction_set_with_other_columns_is_one_line(tmp_path, row):
    file = tmp_path / "own.jsonl"
    good = {"instruction": "a", "input": None, "output": "b"}
    file.write_text(f"{json.dumps(good)}\n\n{json.dumps(row)}\n")
    with pytest.raises(ValueError, match=r"own\.jsonl, line 3: expected texts in `instruction` and `output`.* got {"):
        read_instructions([str(file)])
    file.write_text(json.dumps(good))
    assert read_instructions([str(file)]) == [("a", "b")]
