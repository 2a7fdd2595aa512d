"""An open index while others write: which version is read, which model is asked, which rows a stopped build keeps."""

from __future__ import annotations

import logging
import shutil
import threading
import tracemalloc

import numpy as np
import pytest
from helpers.encoders import HashEncoder, Stops
from helpers.index_driver import CUT
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ubmoe_st.index import CorpusError, EmbeddingIndex, IndexGroup, exact
from ubmoe_st.index.build import Build
from ubmoe_st.index.manifest import Journal


def rows(count: int, first: int = 0) -> list[dict[str, str]]:
    return [{"id": f"d{n}", "text": f"text number {n}"} for n in range(first, first + count)]


def test_rows_of_another_model_are_not_added(tmp_path):
    index = EmbeddingIndex.build(HashEncoder(16), rows(20), tmp_path / "i")
    EmbeddingIndex.build(HashEncoder(16, salt="other"), rows(20), tmp_path / "i", overwrite=True)
    with pytest.raises(ValueError, match="not the model"):
        index.add(rows(1, 50))
    assert len(EmbeddingIndex.open(tmp_path / "i")) == 20


def test_a_model_that_was_changed_since_adds_nothing(tmp_path):
    encoder = HashEncoder(16)
    index = EmbeddingIndex.build(encoder, rows(20), tmp_path / "i")
    assert index.add(rows(1, 40)) == 1
    encoder.salt = "trained further"
    with pytest.raises(ValueError, match="not the model"):
        index.add(rows(1, 50))


def test_a_refreshed_index_lets_go_of_a_model_that_is_no_longer_its_own(tmp_path, caplog):
    encoder, other = HashEncoder(16), HashEncoder(16, salt="other")
    index = EmbeddingIndex.build(encoder, rows(20), tmp_path / "i")
    EmbeddingIndex.build(other, rows(30), tmp_path / "i", overwrite=True)
    with caplog.at_level(logging.WARNING):
        assert index.refresh()
    assert "another model" in caplog.text
    with pytest.raises(ValueError, match="model"):
        index.search("text number 3")
    index.use_model(other)
    assert index.search("text number 3", k=1)[1] == [["d3"]]


def test_an_index_that_was_built_from_scratch_is_a_newer_one(tmp_path):
    encoder = HashEncoder(16)
    index = EmbeddingIndex.build(encoder, rows(5), tmp_path / "i")
    shutil.rmtree(tmp_path / "i")
    EmbeddingIndex.build(encoder, rows(9), tmp_path / "i")
    assert index.version == EmbeddingIndex.open(tmp_path / "i").version
    assert index.refresh()
    assert len(index) == 9
    assert not index.refresh()


def test_a_search_stays_with_the_version_it_began_with(tmp_path):
    encoder = HashEncoder(16)
    index = EmbeddingIndex.build(encoder, rows(1200), tmp_path / "i")
    asked = [f"text number {n}" for n in range(900, 960)]
    wanted = [[f"d{n}"] for n in range(900, 960)]
    wrong, done = [], threading.Event()

    def search():
        group = IndexGroup([index])
        while not done.is_set():
            for found in (
                index.search(asked, k=1)[1],
                [[hit.id for hit in line] for line in index.search_entries(asked, k=1)],
                group.search(asked, k=1)[1],
                [[hit.id for hit in line] for line in group.search_entries(asked, k=1)],
            ):
                if found != wanted:
                    wrong.append(found)

    thread = threading.Thread(target=search)
    thread.start()
    try:
        for n in range(5):
            index.delete([f"d{n * 24 + m}" for m in range(24)])
            index.compact()
    finally:
        done.set()
        thread.join()
    assert len(index) == 1080
    assert not wrong


def test_a_reader_does_not_open_the_faiss_file_of_a_later_version(tmp_path, caplog):
    encoder = HashEncoder(16)
    index = EmbeddingIndex.build(encoder, rows(1500), tmp_path / "i", kind="hnsw")
    reader = EmbeddingIndex.open(tmp_path / "i", model=encoder)
    assert reader.kind == "hnsw"
    index.delete([f"d{n}" for n in range(300)])
    index.compact()
    index.reindex("hnsw")
    assert index.info["index"]["file"] == reader.info["index"]["file"], "the name was not used again"
    queries = [f"text number {n}" for n in range(0, 1500, 7)]
    with caplog.at_level(logging.WARNING):
        found = reader.search(queries, k=1)[1]
    assert found == [[f"d{n}"] for n in range(0, 1500, 7)]
    assert "replaced the faiss index" in caplog.text


def test_another_working_directory_changes_no_open_index(tmp_path, monkeypatch):
    encoder = HashEncoder(16)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    EmbeddingIndex.build(encoder, rows(1500), "i", kind="hnsw")
    index = EmbeddingIndex.open("i", model=encoder)
    monkeypatch.chdir(tmp_path / "sub")
    assert index.search("text number 3", k=1)[1] == [["d3"]]
    assert index.add(rows(1, 5000)) == 1
    assert not list((tmp_path / "sub").iterdir())


@pytest.mark.parametrize("rule", ["upsert", "raise"])
@pytest.mark.parametrize("compacted", [False, True])
def test_a_document_whose_first_chunk_is_gone_is_still_known(tmp_path, rule, compacted):
    encoder = HashEncoder(16)
    document = {"id": "doc", "text": " ".join(f"word{n}" for n in range(60))}
    index = EmbeddingIndex.build(encoder, [document, *rows(3)], tmp_path / "i", chunk_tokens=20)
    chunks = len(index.texts("doc"))
    assert chunks > 2
    index.delete("doc#0")
    if compacted:
        index.compact()
    new = [{"id": "doc", "text": "brand new"}]
    if rule == "raise":
        with pytest.raises(CorpusError, match="'doc' is already there"):
            index.add(new)
    else:
        index.upsert(new)
        assert index.texts("doc") == ["brand new"]
        assert len(index) == 4


def test_a_stopped_build_goes_on_within_its_first_row(tmp_path):
    document = {"id": "long", "text": " ".join(f"word{n}" for n in range(3000))}
    options = {"chunk_tokens": 10, "window_tokens": 200, "batch_tokens": 200}
    with pytest.raises(KeyboardInterrupt):
        EmbeddingIndex.build(Stops(12), [document], tmp_path / "i", **options)
    journal = Journal.read(tmp_path / "i")
    assert journal.position.row == 0
    assert journal.rows > 0
    encoder, whole = (HashEncoder(16, batch_noise=1e-3) for _ in range(2))
    index = EmbeddingIndex.build(encoder, [document], tmp_path / "i", **options)
    EmbeddingIndex.build(whole, [document], tmp_path / "whole", **options)
    assert sum(encoder.batches) < sum(whole.batches), "it began anew"
    assert list(index) == list(EmbeddingIndex.open(tmp_path / "whole"))


def test_a_damaged_journal_is_thrown_away_where_that_was_asked_for(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        EmbeddingIndex.build(Stops(6), rows(60), tmp_path / "i", **CUT)
    (tmp_path / "i" / "build" / "journal.json").write_text("{")
    with pytest.raises(ValueError, match="overwrite=True"):
        EmbeddingIndex.build(HashEncoder(16), rows(60), tmp_path / "i", **CUT)
    assert len(EmbeddingIndex.build(HashEncoder(16), rows(60), tmp_path / "i", overwrite=True, **CUT)) == 60


def test_no_row_of_a_generator_is_lost_to_an_unfinished_build_of_another(tmp_path):
    def of(kind):
        return ({"id": f"{kind}{n}", "text": f"{kind} text {n}"} for n in range(60))

    with pytest.raises(KeyboardInterrupt):
        EmbeddingIndex.build(Stops(6), of("old"), tmp_path / "i", overwrite=True, **CUT)
    encoder = HashEncoder(16, batch_noise=1e-3)
    with pytest.raises(CorpusError, match="give it again"):
        EmbeddingIndex.build(encoder, of("new"), tmp_path / "i", overwrite=True, **CUT)
    index = EmbeddingIndex.build(encoder, of("new"), tmp_path / "i", overwrite=True, **CUT)
    assert list(index) == [f"new{n}" for n in range(60)]


def test_numbers_that_are_none_are_refused_before_anything_is_embedded(tmp_path):
    encoder = HashEncoder(16)
    for options in ({"segment_rows": 1e5}, {"segment_rows": True}, {"truncate_dim": True}, {"truncate_dim": 4.0}):
        with pytest.raises(TypeError, match=next(iter(options))):
            EmbeddingIndex.build(encoder, rows(5), tmp_path / "i", **options)
    assert not (tmp_path / "i").exists()
    index = EmbeddingIndex.build(encoder, rows(5), tmp_path / "i", segment_rows=np.int64(2), truncate_dim=np.int64(4))
    assert len(EmbeddingIndex.open(tmp_path / "i", model=encoder)) == 5
    assert index.dimension == 4


def test_another_search_memory_is_another_index(tmp_path):
    encoder = HashEncoder(16)
    EmbeddingIndex.build(encoder, rows(20), tmp_path / "i")
    with pytest.raises(ValueError, match="overwrite=True"):
        EmbeddingIndex.build(encoder, rows(20), tmp_path / "i", search_memory_budget="100MB")
    EmbeddingIndex.build(encoder, rows(20), tmp_path / "f", kind="flat")
    EmbeddingIndex.build(encoder, rows(20), tmp_path / "f", kind="flat", search_memory_budget="100MB")


def test_tuning_with_numbers_that_are_none_keeps_nothing(tmp_path):
    index = EmbeddingIndex.build(HashEncoder(16), rows(1500), tmp_path / "i", kind="hnsw")
    for options in ({"k": 0}, {"held_back": 0}, {"held_back": -3}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} "):
            index.tune(**options)
    assert index.version == 1


def test_texts_of_numpy_are_queries_in_every_mode(tmp_path):
    encoder = HashEncoder(16)
    index = EmbeddingIndex.build(encoder, rows(30), tmp_path / "i")
    index.build_bm25()
    for mode in ("dense", "bm25", "hybrid"):
        expected = index.search(["text number 3"], k=2, mode=mode)
        found = index.search(np.array(["text number 3"]), k=2, mode=mode)
        assert found[1] == expected[1]
        assert expected[1][0][0]


def test_a_group_takes_any_iterable(tmp_path):
    encoder = HashEncoder(16)
    made = (EmbeddingIndex.build(encoder, rows(5, 10 * n), tmp_path / f"i{n}") for n in range(2))
    assert IndexGroup(made).search("text number 11", k=1)[1] == [["d11"]]


def test_many_queries_are_multiplied_in_parts(monkeypatch):
    generator = np.random.default_rng(0)
    queries, vectors = (generator.standard_normal((n, 8)).astype(np.float32) for n in (50, 300))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    def found():
        into = exact.TopK(queries, 7, exact.SLACK["float32"])
        exact.exact_search([(0, vectors[:200]), (200, vectors[200:])], None, into)
        return into.result()

    at_once = found()
    monkeypatch.setattr(exact, "PRODUCT_BYTES", 4 * 200 * 3)
    for mine, other in zip(found(), at_once):
        np.testing.assert_array_equal(mine, other)


def with_tokenizer(tokenizer: Tokenizer, limit: int) -> HashEncoder:
    encoder = HashEncoder(16)
    encoder.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    encoder.max_seq_length = limit
    return encoder


def test_a_document_without_a_chunk_is_a_bad_row_and_takes_no_number(tmp_path):
    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.Whitespace()
    encoder = with_tokenizer(words, 64)
    documents = [("blank", "\u200b"), ("victim", "keep me please"), ("blank", "now filled")]
    corpus = [{"id": name, "text": text} for name, text in documents]
    options = {"chunk_tokens": 8, "on_duplicate": "upsert"}
    with pytest.raises(CorpusError, match="no token that the model reads"):
        EmbeddingIndex.build(encoder, corpus, tmp_path / "i", **options)
    index = EmbeddingIndex.build(encoder, corpus, tmp_path / "i", on_bad_row="skip", **options)
    assert list(index) == ["victim#0", "blank#0"]
    assert index.info["sources"][0]["bad_rows"] == 1


def test_queries_of_many_tokens_a_character_are_counted(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({"[UNK]": 0, **{letter: n for n, letter in enumerate(alphabet, 1)}}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    index = EmbeddingIndex.build(with_tokenizer(raw, 100), rows(5), tmp_path / "i")
    with pytest.warns(UserWarning, match="1 of 2 queries are longer than the 100 tokens"):
        index.search(["\u0e01" * 40, "a" * 100], k=1)


def test_replacing_rows_takes_few_bytes_for_each(tmp_path, monkeypatch):
    count, found = 4000, Build._dead_rows
    peaks = []

    def watched(self, snapshot):
        tracemalloc.start()
        dead = found(self, snapshot)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        np.testing.assert_array_equal(dead, np.arange(count))
        return dead

    index = EmbeddingIndex.build(HashEncoder(4), rows(count), tmp_path / "i")
    monkeypatch.setattr(Build, "_dead_rows", watched)
    assert index.upsert(rows(count)) == count
    assert peaks[0] < 80 * count
