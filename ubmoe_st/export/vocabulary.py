"""Tokenizers as llama.cpp has them: byte-level BPE, and the BPE of SentencePiece with byte fallback, as of Gemma."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# llama.cpp's names of the ways to cut a text before byte pairs are merged, by how many digits stay together.
_BPE_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BPE_CUTS = {
    _BPE_CUT.replace("DIGITS", r"\p{N}"): "qwen2",
    _BPE_CUT.replace("DIGITS", r"\p{N}{1,3}"): "llama-bpe",
}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 3, 4, 5, 6
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_SPACE = "\u2581"


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to know of a tokenizer.

    Attributes:
        cut: llama.cpp's name of the way to cut a text. None: of SentencePiece, which cuts none.
        names: Of the tokens, (V,).
        kinds: llama.cpp's types of the tokens, (V,).
        merges: Of a byte-level BPE, in their order.
        scores: Of a SentencePiece BPE, (V,): the pair that makes the token of the highest score is merged first.
        special: Ids of bos, eos, unk and pad.
        adds: Whether bos and eos are put around a text.
        chat_template: Jinja template. None: the model does not chat.
    """

    cut: str | None
    names: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    special: dict[str, int | None]
    adds: dict[str, bool]
    chat_template: str | None

    def write(self, writer: Any) -> None:
        """Put it into the head of a GGUF file."""
        writer.add_tokenizer_model("llama" if self.cut is None else "gpt2")
        writer.add_tokenizer_pre(self.cut or "default")
        writer.add_token_list(self.names)
        writer.add_token_types(self.kinds)
        if self.cut is None:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(False)
        else:
            writer.add_token_merges(self.merges)
        for kind, index in self.special.items():
            if index is not None:
                getattr(writer, f"add_{kind}_token_id")(index)
        writer.add_add_bos_token(self.adds["bos"])
        writer.add_add_eos_token(self.adds["eos"])
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def vocabulary_of(tokenizer: Any, size: int, hint: str) -> Vocabulary:
    """The vocabulary of a tokenizer of transformers.

    Args:
        tokenizer: The tokenizer.
        size: Rows of the embedding; those without a token are named and never used.
        hint: What to do with a tokenizer of another kind.

    Raises:
        ValueError: If llama.cpp would cut texts into other tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else {}
    bpe = content.get("model") or {}
    cut = _cut(content.get("pre_tokenizer") or {})
    normalizer = (content.get("normalizer") or {}).get("type")
    byte_level = (
        normalizer in (None, "NFC") and bpe.get("type") == "BPE" and not bpe.get("byte_fallback") and cut is not None
    )
    ranks = None if byte_level else _sentencepiece_ranks(content)
    if not byte_level and ranks is None:
        raise ValueError(
            "gguf is written here for byte-level BPE tokenizers as of GPT-2, SmolLM2, Llama 3 and Qwen, and for that "
            f"of Gemma; the checkpoint has another ({bpe.get('type', 'unknown')}, normalizer {normalizer}); {hint}"
        )
    names = [f"[PAD{index}]" for index in range(size)]
    kinds = [_UNUSED] * size
    for token, index in bpe["vocab"].items():
        if index < size:
            names[index], kinds[index] = token, _NORMAL
    for entry in content["added_tokens"]:
        if entry["id"] < size:
            names[entry["id"]], kinds[entry["id"]] = entry["content"], _CONTROL if entry["special"] else _USER_DEFINED
    scores: list[float] = []
    if ranks is not None:
        for name in _BYTES:
            kinds[bpe["vocab"][name]] = _BYTE
        lowest = len(bpe["merges"])  # No merge makes the token, so its score is never asked for.
        scores = [-float(ranks.get(name, lowest)) for name in names]
    adds = _added(tokenizer, hint)
    if byte_level and normalizer:
        warnings.warn("the tokenizer composes characters (NFC) and llama.cpp does not: do it yourself", stacklevel=3)
    template = tokenizer.chat_template
    return Vocabulary(
        cut=cut if byte_level else None,
        names=names,
        kinds=kinds,
        merges=[pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]] if byte_level else [],
        scores=scores,
        special={kind: getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "unk", "pad")},
        adds=adds,
        chat_template=template if isinstance(template, str) else None,
    )


def _added(tokenizer: Any, hint: str) -> dict[str, bool]:
    """Whether bos and eos are put around a text.

    Raises:
        ValueError: If anything else is.
    """
    plain, found = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    for bos in (False, True):
        for eos in (False, True):
            before, after = [tokenizer.bos_token_id] * bos, [tokenizer.eos_token_id] * eos
            if found == [*before, *plain, *after]:
                return {"bos": bos, "eos": eos}
    names = tokenizer.convert_ids_to_tokens(found)
    raise ValueError(f"llama.cpp puts bos and eos around a text and nothing else, this tokenizer gives {names}; {hint}")


def _cut(pre_tokenizer: dict[str, Any]) -> str | None:
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step.get("type") for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if steps[-1].get("use_regex", True):
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        return "smollm" if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") else None
    if kinds == ["Split", "ByteLevel"] and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
        return _BPE_CUTS.get(steps[0]["pattern"].get("Regex", ""))
    return None


def _sentencepiece_ranks(content: Mapping[str, Any]) -> dict[str, int] | None:
    """Which tokens are merged first, by the place of the first merge that makes one.

    llama.cpp has no list of merges: it merges any two tokens that make a third, of the highest score first. That is
    the same where the list has every such pair, and those that make one token stand together.

    Returns:
        Place by token. None: the tokenizer does something else.
    """
    bpe = content.get("model") or {}
    normalizer, cut = content.get("normalizer") or {}, content.get("pre_tokenizer")
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    # Gemma's, which has no effect once the spaces are replaced.
    idle = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    vocab = bpe.get("vocab") or {}
    odd = any(bpe.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"))
    known = bpe.get("type") == "BPE" and bpe.get("byte_fallback") and not odd and all(name in vocab for name in _BYTES)
    if not known or normalizer != spaces or cut not in (None, idle):
        return None
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in bpe["merges"]]
    ranks: dict[str, int] = {}
    last = None
    for rank, (left, right) in enumerate(pairs):
        token = left + right
        if token in ranks and token != last:
            return None
        ranks.setdefault(token, rank)
        last = token
    listed = set(pairs)
    # Added tokens are taken out of a text before anything is merged.
    merged = vocab.keys() - {entry["content"] for entry in content["added_tokens"]}
    splits = ((token[:place], token[place:]) for token in merged for place in range(1, len(token)))
    complete = all(pair in listed for pair in splits if pair[0] in vocab and pair[1] in vocab)
    return ranks if complete else None
