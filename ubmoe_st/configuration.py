"""What a checkpoint says of itself beside the stock configs."""

from __future__ import annotations

import dataclasses
import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ubmoe_st.files import check_types

Routing = Literal["uni", "bi", "router"]
RouterKind = Literal["soft", "top1"]

ROUTINGS: tuple[str, ...] = get_args(Routing)
ROUTER_KINDS: tuple[str, ...] = get_args(RouterKind)
LAYOUT_VERSION = 1


_FURTHER = ", then trained further"


def trained_further(label: str | None) -> str | None:
    """How experts are called after a training that left no word of itself.

    Args:
        label: How they were called before. None: nobody knows, then or now.
    """
    return label if label is None or label.endswith(_FURTHER) else label + _FURTHER


@dataclass
class UBMoEConfig:
    """The `ubmoe` section of `generator/config.json`.

    The rest of that file is the base model's own config, so stock transformers reads it too.
    """

    base_model: str
    """Name of the base model: a Hub id, or the name of the folder or file it was read from. Empty: the generator's
    weights were changed since, so that it is no longer that base."""

    base_architecture: str
    """Class of the base model in transformers, e.g. `LlamaForCausalLM`."""

    base_origin: Literal["hub", "folder", "gguf"] = "folder"
    """Where the base weights were read from."""

    base_sha256: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each weight file of the base model, by file name."""

    expert_rank: int | None = None
    """Rank of the low-rank form of the `bi` experts. None: the experts are dense."""

    training: str | None = None
    """How the `bi` experts were trained, in a word: `unsupervised`, `self-distilled`, `supervised`, ..."""

    routing: Routing = "uni"
    """Routing that `generate()` takes when none is given."""

    router: RouterKind | None = None
    """How the token routers mix the experts. None: there are no routers."""

    layout_version: int = LAYOUT_VERSION
    """Version of the checkpoint layout."""

    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the libraries that wrote the checkpoint."""

    def __post_init__(self) -> None:
        if self.layout_version > LAYOUT_VERSION:
            raise ValueError(
                f"the checkpoint has layout version {self.layout_version}, this ubmoe_st reads up to "
                f"{LAYOUT_VERSION}: update with `pip install -U ubmoe-st`"
            )
        if self.routing not in ROUTINGS:
            raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}, got {self.routing!r}")
        if self.router is not None and self.router not in ROUTER_KINDS:
            raise ValueError(f"router must be one of {', '.join(ROUTER_KINDS)} or null, got {self.router!r}")
        if self.expert_rank is not None and self.expert_rank < 1:
            raise ValueError(f"expert_rank must be at least 1 or null, got {self.expert_rank}")
        if self.routing == "router" and self.router is None:
            raise ValueError("routing is 'router', but the checkpoint names no router kind")

    def honest(self, base_sha256: Mapping[str, str], changed: str | None) -> UBMoEConfig:
        """The config to write: without the base where the generator is no longer that base.

        Args:
            base_sha256: Of the base that a model was made of, which a config without any takes; empty: it was read
                from a checkpoint.
            changed: A tensor that the generator uses and that is not the base's. None: there is none.
        """
        if changed is None:
            self.base_sha256 = self.base_sha256 or dict(base_sha256)
            return dataclasses.replace(self)
        if self.base_model:
            warnings.warn(
                f"{changed}, which the generator uses, was changed by training or by a merged adapter: the model no "
                f"longer generates exactly like {self.base_model}, so it is saved without that name and hash. To "
                "keep generation as it was, train the FFN layers of the encoder only",
                stacklevel=3,
            )
        return dataclasses.replace(self, base_model="", base_sha256={})

    def to_dict(self) -> dict[str, Any]:
        """The section as plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> UBMoEConfig:
        """Read the section.

        Args:
            values: What `to_dict` gave.

        Raises:
            TypeError: If a value is of another type.
            ValueError: If a key is missing or unknown, or a value is out of range.
        """
        version = values.get("layout_version", LAYOUT_VERSION)
        if type(version) is not int or version <= LAYOUT_VERSION:
            check_types(cls, values)
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown and version <= LAYOUT_VERSION:
            raise ValueError(f"unknown keys {unknown}; known keys are {sorted(known)}")
        missing = [key for key in ("base_model", "base_architecture") if key not in values]
        if missing:
            raise ValueError(f"missing keys {missing}")
        return cls(**{key: value for key, value in values.items() if key in known})


def check_count(name: str, value: object, *, wanted: str = "a whole number", unit: str = "") -> None:
    """Refuse an argument that is no whole number from 1 on.

    Args:
        name: Of the argument.
        value: What was given for it; numbers of numpy and torch are numbers.
        wanted: What it must be, for the message.
        unit: Of the number, for the message.

    Raises:
        TypeError: If it is no whole number.
        ValueError: If it is below 1.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
    if operator.index(value) < 1:
        raise ValueError(f"{name} must be at least 1{unit}, got {value}")


def encoder_limit(config: Any, wanted: int | None = None) -> int | None:
    """Longest text that an encoder may read, in tokens.

    With `longrope` the longest text of a batch decides the frequencies of all, so that a vector would depend on what
    stands beside it: such a base encodes up to `original_max_position_embeddings` tokens.

    Args:
        config: Of the base.
        wanted: A limit. None: the longest there may be.

    Returns:
        `wanted`, or the base's limit. None: there is none.

    Raises:
        ValueError: If `wanted` is beyond the base's limit.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return wanted
    limit = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    if wanted is not None and wanted > limit:
        raise ValueError(
            f"max_seq_length must be at most {limit} with longrope, whose frequencies change for all texts of a batch "
            f"behind it, got {wanted}"
        )
    return limit if wanted is None else wanted


def check_texts(inputs: object) -> None:
    """Refuse what no encoder takes for texts: generators, bytes, entries that are no strings.

    Args:
        inputs: What `encode` was given: a text, a sequence or an array of them, or one of the stock mappings.

    Raises:
        TypeError: With the position of the first entry that is no text.
    """
    if isinstance(inputs, str):
        return
    if not hasattr(inputs, "__iter__") or isinstance(inputs, bytes):
        raise TypeError(f"encode takes a text or a list of texts, got {type(inputs).__name__}")
    if not isinstance(inputs, (Sequence, Mapping)) and not hasattr(inputs, "__array_interface__"):
        raise TypeError(f"encode takes a text or a list of texts, got {type(inputs).__name__}: give `list(...)` of it")
    if isinstance(inputs, Sequence) or getattr(inputs, "ndim", 0) == 1:
        for position, text in enumerate(inputs):
            if not isinstance(text, str):
                raise TypeError(
                    f"encode takes texts, but the entry at position {position} is of type {type(text).__name__}"
                )
