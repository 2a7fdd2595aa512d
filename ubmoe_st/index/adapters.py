"""An `EmbeddingIndex` as a retriever of LangChain and of LlamaIndex.

from ubmoe_st.index.adapters import langchain_retriever, llama_index_retriever

What is asked for, at the beginning or in a call, is honoured or refused: a filter that gets lost shows one reader the
entries of another.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from .core import EmbeddingIndex
from .filters import MISSING, Filter, as_test, both, holds
from .group import IndexGroup
from .search import Hit, check_k

SEARCH_OPTIONS = ("filter", "mode", "weight", "exact", "parameters", "rerank", "candidates")
LANGCHAIN_OPTIONS = (*SEARCH_OPTIONS, "search_type", "score_threshold", "fetch_k", "lambda_mult")
LANGCHAIN_SEARCHES = ("similarity", "similarity_score_threshold", "mmr")


def langchain_retriever(index: EmbeddingIndex | IndexGroup, k: int = 10, **search: Any) -> Any:
    """A LangChain `BaseRetriever` over `index`; needs langchain-core.

    Everything but the index may be given in a call, too: `invoke("...", k=3, filter={"lang": "en"})`. A filter of a
    call narrows that of the retriever: both must hold.

    Args:
        index: An open index, or several in a group.
        k: Documents per query.
        search: `filter`, `mode`, `weight`, `exact`, `parameters`, `rerank` and `candidates`, as far as the index's
            own `search_entries` has them; `search_type` (`similarity` or `mmr`), `score_threshold` (smallest cosine),
            and for `mmr` `fetch_k` (20) and `lambda_mult` (0.5), as LangChain's own retriever has them.

    Returns:
        A retriever whose documents carry score, title, parent and span in `metadata`; where a row has a field of such a
        name, the one of the hit is called `hit_score` and so on.

    Raises:
        TypeError: For an option that does not exist; so does a call.
    """
    try:
        from langchain_core.callbacks import CallbackManagerForRetrieverRun
        from langchain_core.documents import Document
        from langchain_core.retrievers import BaseRetriever
        from langchain_core.vectorstores.utils import maximal_marginal_relevance
        from pydantic import ConfigDict
    except ImportError as error:
        raise ImportError("the retriever needs langchain-core: pip install 'ubmoe-st[langchain]'") from error
    _check_options(search, LANGCHAIN_OPTIONS, index)
    check_k(k)

    class UBMoERetriever(BaseRetriever):
        """Retrieves entries of an embedding index."""

        model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")
        index: Any
        k: int = 10
        search: dict[str, Any] = {}  # noqa: RUF012 - pydantic copies it

        def _get_relevant_documents(
            self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **call: Any
        ) -> list[Document]:
            _check_options(call, ("k", *LANGCHAIN_OPTIONS), self.index)
            options = {"k": self.k, **self.search, **call}
            spec = both(self.search.get("filter"), call.get("filter"))
            return [
                Document(id=hit.id, page_content=hit.text, metadata=_facts(hit))
                for hit in self._hits(query, spec, **{name: options[name] for name in options if name != "filter"})
            ]

        def _hits(
            self,
            query: str,
            spec: Filter | None,
            k: int,
            search_type: str = "similarity",
            score_threshold: float | None = None,
            fetch_k: int = 20,
            lambda_mult: float = 0.5,
            **options: Any,
        ) -> list[Hit]:
            if search_type not in LANGCHAIN_SEARCHES:
                raise ValueError(f"search_type is one of {', '.join(LANGCHAIN_SEARCHES)}, got {search_type!r}")
            if search_type == "similarity_score_threshold" and score_threshold is None:
                raise ValueError(f"search_type={search_type!r} needs a score_threshold, a cosine")
            mmr = search_type == "mmr"
            check_k(k)
            if mmr and not 0 <= lambda_mult <= 1:
                raise ValueError(f"lambda_mult is the share of the similarity, 0 to 1, got {lambda_mult!r}")
            hits = self.index.search_entries(query, max(k, fetch_k) if mmr else k, filter=spec, **options)[0]
            if score_threshold is not None:
                hits = [hit for hit in hits if hit.score >= score_threshold]
            if not mmr or not hits:
                return hits
            vectors = list(_vectors(self.index, hits))
            chosen = maximal_marginal_relevance(_query_vector(self.index, [query]), vectors, lambda_mult, k)
            return [hits[number] for number in chosen]

    return UBMoERetriever(index=index, k=k, search=search)


def llama_index_retriever(index: EmbeddingIndex | IndexGroup, k: int = 10, **search: Any) -> Any:
    """A LlamaIndex `BaseRetriever` over `index`; needs llama-index-core.

    Args:
        index: An open index, or several in a group.
        k: Nodes per query.
        search: As for `langchain_retriever`, without what is LangChain's own; `filters`, the `MetadataFilters` of
            LlamaIndex. Both must hold where both are given.

    Returns:
        A retriever. `ref_doc_id` of a node is the id of its document; score, parent and span are in `metadata` as in
        `langchain_retriever`, and are not shown to the LLM.

    Raises:
        TypeError: For an option that does not exist.
        ValueError: For an operator of `filters` that is not known.
    """
    try:
        from llama_index.core.retrievers import BaseRetriever
        from llama_index.core.schema import NodeRelationship, NodeWithScore, QueryBundle, RelatedNodeInfo, TextNode
    except ImportError as error:
        raise ImportError("the retriever needs llama-index-core: pip install 'ubmoe-st[llama-index]'") from error
    _check_options(search, (*SEARCH_OPTIONS, "filters"), index)
    check_k(k)
    filters = search.pop("filters", None)
    spec = both(search.pop("filter", None), None if filters is None else _metadata_filter(filters))

    def node(hit: Hit) -> TextNode:
        facts = _facts(hit)
        hidden = [name for name in facts if name not in hit.metadata and name != "title"]
        return TextNode(
            id_=hit.id,
            text=hit.text,
            metadata=facts,
            excluded_llm_metadata_keys=hidden,
            excluded_embed_metadata_keys=hidden,
            start_char_idx=hit.start,
            end_char_idx=hit.end,
            relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=hit.parent or hit.id)},
        )

    class UBMoERetriever(BaseRetriever):
        """Retrieves entries of an embedding index."""

        def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
            query: Any = query_bundle.query_str
            if query_bundle.embedding is not None:
                query = np.asarray(query_bundle.embedding, np.float32)
            elif query_bundle.custom_embedding_strs:
                query = _query_vector(index, query_bundle.custom_embedding_strs)
            hits = index.search_entries(query, k, filter=spec, **search)[0]
            return [NodeWithScore(node=node(hit), score=hit.score) for hit in hits]

    return UBMoERetriever()


def _check_options(options: Collection[str], known: Sequence[str], index: EmbeddingIndex | IndexGroup) -> None:
    found = inspect.signature(index.search_entries).parameters
    known = [name for name in known if name not in SEARCH_OPTIONS or name in found]
    if strange := [name for name in options if name not in known]:
        raise TypeError(f"the retriever has no option {strange[0]!r}, only {', '.join(known)}")


def _members(index: EmbeddingIndex | IndexGroup) -> list[EmbeddingIndex]:
    return index.indexes if isinstance(index, IndexGroup) else [index]


def _query_vector(index: EmbeddingIndex | IndexGroup, texts: Sequence[str]) -> np.ndarray:
    """The mean of the query vectors of some texts, (D,)."""
    return _members(index)[0].query_vectors(list(texts)).mean(axis=0)


def _vectors(index: EmbeddingIndex | IndexGroup, hits: Sequence[Hit]) -> np.ndarray:
    """The stored vectors of some hits, (n, D)."""
    members = {str(member.path): member for member in _members(index)}
    return np.concatenate(
        [
            members[hit.index].vectors(hit.id, namespace="document" if hit.parent is None else "chunk")[:1]
            for hit in hits
        ]
    )


def _facts(hit: Hit) -> dict[str, Any]:
    """Everything of a hit but its text; the row's own fields keep their names."""
    facts = {"score": hit.score, "title": hit.title, "parent": hit.parent, "start": hit.start, "end": hit.end}
    return {**hit.metadata, **{f"hit_{name}" if name in hit.metadata else name: facts[name] for name in facts}}


def _metadata_filter(filters: Any) -> Filter:
    """LlamaIndex's `MetadataFilters` as a filter.

    Raises:
        TypeError: If it is something else.
        ValueError: For an operator or a condition that is not known.
    """
    from llama_index.core.vector_stores import MetadataFilters

    if not isinstance(filters, MetadataFilters):
        raise TypeError(f"filters are LlamaIndex's MetadataFilters, got {type(filters).__name__}: or give filter=")
    parts = [_metadata_filter(one) if isinstance(one, MetadataFilters) else _one_filter(one) for one in filters.filters]
    condition = "and" if filters.condition is None else filters.condition.value
    if condition == "and":
        joined: Filter | None = None
        for part in parts:
            joined = both(joined, part)
        return {} if joined is None else joined
    tests = [as_test(part) for part in parts]
    if condition == "or":
        return lambda fields: any(test(dict(fields)) for test in tests)
    if condition == "not":
        return lambda fields: not any(test(dict(fields)) for test in tests)
    raise ValueError(f"filters: the condition is and, or or not, got {condition!r}")


def _one_filter(one: Any) -> Filter:
    """One `MetadataFilter` as a filter."""
    field, wanted, name = one.key, one.value, one.operator.value
    plain: Mapping[str, str] = {"nin": "not in", "any": "in"}
    if name in ("==", "!=", ">", ">=", "<", "<=", "in", *plain):
        return {field: {plain.get(name, name): wanted}}
    if name == "contains":  # a list its item, a text its part
        return lambda fields: holds(fields.get(field, MISSING), "==", wanted) or str(wanted) in _text(fields.get(field))
    if name == "all":
        return lambda fields: all(holds(fields.get(field, MISSING), "==", value) for value in wanted)
    if name == "is_empty":
        return lambda fields: fields.get(field) in (None, "", [])
    if name == "text_match":
        return lambda fields: str(wanted) in _text(fields.get(field))
    if name == "text_match_insensitive":
        return lambda fields: str(wanted).lower() in _text(fields.get(field)).lower()
    raise ValueError(f"filters: there is no operator {name!r} for {field!r}")


def _text(value: Any) -> str:
    """A field's value where it is a text, else none."""
    return value if isinstance(value, str) else ""
