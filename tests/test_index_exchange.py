"""What leaves an index: Parquet, and retrievers for LangChain and LlamaIndex (with the real packages)."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.encoders import HashEncoder

from ubmoe_st.index import EmbeddingIndex


@pytest.fixture
def index(tmp_path):
    rows = [
        {"id": f"d{n}", "text": f"text {n} " + "word " * (n % 15), "title": f"T{n}", "lang": "en"} for n in range(40)
    ]
    index = EmbeddingIndex.build(HashEncoder(12), rows, tmp_path / "i", chunk_tokens=8, segment_rows=20)
    index.delete(["d3", "d7#0"])
    return index


def test_parquet_holds_every_live_entry_with_its_vector(index, tmp_path):
    import pyarrow.parquet as pq

    assert index.export_parquet(tmp_path / "out.parquet") == len(index)
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["id"] for row in rows] == list(index)
    assert {row["document_id"] for row in rows} == {f"d{n}" for n in range(40)} - {"d3"}
    vectors = np.array([row["vector"] for row in rows], np.float32)
    np.testing.assert_array_equal(vectors, index.vectors(list(index)))
    assert [row["text"] for row in rows] == index.texts(list(index))
    assert json.loads(rows[0]["metadata"]) == {"lang": "en"}


def test_langchain_retriever_gives_the_hits(index):
    pytest.importorskip("langchain_core")
    from ubmoe_st.index.adapters import langchain_retriever

    documents = langchain_retriever(index, k=4, filter={"lang": "en"}).invoke("a question")
    hits = index.search_entries("a question", 4)[0]
    assert [document.id for document in documents] == [hit.id for hit in hits]
    assert [document.page_content for document in documents] == [hit.text for hit in hits]
    assert documents[0].metadata["score"] == hits[0].score
    assert documents[0].metadata["lang"] == "en"


def test_llama_index_retriever_gives_the_hits(index):
    pytest.importorskip("llama_index.core")
    from ubmoe_st.index.adapters import llama_index_retriever

    nodes = llama_index_retriever(index, k=4).retrieve("a question")
    hits = index.search_entries("a question", 4)[0]
    assert [node.node.node_id for node in nodes] == [hit.id for hit in hits]
    assert [node.score for node in nodes] == [hit.score for hit in hits]
    assert nodes[0].node.get_content() == hits[0].text


@pytest.fixture
def tenants(tmp_path):
    rows = [
        {"id": n, "text": f"text {n}", "tenant": "ab"[n % 2], "year": 2000 + n, "tags": ["x", "y"][: n % 3], "score": 7}
        for n in range(40)
    ]
    return EmbeddingIndex.build(HashEncoder(12), rows, tmp_path / "tenants")


def test_a_langchain_call_may_ask_for_what_the_retriever_may(tenants):
    pytest.importorskip("langchain_core")
    from ubmoe_st.index.adapters import langchain_retriever

    retriever = langchain_retriever(tenants, k=40)

    def found(given, **call):
        return [document.id for document in given.invoke("a question", **call)]

    theirs = tenants.search("a question", 40, filter={"tenant": "a"})[1][0]
    assert len(found(retriever)) == 40
    assert found(retriever, filter={"tenant": "a"}) == found(retriever.bind(filter={"tenant": "a"})) == theirs
    assert found(retriever, filter={"tenant": "a"}, k=3) == theirs[:3]
    own = langchain_retriever(tenants, k=40, filter={"tenant": "a"})
    for more in ({"tenant": "b"}, {"tenant": ["a", "b"], "year": {"<": 2010}}, lambda fields: fields["year"] < 2010):
        got = found(own, filter=more)
        assert set(got) <= set(theirs), "a call must not widen the filter of the retriever"
    assert len(got) == 5
    scores = tenants.search("a question", 40)[0][0]
    assert len(found(retriever, score_threshold=float(scores[4]))) == 5
    strict = langchain_retriever(
        tenants, k=40, search_type="similarity_score_threshold", score_threshold=float(scores[7])
    )
    assert len(found(strict)) == 8
    for wrong in ({"filters": {}}, {"top_k": 3}):
        with pytest.raises(TypeError, match="has no option"):
            found(retriever, **wrong)
        with pytest.raises(TypeError, match="has no option"):
            langchain_retriever(tenants, **wrong)
    for wrong in ({"search_type": "best"}, {"search_type": "similarity_score_threshold"}):
        with pytest.raises(ValueError, match="search_type"):
            found(retriever, **wrong)


def test_langchain_mmr_is_that_of_a_plain_loop(tenants):
    pytest.importorskip("langchain_core")
    from ubmoe_st.index.adapters import langchain_retriever

    encoder, query = HashEncoder(12), "a question"
    pool = tenants.search(query, 15)[1][0]
    vectors = {name: encoder.vector(f"text {name}") for name in pool}
    chosen = []
    while len(chosen) < 5:

        def gain(name):
            near = max((vectors[name] @ vectors[other] for other in chosen), default=0.0)
            return (
                0.3 * (vectors[name] @ encoder.vector(query)) - 0.7 * near
                if chosen
                else vectors[name] @ encoder.vector(query)
            )

        chosen.append(max((name for name in pool if name not in chosen), key=gain))
    options = {"search_type": "mmr", "fetch_k": 15, "lambda_mult": 0.3}
    found = langchain_retriever(tenants, k=5, **options).invoke(query)
    assert [document.id for document in found] == chosen
    assert chosen != pool[:5], "the order of the scores would do, so this test would be vacuous"


def test_fields_of_a_row_keep_their_names(tenants):
    pytest.importorskip("langchain_core")
    from ubmoe_st.index.adapters import langchain_retriever

    (document,) = langchain_retriever(tenants, k=1).invoke("a question")
    assert document.metadata["score"] == 7
    assert document.metadata["hit_score"] == tenants.search("a question", 1)[0][0, 0]


@pytest.mark.parametrize(
    ("condition", "parts", "keep"),
    [
        (
            "and",
            [("tenant", "==", "a"), ("year", ">=", 2010), ("year", "<", 2020)],
            lambda n: n % 2 == 0 and 10 <= n < 20,
        ),
        ("or", [("tenant", "==", "a"), ("year", "in", [2001, 2003])], lambda n: n % 2 == 0 or n in (1, 3)),
        ("not", [("tenant", "==", "a")], lambda n: n % 2),
        ("and", [("tags", "contains", "y")], lambda n: n % 3 == 2),
        ("and", [("tags", "all", ["x", "y"])], lambda n: n % 3 == 2),
        ("and", [("tags", "any", ["y", "z"])], lambda n: n % 3 == 2),
        ("and", [("tags", "is_empty", None)], lambda n: n % 3 == 0),
        ("and", [("tenant", "nin", ["a"]), ("tenant", "!=", "c")], lambda n: n % 2),
        ("and", [("tenant", "text_match_insensitive", "A")], lambda n: n % 2 == 0),
    ],
)
def test_metadata_filters_of_llama_index_hold(tenants, condition, parts, keep):
    pytest.importorskip("llama_index.core")
    from llama_index.core.vector_stores import MetadataFilter, MetadataFilters

    from ubmoe_st.index.adapters import llama_index_retriever

    filters = MetadataFilters(
        filters=[MetadataFilter(key=key, operator=name, value=value) for key, name, value in parts], condition=condition
    )
    nodes = llama_index_retriever(tenants, k=40, filters=filters).retrieve("a question")
    assert sorted(int(node.node.node_id) for node in nodes) == [n for n in range(40) if keep(n)]
    narrowed = llama_index_retriever(tenants, k=40, filters=filters, filter={"year": {"<": 2010}}).retrieve(
        "a question"
    )
    assert sorted(int(node.node.node_id) for node in narrowed) == [n for n in range(10) if keep(n)]


def test_a_llama_index_node_knows_its_document_and_hides_what_is_no_text(index):
    pytest.importorskip("llama_index.core")
    from llama_index.core.schema import MetadataMode, QueryBundle

    from ubmoe_st.index.adapters import llama_index_retriever

    retriever = llama_index_retriever(index, k=3)
    hit = index.search_entries("a question", 3)[0][0]
    node = retriever.retrieve("a question")[0].node
    assert node.ref_doc_id == hit.parent != hit.id
    assert (node.start_char_idx, node.end_char_idx) == (hit.start, hit.end)
    read = node.get_content(MetadataMode.LLM)
    assert read == f"lang: en\ntitle: {hit.title}\n\n{hit.text}".strip()
    vector = index.query_vectors("another question")[0]
    by_vector = retriever.retrieve(QueryBundle("a question", embedding=vector.tolist()))
    assert [node.node.node_id for node in by_vector] == index.search("another question", 3)[1][0]
    by_text = retriever.retrieve(QueryBundle("a question", custom_embedding_strs=["another question"]))
    assert [node.node.node_id for node in by_text] == index.search("another question", 3)[1][0]
    for wrong in ({"similarity_top_k": 3}, {"k_": 3}):
        with pytest.raises(TypeError, match="has no option"):
            llama_index_retriever(index, **wrong)
    with pytest.raises(TypeError, match="MetadataFilters"):
        llama_index_retriever(index, filters={"lang": "en"})
