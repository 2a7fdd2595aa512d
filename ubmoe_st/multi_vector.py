"""A vector for each token: the modules of an embedding model, put together as a stock `MultiVectorEncoder`."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.base.modules import Transformer as BaseTransformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from torch import nn

TOKENS = "token_embeddings"
"""Where the modules of sentence-transformers keep the vectors of tokens, (B, T, D)."""


def token_modules(model: SentenceTransformer) -> list[nn.Module]:
    """What comes behind the transformer of a model whose token vectors are not pooled.

    A `Dense` behind a mean is the mean of the same `Dense` on each token, so it stays, and shares its weights.

    Args:
        model: Of a transformer and then `Pooling`, `Dense` and `Normalize`.

    Raises:
        ValueError: If the model has another module.
    """
    if model.truncate_dim is not None:
        warnings.warn(
            f"the model cuts its vectors to {model.truncate_dim} dimensions (truncate_dim), and token vectors keep all",
            stacklevel=3,
        )
    behind: list[nn.Module] = []
    for position, module in enumerate(list(model)[1:], 1):
        if isinstance(module, Dense):
            projection = copy.copy(module)
            projection.module_input_name = projection.module_output_name = TOKENS
            behind.append(projection)
        elif type(module).__name__ not in ("Pooling", "Normalize"):
            raise ValueError(
                f"module {position} is a {type(module).__name__}, which has no meaning for single tokens; expected "
                "Pooling, Dense or Normalize behind the transformer"
            )
    return [*behind, Normalize(TOKENS), MultiVectorMask()]


def multi_vector_encoder(model: SentenceTransformer) -> MultiVectorEncoder:
    """The token vectors of a model: a stock `MultiVectorEncoder` over the very modules, which needs no more memory.

    Args:
        model: A `UBMoE`, or another `SentenceTransformer` that begins with a transformer.

    Returns:
        Its `encode_query` and `encode_document` give unit vectors, (T, D) for a text of T tokens, special tokens and
        prompt included; its `similarity` is MaxSim.

    Raises:
        TypeError: If the model begins with something else.
        ValueError: If it has a module that has no meaning for single tokens.

    Example:
        >>> encoder = multi_vector_encoder(UBMoE("models/ubmoe-135m"))
        >>> encoder.similarity(encoder.encode_query(["a cat"]), encoder.encode_document(["a kitten", "a train"]))
    """
    if not isinstance(model, SentenceTransformer) or not isinstance(model[0], BaseTransformer):
        raise TypeError(
            f"token vectors need a SentenceTransformer that begins with a Transformer, got {type(model).__name__}"
        )
    return _over([model[0], *token_modules(model)], model)


def unpooled_encoder(model: SentenceTransformer) -> MultiVectorEncoder:
    """The transformer of a model alone: what its modules pool, (T, D) for a text of T tokens."""
    return _over([model[0]], model)


def _over(modules: list[Any], model: SentenceTransformer) -> MultiVectorEncoder:
    prompts = {name: prompt or "" for name, prompt in model.prompts.items()}
    encoder = MultiVectorEncoder(
        modules=modules,
        device=str(model.device),
        prompts=prompts,
        default_prompt_name=model.default_prompt_name,
    )
    return encoder.eval()
