"""What an index keeps when a row, a run or a member of a group goes wrong."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from helpers.encoders import HashEncoder

from ubmoe_st.index import EmbeddingIndex, IndexGroup
from ubmoe_st.index.corpus import CorpusChangedError


class Broken(HashEncoder):
    """Gives no vector for some texts, as fp16 does where it overflows."""

    def encode(self, inputs, **options):
        vectors = super().encode(inputs, **options)
        vectors[[row for row, text in enumerate(inputs) if "broken" in text]] = np.nan
        return vectors


class Words:
    """A tokenizer of words."""

    is_fast = False

    def __call__(self, texts, truncation=False):
        return {"input_ids": [re.findall(r"\S+", text) for text in texts]}


class Reader(HashEncoder):
    """Reads words, and stops after some batches."""

    tokenizer = Words()

    def __init__(self, after: int = 10**9) -> None:
        super().__init__(16)
        self.after = after

    def encode(self, inputs, **options):
        if len(self.batches) >= self.after:
            raise KeyboardInterrupt
        return super().encode(inputs, **options)


def rows(*pairs):
    return [{"id": name, "text": text} for name, text in pairs]


def texts_of(index):
    return {name: index.texts(name) for name in index}


def test_an_entry_stays_whose_new_row_has_no_vector(tmp_path):
    index = EmbeddingIndex.build(Broken(16), rows(("a", "alpha"), ("b", "beta")), tmp_path / "i")
    assert index.upsert(rows(("a", "broken"), ("b", "gamma")), on_bad_row="skip") == 1
    assert texts_of(index) == {"a": ["alpha"], "b": ["gamma"]}
    assert index.upsert(rows(("a", "delta"), ("a", "epsilon"))) == 1
    assert texts_of(index) == {"a": ["epsilon"], "b": ["gamma"]}
    assert index.info["sources"][-1]["entries"] == 1
    index.compact()
    assert texts_of(index) == {"a": ["epsilon"], "b": ["gamma"]}


@pytest.mark.parametrize(
    ("versions", "last"),
    [
        (["one", "broken"], "one"),
        (["one", "broken", "two"], "two"),
        (["one", "broken", "broken 2", "two"], "two"),
        (["broken", "one"], "one"),
        (["one", "two", "broken"], "two"),
    ],
)
def test_the_last_version_with_a_vector_wins(versions, last, tmp_path):
    corpus = rows(("x", "other"), *(("a", text) for text in versions))
    options = {"on_duplicate": "upsert", "on_bad_row": "skip"}
    built = EmbeddingIndex.build(Broken(16), corpus, tmp_path / "i", **options)
    assert texts_of(built) == {"x": ["other"], "a": [last]}
    added = EmbeddingIndex.build(Broken(16), rows(("a", "zero")), tmp_path / "j")
    assert added.upsert(corpus, on_bad_row="skip") == 2
    assert texts_of(added) == {"x": ["other"], "a": [last]}


def test_a_document_stays_unless_a_chunk_of_the_new_one_has_a_vector(tmp_path):
    def document(*words):
        return [{"id": "a", "text": " ".join(words)}]

    model = type("Both", (Broken, Reader), {})()
    index = EmbeddingIndex.build(model, document(*"abcdef"), tmp_path / "i", chunk_tokens=2)
    index.upsert(document(*["broken"] * 6), on_bad_row="skip")
    assert index.texts("a") == ["a b", "c d", "e f"]
    index.upsert(document("broken", "broken", "x", "y"), on_bad_row="skip")
    assert index.texts("a") == ["x y"]


def stopped(tmp_path, text):
    with pytest.raises(KeyboardInterrupt):
        EmbeddingIndex.build(Reader(after=5), [{"id": "a", "text": text}], tmp_path / "i", **PARTS)


PARTS = {"chunk_tokens": 5, "window_tokens": 10}


def test_a_document_that_changed_is_not_finished_in_its_middle(tmp_path):
    old, new = (" ".join(f"{word}{n}" for n in range(60)) for word in ("old", "new"))
    stopped(tmp_path, old)
    for corpus in (rows(("a", new)), rows(("a", "old0 old1"), ("b", "c")), rows(("b", old))):
        with pytest.raises(CorpusChangedError):
            EmbeddingIndex.build(Reader(), corpus, tmp_path / "i", **PARTS)
    resumed = Reader()
    index = EmbeddingIndex.build(resumed, rows(("a", old)), tmp_path / "i", **PARTS)
    whole = EmbeddingIndex.build(Reader(), rows(("a", old)), tmp_path / "whole", **PARTS)
    assert index.texts("a") == whole.texts("a")
    anew = Reader()
    EmbeddingIndex.build(anew, rows(("a", old)), tmp_path / "anew", **PARTS)
    assert sum(resumed.batches) < sum(anew.batches), "nothing was resumed"


def test_a_group_of_which_one_was_built_anew_with_another_model_is_not_searched(tmp_path):
    first, other = HashEncoder(16, salt="A"), HashEncoder(16, salt="B")
    EmbeddingIndex.build(first, rows(("1", "one")), tmp_path / "1")
    EmbeddingIndex.build(first, rows(("2", "two")), tmp_path / "2")
    group = IndexGroup.open([tmp_path / "1", tmp_path / "2"], model=first)
    assert group.search("two", 1)[1] == [["2"]]
    EmbeddingIndex.build(other, rows(("2", "two")), tmp_path / "2", overwrite=True)
    assert group.refresh()
    for search in (group.search, group.search_entries):
        with pytest.raises(ValueError, match=r"2 cannot be searched together with .*1: .*not the model"):
            search("two", 1)
    EmbeddingIndex.build(first, rows(("2", "two")), tmp_path / "2", overwrite=True)
    group.refresh()
    assert group.search("two", 1)[1] == [["2"]]


def test_a_build_with_a_model_that_gives_other_vectors_is_refused(tmp_path):
    corpus = rows(("1", "the cat"))
    EmbeddingIndex.build(HashEncoder(16, salt="A"), corpus, tmp_path / "i")
    again = HashEncoder(16, salt="A")
    EmbeddingIndex.build(again, corpus, tmp_path / "i")
    with pytest.raises(ValueError, match="already holds an index of another corpus, model or options"):
        EmbeddingIndex.build(HashEncoder(16, salt="B"), corpus, tmp_path / "i")


def test_tuning_asks_for_queries_and_holds_back_live_rows_only(tmp_path):
    corpus = rows(*((str(n), f"text {n}") for n in range(1200)))
    index = EmbeddingIndex.build(HashEncoder(16), corpus, tmp_path / "i", kind="ivf-flat")
    before = index.info["index"]["parameters"]
    for queries in ([], np.empty((0, 16), np.float32)):
        with pytest.raises(ValueError, match="needs queries, got none"):
            index.tune(0.99, queries=queries)
    assert index.info["index"]["parameters"] == before
    index.delete([str(n) for n in range(1195)])
    report = index.tune(0.9, held_back=50)
    assert (report.queries, report.reached) == (5, True)
    index.delete([str(n) for n in range(1195, 1199)])
    with pytest.raises(ValueError, match="the index has 1 entries"):
        index.tune(0.9)


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_an_open_quote_costs_one_row(ending, tmp_path):
    comma = "," if ending == ".csv" else "\t"
    lines = ["id,text", "1,fine", '2,"unclosed', *(f"{n},text {n}" for n in range(3, 50)), '50,"two', 'lines"', "51,x"]
    (tmp_path / f"x{ending}").write_text("\n".join(lines).replace(",", comma) + "\n")
    index = EmbeddingIndex.build(HashEncoder(16), tmp_path / f"x{ending}", tmp_path / "i", on_bad_row="skip")
    said = (tmp_path / "i" / index.info["sources"][0]["bad_rows_file"]).read_text()
    # A quote that opens and closes between two others is theirs, as far as a reader can tell.
    assert said.startswith(f"x{ending} line 3: is not a {ending[1:]} row")
    assert {"1", "3", "49"} <= set(index)
    assert index.texts("3") == ["text 3"]
    assert "2" not in set(index)


def test_an_open_index_keeps_its_words_where_the_folder_was_built_anew(tmp_path):
    pytest.importorskip("bm25s")

    def build(*pairs):
        EmbeddingIndex.build(HashEncoder(16), rows(*pairs), tmp_path / "i").build_bm25()

    build(("x", "apple pie"), ("y", "banana split"))
    index = EmbeddingIndex.open(tmp_path / "i", model=HashEncoder(16))
    shutil.rmtree(tmp_path / "i")
    build(("p", "banana split"), ("q", "apple pie"))
    assert index.search("apple pie", 1, mode="bm25")[1] == [["x"]]
    assert index.refresh()
    assert index.search("apple pie", 1, mode="bm25")[1] == [["q"]]


def test_fields_whose_names_are_one_as_text_are_a_bad_row(tmp_path):
    row = {"id": "a", "text": "one", 1: "x"}
    assert EmbeddingIndex.build(HashEncoder(16), [row], tmp_path / "i").entries("a")[0].metadata == '{"1": "x"}'
    with pytest.raises(ValueError, match="two fields whose names are one as text"):
        EmbeddingIndex.build(HashEncoder(16), [row | {"1": "y"}], tmp_path / "j")
