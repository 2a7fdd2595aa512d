"""What people hand to an index: each thing is read as it is meant, or refused with a word on what to give instead."""

from __future__ import annotations

import enum
import gzip
import json
import logging
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.encoders import HashEncoder

from ubmoe_st.index import CorpusError, EmbeddingIndex, IndexGroup
from ubmoe_st.index.adapters import langchain_retriever, llama_index_retriever


class Language(enum.Enum):
    ENGLISH = "en"


MIXED = [1, "1", None, True, 2.0, "x"]
ROWS = [
    {"id": f"t{n}", "text": f"text {n}", "n": n, "lang": "en" if n % 2 else "de", "u": str(UUID(int=n))}
    | {"at": f"0{n}:00:00", "tags": ["a", "b"][: n % 3], "mixed": MIXED[n]}
    for n in range(6)
]


@pytest.fixture(scope="module")
def encoder():
    return HashEncoder(16)


@pytest.fixture(scope="module")
def index(tmp_path_factory, encoder):
    return EmbeddingIndex.build(encoder, ROWS, tmp_path_factory.mktemp("inputs") / "i")


def passed(index, spec) -> set[int]:
    return {int(hit.id[1:]) for hit in index.search_entries("text 0", 10, filter=spec)[0]}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"n": range(2, 4)}, {2, 3}),
        ({"n": np.array([1, 2])}, {1, 2}),
        ({"n": {"not in": np.array([1, 2])}}, {0, 3, 4, 5}),
        ({"n": {1: 2}.keys()}, {1}),
        ({"n": np.int64(2)}, {2}),
        ({"lang": Language.ENGLISH}, {1, 3, 5}),
        ({"lang": np.str_("en")}, {1, 3, 5}),
        ({"u": UUID(int=2)}, {2}),
        ({"u": [UUID(int=2), UUID(int=3)]}, {2, 3}),
        ({"at": time(4)}, {4}),
        # None is a field that is not there, as in the rows that have it.
        ({"mixed": None}, {2}),
        ({"mixed": {"!=": None}}, {0, 1, 3, 4, 5}),
        ({"mixed": [None, "x"]}, {2, 5}),
        ({"mixed": {"not in": [None, "x"]}}, {0, 1, 3, 4}),
        ({"parent": None}, {0, 1, 2, 3, 4, 5}),
    ],
)
def test_wanted_values_of_every_type_are_compared_as_they_are_stored(index, spec, expected):
    assert passed(index, spec) == expected
    assert passed(index, dict(spec) | {"id": {"!=": "t0"}}) == expected - {0}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"n": b"x"}, "expected a text, a number"),
        ({"n": object()}, "expected a text, a number"),
        ({"n": [{"a": 1}]}, "expected a text, a number"),
        ({"n": float("nan")}, "nan equals nothing"),
        ({"n": {"exists": "false"}}, "true or false"),
        ({"n": {"<": [1, 2]}}, "takes one value"),
        ({"n": {">": None}}, "takes one value"),
    ],
)
def test_wanted_values_that_nothing_can_equal_are_refused(index, spec, said):
    with pytest.raises((TypeError, ValueError), match=said):
        index.search("text 0", 3, filter=spec)


def test_a_list_against_single_values_is_told_of(index, caplog):
    assert passed(index, {"n": {"!=": [1, 2]}}) == set(range(6))
    assert "no value of 'n'" in caplog.text
    caplog.clear()
    assert passed(index, {"tags": {"!=": ["a"]}}) == {0, 2, 3, 5}
    assert not caplog.text


@pytest.mark.parametrize("queries", [np.array(["text 1", "text 2"]), np.array(["text 1", "text 2"], object)])
def test_arrays_of_texts_are_queries(index, queries):
    assert index.search(queries, 1)[1] == [["t1"], ["t2"]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"queries": ""}, "query 0 is empty"),
        ({"queries": ["a", " \n"]}, "query 1 is empty"),
        ({"queries": None}, "texts or vectors, got NoneType"),
        ({"queries": 3.0}, "texts or vectors, got float"),
        ({"queries": "a", "parameters": {"nprob": 2}}, "nprob=2"),
        ({"queries": "a", "parameters": {"nprobe": 0}}, "nprobe=0"),
    ],
)
def test_searches_that_ask_for_nothing_are_refused(index, arguments, said):
    with pytest.raises((TypeError, ValueError), match=said):
        index.search(**arguments)


def test_a_query_that_is_cut_is_told_of(index):
    opened = EmbeddingIndex.open(index.path, model=_Words(16))
    with pytest.warns(UserWarning, match="1 of 2 queries are longer than the 512 tokens"):
        opened.search(["text 0", "word " * 600], 1)


class _Words(HashEncoder):
    """Counts words as tokens."""

    @staticmethod
    def tokenizer(texts, truncation=False):
        return {"input_ids": [text.split() for text in texts]}


@pytest.mark.parametrize("ids", [b"t0", None, 1.5, ["t0", None], {"t0": 1.5}.values()])
def test_what_is_no_id_is_refused(index, ids):
    with pytest.raises(TypeError, match="an id is a text or a whole number"):
        index.texts(ids)


def test_an_id_of_half_characters_is_in_no_index(index):
    assert "\udcff" not in index
    with pytest.raises(KeyError, match="no entry has the id"):
        index.texts("\udcff")


def test_a_group_is_of_open_indexes(index):
    with pytest.raises(TypeError, match=r"IndexGroup\.open"):
        IndexGroup([str(index.path)])
    with pytest.raises(TypeError, match="give a list"):
        IndexGroup(index)


class Frame:
    """What data frames have in common: iterating gives the names of their columns."""

    columns = ("id", "text")

    def __iter__(self):
        return iter(self.columns)


def test_corpora_that_are_not_read_as_they_look_are_refused(tmp_path, encoder):
    (tmp_path / "a.jsonl").write_text('{"id": "a", "text": "x"}\n')
    with pytest.raises(TypeError, match=r"to_dict\('records'\)"):
        EmbeddingIndex.build(encoder, Frame(), tmp_path / "i")
    with open(tmp_path / "a.jsonl") as file, pytest.raises(TypeError, match="give its path"):
        EmbeddingIndex.build(encoder, file, tmp_path / "i")
    with pytest.raises(CorpusError, match="is the name of a file"):
        EmbeddingIndex.build(encoder, [str(tmp_path / "a.jsonl")], tmp_path / "i")
    with pytest.raises(TypeError, match="list of names"):
        EmbeddingIndex.build(encoder, ROWS, tmp_path / "i", metadata_fields="lang")
    with pytest.raises(CorpusError, match="which is absent; it has _id, text"):
        EmbeddingIndex.build(encoder, [{"_id": "a", "text": "x"}], tmp_path / "i")
    with pytest.raises(TypeError, match=r"chunk_tokens is a whole number, got 3\.5"):
        EmbeddingIndex.build(encoder, ROWS, tmp_path / "i", chunk_tokens=3.5)
    with pytest.raises(ValueError, match="in, a file; an index is a folder"):
        EmbeddingIndex.build(encoder, ROWS, tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.jsonl", '{"id": "a", "text": "x"}'.encode("utf-16"), "is UTF-16"),
        ("a.tsv", "id\ttext\na\tx\n".encode("utf-16"), "is UTF-16"),
        ("a.csv", b"\xfe\xff" + "id,text\na,x\n".encode("utf-16-be"), "is UTF-16"),
        ("a.jsonl", gzip.compress(mtime=0, data=b'{"id": "a", "text": "x"}'), "name it .gz"),
    ],
)
def test_a_file_that_is_something_else_is_named_so(tmp_path, encoder, name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError, match=said):
        EmbeddingIndex.build(encoder, tmp_path / name, tmp_path / "i")


def test_a_folder_is_read_without_what_is_hidden_and_told_of_what_is_left_out(tmp_path, encoder, caplog):
    docs = tmp_path / "docs"
    (docs / ".git").mkdir(parents=True)
    for name in ("a.txt", "b.TXT", "c.pdf", "d.pdf", ".git/x.txt", ".hidden.md"):
        (docs / name).write_text(f"text of {name}")
    with caplog.at_level(logging.WARNING):
        found = EmbeddingIndex.build(encoder, docs, tmp_path / "i")
    assert set(found) == {"a.txt", "b.TXT"}
    assert "2 files are of no known kind and left out (2 .pdf)" in caplog.text
    with pytest.raises(ValueError, match="lies in the corpus"):
        EmbeddingIndex.build(encoder, docs, docs / "index")
    assert not (docs / "index" / "index_info.json").exists()
    (tmp_path / "UP.CSV").write_text("id,text\na,x\n")
    assert list(EmbeddingIndex.build(encoder, tmp_path / "UP.CSV", tmp_path / "up")) == ["a"]


def test_an_addition_that_took_nothing_in_blocks_nothing(tmp_path, encoder):
    index = EmbeddingIndex.build(encoder, ROWS, tmp_path / "i")
    with pytest.raises(CorpusError, match="is empty"):
        index.upsert([])
    with pytest.raises(CorpusError, match="has an empty"):
        index.add([{"id": "new", "text": " "}])
    assert index.delete("t5") == 1
    with pytest.raises(CorpusError, match="already there"):
        index.add([{"id": "t0", "text": "x"}])
    assert index.add([{"id": "new", "text": "x"}]) == 1
    assert set(index) == {"t0", "t1", "t2", "t3", "t4", "new"}
    assert index.verify() == []


def test_an_addition_that_stopped_says_how_to_get_rid_of_it(tmp_path, encoder):
    index = EmbeddingIndex.build(encoder, ROWS, tmp_path / "i", window_tokens=2)
    with pytest.raises(CorpusError, match="has an empty"):
        index.add([*({"id": f"n{n}", "text": f"new {n}"} for n in range(9)), {"id": "bad", "text": ""}])
    with pytest.raises(ValueError, match=r"discard_unfinished\(\)"):
        index.upsert([{"id": "other", "text": "x"}])
    with pytest.raises(ValueError, match=r"discard_unfinished\(\)"):
        index.add([{"id": "other", "text": "x"}])
    assert index.discard_unfinished()
    assert index.add([{"id": "other", "text": "x"}]) == 1


def test_a_langchain_retriever_takes_what_the_index_takes(index):
    pytest.importorskip("langchain_core")
    with pytest.raises(ValueError, match="k is a whole number"):
        langchain_retriever(index, search_type="mmr").invoke("text 0", k=-1)
    with pytest.raises(ValueError, match="lambda_mult"):
        langchain_retriever(index).invoke("text 0", search_type="mmr", lambda_mult=7)
    with pytest.raises(ValueError, match="k is a whole number"):
        langchain_retriever(index, k=0)
    ranked = _Reversed(16)
    opened = EmbeddingIndex.open(index.path, model=ranked)
    found = langchain_retriever(opened, k=6).invoke("text 0", rerank="likelihood", candidates=6)
    assert [one.id for one in found] == opened.search("text 0", 6)[1][0][::-1]
    with pytest.raises(TypeError, match="no option 'mode'"):
        langchain_retriever(IndexGroup([index]), mode="hybrid")


class _Reversed(HashEncoder):
    """Ranks documents the other way round."""

    def rank(self, query, documents):
        return [{"corpus_id": number, "score": 0.0} for number in reversed(range(len(documents)))]


def test_contains_of_llama_index_is_a_part_of_a_text_or_an_item(index):
    stores = pytest.importorskip("llama_index.core.vector_stores")

    def found(key: str, value: str) -> set[str]:
        one = stores.MetadataFilter(key=key, value=value, operator="contains")
        retriever = llama_index_retriever(index, filters=stores.MetadataFilters(filters=[one]))
        return {node.node.node_id for node in retriever.retrieve("text 0")}

    assert found("lang", "e") == {f"t{n}" for n in range(6)}
    assert found("lang", "n") == {"t1", "t3", "t5"}
    assert found("tags", "b") == {"t2", "t5"}
    assert found("n", "1") == set()


def test_a_path_with_spaces_and_a_link_is_a_path(tmp_path, encoder):
    folder = tmp_path / "with space é"
    index = EmbeddingIndex.build(encoder, ROWS, folder)
    (tmp_path / "link").symlink_to(folder)
    linked = EmbeddingIndex.open(tmp_path / "link", model=encoder)
    assert linked.add([{"id": "new", "text": "x"}]) == 1
    assert index.refresh()
    assert index.search("x", 1)[1] == [["new"]]
    assert Path(linked.path).is_symlink()


def test_a_quote_in_a_tsv_loses_no_row_without_a_word(tmp_path):
    lines = ["id\ttext", '1\t"Gone with the wind', "2\tsecond", '3\tthird says: the end"', '4\t"two', 'lines"', "5\tx"]
    (tmp_path / "a.tsv").write_text("\n".join(lines) + "\n")
    with pytest.raises(CorpusError, match=r"a\.tsv line 2: .*opens a quote that ends in a later line"):
        EmbeddingIndex.build(HashEncoder(16), tmp_path / "a.tsv", tmp_path / "i")
    index = EmbeddingIndex.build(HashEncoder(16), tmp_path / "a.tsv", tmp_path / "i", on_bad_row="skip")
    assert index.texts(list(index)) == ["second", 'third says: the end"', "two\nlines", "x"]
    assert index.info["sources"][0]["bad_rows"] == 1
    (tmp_path / "b.tsv").write_text('text\n"one\ntwo\nthree"\nfour\n')
    index = EmbeddingIndex.build(HashEncoder(16), tmp_path / "b.tsv", tmp_path / "b", id_field=None, on_bad_row="skip")
    assert index.texts(list(index)) == ["two", 'three"', "four"]


def test_a_large_row_of_a_csv_is_a_bad_row(tmp_path):
    large = "x" * 3_000_000
    rows = ["id,text", "1,ok", f"2,{large}", "3,fine", f'4,"{large}', "a,b", 'end"', "5,x", '6,"y', f'{large}"', "7,z"]
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    options = {"on_bad_row": "skip", "max_row_bytes": 1000}
    index = EmbeddingIndex.build(HashEncoder(16), tmp_path / "a.csv", tmp_path / "i", **options)
    assert list(index) == ["1", "3", "5", "7"]
    said = (tmp_path / "i" / index.info["sources"][0]["bad_rows_file"]).read_text().splitlines()
    assert said[0].startswith("a.csv line 3: line 3 has more than max_row_bytes=1,000 bytes (3,000,003)")
    assert said[1].startswith("a.csv line 5: line 5 has more than")
    assert "the row ends in line 7" in said[1]
    assert said[2].startswith("a.csv line 9: line 10 has more than")
    (tmp_path / "b.csv").write_text(f'id,text\n1,ok\n2,"{large}\n3,fine\n')
    with pytest.raises(CorpusError, match=r"b\.csv line 3: .*a quote that is open there does not end"):
        EmbeddingIndex.build(HashEncoder(16), tmp_path / "b.csv", tmp_path / "b", **options)
    (tmp_path / "c.csv").write_text(f"id,text,{large}\n1,ok,x\n")
    with pytest.raises(CorpusError, match=r"c\.csv line 1 has 3,000,009 bytes, more than max_row_bytes=1,000"):
        EmbeddingIndex.build(HashEncoder(16), tmp_path / "c.csv", tmp_path / "c", **options)


def test_a_parquet_with_columns_of_one_name_is_refused(tmp_path):
    table = pa.table([pa.array(["a"]), pa.array(["first"]), pa.array(["second"])], names=["id", "text", "text"])
    pq.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(CorpusError, match=r"d\.parquet has columns of the same name"):
        EmbeddingIndex.build(HashEncoder(16), tmp_path / "d.parquet", tmp_path / "i")


def test_times_of_numpy_are_dates_whatever_their_unit(tmp_path):
    values = [np.datetime64("2020-01-02", unit) for unit in ("D", "s", "ms", "us", "ns")]
    values += [np.datetime64("2020-01-02T00:00:00.123456789"), np.array(["2020-01-02", "NaT"], "datetime64[ns]")]
    values += [np.datetime64("NaT", "ns")]
    rows = [{"id": n, "text": f"t {n}", "when": value} for n, value in enumerate(values)]
    index = EmbeddingIndex.build(HashEncoder(16), rows, tmp_path / "i")
    stored = [json.loads(entry.metadata or "{}").get("when") for entry in index.entries(range(len(rows)))]
    midnight = "2020-01-02T00:00:00"
    assert stored == ["2020-01-02", *[midnight] * 4, f"{midnight}.123456789", [midnight, None], None]
    for wanted in (date(2020, 1, 2), np.datetime64("2020-01-02")):
        found = index.search("q", 10, filter={"when": wanted})[1][0]
        assert {"0", "1", "2", "3", "4", "6"} <= set(found)
    assert set(index.search("q", 10, filter={"when": np.datetime64("2020-01-02", "ns")})[1][0]) >= {"1", "4"}


def test_a_wanted_decimal_is_compared_as_numbers_are_stored(tmp_path):
    values = [Decimal(9007199254740993), Decimal(9007199254740992), Decimal("0.1"), 0.1, "0.1"]
    rows = [{"id": n, "text": f"t {n}", "value": value} for n, value in enumerate(values)]
    index = EmbeddingIndex.build(HashEncoder(16), rows, tmp_path / "i")

    def found(wanted):
        return sorted(index.search("q", 10, filter={"value": wanted})[1][0])

    assert found(Decimal(9007199254740993)) == ["0"]
    assert found(Decimal("0.1")) == ["2", "3", "4"]
    assert found({">": Decimal(9007199254740992)}) == ["0"]


def test_a_field_that_no_row_has_is_named(tmp_path, caplog):
    rows = [{"id": 1, "text": "x", "headline": "T", "year": 2000}, {"id": 2, "text": "y", "lang": "en"}]
    EmbeddingIndex.build(HashEncoder(16), rows, tmp_path / "i", metadata_fields=["yaer", "lang"], title_field="headlin")
    assert caplog.text.count("no row has the field 'headlin', 'yaer'") == 1
    caplog.clear()
    EmbeddingIndex.build(HashEncoder(16), rows, tmp_path / "j", metadata_fields=["year"], title_field="headline")
    EmbeddingIndex.build(HashEncoder(16), rows, tmp_path / "k")
    assert "no row has" not in caplog.text
