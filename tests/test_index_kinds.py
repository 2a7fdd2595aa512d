"""Index kinds, tuning, filters and hybrid search, against numpy brute force and the rank_bm25 formula."""

from __future__ import annotations

import math
import warnings
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal

import numpy as np
import pytest
from helpers.encoders import HashEncoder

from ubmoe_st.index import EmbeddingIndex, IndexGroup
from ubmoe_st.index.budget import MemoryBudget, parse_size, token_bytes
from ubmoe_st.index.embedder import Embedder
from ubmoe_st.index.hybrid import tokenize
from ubmoe_st.index.kinds import KINDS, Request, choose, subquantizers_for, write_faiss
from ubmoe_st.index.search import SearchSettings
from ubmoe_st.index.store import Snapshot
from ubmoe_st.index.workplace import Workplace

DIMENSION = 32
ROWS = 3000


def clustered(count: int, seed: int) -> np.ndarray:
    """Vectors with neighbourhoods, as embeddings have."""
    centres = np.random.default_rng(99).normal(size=(60, DIMENSION))
    generator = np.random.default_rng(seed)
    return centres[generator.integers(60, size=count)] + 0.5 * generator.normal(size=(count, DIMENSION))


class TableEncoder:
    """Looks vectors up: `row 17` has vector 17; other texts get one by their hash."""

    def __init__(self) -> None:
        self.prompts: dict[str, str] = {}
        self.table = clustered(ROWS + 500, 0)

    def encode(self, inputs, **_):
        return np.stack([self.table[int(t.split()[1])] if t.startswith("row ") else self.other(t) for t in inputs])

    def other(self, text: str) -> np.ndarray:
        return np.random.default_rng(sum(text.encode())).normal(size=DIMENSION)


def corpus(count: int = ROWS, first: int = 0) -> list[dict]:
    return [
        {
            "id": f"r{n}",
            "text": f"row {n}",
            "lang": ["en", "de", "fr"][n % 3],
            "year": 1900 + n % 120,
            "even": n % 2 == 0,
        }
        for n in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def encoder():
    return TableEncoder()


@pytest.fixture(scope="module")
def flat(encoder, tmp_path_factory):
    return EmbeddingIndex.build(encoder, corpus(), tmp_path_factory.mktemp("flat") / "i", kind="flat")


@pytest.fixture(scope="module")
def queries():
    return clustered(40, 7).astype(np.float32)


def truth(encoder, queries, k, keep=None):
    matrix = encoder.table[:ROWS] / np.linalg.norm(encoder.table[:ROWS], axis=1, keepdims=True)
    scores = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ matrix.T
    if keep is not None:
        scores[:, ~keep] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), [[f"r{row}" for row in line] for line in order]


def recall(found, expected):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, expected)])


@pytest.fixture(scope="module", params=[name for name in KINDS if name != "flat"] + ["faiss:IVF32,SQ8"])
def approximate(request, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kind") / "i"
    EmbeddingIndex.build(encoder, corpus(), folder, kind=request.param)
    return EmbeddingIndex.open(folder, model=encoder)


def test_every_kind_returns_exact_cosines_and_finds_most(approximate, encoder, queries):
    import faiss

    expected, names = truth(encoder, queries, 10)
    scores, ids = approximate.search(queries, 10)
    assert recall(ids, names) >= 0.9
    matrix = encoder.table / np.linalg.norm(encoder.table, axis=1, keepdims=True)
    for line, values, query in zip(ids, scores, queries / np.linalg.norm(queries, axis=1, keepdims=True)):
        np.testing.assert_allclose(values, [matrix[int(name[1:])] @ query for name in line], atol=2e-6)
        assert (np.diff(values) <= 0).all()
    exact, exact_ids = approximate.search(queries, 10, exact=True)
    np.testing.assert_allclose(exact, expected, atol=2e-6)
    assert exact_ids == names
    assert faiss.read_index(str(approximate.path / approximate.info["index"]["file"])).ntotal == ROWS
    assert approximate.verify() == []


def through_faiss(index: EmbeddingIndex, encoder) -> EmbeddingIndex:
    """The same index, which compares all rows that a filter leaves only where they are very few."""
    return EmbeddingIndex(Snapshot(index.path), Embedder(encoder), SearchSettings(few_rows=50))


def test_filters_hold_in_every_kind_and_fill_the_list(approximate, encoder, queries):
    approximate = through_faiss(approximate, encoder)
    keep = np.array([row["lang"] == "de" and row["year"] >= 1950 for row in corpus()])
    spec = {"lang": "de", "year": {">=": 1950}}
    _, names = truth(encoder, queries, 10, keep)
    _, ids = approximate.search(queries, 10, filter=spec)
    assert all(len(line) == 10 for line in ids)
    assert {keep[int(name[1:])] for line in ids for name in line} == {np.True_}
    assert recall(ids, names) >= 0.85
    rare = {"year": 1900, "lang": "en"}
    few = [row["id"] for row in corpus() if row["year"] == 1900 and row["lang"] == "en"]
    assert sorted(approximate.search(queries[:1], 100, filter=rare)[1][0]) == sorted(few)


def test_rows_added_later_and_deleted_ones_are_right_in_every_kind(approximate, encoder, queries):
    index = EmbeddingIndex.open(approximate.path, model=encoder)
    before = approximate.search(queries, 5)[1]
    assert index.add(corpus(300, first=ROWS)) == 300
    for number in (ROWS, ROWS + 299):
        assert index.search(encoder.table[number], 1)[1] == [[f"r{number}"]]
    gone = {name for line in before[:3] for name in line[:2]}
    assert index.delete(gone) == len(gone)
    _, ids = index.search(queries, 5)
    assert not gone & {name for line in ids for name in line}
    assert approximate.search(queries, 5)[1] == before, "an open reader keeps its version"
    index.delete([f"r{number}" for number in range(ROWS, ROWS + 300)])
    index.upsert([row for row in corpus() if row["id"] in gone])
    assert sorted(index) == sorted(row["id"] for row in corpus())
    index.compact()
    assert (len(index), index.info["stored_rows"]) == (ROWS, ROWS)
    assert recall(index.search(queries, 5)[1], before) >= 0.9
    assert index.verify() == []


def test_tuning_reaches_its_recall_and_is_kept(encoder, tmp_path, queries):
    index = EmbeddingIndex.build(encoder, corpus(), tmp_path / "i", kind="ivf-flat")
    poor = index.search(queries, 10, parameters={"nprobe": 1, "rerank": 1})[1]
    _, names = truth(encoder, queries, 10)
    assert recall(poor, names) < 0.97, "one cell is enough, so this test would be vacuous"
    report = index.tune(0.99, queries=queries)
    assert report.reached
    again = EmbeddingIndex.open(tmp_path / "i", model=encoder)
    assert again.info["index"]["parameters"] == report.chosen.parameters
    assert recall(again.search(queries, 10)[1], names) == pytest.approx(report.chosen.recall)
    assert report.chosen.recall >= 0.99
    one = again.search(queries, 10, parameters={"rerank": report.chosen.parameters["rerank"]})[1]
    assert recall(one, names) == pytest.approx(report.chosen.recall), "what is not named does not stay as stored"
    held = again.tune(0.9, held_back=50, save=False)
    assert held.queries == 50
    assert held.reached
    with pytest.raises(ValueError, match="recall is above 0"):
        index.tune(1.5)


def test_a_flat_index_cannot_be_tuned_but_reindexed(encoder, tmp_path):
    index = EmbeddingIndex.build(encoder, corpus(), tmp_path / "i")
    assert index.kind == "flat"
    with pytest.raises(ValueError, match="nothing to tune"):
        index.tune()
    index.reindex("int8")
    assert index.kind == EmbeddingIndex.open(tmp_path / "i").kind == "int8"
    assert len(list(tmp_path.glob("i/index*.faiss"))) == 1


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "flat"] + ["faiss:IVF32,SQ8"])
def test_an_index_of_several_files_finds_what_one_file_does(kind, encoder, tmp_path, queries, monkeypatch):
    import faiss

    whole = EmbeddingIndex.build(encoder, corpus(), tmp_path / "whole", kind=kind)
    monkeypatch.setattr(MemoryBudget, "shard_rows", lambda *_: 800)
    cut = EmbeddingIndex.build(encoder, corpus(), tmp_path / "cut", kind=kind)
    files = cut.info["index"]["files"]
    assert [file["rows"] for file in files] == [750] * 4
    assert len(whole.info["index"]["files"]) == 1
    for file in files:
        assert faiss.read_index(str(cut.path / file["file"])).ntotal == 750
    names = whole.search(queries, 10)[1]
    found = cut.search(queries, 10)[1]
    assert recall(found, names) >= (1.0 if kind in ("int8", "ivf-flat", "faiss:IVF32,SQ8") else 0.97)
    assert {int(name[1:]) // 750 for line in found for name in line} == {0, 1, 2, 3}
    keep = {row["id"] for row in corpus() if row["lang"] == "de"}
    filtered = through_faiss(cut, encoder).search(queries, 10, filter={"lang": "de"})[1]
    assert all(len(line) == 10 and set(line) <= keep for line in filtered)
    (cut.path / files[2]["file"]).write_bytes(b"short")
    with pytest.raises(ValueError, match=r"index\.2\.faiss.*truncated"):
        EmbeddingIndex.open(cut.path)


def test_a_flat_index_has_a_faiss_file_when_asked_or_small(encoder, tmp_path, queries):
    import faiss

    small = EmbeddingIndex.build(encoder, corpus(50), tmp_path / "small")
    assert faiss.read_index(str(small.path / "index.faiss")).ntotal == 50
    without = EmbeddingIndex.build(encoder, corpus(50), tmp_path / "without", faiss_file=False)
    assert without.info["index"]["file"] is None
    with Workplace(without.path) as workplace:
        for most, files in ((40, 0), (49, 0), (50, 1)):
            request = Request("auto", MemoryBudget.of(None), flat_rows=most)
            record = write_faiss(Snapshot(without.path), request, workplace, 2)
            assert (record.kind, len(record.files)) == ("flat", files)
    asked = EmbeddingIndex.build(encoder, corpus(50), tmp_path / "asked", kind="flat", faiss_file=True)
    without.delete("absent", missing_ok=True)
    assert not list(without.path.rglob("*.faiss")), "what no version needs has stayed"
    assert without.search(queries, 5)[1] == small.search(queries, 5)[1]
    assert without.verify() == []
    without.reindex("flat", faiss_file=True)
    for index in (without, asked):
        stock = faiss.read_index(str(index.path / index.info["index"]["file"]))
        np.testing.assert_array_equal(stock.reconstruct_n(0, 50), index.vectors([f"r{n}" for n in range(50)]))
    assert EmbeddingIndex.build(encoder, corpus(50), asked.path, kind="flat", faiss_file=True).version == 1


def test_a_reader_searches_on_when_its_faiss_file_is_replaced(encoder, tmp_path, queries, caplog):
    EmbeddingIndex.build(encoder, corpus(), tmp_path / "i", kind="int8")
    reader = EmbeddingIndex.open(tmp_path / "i", model=encoder)
    EmbeddingIndex.open(tmp_path / "i").reindex("ivf-flat")
    _, names = truth(encoder, queries, 10)
    assert reader.search(queries, 10)[1] == names
    assert "until refresh" in caplog.text
    assert reader.refresh()
    assert (reader.kind, len(reader.search(queries, 10)[1])) == ("ivf-flat", 40)


def test_the_memory_budget_bounds_what_is_held():
    assert [parse_size(text) for text in ("512MB", "1.5 GiB", "64m", 7)] == [512 * 10**6, 3 << 29, 64 * 10**6, 7]
    for wrong in ("much", "5 PB", 0, -1, True, "", 1.5):
        with pytest.raises(ValueError, match="a size is"):
            parse_size(wrong)
    with pytest.raises(ValueError, match="at least 64 MB, got 10 MB"):
        MemoryBudget.of("10MB")
    with pytest.raises(ValueError, match="do not fit in memory_budget=64 MB"):
        MemoryBudget.of("64MB").check_row(8 << 20)
    tight, roomy = MemoryBudget.of("64MB"), MemoryBudget.of("64GB")
    assert roomy.window(576) == {"window_tokens": 65536, "window_rows": 8192, "window_bytes": 16 << 20}
    for dimension in (64, 576, 8192):
        rows = tight.window(dimension)["window_rows"]
        assert 1 <= rows * dimension * 8 <= 8 * 10**6
        assert tight.training_rows(dimension) * dimension * 4 <= 8 * 10**6
        assert tight.shard_rows(4 * dimension) * dimension * 4 <= 16 * 10**6
    assert tight.batch_tokens(token_bytes(None, 576)) < roomy.batch_tokens(token_bytes(None, 576)) == 4096
    assert choose("ivf-pq", 10**6, 576, budget=tight).factory.split(",")[1] == "IVF64"
    assert choose("ivf-pq", 10**6, 576, budget=roomy).factory.split(",")[1] == "IVF2048"


def test_auto_explains_its_choice_by_rows_and_memory():
    assert choose("auto", 10_000, 576).kind == "flat"
    roomy, tight, huge = (
        choose("auto", 10**6, 576, 4000),
        choose("auto", 10**6, 576, 400),
        choose("auto", 10**8, 576, 9**9),
    )
    assert (roomy.kind, tight.kind, huge.kind) == ("hnsw-int8", "ivf-pq", "ivf-pq")
    assert "1,000,000 rows of 576 dimensions" in roomy.why
    assert "400 MiB" in tight.why
    assert choose("ivf-pq", 10, 576).kind == "flat"
    with pytest.raises(ValueError, match="kind is auto, flat"):
        choose("best", 10, 576)
    for dimension in (384, 576, 768, 1024, 33, 7):
        assert dimension % subquantizers_for(dimension) == 0


@pytest.mark.parametrize(
    ("spec", "keep"),
    [
        ({"lang": "en"}, lambda row: row["lang"] == "en"),
        ({"lang": ["en", "fr"]}, lambda row: row["lang"] != "de"),
        ({"lang": {"!=": "en"}}, lambda row: row["lang"] != "en"),
        ({"lang": {"not in": ["en", "fr"]}}, lambda row: row["lang"] == "de"),
        ({"year": {">=": 1950, "<": 1960}}, lambda row: 1950 <= row["year"] < 1960),
        ({"year": {">": 1950}, "lang": "de"}, lambda row: row["year"] > 1950 and row["lang"] == "de"),
        ({"even": True}, lambda row: row["even"]),
        ({"even": 1}, lambda row: False),
        ({"year": {">": "1950"}}, lambda row: False),
        ({"absent": {"exists": False}}, lambda row: True),
        ({"absent": "x"}, lambda row: False),
        (lambda metadata: metadata["year"] % 7 == 0, lambda row: row["year"] % 7 == 0),
    ],
)
def test_filters_mean_what_they_say(flat, encoder, queries, spec, keep):
    mask = np.array([bool(keep(row)) for row in corpus()])
    scores, ids = flat.search(queries[:2], 12, filter=spec)
    expected, names = truth(encoder, queries[:2], 12, mask)
    width = min(12, int(mask.sum()))
    assert ids == [line[:width] for line in names]
    np.testing.assert_allclose(scores, expected[:, :width], atol=2e-6)


@pytest.mark.parametrize(
    ("spec", "kind", "said"),
    [
        ({"year": {}}, ValueError, "expected an operator"),
        ({"year": {"in": 5}}, TypeError, "takes a list"),
        ({"lang": {"not in": "en"}}, TypeError, "takes a list"),
        ({1: 2, "a": 3}, TypeError, "names fields by text"),
    ],
)
def test_a_filter_of_the_wrong_form_is_refused(flat, queries, spec, kind, said):
    with pytest.raises(kind, match=said):
        flat.search(queries, 3, filter=spec)


def test_a_field_that_no_row_has_is_said(flat, queries, caplog):
    flat.search(queries, 3, filter={"langs": {"!=": "en"}})
    assert "no row of" in caplog.text
    assert "'langs'; it has even, lang, year" in caplog.text


def test_an_unknown_operator_is_refused(flat, queries):
    with pytest.raises(ValueError, match="no operator '~'"):
        flat.search(queries, 3, filter={"year": {"~": 3}})
    with pytest.raises(TypeError, match="a filter is a mapping"):
        flat.search(queries, 3, filter="lang=en")


def bm25(query: str, texts: list[str], k1: float = 1.5, b: float = 0.75) -> np.ndarray:
    """Lucene's BM25, the default of bm25s, written out."""
    documents = [text.split() for text in texts]
    mean = np.mean([len(words) for words in documents])
    scores = np.zeros(len(texts))
    for word in query.split():
        holding = sum(word in words for words in documents)
        idf = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
        for number, words in enumerate(documents):
            count = words.count(word)
            scores[number] += idf * count / (count + k1 * (1 - b + b * len(words) / mean))
    return scores


def test_hybrid_is_reciprocal_rank_fusion_of_bm25_and_cosines(encoder, tmp_path):
    pytest.importorskip("bm25s")
    generator = np.random.default_rng(4)
    texts = [" ".join(f"word{generator.zipf(1.5) % 60}" for _ in range(generator.integers(3, 30))) for _ in range(200)]
    rows = [{"id": str(n), "text": text, "half": n % 2} for n, text in enumerate(texts)]
    index = EmbeddingIndex.build(encoder, rows, tmp_path / "i")
    query = "word7 word23 word41"
    with pytest.raises(ValueError, match="build_bm25"):
        index.search(query, mode="hybrid")
    index.build_bm25()
    index = EmbeddingIndex.open(tmp_path / "i", model=encoder)
    expected = bm25(query, texts)
    order = [n for n in np.lexsort((np.arange(200), -np.round(expected, 5))) if expected[n] > 0]
    _, ids = index.search(query, 10, mode="bm25")
    assert [round(float(expected[int(name)]), 4) for name in ids[0]] == [
        round(float(expected[n]), 4) for n in order[:10]
    ]
    cosines = {name: score for name, score in zip(index.search(query, 200)[1][0], index.search(query, 200)[0][0])}
    dense = list(cosines)[:100]
    keywords = index.search(query, 100, mode="bm25")[1][0]
    points = {
        str(n): sum(1 / (61 + lst.index(str(n))) for lst in (dense, keywords) if str(n) in lst) for n in range(200)
    }
    scores, ids = index.search(query, 10, mode="hybrid")
    assert ids[0] == sorted(points, key=lambda name: (-points[name], int(name)))[:10]
    assert ids[0] != dense[:10]
    np.testing.assert_allclose(scores[0], [cosines[name] for name in ids[0]], atol=1e-6)
    keywords = [name for name in keywords if name]
    parts = [{name: cosines[name] for name in dense}, {name: expected[int(name)] for name in keywords}]
    found = []
    for weight in (0.7, 0.0):
        summed = dict.fromkeys([*dense, *keywords], 0.0)
        for share, part in zip((weight, 1 - weight), parts):
            low, high = min(part.values()), max(part.values())
            for name, value in part.items():
                summed[name] += share * (value - low) / (high - low)
        _, ids = index.search(query, 10, mode="hybrid", weight=weight)
        best = sorted(summed.values(), reverse=True)[:10]
        assert [summed[name] for name in ids[0]] == pytest.approx(best, abs=1e-5)
        found.append(ids)
    assert found[0] != found[1]
    for options in ({"weight": 0.5}, {"mode": "hybrid", "weight": 1.5}):
        with pytest.raises(ValueError, match="weight is the share of the vectors in mode='hybrid', 0 to 1"):
            index.search(query, **options)
    assert all(int(name) % 2 for name in index.search(query, 10, mode="hybrid", filter={"half": 1})[1][0])
    scores, ids = index.search("unheard", 5, mode="bm25")
    assert ids == [[""] * 5]
    assert np.isnan(scores).all()
    assert index.search_entries("unheard", 5, mode="bm25") == [[]]
    with pytest.raises(TypeError, match="as texts"):
        index.search(encoder.table[0], mode="hybrid")
    index.delete(index.search(query, 1, mode="bm25")[1][0])
    assert index.search(query, 1, mode="bm25")[1][0][0] != keywords[0]
    assert index.verify() == []


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    """Rows of a CSV, whose values are all text, and the same with their own types."""
    folder = tmp_path_factory.mktemp("typed")
    lines = [f"c{n},text {n},{1990 + n},2020-01-{n + 1:02},{str(n % 2 == 0).lower()}" for n in range(20)]
    (folder / "c.csv").write_text("\n".join(["id,text,year,day,even", *lines]))
    own = [
        {"id": f"c{n}", "text": f"text {n}", "year": 1990 + n, "day": date(2020, 1, n + 1), "even": n % 2 == 0}
        | {"time": datetime(2020, 1, n + 1, 12, tzinfo=timezone(timedelta(hours=2)))}
        for n in range(20)
    ]
    return (
        EmbeddingIndex.build(HashEncoder(8), folder / "c.csv", folder / "csv"),
        EmbeddingIndex.build(HashEncoder(8), own, folder / "own"),
    )


@pytest.mark.parametrize(
    ("spec", "keep"),
    [
        ({"year": 1995}, [5]),
        ({"year": {">=": 1990 + 15.5}}, range(16, 20)),
        ({"year": [1991, np.int64(1993)]}, [1, 3]),
        ({"year": {"!=": 1995}}, [n for n in range(20) if n != 5]),
        ({"year": Decimal("1995")}, [5]),
        ({"even": False}, range(1, 20, 2)),
        ({"day": date(2020, 1, 3)}, [2]),
        ({"day": {"<": date(2020, 1, 3)}}, [0, 1]),
        ({"day": {"in": [date(2020, 1, 3), date(2020, 1, 4)]}}, [2, 3]),
        ({"day": {">=": datetime(2020, 1, 19)}}, [18, 19]),
        ({"day": {">": "2020-01-18"}}, [18, 19]),
    ],
)
def test_values_compare_across_types(typed, spec, keep, caplog):
    for index in typed:
        found = index.search("a query", 20, filter=spec)[1][0]
        assert sorted(found) == sorted(f"c{n}" for n in keep)
    assert not caplog.text


def test_times_compare_across_zones(typed):
    index = typed[1]
    noon = datetime(2020, 1, 5, 10, tzinfo=timezone.utc)  # 12:00 two hours east
    assert index.search("a query", 20, filter={"time": noon})[1] == [["c4"]]
    assert index.search("a query", 20, filter={"time": {">": noon.replace(tzinfo=None), "<": date(2020, 1, 7)}})[1] == [
        ["c5"]
    ]


def test_a_type_that_never_occurs_is_said(typed, caplog):
    for index, spec, found in (
        (typed[1], {"year": {">": "1995"}}, 0),
        (typed[1], {"year": {"!=": "1995"}}, 20),
        (typed[0], {"id": {"!=": "c1"}, "day": {"not in": [1, 2]}}, 19),
        (typed[1], {"year": date(1995, 1, 1)}, 0),
    ):
        caplog.clear()
        assert len(index.search("a query", 20, filter=spec)[1][0]) == found
        assert caplog.text.count("compares with") == 1, spec
    caplog.clear()
    assert typed[1].search("a query", 20, filter={"year": "1995", "even": True})[1] == [[]]
    assert "no value of 'year'" in caplog.text
    assert "they are like 2009, a int" in caplog.text


@pytest.mark.parametrize(
    ("query", "wanted"),
    [("目录", "zh"), ("コピー", "ja"), ("โฟลเดอร์", "th"), ("폴더", "ko"), ("कॉपी", "hi"), ("木", "one"), ("été", "fr")],
)
def test_bm25_finds_words_of_scripts_without_spaces_and_with_marks(encoder, tmp_path, query, wanted):
    pytest.importorskip("bm25s")
    texts = {
        "zh": "递归地复制整个目录",
        "ja": "フォルダーを丸ごとコピーする",
        "th": "คัดลอกโฟลเดอร์ทั้งหมด",
        "ko": "폴더를 통째로 복사한다",
        "hi": "पूरे फ़ोल्डर की कॉपी करें",
        "one": "木",
        "fr": "tout l'été",
        "en": "copy a folder",
    }
    index = EmbeddingIndex.build(encoder, [{"id": i, "text": t} for i, t in texts.items()], tmp_path / "i")
    index.build_bm25()
    assert [hit.id for hit in index.search_entries(query, 5, mode="bm25")[0]] == [wanted]


def test_words_are_those_of_bm25s_where_spaces_part_them():
    bm25s = pytest.importorskip("bm25s")
    texts = ["The cat sat; it's 2nd_x a b cd", "über straße x9", "Привет мир я", "مرحبا بالعالم", ""]
    assert tokenize(texts, return_ids=False) == bm25s.tokenize(
        texts, stopwords=None, show_progress=False, return_ids=False
    )


def test_rows_that_bm25_does_not_cover_are_told_of(encoder, tmp_path):
    pytest.importorskip("bm25s")
    index = EmbeddingIndex.build(encoder, [{"id": "a", "text": "the cat"}, {"id": "b", "text": "dog"}], tmp_path / "i")
    index.build_bm25()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert index.search("cat", 1, mode="bm25")[1] == [["a"]]
    index.add([{"id": "c", "text": "zebra"}])
    with pytest.warns(UserWarning, match=r"1 of 3 rows were added after build_bm25\(\)"):
        assert index.search_entries("zebra", 1, mode="bm25") == [[]]
    index.build_bm25()
    assert index.search("zebra", 1, mode="bm25")[1] == [["c"]]


def test_texts_without_a_word_have_a_bm25_part_that_finds_nothing(encoder, tmp_path):
    pytest.importorskip("bm25s")
    index = EmbeddingIndex.build(encoder, [{"id": "a", "text": "?!"}, {"id": "b", "text": "x"}], tmp_path / "i")
    index.build_bm25()
    assert index.search_entries("cat", 1, mode="bm25") == [[]]
    assert len(index.search("cat", 2, mode="hybrid")[1][0]) == 2
    index.delete("a")
    index.compact()
    assert index.search_entries("x", 1, mode="bm25") == [[]]


@pytest.mark.parametrize("kind", ["binary", "ivf-flat"])
def test_tuning_measures_the_index_also_where_a_row_is_dead(kind, encoder, tmp_path, queries):
    index = EmbeddingIndex.build(encoder, corpus(), tmp_path / "i", kind=kind)
    index.delete(["r5"])
    keep = np.arange(ROWS) != 5
    _, names = truth(encoder, queries, 10, keep)
    report = index.tune(0.9, queries=queries)
    assert min(trial.recall for trial in report.trials) < 0.97, "exact search was measured in the place of the index"
    assert report.reached
    assert recall(index.search(queries, 10)[1], names) == pytest.approx(report.chosen.recall)


def test_an_index_with_most_rows_dead_finds_the_live_ones(encoder, tmp_path, queries):
    index = EmbeddingIndex.build(encoder, corpus(), tmp_path / "i", kind="ivf-flat")
    index.delete([f"r{n}" for n in range(ROWS - 300)])
    _, names = truth(encoder, queries, 10, np.arange(ROWS) >= ROWS - 300)
    assert recall(index.search(queries, 10, parameters={"nprobe": 1, "rerank": 1})[1], names) == 1.0


def test_a_few_rows_can_be_tuned(encoder, tmp_path):
    index = EmbeddingIndex.build(encoder, corpus(5), tmp_path / "i", kind="faiss:SQ8")
    report = index.tune(0.9, k=2)
    assert report.reached
    assert [trial.parameters for trial in report.trials] == [{"rerank": 1}]


@pytest.mark.parametrize("factory", ["IVF32,SQ8,RFlat", "OPQ8,IVF32,PQ8x4fs,RFlat", "PCA16,IVF32,Flat,Refine(SQ8)"])
def test_the_cells_of_an_index_behind_others_are_searched_and_tuned(factory, tmp_path, queries):
    encoder = HashEncoder(DIMENSION)  # without neighbourhoods, so that one cell is not enough
    index = EmbeddingIndex.build(encoder, corpus(1500), tmp_path / "i", kind=f"faiss:{factory}")
    matrix = np.stack([encoder.vector(f"row {n}") for n in range(1500)])
    names = [[f"r{row}" for row in line] for line in np.argsort(-queries @ matrix.T, axis=1)[:, :10]]

    def reached(**parameters):
        return recall(index.search(queries, 10, parameters=parameters)[1], names)

    assert reached(nprobe=1, rerank=16) < 0.6 < reached(nprobe=16, rerank=64)
    assert reached(nprobe=32, rerank=128) > 0.99
    report = index.tune(0.9, queries=queries)
    assert report.reached
    assert report.chosen.parameters["nprobe"] > 1
    assert recall(index.search(queries, 10)[1], names) == pytest.approx(report.chosen.recall)


def test_a_graph_behind_another_index_is_searched_as_far_as_wanted(encoder, tmp_path, queries):
    index = EmbeddingIndex.build(encoder, corpus(), tmp_path / "i", kind="faiss:HNSW4,SQ8,RFlat")
    _, names = truth(encoder, queries, 10)
    near, far = (
        recall(index.search(queries, 10, parameters={"efSearch": n, "rerank": 1})[1], names) for n in (10, 512)
    )
    assert near < far
    assert {name for trial in index.tune(0.9, queries=queries, save=False).trials for name in trial.parameters} == {
        "efSearch",
        "rerank",
    }


def test_a_search_parameter_that_an_index_does_not_have_is_refused(flat, encoder, tmp_path, queries):
    graph = EmbeddingIndex.build(encoder, corpus(1500), tmp_path / "hnsw", kind="hnsw")
    cells = EmbeddingIndex.build(encoder, corpus(1500, 1500), tmp_path / "ivf", kind="ivf-flat")
    with pytest.raises(ValueError, match="kind hnsw has no nprobe, expected efSearch or rerank"):
        graph.search(queries, 3, parameters={"nprobe": 4})
    with pytest.raises(ValueError, match="kind ivf-flat has no efSearch, expected nprobe or rerank"):
        cells.search(queries, 3, exact=True, parameters={"efSearch": 4, "rerank": 2})
    both = IndexGroup([graph, cells])
    _, names = truth(encoder, queries, 3)
    few, all_cells = (both.search(queries, 3, parameters={"nprobe": n, "rerank": 8})[1] for n in (1, 256))
    assert recall(few, names) < recall(all_cells, names)
    with pytest.raises(ValueError, match="no index of the group has nprobe"):
        IndexGroup([graph]).search(queries, 3, parameters={"nprobe": 4})
    assert flat.search(queries, 3, parameters={"nprobe": 4})[1] == names
