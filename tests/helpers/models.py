"""Tiny random models of every supported architecture, and a tokenizer made in memory."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ubmoe_st.classification import ClassificationHead
from ubmoe_st.experts import LowRank, find_ffns
from ubmoe_st.model import UBMoE, UBMoETransformer

WORDS = (
    "a the cat dog bird train sits runs sleeps on in under mat house tree red blue old and with user assistant".split()
)
SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# A window shorter than the texts, so that sliding layers differ from full ones.
SLIDING = {"sliding_window": 4, "use_sliding_window": True}
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-untied": ("LlamaConfig", {"tie_word_embeddings": False, "mlp_bias": True}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-sliding": ("Qwen2Config", {**SLIDING, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 8, "tie_word_embeddings": False}),
    "mistral-sliding": ("MistralConfig", {"sliding_window": 4, "tie_word_embeddings": False}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "phi3-fused": ("Phi3Config", {"tie_word_embeddings": False}),
    "olmo2": ("Olmo2Config", {"tie_word_embeddings": False}),
    "smollm3": ("SmolLM3Config", {"tie_word_embeddings": True, "no_rope_layers": [1, 0, 1]}),
}
TEXTS = [
    "the cat sits on the mat",
    "a red bird sleeps in the old tree under the house and the dog runs",
    "train",
    "the dog and the cat",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '</s> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    return tokenizer


def make_base(folder: Path, architecture: str = "llama", **changes: object) -> Path:
    """A random base model with its tokenizer, saved by stock transformers."""
    name, extra = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SIZES, **extra, **changes})
    lm = transformers.AutoModelForCausalLM.from_config(config)
    # Larger than the default initialisation, so that attention and experts matter.
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)
    lm.save_pretrained(folder)
    # Under a neutral model type: AutoTokenizer replaces the tokenizer of some types (qwen2, gemma3) by its own.
    make_tokenizer().save_pretrained(folder)
    return folder


def random_experts(module: UBMoETransformer, rank: int = 2, scale: float = 0.3) -> LowRank:
    generator = torch.Generator().manual_seed(1)
    low_rank = {}
    for prefix, ffn in find_ffns(module.model).items():
        for name, linear in ffn.named_modules():
            if isinstance(linear, torch.nn.Linear):
                low_rank[f"{prefix}.{name}"] = (
                    torch.randn(rank, linear.in_features, generator=generator) * scale,
                    torch.randn(linear.out_features, rank, generator=generator) * scale,
                )
    return low_rank


def make_checkpoint(base: Path, out: Path, low_rank: bool = True) -> Path:
    module = UBMoETransformer.from_base(base)
    if low_rank:
        module.set_low_rank_experts(random_experts(module))
    UBMoE(modules=[module, Pooling(32), Normalize()], device="cpu").save(str(out))
    return out


def save_with_head(checkpoint: Path, out: Path, length: float = 1.0) -> UBMoE:
    """A copy of a checkpoint with a random classification head: layer 2, 5 dimensions."""
    torch.manual_seed(3)
    model = UBMoE(str(checkpoint), device="cpu")
    linear = torch.nn.Linear(model[0].model.config.hidden_size, 5)
    model[0].set_classification_head(ClassificationHead(2, 0.6, linear, length))
    model.save(str(out))
    return model
