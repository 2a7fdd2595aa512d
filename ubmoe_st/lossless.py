"""Whether a model generates exactly like its base, found out from what both compute, not from flags."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ubmoe_st.bases import SHORT_NAMES, Base, resolve_base
from ubmoe_st.configuration import UBMoEConfig
from ubmoe_st.transformer import UBMoETransformer

_MOST_TOKENS = 48
_NEW_TOKENS = 12
_TEXTS = (
    "The cat sits on the mat, and 12 dogs ran 3.5 km.",
    "  def f(x):\n\treturn x**2  # ok\n\n",
    "Größe, naïve, 東京, Москва, 🙂",
    "",
)
"""Words, code, other scripts, nothing: what tokenizers treat differently."""


@dataclass(frozen=True)
class LosslessReport:
    """What a comparison with the base found.

    Attributes:
        base: Name of the base.
        same_files: Whether its weight files have the SHA-256 that the checkpoint records. None: it records none.
        checks: By name of the check what differs; None where nothing does.
    """

    base: str
    same_files: bool | None
    checks: dict[str, str | None]

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not any(self.checks.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ok": self.ok}


def check_lossless(views: UBMoETransformer, base: str | os.PathLike[str] | Base | None = None) -> LosslessReport:
    """Compare what a checkpoint generates with its base, and see which tokens each view attends to.

    Args:
        views: Both views.
        base: As for `resolve_base`. None: what the checkpoint names.

    Raises:
        ValueError: If no base is given, and that of the checkpoint is not named or not found.
    """
    config = views.ubmoe_config
    if base is None:
        found = recorded_base(config)
    else:
        found = base if isinstance(base, Base) else resolve_base(base)
    attention = views.model.config._attn_implementation
    reference: Any = AutoModelForCausalLM.from_pretrained(
        found.path, dtype=views.model.dtype, attn_implementation=attention
    )
    recorded = config.base_sha256 if config else {}
    same_files = found.has_weights(recorded) if recorded else None
    checks = compare(views.generator(), reference.to(views.model.device).eval())
    routing = config.routing if config else "uni"
    checks["default routing"] = None if routing == "uni" else f"{routing}, and the base is what uni generates"
    checks |= _texts(views, found)
    checks["encoder sees later tokens"] = _full(views.model)
    return LosslessReport(found.name, same_files, checks)


def compare(lm: PreTrainedModel, reference: PreTrainedModel) -> dict[str, str | None]:
    """What two causal LMs compute differently on the same random tokens.

    Args:
        lm: The one to check.
        reference: What it should be.

    Returns:
        By name of the check what differs; None where nothing does.
    """
    if lm.config.vocab_size != reference.config.vocab_size or type(lm) is not type(reference):
        both = [f"{type(x).__name__} with {x.config.vocab_size} tokens" for x in (lm, reference)]
        return {"architecture": f"{both[0]}, the base is {both[1]}"}
    alone, padded = _inputs(reference)
    calls: dict[str, Callable[[Any], Tensor]] = {
        "logits of one row": lambda x: x(**alone, use_cache=False).logits,
        "logits of one token": lambda x: x(input_ids=alone["input_ids"][:, :1]).logits,
        "logits of a padded batch": lambda x: x(**padded, use_cache=False).logits * padded["attention_mask"][..., None],
        "last logits of a padded batch": lambda x: x(**padded, logits_to_keep=1).logits,
        "logits with KV cache": lambda x: _cached(x, padded),
        "greedy tokens": lambda x: _greedy(x, padded),
        "greedy tokens without KV cache": lambda x: _greedy(x, alone, use_cache=False),
    }
    checks = {"lm_head": _difference(*(x.get_output_embeddings().weight for x in (lm, reference)))}
    checks["weights"] = _weights(lm, reference)
    with torch.inference_mode():
        for name, call in calls.items():
            checks[name] = _difference(call(lm), call(reference))
        checks["generator is causal"] = _causal(lm)
    return checks


def recorded_base(config: UBMoEConfig | None) -> Base:
    """The base that a checkpoint names.

    Raises:
        ValueError: If the checkpoint names none, or that is not found here.
    """
    name = config.base_model if config else ""
    if not name:
        raise ValueError("the checkpoint names no base, as its generator was changed; say which with base=...")
    short = {full: short for short, full in SHORT_NAMES.items()}.get(name, name)
    try:
        return resolve_base(short)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"the base {name} is not found here; say where it is with base=... ({error})") from error


def _texts(views: UBMoETransformer, base: Base) -> dict[str, str | None]:
    """What becomes of texts and chats before they are generated from; None where that is as in the base."""
    own: Any = views.tokenizer
    try:
        reference: Any = AutoTokenizer.from_pretrained(base.path)
    except (OSError, ValueError, ImportError) as error:
        return {"tokens of texts": f"the base's tokenizer cannot be read: {' '.join(str(error).split())[:200]}"}
    odd = next((text for text in _TEXTS if views.token_ids(text) != reference(text)["input_ids"]), None)
    tokens = None if odd is None else f"{odd!r} has {views.token_ids(odd)}, in the base {reference(odd)['input_ids']}"
    same_chat = own.chat_template == reference.chat_template
    return {"tokens of texts": tokens, "chat template": None if same_chat else "it is not that of the base"}


def _inputs(lm: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One row (1, T), and two rows of which one is padded on the left (2, T)."""
    longest = getattr(lm.config, "max_position_embeddings", None) or 2 * _MOST_TOKENS
    tokens = max(4, min(_MOST_TOKENS, longest - _NEW_TOKENS))
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.config.vocab_size, (2, tokens), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, : tokens // 2] = 0
    inputs = {"input_ids": ids.to(lm.device), "attention_mask": mask.to(lm.device)}
    return {key: tensor[:1] for key, tensor in inputs.items()}, inputs


def _cached(lm: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the last tokens, one at a time on the cache of those before, (B, 4, V)."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    first = ids.shape[1] - 4
    cache = lm(input_ids=ids[:, :first], attention_mask=mask[:, :first], use_cache=True).past_key_values
    rows = []
    for end in range(first + 1, ids.shape[1] + 1):
        out = lm(input_ids=ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        rows.append(out.logits)
    return torch.cat(rows, 1)


def _greedy(lm: Any, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    ids = lm.generate(**inputs, max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=0, **kwargs)
    return ids[:, inputs["input_ids"].shape[1] :]


def _difference(found: Tensor, expected: Tensor) -> str | None:
    if found.shape != expected.shape:
        return f"shape {tuple(found.shape)}, the base's is {tuple(expected.shape)}"
    if torch.equal(found, expected):
        return None
    if not found.is_floating_point():
        return f"{int((found != expected).sum())} of {found.numel()} differ"
    largest = float((found.detach().float() - expected.detach().float()).abs().max())
    return f"largest difference {largest:.3g}"


def _weights(lm: PreTrainedModel, reference: PreTrainedModel) -> str | None:
    own, theirs = lm.state_dict(), reference.state_dict()
    odd = [name for name in theirs if name not in own or not torch.equal(own[name], theirs[name])]
    odd += sorted(set(own) - set(theirs))
    if not odd:
        return None
    more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
    return f"{odd[0]}{more} of {len(theirs)} tensors"


def _probe(lm: Any) -> tuple[Tensor, Tensor]:
    """The same eight tokens twice, (1, 8), but for that at position 4."""
    vocabulary = lm.config.vocab_size
    ids = torch.arange(8, device=lm.device)[None] % vocabulary
    other = ids.clone()
    other[0, 4] = (ids[0, 4] + vocabulary // 2 + 1) % vocabulary
    return ids, other


def _causal(lm: Any) -> str | None:
    first, second = (lm(input_ids=ids, use_cache=False).logits[0] for ids in _probe(lm))
    if not torch.equal(first[:4], second[:4]):
        return "a token sees a later one"
    return None if not torch.equal(first[4:], second[4:]) else "tokens do not see earlier ones"


def _full(encoder: Any) -> str | None:
    with torch.inference_mode():
        first, second = (encoder(input_ids=ids, use_cache=False).last_hidden_state[0] for ids in _probe(encoder))
    blind = (first == second).all(-1).nonzero().flatten().tolist()
    return f"the token at position {blind[0]} does not see that at position 4" if blind else None
