"""The embedding index: exact search, building, bad input. References: numpy, the json module, faiss."""

from __future__ import annotations

import gzip
import json
from datetime import date
from decimal import Decimal
from uuid import UUID

import numpy as np
import pytest
from helpers.encoders import HashEncoder

from ubmoe_st.index import CorpusError, EmbeddingIndex
from ubmoe_st.index.embedder import Embedder
from ubmoe_st.index.kinds import check_factory
from ubmoe_st.index.search import SearchSettings
from ubmoe_st.index.store import Snapshot


def rows(count: int, words: int = 12, seed: int = 0) -> list[dict]:
    generator = np.random.default_rng(seed)
    made = []
    for number in range(count):
        length = int(generator.integers(1, 2 * words))
        text = " ".join(f"w{generator.integers(1000)}" for _ in range(length))
        made.append({"id": f"doc-{number}", "text": text, "title": f"Title {number}" if number % 3 else None})
    return made


def write_jsonl(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), "utf-8")
    return path


def model_text(row: dict) -> str:
    return f"{row['title']}\n{row['text']}" if row.get("title") else row["text"]


def brute_force(queries: np.ndarray, matrix: np.ndarray, k: int):
    """Cosines by plain numpy in float64: falling score, then rising row."""
    a = queries.astype(np.float64) / np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True)
    b = matrix.astype(np.float64) / np.linalg.norm(matrix.astype(np.float64), axis=1, keepdims=True)
    scores = a @ b.T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


@pytest.fixture
def encoder():
    return HashEncoder(24)


def test_scores_are_the_cosines_of_numpy_brute_force(tmp_path, encoder):
    corpus = rows(300)
    index = EmbeddingIndex.build(encoder, write_jsonl(tmp_path / "c.jsonl", corpus), tmp_path / "i")
    matrix = np.stack([encoder.vector(model_text(row)) for row in corpus])
    queries = ["first query", "second query", model_text(corpus[7])]
    scores, ids = index.search(queries, 10)
    expected, order = brute_force(np.stack([encoder.vector(q) for q in queries]), matrix, 10)
    assert scores.shape == (3, 10)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=2e-6)
    assert ids == [[f"doc-{row}" for row in line] for line in order]
    assert ids[2][0] == "doc-7"
    assert scores[2, 0] == pytest.approx(1.0, abs=1e-6)
    assert len(set(np.round(scores.ravel(), 4))) > 10, "scores hardly differ, so this test would be vacuous"


def test_vector_queries_of_any_length_give_the_same_cosines(tmp_path, encoder):
    index = EmbeddingIndex.build(encoder, rows(50), tmp_path / "i")
    vector = encoder.vector("x").astype(np.float32)
    text_scores, text_ids = index.search("x", 5)
    for query in (vector, 7.5 * vector, vector[None], vector.tolist()):
        scores, ids = index.search(query, 5)
        assert ids == text_ids
        np.testing.assert_allclose(scores, text_scores, atol=1e-6)


def test_equal_vectors_tie_and_come_in_corpus_order(tmp_path, encoder):
    corpus = [{"id": str(number), "text": f"text {number % 4}"} for number in range(2000)]
    index = EmbeddingIndex.build(encoder, corpus, tmp_path / "i")
    scores, ids = index.search(["text 1", "text 2"], 300)
    for line, values, kind in zip(ids, scores, (1, 2)):
        assert line == [str(number) for number in range(2000) if number % 4 == kind][:300]
        assert len(set(values.tolist())) == 1


def test_blocks_and_segments_do_not_change_the_result(tmp_path, encoder):
    corpus = rows(700)
    whole = EmbeddingIndex.build(encoder, corpus, tmp_path / "a")
    cut = EmbeddingIndex.build(encoder, corpus, tmp_path / "b", segment_rows=100, window_tokens=300)
    assert len(cut.info["segments"]) > 3
    assert len(whole.info["segments"]) == 1
    cut = EmbeddingIndex(Snapshot(cut.path), Embedder(encoder), SearchSettings(block_bytes=4 * 24 * 37))
    queries = [f"query {number}" for number in range(20)]
    for k in (1, 10, 699, 700, 5000):
        ours, ours_ids = cut.search(queries, k)
        theirs, their_ids = whole.search(queries, k)
        assert ours_ids == their_ids
        np.testing.assert_array_equal(ours, theirs)
    assert ours.shape == (20, 700)


def test_faiss_opens_the_file_and_finds_the_same(tmp_path, encoder):
    import faiss

    corpus = rows(400)
    index = EmbeddingIndex.build(encoder, corpus, tmp_path / "i", segment_rows=150, window_tokens=400)
    stock = faiss.read_index(str(index.path / index.info["index"]["file"]))
    assert isinstance(stock, faiss.IndexFlat)
    assert stock.ntotal == 400
    assert stock.metric_type == faiss.METRIC_INNER_PRODUCT
    queries = np.stack([encoder.vector(f"q{n}") for n in range(8)]).astype(np.float32)
    scores, found = stock.search(queries, 10)
    ours, ids = index.search(queries, 10)
    assert ids == [[f"doc-{row}" for row in line] for line in found]
    np.testing.assert_allclose(ours, scores, atol=2e-6)


def test_reopened_index_gives_texts_ids_and_hits(tmp_path, encoder):
    corpus = rows(60)
    corpus[5]["year"], corpus[5]["tags"] = 1999, ["a", "b"]
    EmbeddingIndex.build(encoder, write_jsonl(tmp_path / "c.jsonl", corpus), tmp_path / "i")
    index = EmbeddingIndex.open(tmp_path / "i", model=encoder, verify=True)
    assert len(index) == 60
    assert list(index) == [row["id"] for row in corpus]
    assert index.texts(["doc-3", "doc-59"]) == [corpus[3]["text"], corpus[59]["text"]]
    assert "doc-3" in index
    assert "doc-60" not in index
    with pytest.raises(KeyError, match="doc-60"):
        index.texts("doc-60")
    hit = index.search_entries(model_text(corpus[5]), 2)[0][0]
    assert (hit.id, hit.text, hit.title) == ("doc-5", corpus[5]["text"], corpus[5]["title"])
    assert hit.metadata == {"year": 1999, "tags": ["a", "b"]}
    assert json.loads(json.dumps(hit.as_dict()))["id"] == "doc-5"
    np.testing.assert_allclose(index.vectors("doc-5")[0], encoder.vector(model_text(corpus[5])), atol=1e-6)


def test_half_precision_scores_are_cosines_of_what_is_stored(tmp_path, encoder):
    corpus = rows(200)
    index = EmbeddingIndex.build(encoder, corpus, tmp_path / "i", dtype="float16")
    stored = np.load(next(index.path.glob("segments/*/vectors.npy")))
    assert stored.dtype == np.float16
    queries = np.stack([encoder.vector(f"q{n}") for n in range(5)])
    scores, ids = index.search(queries, 10)
    expected, order = brute_force(queries, stored, 10)
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert ids == [[f"doc-{row}" for row in line] for line in order]


def test_matryoshka_truncation_is_normalised_again(tmp_path, encoder):
    corpus = rows(80)
    EmbeddingIndex.build(encoder, corpus, tmp_path / "i", truncate_dim=9)
    index = EmbeddingIndex.open(tmp_path / "i", model=encoder)
    matrix = np.stack([encoder.vector(model_text(row)) for row in corpus])
    scores, _ = index.search(["q"], 4)
    expected, _ = brute_force(encoder.vector("q")[None, :9], matrix[:, :9], 4)
    np.testing.assert_allclose(scores, expected, atol=2e-6)
    assert index.dimension == 9


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        (np.ones((1, 23)), ValueError, "23 dimensions, the index 24"),
        (np.zeros((1, 24)), ValueError, "zero, NaN or infinite"),
        (np.full((2, 24), np.nan), ValueError, "query 0"),
        (["fine", 3], TypeError, "query 1 is a int"),
        (object(), TypeError, "texts or vectors"),
        (np.ones((1, 1, 24)), ValueError, "shape"),
    ],
)
def test_wrong_queries_are_refused(tmp_path, encoder, query, error, message):
    index = EmbeddingIndex.build(encoder, rows(5), tmp_path / "i")
    with pytest.raises(error, match=message):
        index.search(query)


@pytest.mark.parametrize("k", [0, -1, 2.5, True])
def test_wrong_k_is_refused(tmp_path, encoder, k):
    index = EmbeddingIndex.build(encoder, rows(5), tmp_path / "i")
    with pytest.raises(ValueError, match="k is a whole number"):
        index.search("q", k)


def test_no_queries_give_no_results(tmp_path, encoder):
    index = EmbeddingIndex.build(encoder, rows(5), tmp_path / "i")
    scores, ids = index.search([], 3)
    assert scores.shape == (0, 3)
    assert ids == []


def test_another_model_is_refused_and_the_same_one_taken(tmp_path, encoder):
    EmbeddingIndex.build(encoder, rows(5), tmp_path / "i")
    with pytest.raises(ValueError, match="not the model"):
        EmbeddingIndex.open(tmp_path / "i", model=HashEncoder(24, salt="other"))
    with pytest.raises(ValueError, match="24 dimensions, the model gives 25"):
        EmbeddingIndex.open(tmp_path / "i", model=HashEncoder(25))
    with pytest.raises(ValueError, match="open it with model="):
        EmbeddingIndex.open(tmp_path / "i").search("needs a model")
    almost = HashEncoder(24, batch_noise=1e-4)
    assert EmbeddingIndex.open(tmp_path / "i", model=almost).search("q", 1)[0].shape == (1, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "x"}', "needs a string in 'text', which is absent"),
        (b'{"id": "x", "text": 7}', "which is a int"),
        (b'{"id": "x", "text": "  \\n"}', "empty 'text'"),
        (b'{"text": "no id"}', "needs a non-empty string or integer in 'id'"),
        (b'{"id": 1.5, "text": "t"}', "in 'id', got 1.5"),
        (b'{"id": "x", "text": "t", "title": 3}', "string in 'title'"),
        (b'{"id": "x", "text": "caf\xe9"}', "not valid UTF-8"),
        (b'{"id": "x", "text": "\\ud800"}', "not valid UTF-8"),
        (b'{"id": "x", "text": "t"', "is not JSON"),
        (b'["x"]', "is a list, expected an object"),
        (b'{"id": "x", "text": "t", "m": ' + b'{"a":' * 700 + b"1" + b"}" * 701, "metadata that JSON cannot hold"),
        (b'{"id": "x", "text": "' + b"a" * 5_000_000 + b'"}', "5,000,02. bytes, more than max_row_bytes=4,194,304"),
    ],
)
def test_a_bad_row_is_reported_with_its_line_and_skipped_by_choice(tmp_path, encoder, line, message):
    good = [json.dumps(row).encode() for row in rows(4)]
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"\n".join([good[0], b"", good[1], line, good[2], good[3]]) + b"\n")
    with pytest.raises(CorpusError, match=rf"c\.jsonl line 4.*{message}"):
        EmbeddingIndex.build(encoder, path, tmp_path / "i")
    index = EmbeddingIndex.build(encoder, path, tmp_path / "i", on_bad_row="skip")
    assert list(index) == ["doc-0", "doc-1", "doc-2", "doc-3"]
    source = index.info["sources"][0]
    assert source["bad_rows"] == 1
    assert "c.jsonl line 4" in (index.path / source["bad_rows_file"]).read_text()


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"id": "a"}\n'])
def test_an_empty_corpus_is_refused(tmp_path, encoder, content):
    (tmp_path / "c.jsonl").write_bytes(content)
    with pytest.raises(CorpusError, match="is empty"):
        EmbeddingIndex.build(encoder, tmp_path / "c.jsonl", tmp_path / "i", on_bad_row="skip")
    with pytest.raises(FileNotFoundError, match="not finished"):
        EmbeddingIndex.open(tmp_path / "i")


class Broken(HashEncoder):
    """Gives a useless vector for one text."""

    def __init__(self, value: float) -> None:
        super().__init__(24)
        self.value = value

    def encode(self, inputs, **kwargs):
        vectors = super().encode(inputs, **kwargs)
        for position, text in enumerate(inputs):
            if "poison" in text:
                vectors[position] = self.value
        return vectors


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_useless_vector_never_gets_in(tmp_path, value):
    corpus = rows(30)
    corpus[11]["text"] = "poison"
    with pytest.raises(ValueError, match=r"'doc-11'.*zero, NaN or infinite"):
        EmbeddingIndex.build(Broken(value), corpus, tmp_path / "i")
    index = EmbeddingIndex.build(Broken(value), corpus, tmp_path / "i", on_bad_row="skip")
    assert len(index) == 29
    assert "doc-11" not in index
    scores, ids = index.search("q", 30)
    assert np.isfinite(scores).all()
    assert sorted(ids[0]) == sorted(row["id"] for row in corpus if row["id"] != "doc-11")


def test_duplicate_ids_are_refused_skipped_or_win(tmp_path, encoder):
    corpus = [{"id": f"d{number % 40}", "text": f"text {number}"} for number in range(60)]
    cut = {"window_tokens": 30, "segment_rows": 25}
    with pytest.raises(CorpusError, match=r"row 40: id 'd0' is already there"):
        EmbeddingIndex.build(encoder, corpus, tmp_path / "a", **cut)
    first = EmbeddingIndex.build(encoder, corpus, tmp_path / "b", on_duplicate="skip", **cut)
    assert first.texts(["d0", "d19", "d39"]) == ["text 0", "text 19", "text 39"]
    last = EmbeddingIndex.build(encoder, corpus, tmp_path / "c", on_duplicate="upsert", **cut)
    assert last.texts(["d0", "d19", "d39"]) == ["text 40", "text 59", "text 39"]
    for index in (first, last):
        assert len(index) == 40
        assert len(set(index.search("q", 100)[1][0])) == 40
    assert last.search("text 0", 1)[0][0, 0] < 0.99
    assert last.search("text 40", 1)[0][0, 0] > 0.99


def test_chunks_keep_parent_and_span_and_lose_no_word(tmp_path, encoder):
    generator = np.random.default_rng(3)
    corpus = [
        {"id": f"d{n}", "text": "  ".join(f"w{generator.integers(99)}" for _ in range(int(generator.integers(1, 90))))}
        for n in range(40)
    ]
    options = {"chunk_tokens": 10, "overlap_tokens": 3, "window_tokens": 70, "segment_rows": 30}
    index = EmbeddingIndex.build(encoder, corpus, tmp_path / "i", **options)
    assert len(index) > 100
    for row in corpus:
        chunks = index.entries(row["id"])
        assert [chunk.id for chunk in chunks] == [f"{row['id']}#{n}" for n in range(len(chunks))]
        words: list[str] = []
        for chunk in chunks:
            assert chunk.parent == row["id"]
            assert chunk.text == row["text"][chunk.start : chunk.end]
            assert len(chunk.text.split()) <= 10
            found = chunk.text.split()
            words += found if not words else found[3:]
        assert words == row["text"].split()
    assert index.search_entries(index.texts("d7#0")[0], 1)[0][0].score > 0.999


def test_a_long_text_is_cut_the_same_in_blocks():
    from ubmoe_st.index.embedder import TokenCounter, chunk_spans

    text = " ".join(f"word{n}" for n in range(3000))
    counter = TokenCounter(None, None)
    whole = chunk_spans(text, counter, 50, 7)
    assert chunk_spans(text, counter, 50, 7, block_characters=333) == whole
    assert len(whole) == 70


def test_every_kind_of_corpus_gives_the_same_index(tmp_path, encoder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    corpus = [{**row, "year": 1990 + n} for n, row in enumerate(rows(30))]
    plain = write_jsonl(tmp_path / "c.jsonl", corpus)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    pq.write_table(pa.Table.from_pylist(corpus), tmp_path / "c.parquet", row_group_size=7)
    sources = [plain, tmp_path / "c.jsonl.gz", tmp_path / "c.parquet", corpus, (row for row in corpus)]
    indexes = [EmbeddingIndex.build(encoder, source, tmp_path / f"i{n}") for n, source in enumerate(sources)]
    for index in indexes:
        assert index.entries("doc-7")[0].metadata == '{"year": 1997}'
        assert list(index) == list(indexes[0])
        np.testing.assert_array_equal(index.vectors(list(index)), indexes[0].vectors(list(indexes[0])))


def test_tables_and_folders_are_read(tmp_path, encoder):
    (tmp_path / "c.csv").write_text('key,body,lang\n1,"two\nlines, quoted",en\n2,plain,\n', "utf-8-sig")
    index = EmbeddingIndex.build(encoder, tmp_path / "c.csv", tmp_path / "a", id_field="key", text_field="body")
    assert index.texts(["1", "2"]) == ["two\nlines, quoted", "plain"]
    assert index.entries("1")[0].metadata == '{"lang": "en"}'
    (tmp_path / "c.tsv").write_text("id\ttext\na\tx\nb\ty\tz\n", "utf-8")
    with pytest.raises(CorpusError, match=r"c\.tsv line 3.*3 columns where the header has 2"):
        EmbeddingIndex.build(encoder, tmp_path / "c.tsv", tmp_path / "b")
    (tmp_path / "texts" / "sub").mkdir(parents=True)
    (tmp_path / "texts" / "one.txt").write_text("first")
    (tmp_path / "texts" / "sub" / "two.md").write_text("second")
    index = EmbeddingIndex.build(encoder, tmp_path / "texts", tmp_path / "c")
    assert list(index) == ["one.txt", "sub/two.md"]
    index = EmbeddingIndex.build(encoder, ["just", "strings"], tmp_path / "d", id_field=None)
    assert index.texts(["0", "1"]) == ["just", "strings"]


def test_a_dataset_is_read(tmp_path, encoder):
    datasets = pytest.importorskip("datasets")
    corpus = rows(12)
    dataset = datasets.Dataset.from_list(corpus)
    dataset.save_to_disk(tmp_path / "saved")
    for number, source in enumerate((dataset, dataset.to_iterable_dataset(), tmp_path / "saved")):
        index = EmbeddingIndex.build(encoder, source, tmp_path / f"i{number}")
        assert list(index) == [row["id"] for row in corpus]


def test_a_damaged_gzip_is_refused(tmp_path, encoder):
    rows = b"".join(b'{"id": "%d", "text": "row %d"}\n' % (n, n * n * 7919) for n in range(3000))
    damaged = bytearray(gzip.compress(rows))
    damaged[40:60] = b"\xff" * 20
    (tmp_path / "c.jsonl.gz").write_bytes(damaged)
    with pytest.raises(CorpusError, match="damaged"):
        EmbeddingIndex.build(encoder, tmp_path / "c.jsonl.gz", tmp_path / "a")


def test_rows_that_no_reader_takes_are_reported_with_their_place(tmp_path, encoder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "n.jsonl").write_text(
        '{"id": "a", "text": "cat"}\n{"id": "b", "text": "dog", "n": ' + "9" * 5000 + "}\n"
    )
    (tmp_path / "q.csv").write_text('id,text\n1,cat\n2,"open\n' + "".join(f"{n},row {n}\n" for n in range(3, 9)))
    offsets = np.array([0, 2, 4], np.int32).tobytes()
    text = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(offsets), pa.py_buffer(b"ok\xff\xfe")])
    pq.write_table(pa.table({"id": ["1", "2"], "text": text}), tmp_path / "p.parquet")
    for name, place, kept in (("n.jsonl", "line 2", 1), ("q.csv", "line 3", 7), ("p.parquet", "row 1", 1)):
        with pytest.raises(CorpusError, match=rf"{name} {place}"):
            EmbeddingIndex.build(encoder, tmp_path / name, tmp_path / f"{name}-strict")
        index = EmbeddingIndex.build(encoder, tmp_path / name, tmp_path / f"{name}-i", on_bad_row="skip")
        assert len(index) == kept


def test_a_parquet_file_without_its_footer_is_refused(tmp_path, encoder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "p.parquet"
    pq.write_table(pa.table({"id": ["1"], "text": ["cat"]}), file)
    content = file.read_bytes()
    size = int.from_bytes(content[-8:-4], "little")
    file.write_bytes(content[: -8 - size] + b"\xff" * size + content[-8:])
    with pytest.raises(CorpusError, match=r"p\.parquet is not a readable parquet file"):
        EmbeddingIndex.build(encoder, file, tmp_path / "i")
    # A name of a column that is no UTF-8.
    pq.write_table(pa.table({"id": ["1"], "text": ["cat"], "wrong": ["x"]}), file, store_schema=False)
    file.write_bytes(file.read_bytes().replace(b"wrong", b"wro\x8fg"))
    with pytest.raises(CorpusError, match=r"p\.parquet is not a readable parquet file"):
        EmbeddingIndex.build(encoder, file, tmp_path / "i")


def test_a_csv_with_columns_of_one_name_or_an_endless_line_is_refused(tmp_path, encoder):
    (tmp_path / "c.csv").write_text("id,text,text\n1,a,b\n")
    with pytest.raises(CorpusError, match="same name"):
        EmbeddingIndex.build(encoder, tmp_path / "c.csv", tmp_path / "a")
    (tmp_path / "d.csv").write_text("id,text\n1," + "a" * 5000 + "\n")
    with pytest.raises(CorpusError, match="line 2 has more than max_row_bytes"):
        EmbeddingIndex.build(encoder, tmp_path / "d.csv", tmp_path / "b", max_row_bytes=1000)


def test_whole_numbers_are_ids_everywhere(tmp_path, encoder):
    index = EmbeddingIndex.build(encoder, [{"id": n, "text": f"row {n}"} for n in range(5)], tmp_path / "a")
    assert index.texts([1, "2"]) == ["row 1", "row 2"]
    assert index.texts(3) == ["row 3"]
    assert index.delete([1]) == 1
    assert len(index) == 4
    with pytest.raises(TypeError, match="a text or a whole number"):
        index.delete([None])


def test_a_truncated_gzip_is_refused(tmp_path, encoder):
    data = gzip.compress("".join(json.dumps(row) + "\n" for row in rows(2000)).encode())
    (tmp_path / "c.jsonl.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(CorpusError, match="truncated"):
        EmbeddingIndex.build(encoder, tmp_path / "c.jsonl.gz", tmp_path / "i")


@pytest.mark.parametrize("name", ["vectors.npy", "entries.arrow", "keys.npy"])
def test_a_truncated_or_changed_segment_is_found(tmp_path, encoder, name):
    index = EmbeddingIndex.build(encoder, rows(50), tmp_path / "i")
    assert index.verify() == []
    path = next((tmp_path / "i").glob(f"segments/*/{name}"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    problems = EmbeddingIndex.open(tmp_path / "i").verify()
    assert len(problems) == 1
    assert name in problems[0]
    with pytest.raises(ValueError, match="damaged"):
        EmbeddingIndex.open(tmp_path / "i", verify=True)
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=rf"{name}.*truncated"):
        EmbeddingIndex.open(tmp_path / "i")


def test_the_folder_is_refused_when_it_is_not_ours(tmp_path, encoder):
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "thesis.doc").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"thesis\.doc"):
            EmbeddingIndex.build(encoder, rows(3), tmp_path / "i", overwrite=overwrite)
    with pytest.raises(FileNotFoundError, match="no index"):
        EmbeddingIndex.open(tmp_path / "i")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        EmbeddingIndex.build(encoder, tmp_path / "absent.jsonl", tmp_path / "j")


def test_an_index_is_replaced_only_when_asked(tmp_path, encoder):
    EmbeddingIndex.build(encoder, rows(9), tmp_path / "i")
    again = EmbeddingIndex.build(HashEncoder(24), rows(9), tmp_path / "i")
    assert again.version == 1
    assert len(again) == 9
    with pytest.raises(ValueError, match="overwrite=True"):
        EmbeddingIndex.build(encoder, rows(10), tmp_path / "i")
    old = EmbeddingIndex.open(tmp_path / "i", model=encoder)
    new = EmbeddingIndex.build(encoder, rows(10, seed=1), tmp_path / "i", overwrite=True)
    assert (new.version, len(new)) == (2, 10)
    assert len(list((tmp_path / "i" / "segments").iterdir())) == 1
    assert old.texts("doc-8") == [rows(9)[8]["text"]]
    assert old.search("q", 3)[0].shape == (1, 3)
    assert old.refresh()
    assert len(old) == 10


def test_a_missing_library_is_named(tmp_path, encoder, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "faiss" else object())
    for action in (lambda: EmbeddingIndex.build(encoder, rows(3), tmp_path / "i"), lambda: EmbeddingIndex.open("i")):
        with pytest.raises(ImportError, match=r"needs faiss: pip install 'ubmoe-st\[index\]'"):
            action()


def test_progress_is_told_and_nothing_printed(tmp_path, encoder, capfd):
    states = []
    path = write_jsonl(tmp_path / "c.jsonl", rows(200))
    EmbeddingIndex.build(encoder, path, tmp_path / "i", window_tokens=200, progress=states.append)
    assert [state.rows for state in states] == sorted(state.rows for state in states)
    assert states[-1].rows == 200
    assert states[-1].fraction == 1.0
    assert all(state.tokens_per_second > 0 for state in states)
    assert capfd.readouterr() == ("", "")
    EmbeddingIndex.build(encoder, rows(20), tmp_path / "j", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "rows/s" in err


def test_batches_stay_within_the_token_budget():
    from ubmoe_st.index.windows import token_batches

    lengths = np.random.default_rng(0).integers(1, 300, 500).tolist()
    batches = list(token_batches(lengths, 1000, 64))
    assert sorted(row for batch in batches for row in batch) == list(range(500))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= 1000
        assert len(batch) <= 64
    assert list(token_batches([5000, 1], 1000, 64)) == [[0], [1]]


def test_ids_seen_are_remembered_like_a_dictionary_would(tmp_path):
    from ubmoe_st.index.seen import SeenIds

    seen, expected = SeenIds(tmp_path, cache_kib=16), {}
    names = [f"id {number}" for number in np.random.default_rng(0).integers(3000, size=10_000).tolist()]
    for first in range(0, len(names), 300):
        known = seen.known(names[first : first + 300])
        for row, name in enumerate(names[first : first + 300], first):
            assert known.row_of(name) == expected.get(name)
            if row % 3 or name not in expected:
                expected[name] = row
                known.move(name, row)
        known.write()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 64 << 10, "all in the cache: vacuous"
    seen.close()


def test_no_space_for_the_table_of_ids_is_told(tmp_path, monkeypatch):
    import sqlite3

    from ubmoe_st.index.seen import SeenIds

    real = sqlite3.connect

    def tiny(*args, **kwargs):
        table = real(*args, **kwargs)
        table.execute("PRAGMA max_page_count = 1")
        return table

    monkeypatch.setattr(sqlite3, "connect", tiny)
    with pytest.raises(OSError, match=r"database or disk is full.*intact: free some space"):
        SeenIds(tmp_path)


@pytest.mark.parametrize("factory", ["IVF4096,Nonsense", "PQ7", "IDMap,Flat,Flat", "PCA500,Flat"])
def test_a_faiss_factory_is_tried_before_anything_is_embedded(tmp_path, factory):
    encoder = HashEncoder(24)
    with pytest.raises(ValueError, match=f"faiss cannot use '{factory}' for vectors of 24 dimensions"):
        EmbeddingIndex.build(encoder, rows(5), tmp_path / "i", kind=f"faiss:{factory}")
    assert encoder.batches == [4, 4], "only the probe texts may be read before"
    assert {path.name for path in (tmp_path / "i").iterdir()} <= {".lock"}


@pytest.mark.parametrize(
    "factory",
    "IVF4096,Flat OPQ6,IVF4096,PQ6x4fs IVF9000_HNSW16,PQ6 PQ6x12 LSHrt SQ4 HNSW32 HNSW8,SQ8 PCA8,HNSW8".split(),
)
def test_a_faiss_factory_that_works_is_not_refused(factory):
    check_factory(f"faiss:{factory}", 24)


@pytest.mark.parametrize("factory", ["HNSW32", "HNSW16,SQ8"])
def test_a_graph_of_ones_own_finds_what_exact_search_does(tmp_path, encoder, factory):
    index = EmbeddingIndex.build(encoder, rows(300), tmp_path / "i", kind=f"faiss:{factory}")
    texts = [row["text"] for row in rows(300)][:20]
    found, exact = index.search(texts, 10)[1], index.search(texts, 10, exact=True)[1]
    assert np.mean([len({*a} & {*b}) for a, b in zip(found, exact)]) > 8


def test_more_cells_than_rows_can_be_mended_without_embedding_again(tmp_path):
    encoder = HashEncoder(24)
    with pytest.raises(ValueError, match="512 cells and needs at least as many rows to train, there are 100"):
        EmbeddingIndex.build(encoder, rows(100), tmp_path / "i", kind="faiss:IVF512,Flat")
    again = HashEncoder(24)
    assert len(EmbeddingIndex.build(again, rows(100), tmp_path / "i", kind="faiss:IVF2,Flat")) == 100
    assert again.batches == [4, 4]


def test_a_csv_header_that_is_none_is_refused(tmp_path, encoder):
    (tmp_path / "c.csv").write_text('id,"te"xt\n1,a\n')
    with pytest.raises(CorpusError, match=r"c\.csv line 1: the header is not a csv row"):
        EmbeddingIndex.build(encoder, tmp_path / "c.csv", tmp_path / "i")


def test_metadata_are_json_whatever_the_table_holds(tmp_path, encoder):
    nan = float("nan")
    given = {
        "price": Decimal("12.50"), "count": Decimal("3"), "gone": nan, "none": Decimal("NaN"), "inner": [1.0, nan],
        "deep": {"x": nan, "y": 2}, "small": np.float32(0.5), "array": np.array([1, 2]), "lost": np.float32("nan"),
        "key": UUID(int=5), "day": date(2020, 1, 2),
    }  # fmt: skip
    index = EmbeddingIndex.build(encoder, [{"id": 1, "text": "a", **given}], tmp_path / "i")
    text = index.entries(1)[0].metadata

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    assert json.loads(text, parse_constant=refuse) == {
        "price": 12.5, "count": 3, "inner": [1.0, None], "deep": {"x": None, "y": 2}, "small": 0.5, "array": [1, 2],
        "key": str(UUID(int=5)), "day": "2020-01-02",
    }  # fmt: skip
    assert index.search("a", 3, filter={"price": {">": 12}, "gone": {"exists": False}})[1] == [["1"]]
    for bad in (float("inf"), Decimal("Infinity"), b"bytes"):
        with pytest.raises(CorpusError, match="metadata that JSON cannot hold"):
            EmbeddingIndex.build(encoder, [{"id": 1, "text": "a", "x": bad}], tmp_path / "b")
