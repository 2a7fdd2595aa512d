"""What a recipe can say: the dataclasses of both stages. `command.py` reads them from YAML.

Those of the texts are in `mixtures.py`, those of the teachers in `teacher_settings.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args

from training.limits import above, at_least, shares
from training.mixtures import Groups, Kind, Mixture, Texts, refuse_no_kinds
from training.teacher_settings import EmbedderTeacher, Teacher
from ubmoe_st.configuration import ROUTER_KINDS, RouterKind

Trained = Literal["ffn", "attention", "ffn+attention", "embeddings", "ffn+embeddings", "attention+embeddings", "all"]
LossName = Literal["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss", "distillation", "similarity"]

USED_BY: dict[str, tuple[LossName, ...]] = {
    "teacher": ("distillation", "similarity"),
    "distillation": ("distillation",),
    "similarity": ("similarity",),
    "scale": ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss", "distillation"),
    "mini_batch_size": ("CachedMultipleNegativesRankingLoss",),
}
"""Losses that read a key; with any other it does nothing."""
_OTHER_BATCHES = {
    "batch_tokens": ("per_device_train_batch_size", "batch_sampler"),
    "shuffle_buffer": ("batch_sampler",),
}
"""Keys of the trainer that nothing reads where a recipe has another one."""


_ELSEWHERE = {
    "output_dir": "checkpoints go to `out`, where a run that goes on looks for them",
    "prompts": "the released model would not know them; use `prompt` or `prompts` of the recipe",
}
"""Arguments of a trainer that a recipe says in another place."""


def _refuse_elsewhere(trainer: dict[str, Any]) -> None:
    for key in _ELSEWHERE.keys() & trainer.keys():
        raise ValueError(f"trainer.{key}={trainer[key]!r}: {_ELSEWHERE[key]}")


SELF_DISTILLED = "self-distilled"
"""How tables and cards call experts that their own base alone has taught."""
UNSUPERVISED = "unsupervised"
"""Those that nobody has taught."""
SUPERVISED = "supervised"
"""Those of labelled pairs."""


# --- stage 1 ----------------------------------------------------------------------------------------------------


@dataclass
class DistillationWeights:
    """Weights of the terms of `DistillationLoss`."""

    cosine: float = 1.0
    info_nce: float = 1.0
    similarity: float = 20.0
    contrastive: float = 0.0
    """Of the in-batch contrastive loss on two noisy views of a sentence; above 0 each sentence is read twice."""

    def __post_init__(self) -> None:
        at_least(self, 0, "cosine", "info_nce", "similarity", "contrastive")


@dataclass
class SimilarityWeights:
    """Weights of the terms of `SimilarityLoss`."""

    similarity: float = 20.0
    """Of the squared error of the similarity matrices, without their diagonals."""

    within: float = 0.0
    """Share of that error that is taken over the pairs of one group alone, from 0 to 1."""

    shift: float = 1.0
    """What a shift of all similarities of a batch costs: 1 as much as any other error, 0 nothing."""

    kl: float = 0.5
    """Of the divergence of the rows' softmax from the teacher's."""

    cosine: float = 0.5
    """Of 1 - cosine of the head's output and the first teacher's vectors."""

    temperature: float = 0.05
    """Of the rows' softmax."""

    contrastive: float = 0.0
    """Of the cross entropy of a title's or a question's own passage among the passages of the batch."""

    def __post_init__(self) -> None:
        at_least(self, 0, "similarity", "shift", "kl", "cosine", "contrastive")
        above(self, 0, "temperature")
        shares(self, "within")


@dataclass
class ContrastiveRecipe:
    """What stage 1 trains, on what and how; the rest is `SentenceTransformerTrainingArguments`."""

    base: str
    """Local folder, `.gguf` file, Hub id or short name, see `resolve_base`."""

    out: str
    """Folder of checkpoints and results."""

    init_from: str | None = None
    """Start from the parameters of a finished run that trained the same modules, or from a folder of experts
    (`bi_delta.safetensors`); what it does not hold starts as without it."""

    sentences: Mixture | None = None
    """Unlabelled sentences: each is its own positive."""

    texts: Texts | None = None
    """Instead of `sentences`: texts of several kinds."""

    groups: Groups | None = None
    """Batches of whole neighbour groups, `batch_tokens` each; for the losses with a teacher."""

    rough: float = 0.0
    """Share of the sentences that the student reads as fragments, see `roughen`; a teacher reads all clean."""

    pairs: str | None = None
    """Supervised pairs or triplets instead, see `read_rows`."""

    columns: list[str] = field(default_factory=lambda: ["anchor", "positive"])
    """Columns of `pairs`: anchor, positive, then hard negatives."""

    shuffle_buffer: int | None = None
    """Read `pairs` as they come, and shuffle them in a buffer of so many rows: for datasets beyond memory and disk.
    None: read all first, and shuffle all."""

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

    teacher: Teacher | list[Teacher] | None = None
    """For `distillation` one, for `similarity` one or several. The first one's space is that of the head."""

    distillation: DistillationWeights = field(default_factory=DistillationWeights)
    similarity: SimilarityWeights = field(default_factory=SimilarityWeights)

    head: Literal["training", "output"] | None = None
    """Linear layer behind the pooling, to the first teacher's dimension. `training`: dropped afterwards, the vectors
    are the pooled ones. `output`: part of the model, whose vectors then live in the teacher's space."""

    ridge: int = 3000
    """Texts from which the head of `loss: similarity` is started by ridge regression, unless `init_from` brings one,
    and whose mean the layer of `project` subtracts. 0: a random start of the head."""

    project: bool = False
    """A square linear layer behind the pooling that is part of the model. It starts by subtracting the mean of the
    pooled vectors of the `ridge` texts."""

    components: bool | int = False
    """At the end the projection is turned to the principal components of the vectors of the `ridge` texts: cosines
    stay, and the leading dimensions say most, so that `truncate_dim` costs little. A number: so many are released."""

    pooling: Literal["mean", "lasttoken"] = "mean"
    prompt: str | None = None
    """Put before every text, in training and by `encode`."""

    prompts: dict[str, str] = field(default_factory=dict)
    """Put before the texts that the student reads, by their kind in `texts`. Those of `queries` and `passages` become
    the released model's prompts `query` and `document`, for `encode_query` and `encode_document`."""

    pool_prompt: bool = False
    """Whether mean pooling takes the prompt's tokens too."""

    max_seq_length: int = 64
    """Longest text in training, tokens."""

    encode_max_seq_length: int = 512
    """Longest text of the released model, tokens."""

    length_buckets: bool = True
    """Batches of texts of similar length, unless `trainer` names a `batch_sampler`. Not with `shuffle_buffer`."""

    batch_tokens: int | None = None
    """Tokens of a batch in each process, padding included, of one view and without `prompt`; instead of the trainer's
    `per_device_train_batch_size`."""

    evaluate: dict[str, int | None] = field(default_factory=lambda: {"STSB-dev": None})
    """Development sets, and how many of their pairs (None: all). With trainer.eval_strategy; the first one then chooses
    the best checkpoint."""

    early_stopping_patience: int | None = None
    """Stop after so many evaluations without a gain."""

    save_minutes: float | None = 8.0
    """A checkpoint at least so often, whatever the trainer's `save_strategy`. None: by `save_strategy` alone."""

    attention: str | None = None
    """`attn_implementation` of the student while it trains. None: the default of transformers. On a CPU `eager` is
    faster for short texts."""

    compile: bool = False
    """Whether each decoder layer is compiled by `torch.compile`, once for all of them. Takes a C++ compiler on a CPU,
    and a minute for each new kind of pass."""

    trainer: dict[str, Any] = field(default_factory=dict)
    """`SentenceTransformerTrainingArguments`. `bf16: auto`: where the processor computes in it."""

    def __post_init__(self) -> None:
        self._check_numbers()
        _refuse_elsewhere(self.trainer)
        if self.train not in get_args(Trained):
            raise ValueError(f"train must be one of {', '.join(get_args(Trained))}, got {self.train!r}")
        if self.loss not in get_args(LossName):
            raise ValueError(f"loss must be one of {', '.join(get_args(LossName))}, got {self.loss!r}")
        if sum(source is not None for source in (self.sentences, self.texts, self.pairs)) != 1:
            raise ValueError("a recipe needs exactly one of `sentences`, `texts` and `pairs`")
        if self.loss in ("distillation", "similarity"):
            self._check_distillation()
        elif self.head == "training":
            raise ValueError("head: training is for distillation; a contrastive loss trains the vectors themselves")
        elif self.groups is not None:
            raise ValueError("groups need a teacher that says what is close: loss: similarity, or distillation")
        if self.components and (not self.project or self.matryoshka_dims or self.pairs is not None):
            raise ValueError(
                "components turns the layer of `project: true` by the vectors of `sentences` or `texts`; it goes "
                "neither with `pairs` nor with matryoshka_dims, which order the dimensions themselves"
            )
        if not isinstance(self.components, bool) and self.components < 1:
            raise ValueError(f"components is true, false, or at least 1, got {self.components}")
        if self.project and self.head == "output":
            raise ValueError("project changes the vectors that head: output ties to the teacher's space; choose one")
        if self.views == 2 and self.pairs is None and not self.has_noise:
            raise ValueError(
                "without noise both views of a sentence are equal and there is nothing to learn; set lora_dropout, "
                "attention_dropout or ffn_dropout"
            )
        if self.shuffle_buffer is not None:
            if self.pairs is None or self.shuffle_buffer < 1:
                raise ValueError(f"shuffle_buffer is a number of rows of `pairs` from 1 on, got {self.shuffle_buffer}")
            if self.trainer.get("max_steps", -1) < 1:
                raise ValueError("with shuffle_buffer nobody knows where an epoch ends; set trainer.max_steps")
        if self.batch_tokens is not None and self.pairs is not None:
            raise ValueError("batch_tokens counts one sentence per row; with `pairs` use per_device_train_batch_size")
        if self.prompts:
            kinds = get_args(Kind)
            other = next((kind for kind in self.prompts if kind not in kinds), None)
            if other is not None:
                raise ValueError(f"prompts: expected kinds of text ({', '.join(kinds)}), got {other!r}")
            if self.texts is None or self.prompt is not None or not self.pool_prompt:
                raise ValueError("prompts go with `texts`, without `prompt`, and with pool_prompt: true")
        if self.rough and self.pairs is not None and "anchor" not in self.columns:
            raise ValueError(
                f"rough changes the column `anchor`, got the columns {self.columns}; rename one of `pairs`"
            )
        if self.rank is None and self.lora_dropout:
            raise ValueError("lora_dropout needs low-rank experts; set rank, or use ffn_dropout")

    def _check_numbers(self) -> None:
        at_least(self, 1, "rank", "mini_batch_size", "max_seq_length", "encode_max_seq_length", "batch_tokens")
        at_least(self, 1, "early_stopping_patience", "matryoshka_dims")
        at_least(self, 0, "ridge")
        above(self, 0, "scale", "alpha", "save_minutes")
        shares(self, "rough")
        for name, sample in self.evaluate.items():
            if sample is not None and sample < 1:
                raise ValueError(f"evaluate: {name} must be at least 1 pair, or null for all, got {sample}")
        for name in ("lora_dropout", "attention_dropout", "ffn_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is a rate from 0 to below 1, got {getattr(self, name)}")
        evaluated = self.evaluate and self.trainer.get("eval_strategy", "no") != "no"
        if self.early_stopping_patience is not None and not evaluated:
            raise ValueError("early_stopping_patience counts evaluations: set `evaluate` and trainer.eval_strategy")

    def _check_distillation(self) -> None:
        if not self.teachers or self.pairs is not None:
            raise ValueError(f"loss: {self.loss} needs `teacher` and `sentences` or `texts`")
        if self.loss == "distillation":
            if len(self.teachers) > 1 or self.head is None:
                raise ValueError("loss: distillation needs one `teacher` and `head` (training or output)")
            if self.matryoshka_dims:
                raise ValueError("matryoshka_dims go with loss: similarity and the contrastive losses")
        elif self.head is None and self.similarity.cosine:
            raise ValueError("similarity.cosine needs `head` (training or output); set it, or similarity.cosine to 0")
        if min(teacher.weight for teacher in self.teachers) <= 0:
            raise ValueError("teacher: weights must be greater than 0")
        if left_out := self.teachers[0].left_out:
            raise ValueError(
                "teacher: the first one gives the groups and the target of the head and must know every kind of text, "
                f"but gives {', '.join(sorted(left_out))} no weight; put another teacher first"
            )
        if len({teacher.folder for teacher in self.teachers}) < len(self.teachers):
            raise ValueError("teacher: each one needs a `folder` of its own for its vectors")
        if self.groups is not None and self.batch_tokens is None:
            raise ValueError("groups make batches of batch_tokens; set it")
        if self.similarity.within and self.groups is None:
            raise ValueError("similarity.within is a share of the pairs of one group; it needs `groups`")
        sources = self.texts.sources if self.texts is not None else []
        if self.similarity.contrastive and not any(source.title_apart or source.query for source in sources):
            raise ValueError(
                "similarity.contrastive is of titles and questions and their passages; it needs `texts` with "
                "passages that have `title_apart` or `query`"
            )

    @property
    def _unused(self) -> dict[str, str]:
        """Keys that nothing reads beside the other keys, with the reason."""
        reasons = {
            key: f"with loss: {self.loss}, it is for {' and '.join(losses)}"
            for key, losses in USED_BY.items()
            if self.loss not in losses
        }
        if self.batch_tokens is not None:
            reasons["length_buckets"] = "with batch_tokens, which makes other batches"
        if self.rank is None:
            reasons["alpha"] = "without rank"
        if self.pairs is None:
            reasons["columns"] = "without pairs"
        return reasons

    @property
    def idle(self) -> dict[str, Any]:
        """Keys whose value does nothing beside the other keys, with their defaults."""
        defaults = {
            spec.name: spec.default if spec.default_factory is MISSING else spec.default_factory()
            for spec in fields(self)
        }
        return {key: defaults[key] for key in self._unused if getattr(self, key) != defaults[key]}

    def refuse_idle(self) -> None:
        """Refuse a key that was set for nothing.

        Not when a recipe is made: finished runs are opened by theirs.

        Raises:
            ValueError: If there is one.
        """
        for key in self.idle:
            raise ValueError(f"{key} does nothing {self._unused[key]}; leave it out")
        refuse_no_kinds("prompts", self.prompts)
        for section in (self.texts, *self.teachers):
            if section is not None:
                section.refuse_idle()
        if len(self.teachers) == 1 and (self.teachers[0].weight != 1 or self.teachers[0].weights):
            raise ValueError("teacher: weight and weights do nothing with a single teacher; leave them out")
        if self.loss == "similarity" and not (self.similarity.kl or self.similarity.contrastive):
            if self.similarity.temperature != SimilarityWeights().temperature:
                raise ValueError("similarity.temperature does nothing without kl and contrastive; leave it out")
        if self.texts is not None and self.groups is None and any(source.join for source in self.texts.sources):
            raise ValueError("join of a source does nothing without `groups`; set them, or leave it out")
        for key, names in _OTHER_BATCHES.items():
            unread = next((name for name in names if name in self.trainer), None)
            if getattr(self, key) is not None and unread is not None:
                raise ValueError(f"trainer.{unread} does nothing with {key}, which makes other batches; leave it out")
        chosen = self.evaluate not in ({}, {"STSB-dev": None})
        if chosen and "eval_strategy" not in self.trainer:
            raise ValueError(
                "evaluate does nothing without evaluations: add `eval_strategy: steps` and `eval_steps: 100` to "
                "trainer, or `eval_strategy: no`"
            )

    @property
    def teachers(self) -> list[Teacher]:
        """The teachers, none for losses without."""
        if self.teacher is None or self.loss not in ("distillation", "similarity"):
            return []
        return self.teacher if isinstance(self.teacher, list) else [self.teacher]

    @property
    def views(self) -> int:
        """How often a text is read in a step."""
        if self.loss == "similarity":
            return 1
        return 2 if self.loss != "distillation" or self.distillation.contrastive else 1

    @property
    def released_prompts(self) -> dict[str, str]:
        """Prompts of the released model, by name; `default`, where there is one, is that of plain `encode`."""
        if self.prompt:
            return {"default": self.prompt}
        names = {"query": "queries", "document": "passages"}
        return {name: self.prompts[kind] for name, kind in names.items() if self.prompts.get(kind)}

    @property
    def supervision(self) -> str:
        """How tables and cards call this kind of training, each embedder being another model."""
        return self.supervision_of([teacher.label for teacher in self.teachers if isinstance(teacher, EmbedderTeacher)])

    def supervision_of(self, others: Sequence[str]) -> str:
        """How tables and cards call it, without the phases before.

        Args:
            others: Names of those of its embedders that are other models, see `training.teacher.other_models`.
        """
        if self.pairs is not None:
            return SUPERVISED
        if not self.teachers:
            return UNSUPERVISED
        return "distilled from " + " and ".join(others) if others else SELF_DISTILLED

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

    plain_format: str | None = None
    """For a base without chat template: a text with `{question}` and, behind it, `{answer}`, such as
    `"Question: {question}\\nAnswer: {answer}"`; the end token follows. None: the chat template."""

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
        at_least(self, 0, "held_out")
        _refuse_elsewhere(self.trainer)
        shares(self, "balance_target")
        at_least(self, 1, "count", "max_tokens")
        if self.kind not in ROUTER_KINDS:
            raise ValueError(f"kind must be one of {', '.join(ROUTER_KINDS)}, got {self.kind!r}")
        if min(self.kl, self.balance) < 0:
            raise ValueError("kl and balance are weights of losses and cannot be negative")
        if self.plain_format is not None:
            before, _, after = self.plain_format.partition("{answer}")
            if before.count("{question}") != 1 or "{question}" in after or self.plain_format.count("{answer}") != 1:
                raise ValueError(
                    "plain_format needs {question} and, behind it, {answer}, once each, got "
                    f"{self.plain_format!r}; e.g. 'Question: {{question}}\\nAnswer: {{answer}}'"
                )

    def refuse_idle(self) -> None:
        """Refuse a key that was set for nothing.

        Raises:
            ValueError: If there is one.
        """
        if self.balance == 0 and self.balance_target != RouterRecipe.balance_target:
            raise ValueError("balance_target does nothing without balance, its weight; set that, or leave it out")
