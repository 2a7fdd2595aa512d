"""The retriever for LangChain against the tests that LangChain has for retrievers."""

from __future__ import annotations

import pytest
from helpers.encoders import HashEncoder

from ubmoe_st.index import EmbeddingIndex

langchain_tests = pytest.importorskip("langchain_tests.integration_tests")


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore:.*marked with .@pytest.mark.asyncio")
class TestLangChainStandard(langchain_tests.RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _index(self, tmp_path):
        rows = [{"id": n, "text": f"text {n}"} for n in range(12)]
        self.index = EmbeddingIndex.build(HashEncoder(12), rows, tmp_path / "i")

    @property
    def retriever_constructor(self):
        from ubmoe_st.index.adapters import langchain_retriever

        return type(langchain_retriever(self.index))

    @property
    def retriever_constructor_params(self):
        return {"index": self.index}

    @property
    def retriever_query_example(self):
        return "a question"
