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
