"""Words of BM25: letters that Unicode writes in several ways are one, and a part of before keeps its own rule."""

from __future__ import annotations

import pytest
from helpers.encoders import HashEncoder

from ubmoe_st.index import EmbeddingIndex, hybrid


def test_letters_that_are_written_in_several_ways_are_one_word(tmp_path):
    pytest.importorskip("bm25s")
    texts = {"nfc": "caf\u00e9 M\u00fcller", "nfd": "cafe\u0301 Mu\u0308ller", "other": "nothing else"}
    texts |= {"big": "STRASSE", "small": "Stra\u00dfe", "wide": "\uff34\uff2f\uff2b\uff39\uff2f", "tied": "\ufb01nance"}
    rows = [{"id": name, "text": text} for name, text in texts.items()]
    index = EmbeddingIndex.build(HashEncoder(8), rows, tmp_path / "i")
    index.build_bm25()

    def found(query):
        return {name for name in index.search(query, 9, mode="bm25")[1][0] if name}

    for query, expected in (
        ("caf\u00e9", {"nfc", "nfd"}),
        ("mu\u0308ller", {"nfc", "nfd"}),
        ("stra\u00dfe", {"big", "small"}),
        ("Strasse", {"big", "small"}),
        ("tokyo", {"wide"}),
        ("finance", {"tied"}),
    ):
        assert found(query) == expected, query


def test_a_bm25_part_of_before_is_searched_by_its_own_words(tmp_path, monkeypatch):
    pytest.importorskip("bm25s")
    rows = [{"id": "nfc", "text": "caf\u00e9"}, {"id": "nfd", "text": "cafe\u0301"}, {"id": "x", "text": "Stra\u00dfe"}]
    index = EmbeddingIndex.build(HashEncoder(8), rows, tmp_path / "i")
    with monkeypatch.context() as patch:
        patch.setattr(hybrid, "_folded", lambda text: text)
        patch.setattr(hybrid, "WORDS", None)
        index.build_bm25()
    assert "words" not in index.info["bm25"], "an index of before has no number"
    index = EmbeddingIndex.open(tmp_path / "i", model=HashEncoder(8))
    for name, query in (("nfc", "caf\u00e9"), ("nfd", "cafe\u0301"), ("x", "stra\u00dfe")):
        assert [one for one in index.search(query, 9, mode="bm25")[1][0] if one] == [name]
    index.build_bm25()
    assert set(index.search("caf\u00e9", 2, mode="bm25")[1][0]) == {"nfc", "nfd"}


def test_a_query_is_folded_where_all_texts_are_plain(tmp_path):
    pytest.importorskip("bm25s")
    index = EmbeddingIndex.build(HashEncoder(8), [{"id": "a", "text": "strasse"}, {"id": "b", "text": "x y"}], tmp_path)
    index.build_bm25()
    assert "words" not in index.info["bm25"]
    assert index.search("Stra\u00dfe", 1, mode="bm25")[1] == [["a"]]
