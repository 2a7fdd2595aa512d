"""Tiny checkpoints whose tokenizers a GGUF file can hold."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
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
    # A full layer between sliding ones.
    "gemma3": {"num_hidden_layers": 7},
    "gemma3-odd": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 40.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
        "query_pre_attn_scalar": 3,
        "sliding_window": 3,
        "tie_word_embeddings": False,
    },
}
GGUF_TEXTS = [*TEXTS, "In 1984 the cat's tree had 12 birds.", "Größe", "the  cat\n\n\nsits  "]


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


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As of Gemma: spaces are letters, other letters fall back to bytes, every way to make a token is a merge."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    added = ["\n\n", "<table>"]
    trainer = trainers.BpeTrainer(vocab_size=90, show_progress=False)
    spaced = [text.replace(" ", "\u2581") for text in [*TEXTS, "12 birds  in 1984   in 1984", "the\ncat\nsits"] * 3]
    trained = Tokenizer(models.BPE())
    trained.train_from_iterator(spaced, trainer)
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    names = [*special, *added, *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    vocab = {name: index for index, name in enumerate(names)}
    merges = [
        (token[:place], token[place:])
        for token in learned
        for place in range(1, len(token))
        if token[:place] in vocab and token[place:] in vocab
    ]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def make_gguf_checkpoint(folder: Path, name: str) -> tuple[Path, Path]:
    """A base of `GGUF_MODELS` and a checkpoint made of it."""
    architecture = {"llama-rope": "llama", "gemma3-odd": "gemma3"}.get(name, name)
    gemma = architecture == "gemma3"
    base = make_base(folder / "base", architecture, vocab_size=360 if gemma else 320, **GGUF_MODELS[name])
    for file in base.glob("tokenizer*"):
        file.unlink()
    (sentencepiece_tokenizer() if gemma else bpe_tokenizer(digits=name == "llama")).save_pretrained(base)
    return base, make_checkpoint(base, folder / "checkpoint")
