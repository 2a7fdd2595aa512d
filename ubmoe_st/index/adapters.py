"""An `EmbeddingIndex` as a retriever of LangChain and of LlamaIndex.

from ubmoe_st.index.adapters import langchain_retriever, llama_index_retriever
"""

from __future__ import annotations

from typing import Any

from .core import EmbeddingIndex
from .group import IndexGroup


def langchain_retriever(index: EmbeddingIndex | IndexGroup, k: int = 10, **search: Any) -> Any:
    """A LangChain `BaseRetriever` over `index`; needs langchain-core.

    Args:
        index: An open index, or several in a group.
        k: Documents per query.
        search: `filter`, `mode` and so on, for `EmbeddingIndex.search_entries`.

    Returns:
        A retriever whose documents carry id, score, title, parent and span in `metadata`.
    """
    try:
        from langchain_core.callbacks import CallbackManagerForRetrieverRun
        from langchain_core.documents import Document
        from langchain_core.retrievers import BaseRetriever
    except ImportError as error:
        raise ImportError("the retriever needs langchain-core: pip install 'ubmoe-st[langchain]'") from error

    class UBMoERetriever(BaseRetriever):
        """Retrieves entries of an embedding index."""

        def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
            hits = index.search_entries(query, k, **search)[0]
            return [Document(id=hit.id, page_content=hit.text, metadata=_facts(hit)) for hit in hits]

    return UBMoERetriever()


def llama_index_retriever(index: EmbeddingIndex | IndexGroup, k: int = 10, **search: Any) -> Any:
    """A LlamaIndex `BaseRetriever` over `index`; needs llama-index-core. Arguments as in `langchain_retriever`."""
    try:
        from llama_index.core.retrievers import BaseRetriever
        from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
    except ImportError as error:
        raise ImportError("the retriever needs llama-index-core: pip install 'ubmoe-st[llama-index]'") from error

    class UBMoERetriever(BaseRetriever):
        """Retrieves entries of an embedding index."""

        def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
            hits = index.search_entries(query_bundle.query_str, k, **search)[0]
            return [
                NodeWithScore(node=TextNode(id_=hit.id, text=hit.text, metadata=_facts(hit)), score=hit.score)
                for hit in hits
            ]

    return UBMoERetriever()


def _facts(hit: Any) -> dict[str, Any]:
    """Everything of a hit but its text, the row's own fields first."""
    facts = {"score": hit.score, "title": hit.title, "parent": hit.parent, "start": hit.start, "end": hit.end}
    return {**hit.metadata, **facts}
