"""Gemma 3 as llama.cpp has it: `gemma3` attends causally, `gemma-embedding` in full, in windows to both sides.

Scale of the embeddings, soft shape of the FFN and order of the norms are part of llama.cpp's code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

ENCODER = "gemma-embedding"
"""llama.cpp's name of the architecture that attends in full."""


def check_gemma(config: Any) -> None:
    """Refuse what llama.cpp computes otherwise.

    Args:
        config: Of a Gemma 3 text model.

    Raises:
        ValueError: Says what it is, and which format holds it.
    """
    full, sliding = (config.rope_parameters[kind]["rope_type"] for kind in ("full_attention", "sliding_attention"))
    odd = {
        "layer_types other than some sliding layers and a full one, in turn": _period(config.layer_types) is None,
        f"rope type {full}": full not in ("default", "linear"),
        f"rope type {sliding} in its sliding layers": sliding != "default",
        "attn_logit_softcapping": config.attn_logit_softcapping is not None,
        "final_logit_softcapping": config.final_logit_softcapping is not None,
        "attention_bias": config.attention_bias,
        "use_bidirectional_attention": config.use_bidirectional_attention,
        f"activation {config.hidden_activation}": config.hidden_activation != "gelu_pytorch_tanh",
    }
    found = [name for name, applies in odd.items() if applies]
    if found:
        raise ValueError(f"llama.cpp runs no Gemma 3 with {' and '.join(found)}; take format='onnx'")


def write_gemma_attention(writer: Any, config: Any, view: str) -> None:
    """Windows and rotations, which layers that attend to the whole text and the others have each of their own.

    Keys are spelled out: versions of `gguf` differ in those they have.

    Args:
        writer: A `GGUFWriter`.
        config: Of the model.
        view: `encoder` or `generator`.
    """
    import gguf

    full = config.rope_parameters["full_attention"]
    writer.add_rope_freq_base(full["rope_theta"])
    if full["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    writer.add_float32(f"{writer.arch}.rope.freq_base_swa", config.rope_parameters["sliding_attention"]["rope_theta"])
    # A token sees a window before itself; without a causal mask one to each side, and llama.cpp counts both.
    writer.add_sliding_window(config.sliding_window * (2 if view == "encoder" else 1))
    writer.add_uint32(f"{writer.arch}.attention.sliding_window_pattern", _period(config.layer_types))


def gemma_tensor(name: str, tensor: Tensor, config: Any, view: str) -> Tensor:
    """A tensor as llama.cpp has it: it multiplies by the weight of a norm, where transformers adds one before.

    Args:
        name: llama.cpp's name.
        tensor: As of transformers.
        config: Of the model.
        view: `encoder` or `generator`.
    """
    if not name.endswith("norm.weight"):
        return tensor
    weight = tensor.float() + 1
    if name.endswith("attn_q_norm.weight"):
        # llama.cpp takes the scale of the attention from the shape, except for the 27B. What differs goes into a norm.
        of_27b = view == "generator" and config.num_hidden_layers == 62
        size = config.hidden_size // config.num_attention_heads if of_27b else config.head_dim
        weight = weight * math.sqrt(size / config.query_pre_attn_scalar)
    return weight


def _period(layer_types: Sequence[str]) -> int | None:
    """Every how many layers one attends to the whole text, the last of each. None: at no regular distance.

    Without layers of both kinds llama.cpp aborts: it makes a mask for each.
    """
    full = [kind == "full_attention" for kind in layer_types]
    period = full.index(True) + 1 if True in full else 1
    regular = full == [(layer + 1) % period == 0 for layer in range(len(full))]
    return period if regular and period > 1 else None
