"""Any SentenceTransformer as the model of an index: what it is, how long its inputs are, unit vectors out."""

from __future__ import annotations

import copy
import hashlib
import operator
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..configuration import check_count
from .corpus import utf8_bytes

SUMMED_TOGETHER = 1 << 16
"""Numbers of a weight that its fingerprint sums at a time."""
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "How do I read a file line by line?",
    "Interest rates were left unchanged by the central bank.",
    "def add(a, b):\n    return a + b",
)
"""Texts embedded when an index is built, and again by whoever opens it, to see that the model is the same."""

SAME_MODEL_COSINE = 0.998
"""Smallest cosine between the stored and the new vector of a probe: above what bf16 against fp32 changes."""

DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""Names of the prompt of documents, the first that a model has."""

UNLIMITED_TOKENS = 1 << 30
"""`max_seq_length` of a model that has none; tokenizers also say it with a huge number."""


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Rows at unit length in float32; a row that is zero or not finite becomes NaN.

    Args:
        vectors: Any float type, (N, D).
    """
    wide = np.asarray(vectors, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        norms = np.sqrt((wide * wide).sum(axis=1, keepdims=True))
        result = (wide / norms).astype(np.float32)
    result[~np.isfinite(result).all(axis=1)] = np.nan
    return result  # (N, D)


def weights_fingerprint(model: Any) -> str | None:
    """A hash of every weight, or None for a model that shows no `state_dict`.

    Per tensor: name, shape, type, the exact integer sum of its bits (any one changed value changes it) and a strided
    sample (order matters). Reading is all it costs, so it is many times faster than SHA-256 over the bytes. The same
    weights in another dtype have another fingerprint.
    """
    if not hasattr(model, "state_dict"):
        return None
    import torch

    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    digest = hashlib.sha256()
    plain = ((name, part) for name, tensor in sorted(model.state_dict().items()) for part in _parts(tensor))
    for name, tensor in plain:
        flat = tensor.detach().reshape(-1)
        if flat.is_complex() or flat.element_size() not in bits or flat.is_quantized:
            flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat.int_repr().reshape(-1)
        whole = flat.view(bits[flat.element_size()])
        sample = whole[:: max(1, whole.numel() // 256)]
        # In parts: torch makes a wide copy of what it sums in another type.
        total = torch.stack([part.sum(dtype=torch.int64) for part in whole.split(SUMMED_TOGETHER)]).sum().item()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|{total}".encode())
        digest.update(sample.to(torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()


def _parts(value: Any) -> list[Any]:
    """The plain tensors of which a value of a state is made: itself, or numbers and scales of a packed one, or none."""
    import torch

    if not isinstance(value, torch.Tensor):
        return []
    flatten = getattr(value, "__tensor_flatten__", None)
    return [value] if flatten is None else [part for name in flatten()[0] for part in _parts(getattr(value, name))]


def identity_of(model: Any) -> str | None:
    """Where the model came from, folder or Hub id, as far as it says so itself."""
    card = getattr(model, "model_card_data", None)
    transformers_model = getattr(model, "transformers_model", None)
    candidates = (
        getattr(model, "name_or_path", None),
        getattr(getattr(transformers_model, "config", None), "_name_or_path", None),
        getattr(card, "base_model", None),
    )
    for candidate in candidates:
        if isinstance(candidate, (str, os.PathLike)) and os.fspath(candidate):
            return os.fspath(candidate)
    return None


def load_model(identity: str) -> Any:
    """A stock `SentenceTransformer` from a folder or Hub id."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(identity)


class Embedder:
    """A model with what an index needs of it.

    Args:
        model: A `SentenceTransformer`, anything with its `encode` (and, where present, `encode_document`,
            `encode_query`, `tokenizer`, `max_seq_length`, `prompts`), or a folder or Hub id to load.
        identity: The folder or Hub id to remember; None asks the model.
        truncate_dim: Keep only the first dimensions (Matryoshka); the rest is cut before normalising. None: those that
            the model keeps.
        max_tokens: What a model that is loaded here reads at most. None: what it says itself.

    Raises:
        TypeError: If `model` has no `encode`.
    """

    def __init__(
        self,
        model: Any,
        identity: str | None = None,
        truncate_dim: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self._own = isinstance(model, (str, os.PathLike))
        if isinstance(model, (str, os.PathLike)):
            identity = identity or os.fspath(model)
            model = load_model(os.fspath(model))
        if not callable(getattr(model, "encode", None)):
            raise TypeError(
                f"expected a SentenceTransformer, or an object with its encode(), got {type(model).__name__}"
            )
        if truncate_dim is not None:
            check_count("truncate_dim", truncate_dim, wanted="a whole number or None")
            truncate_dim = operator.index(truncate_dim)
        elif isinstance(own := getattr(model, "truncate_dim", None), int):
            truncate_dim = own  # remembered, so that the model cuts as much when it is loaded again
        self.model = model
        self.identity = identity or identity_of(model)
        self.truncate_dim = truncate_dim
        self.take_limit(max_tokens)
        self._probed: tuple[np.ndarray, Any] | None = None
        self._counters: dict[tuple[int | None, str], TokenCounter] = {}
        self._token_encoder: Any = None
        self._unpooled_encoder: Any = None

    @property
    def max_tokens(self) -> int | None:
        """Tokens that the model reads of a text, as it is set now; None where there is no limit, or none is known."""
        limit = getattr(self.model, "max_seq_length", None)
        return limit if isinstance(limit, int) and 0 < limit < UNLIMITED_TOKENS else None

    def take_limit(self, max_tokens: int | None) -> None:
        """Let a model that was loaded here read as much as that of an index did; one that was given stays as it is."""
        if self._own and max_tokens is not None and self.max_tokens != max_tokens:
            self.model.max_seq_length = max_tokens

    def check_limit(self, stored: int | None, *, longer_too: bool = False) -> None:
        """Refuse a model that reads less of a text than the model of an index did.

        Args:
            stored: Tokens that the model of the index read; None: not known.
            longer_too: Refuse one that reads more, too: what it adds would differ from what is there.

        Raises:
            ValueError: Saying what to set.
        """
        mine = self.max_tokens
        if mine is not None and stored is not None and (mine < stored or (longer_too and mine > stored)):
            raise ValueError(
                f"the model reads {mine} tokens, the index was built with {stored}: set its max_seq_length to {stored}"
            )

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of documents, float32, (N, D). A row without direction or with NaN is NaN all over."""
        return self._encode(getattr(self.model, "encode_document", self.model.encode), texts)

    def queries(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """Unit vectors of queries, float32, (Q, D)."""
        encode = getattr(self.model, "encode_query", self.model.encode)
        parts = [self._encode(encode, texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)]
        return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)

    def warn_of_cut(self, texts: Sequence[str]) -> None:
        """Warn of queries of which the model reads only the beginning."""
        if (limit := self.max_tokens) is None:
            return
        counter = self._counter_with(self.query_prompt())
        room = limit if counter.limit is None else counter.limit
        # A token has a byte at least, a rare character several tokens: short texts are not counted.
        long = [text for text in texts if utf8_bytes(text) + counter.special_tokens > room]
        if cut := sum(size > room for size in counter.sizes(long)) if long else 0:
            prompt = f", {counter.prompt_tokens} of them the prompt," if counter.prompt_tokens else ""
            warnings.warn(
                f"{cut} of {len(texts)} queries are longer than the {limit} tokens the model reads{prompt} and are "
                "compared by their beginning",
                stacklevel=3,
            )

    def _encode(self, encode: Any, texts: Sequence[str]) -> np.ndarray:
        vectors = encode(list(texts), batch_size=max(1, len(texts)), show_progress_bar=False)
        if hasattr(vectors, "detach"):
            vectors = vectors.detach().float().cpu().numpy()
        vectors = np.asarray(vectors)
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise ValueError(f"the model returned shape {vectors.shape} for {len(texts)} texts, expected (N, D)")
        return self.finished(vectors)

    def finished(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors as they are stored: cut to `truncate_dim`, of unit length; a row without direction is NaN, (N, D)."""
        if self.truncate_dim is not None:
            if vectors.shape[1] < self.truncate_dim:
                raise ValueError(
                    f"truncate_dim={self.truncate_dim} is more than the model's {vectors.shape[1]} dimensions"
                )
            vectors = vectors[:, : self.truncate_dim]
        return normalized(vectors)

    def probes(self) -> np.ndarray:
        """Vectors of the probe texts as documents and as queries, (2, P, D), computed once."""
        known = self._probed
        return known[0] if known is not None else self.probes_now()

    def probes_now(self) -> np.ndarray:
        """The same, computed again: the model may have been changed since."""
        seen = self._look()  # before: what another thread changes meanwhile is found the next time
        probes = np.stack([self.documents(PROBES), self.queries(PROBES)])
        # Together: to another thread the old vectors must not look like those of the model as it is now.
        self._probed = probes, seen
        return probes

    def probes_of_now(self) -> np.ndarray:
        """The same, computed again only where the model is no longer what it was then.

        That is found out in about a millisecond, from its prompts, the settings of its modules, and addresses,
        counters and a few numbers of its weights.
        """
        if self._probed is None:
            return self.probes_now()
        probes, (watch, told) = self._probed
        same = told == self._told() and (watch is None or watch.unchanged(self.model))
        return probes if same else self.probes_now()

    def _look(self) -> tuple[Any, Any]:
        if not hasattr(self.model, "named_parameters"):
            return None, self._told()
        from ..watch import Watch

        return Watch(self.model), self._told()

    def _told(self) -> tuple[Any, ...]:
        names = ("default_prompt_name", "max_seq_length")
        return sorted(self.prompts().items()), *(getattr(self.model, name, None) for name in names)

    @property
    def dimension(self) -> int:
        """D."""
        return int(self.probes().shape[-1])

    def document_prompt(self) -> str:
        """What the model puts before a document, found as sentence-transformers does it."""
        return self._prompt(DOCUMENT_PROMPTS if hasattr(self.model, "encode_document") else ())

    def query_prompt(self) -> str:
        """The same before a query."""
        return self._prompt(("query",) if hasattr(self.model, "encode_query") else ())

    def _prompt(self, names: tuple[str, ...]) -> str:
        prompts = self.prompts()
        for name in (*names, getattr(self.model, "default_prompt_name", None)):
            if name in prompts:
                return prompts[name] or ""
        return ""

    def prompts(self) -> dict[str, str]:
        """The prompts of the model, by name."""
        return dict(getattr(self.model, "prompts", None) or {})

    def counter(self) -> TokenCounter:
        """Counts what the model reads of documents, as it is set now; threads may share it."""
        return self._counter_with(self.document_prompt())

    def _counter_with(self, prompt: str) -> TokenCounter:
        key = self.max_tokens, prompt
        counter = self._counters.get(key)
        if counter is None:
            counter = TokenCounter(self.copy_tokenizer(), *key)
            self._counters = {**self._counters, key: counter}
        return counter

    def token_encoder(self) -> Any:
        """The token vectors of the model, as a stock `MultiVectorEncoder`.

        Raises:
            TypeError: If the model has none.
        """
        if self._token_encoder is None:
            from ..multi_vector import multi_vector_encoder

            self._token_encoder = multi_vector_encoder(self.model)
        return self._token_encoder

    def unpooled_encoder(self) -> Any:
        """What the model pools, as a stock `MultiVectorEncoder` of its transformer."""
        if self._unpooled_encoder is None:
            from ..multi_vector import unpooled_encoder

            self._unpooled_encoder = unpooled_encoder(self.model)
        return self._unpooled_encoder

    def copy_tokenizer(self) -> Any:
        """The model's tokenizer for use in another thread, or None. A copy: tokenizers are not shared safely."""
        tokenizer = getattr(self.model, "tokenizer", None)
        if tokenizer is None or not callable(tokenizer):
            return None
        if not getattr(tokenizer, "is_fast", False):
            return tokenizer
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        return tokenizer


def check_probes(mine: np.ndarray, stored: np.ndarray, smallest_cosine: float = SAME_MODEL_COSINE) -> None:
    """Refuse when the model with probes `mine` is not the one that made `stored`, both (2, P, D).

    Raises:
        ValueError: If the dimension differs or a probe's cosine is below `smallest_cosine`.
    """
    if mine.shape != stored.shape:
        raise ValueError(
            f"this index holds vectors of {stored.shape[-1]} dimensions, the model gives {mine.shape[-1]}: "
            "search it with the model it was built with"
        )
    cosines = (mine.astype(np.float64) * stored.astype(np.float64)).sum(axis=-1)
    worst = float(cosines.min())
    if not worst >= smallest_cosine:
        raise ValueError(
            f"this is not the model (or not the prompts) the index was built with: a probe text gives a vector at "
            f"cosine {worst:.6f} to the stored one, expected at least {smallest_cosine}"
        )


def plain_texts(queries: Any) -> Any:
    """A text, and texts of numpy and pandas, as a list; anything else as it is."""
    if isinstance(queries, str):
        return [queries]
    kind = getattr(getattr(queries, "dtype", None), "kind", "")
    return queries.tolist() if kind in ("U", "O", "T") else queries


def query_vectors(queries: Any, dimension: int, embedder: Callable[[], Embedder]) -> np.ndarray:
    """Texts or vectors as `EmbeddingIndex.query_vectors` takes them, as unit vectors, float32, (Q, D).

    Args:
        queries: A text, a list of texts, or vectors of shape (D,) or (Q, D).
        dimension: D.
        embedder: Gives the model, asked for with texts only.

    Raises:
        TypeError: If it is neither, naming the position.
        ValueError: For an empty text, another dimension, or a vector that is zero or not finite.
    """
    queries = plain_texts(queries)
    if isinstance(queries, (list, tuple)) and queries and any(isinstance(query, str) for query in queries):
        for position, query in enumerate(queries):
            if not isinstance(query, str):
                raise TypeError(f"query {position} is a {type(query).__name__}, expected a string")
            if not query.strip():
                raise ValueError(f"query {position} is empty: say what to look for")
        model = embedder()
        model.warn_of_cut(queries)
        vectors = model.queries(queries)
    else:
        if hasattr(queries, "detach"):
            queries = queries.detach().float().cpu().numpy()
        try:
            array = np.asarray(queries, dtype=np.float32)
            if array.ndim == 0:
                raise TypeError("a number is no vector")
        except (TypeError, ValueError) as error:
            raise TypeError(f"queries are texts or vectors, got {type(queries).__name__}") from error
        if array.size == 0:
            return np.zeros((0, dimension), np.float32)
        array = array[None] if array.ndim == 1 else array
        if array.ndim != 2:
            raise ValueError(f"query vectors have shape (Q, D), got {array.shape}")
        if array.shape[1] != dimension:
            raise ValueError(
                f"the query has {array.shape[1]} dimensions, the index {dimension}: "
                "embed it with the model of the index"
            )
        vectors = normalized(array)
    for position in np.flatnonzero(np.isnan(vectors).any(axis=1)).tolist():
        raise ValueError(f"query {position} has a vector that is zero, NaN or infinite: it has no cosine")
    return vectors  # (Q, D)


class TokenCounter:
    """Token counts and token offsets, in the calling thread, without touching the model's own tokenizer.

    Args:
        tokenizer: From `Embedder.copy_tokenizer`; None counts four characters as a token.
        max_tokens: No length is above this, because the model sees no more.
        prompt: What the model puts before each text.
    """

    def __init__(self, tokenizer: Any, max_tokens: int | None, prompt: str = "") -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens or UNLIMITED_TOKENS
        self.fast = bool(getattr(tokenizer, "is_fast", False))
        self.special_tokens = self.prompt_tokens = 0
        self.limit: int | None = None
        """Largest size of a text that the model reads whole; None where that is not known."""
        if tokenizer is not None and max_tokens is not None:
            alone, plain, prompted = self.sizes(["", "a", f"{prompt}a"])
            self.special_tokens, self.prompt_tokens = alone, max(0, prompted - plain)
            self.limit = max_tokens - self.prompt_tokens

    def sizes(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text and its special tokens, without the prompt, however many the model sees of them."""
        if self._tokenizer is None:
            return [len(text) // 4 + 1 for text in texts]
        if self.fast:
            return [len(encoding.ids) for encoding in self._tokenizer.backend_tokenizer.encode_batch(list(texts))]
        return [len(ids) for ids in self._tokenizer(list(texts), truncation=False)["input_ids"]]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens the model will see of each text."""
        return self.seen(self.sizes(texts))

    def seen(self, sizes: Sequence[int]) -> list[int]:
        """What the model will see of texts of these sizes."""
        return [min(size, self._max_tokens) for size in sizes]

    def room(self, title: str | None) -> int | None:
        """Tokens of a text that the model reads whole behind a title; None where that is not known."""
        if self.limit is None:
            return None
        return self.limit - (self.sizes([f"{title}\n"])[0] if title else self.special_tokens)

    def places(self, text: str) -> np.ndarray:
        """Where the tokens that the model reads of a text stand; needs a fast tokenizer.

        Returns:
            First character, the one after the last, and 1 for a special token, (T, 3).
        """
        encoding = self._tokenizer.backend_tokenizer.encode(text)
        spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return np.column_stack([spans, np.array(encoding.special_tokens_mask, np.int64)])

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Start and end of each token in `text`, in characters; words where there is no fast tokenizer."""
        if self.fast:
            encoding = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
            return [(start, end) for start, end in encoding.offsets if end > start]
        import re

        return [match.span() for match in re.finditer(r"\S+", text)]


BLOCK_CHARACTERS = 1 << 16
"""A long text is tokenised in blocks of about this many characters, so memory does not grow with it."""


def chunk_spans(
    text: str,
    counter: TokenCounter,
    chunk_tokens: int,
    overlap_tokens: int,
    block_characters: int = BLOCK_CHARACTERS,
) -> list[tuple[int, int]]:
    """Character spans of at most `chunk_tokens` tokens each, with `overlap_tokens` shared by neighbours.

    Spans begin and end at token borders and together cover every token of the text. Blank chunks are left out.
    """
    spans: list[tuple[int, int]] = []
    window: list[tuple[int, int]] = []
    position, end_of_last = 0, 0
    while position < len(text):
        stop = min(len(text), position + block_characters)
        if stop < len(text):
            space = max(text.rfind(" ", position + 1, stop), text.rfind("\n", position + 1, stop))
            stop = space if space > position else stop
        window.extend((position + start, position + end) for start, end in counter.offsets(text[position:stop]))
        position = stop
        while len(window) > chunk_tokens or (position >= len(text) and window and window[-1][1] > end_of_last):
            piece = window[:chunk_tokens]
            start, end = piece[0][0], piece[-1][1]
            if text[start:end].strip():
                spans.append((start, end))
            end_of_last = end
            window = window[chunk_tokens - overlap_tokens :]
    return spans
