"""What a recipe can say: the dataclasses of both stages. `command.py` reads them from YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ubmoe_st.configuration import ROUTER_KINDS, RouterKind

Trained = Literal["ffn", "attention", "ffn+attention", "embeddings", "ffn+embeddings", "attention+embeddings", "all"]
LossName = Literal["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss", "distillation", "similarity"]


# --- texts ------------------------------------------------------------------------------------------------------


@dataclass
class Mixture:
    """Sentences drawn from several files.

    Attributes:
        files: Share of each file, by name without `train/sentences-` and `.txt.gz`, or by path of a text file.
        count: Sentences to draw in all; a file that holds fewer gives what it has.
        use: Train on the first so many of the drawn ones. None: all.
        words: Fewest and most words of a sentence.
        seed: Of the draw.
    """

    files: dict[str, float]
    count: int = 60_000
    use: int | None = None
    words: tuple[int, int] = (4, 28)
    seed: int = 0


# --- teachers ---------------------------------------------------------------------------------------------------


@dataclass
class PromptedTeacher:
    """How the base is asked, and how its answer becomes a target.

    The target of a text: its hidden states of some layers at the last prompt token, each minus its mean over
    the texts and normalised, concatenated, minus the mean, projected on the first principal components, each
    component weighed by (singular value / largest) ** -whitening, normalised.

    Attributes:
        prefix: Text before the sentence; computed once, as a key-value cache.
        suffix: Text after the sentence.
        layers: Numbers of the hidden states (0 is the embedding).
        folder: Where the vectors are kept.
        dimension: Principal components.
        whitening: 0 leaves the components as they are, 1 gives all the same variance.
        batch_size: Sentences per forward pass.
        scale: Factor of the stored vectors, for a base whose hidden states are beyond the range of fp16; the targets
            do not depend on it.
    """

    prefix: str
    suffix: str
    layers: list[int]
    folder: str
    dimension: int = 384
    whitening: float = 0.25
    batch_size: int = 64
    scale: float = 1.0


# --- stage 1 ----------------------------------------------------------------------------------------------------


@dataclass
class DistillationWeights:
    """Weights of the terms of `DistillationLoss`."""

    cosine: float = 1.0
    info_nce: float = 1.0
    similarity: float = 20.0
    contrastive: float = 0.0
    """Of the in-batch contrastive loss on two noisy views of a sentence; above 0 each sentence is read twice."""


@dataclass
class ContrastiveRecipe:
    """What stage 1 trains, on what and how; the rest is `SentenceTransformerTrainingArguments`."""

    base: str
    """Local folder, `.gguf` file, Hub id or short name, see `resolve_base`."""

    out: str
    """Folder of checkpoints and results."""

    init_from: str | None = None
    """Folder of a finished run that trained the same modules: start from its parameters."""

    sentences: Mixture | None = None
    """Unlabelled sentences: each is its own positive."""

    rough: float = 0.0
    """Share of the sentences that the student reads as fragments, see `roughen`; a teacher reads all clean."""

    pairs: str | None = None
    """Supervised pairs or triplets instead, see `read_rows`."""

    columns: list[str] = field(default_factory=lambda: ["anchor", "positive"])
    """Columns of `pairs`: anchor, positive, then hard negatives."""

    train: Trained = "ffn"
    """What trains. Only `ffn` can be released: everything else is shared with the generator."""

    rank: int | None = 16
    """Rank of the low-rank experts (rsLoRA). None: dense."""

    alpha: float | None = None
    """LoRA alpha; the deltas are scaled by alpha / sqrt(rank). None: the rank."""

    lora_dropout: float = 0.0
    """Noise: dropout rate on the input of every low-rank expert."""

    attention_dropout: float = 0.0
    """Noise: dropout rate on the attention weights."""

    ffn_dropout: float = 0.0
    """Noise: dropout rate on the output of every FFN."""

    loss: LossName = "MultipleNegativesRankingLoss"
    scale: float = 20.0
    """1 / temperature of every softmax over similarities."""

    mini_batch_size: int = 32
    """Sentences per forward pass of `CachedMultipleNegativesRankingLoss`."""

    matryoshka_dims: list[int] | None = None
    """Also train these leading dimensions of the vectors, by `MatryoshkaLoss`."""

    teacher: PromptedTeacher | None = None
    """For `distillation`."""

    distillation: DistillationWeights = field(default_factory=DistillationWeights)

    head: Literal["training", "output"] | None = None
    """Linear layer behind the pooling, to the teacher's dimension. `training`: dropped afterwards, the vectors are
    the pooled ones. `output`: part of the model."""

    pooling: Literal["mean", "lasttoken"] = "mean"
    prompt: str | None = None
    """Put before every text, in training and by `encode`."""

    pool_prompt: bool = False
    """Whether mean pooling takes the prompt's tokens too."""

    max_seq_length: int = 64
    """Longest text in training, tokens."""

    encode_max_seq_length: int = 512
    """Longest text of the released model, tokens."""

    length_buckets: bool = True
    """Batches of texts of similar length. False: by the trainer's `batch_sampler`."""

    batch_tokens: int | None = None
    """Tokens of a batch in each process, padding included, instead of the trainer's `per_device_train_batch_size`."""

    evaluate: dict[str, int | None] = field(default_factory=lambda: {"STSB-dev": None})
    """Development sets, and how many of their pairs (None: all). The first one chooses the best checkpoint."""

    early_stopping_patience: int | None = None
    """Stop after so many evaluations without a gain."""

    trainer: dict[str, Any] = field(default_factory=dict)
    """`SentenceTransformerTrainingArguments`."""

    def __post_init__(self) -> None:
        if self.train not in get_args(Trained):
            raise ValueError(f"train must be one of {', '.join(get_args(Trained))}, got {self.train!r}")
        if self.loss not in get_args(LossName):
            raise ValueError(f"loss must be one of {', '.join(get_args(LossName))}, got {self.loss!r}")
        if (self.sentences is None) == (self.pairs is None):
            raise ValueError("a recipe needs either `sentences` or `pairs`")
        if self.loss == "distillation":
            if self.teacher is None or self.sentences is None or self.head is None:
                raise ValueError("loss: distillation needs `teacher`, `sentences` and `head` (training or output)")
            if self.matryoshka_dims:
                raise ValueError("matryoshka_dims go with the contrastive losses, not with distillation")
        elif self.head == "training":
            raise ValueError("head: training is for distillation; a contrastive loss trains the vectors themselves")
        two_views = self.loss != "distillation" or self.distillation.contrastive > 0
        if two_views and self.sentences is not None and not self.has_noise:
            raise ValueError(
                "without noise both views of a sentence are equal and there is nothing to learn; set lora_dropout, "
                "attention_dropout or ffn_dropout"
            )
        if self.batch_tokens is not None and self.pairs is not None:
            raise ValueError("batch_tokens counts one sentence per row; with `pairs` use per_device_train_batch_size")
        if not 0 <= self.rough <= 1:
            raise ValueError(f"rough is a share from 0 to 1, got {self.rough}")
        if self.rank is None and self.lora_dropout:
            raise ValueError("lora_dropout needs low-rank experts; set rank, or use ffn_dropout")

    @property
    def supervision(self) -> str:
        """How the tables call this kind of training."""
        if self.pairs is not None:
            return "supervised"
        return "self-distilled" if self.loss == "distillation" else "unsupervised"

    @property
    def has_noise(self) -> bool:
        """Whether two passes over a sentence differ in training."""
        # PEFT drops nothing in front of an embedding.
        lora = self.lora_dropout if set(self.train.split("+")) - {"embeddings"} else 0.0
        return max(lora, self.attention_dropout, self.ffn_dropout) > 0


# --- stage 2 ----------------------------------------------------------------------------------------------------


@dataclass
class RouterRecipe:
    """What stage 2 trains on; the rest is transformers' `TrainingArguments`."""

    checkpoint: str
    """UBMoE checkpoint with trained `bi` experts."""

    out: str
    """Folder of checkpoints and results."""

    instructions: list[str]
    """Instruction sets, see `read_instructions`."""

    kind: RouterKind = "soft"
    """`soft`: weighted sum of both experts; `top1`: one of them."""

    kl: float = 0.0
    """Weight of KL(base || routed) on the answer tokens: keeps the mix near the base."""

    balance: float = 0.0
    """Weight of the load balance: squared distance of each layer's mean `bi` weight from `balance_target`."""

    balance_target: float = 0.5
    count: int | None = None
    """Answers to train on, a seeded sample. None: all."""

    held_out: int = 100
    """Answers kept for the evaluation loss."""

    max_tokens: int = 512
    """Longer questions and answers lose their end."""

    seed: int = 0
    """Of the sample."""

    trainer: dict[str, Any] = field(default_factory=dict)
    """`TrainingArguments`."""

    def __post_init__(self) -> None:
        if self.kind not in ROUTER_KINDS:
            raise ValueError(f"kind must be one of {', '.join(ROUTER_KINDS)}, got {self.kind!r}")
        if min(self.kl, self.balance) < 0:
            raise ValueError("kl and balance are weights of losses and cannot be negative")
