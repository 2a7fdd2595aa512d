"""Tiny checkpoints whose tokenizers a GGUF file can hold."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers.models import TEXTS, make_base, make_checkpoint

ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GGUF_MODELS = {
    "llama": {},
    "llama-untied": {"attention_bias": True},
    "llama-rope": {"rope_parameters": ROPE_LLAMA3},
    "qwen2": {},
    "qwen3": {},
}
GGUF_TEXTS = [*TEXTS, "In 1984 the cat's tree had 12 birds.", "Größe"]


def bpe_tokenizer(digits: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alone = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([alone, cut]) if digits else cut
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
    )
    backend.train_from_iterator([*TEXTS, "12 birds in 1984 in 1984 in 1984"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_gguf_checkpoint(folder: Path, name: str) -> tuple[Path, Path]:
    """A base of `GGUF_MODELS` and a checkpoint made of it."""
    architecture = name if name != "llama-rope" else "llama"
    base = make_base(folder / "base", architecture, vocab_size=320, **GGUF_MODELS[name])
    for file in base.glob("tokenizer*"):
        file.unlink()
    bpe_tokenizer(digits=name == "llama").save_pretrained(base)
    return base, make_checkpoint(base, folder / "checkpoint")
