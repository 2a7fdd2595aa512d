"""What a server allows: `Settings`."""

from __future__ import annotations

from dataclasses import dataclass, fields

_WHOLE = {
    "batch_tokens",
    "max_inputs",
    "max_queue",
    "generations",
    "searches",
    "max_waiting",
    "default_max_tokens",
    "max_body_bytes",
}


@dataclass(frozen=True)
class Settings:
    """Limits of a server."""

    batch_tokens: int = 8192
    """Tokens of one pass of the encoder, padding included: texts of concurrent requests are computed together."""
    batch_wait_ms: float = 2.0
    """How long the first text of a batch waits for others, ms. While the encoder works, texts gather anyway."""
    max_inputs: int = 2048
    """Texts in one request."""
    max_queue: int = 8192
    """Texts that may wait for the encoder; a request that would make it more is answered with 429."""
    generations: int = 2
    """Texts generated, or lists of documents ranked, at the same time."""
    searches: int = 2
    """Searches of an index computed at the same time."""
    max_waiting: int = 64
    """Requests that may wait to generate or to rank, and as many to search; the next is answered with 429."""
    default_max_tokens: int = 256
    """Tokens generated where a request does not say how many."""
    timeout_s: float = 600.0
    """How long a request may take, waiting included, seconds."""
    max_body_bytes: int = 32 * 2**20
    """Size of a request."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _WHOLE and (value != int(value) or value < 1):
                raise ValueError(f"{field.name} must be a whole number of at least 1, got {value!r}")
            if value < 0 or (field.name == "timeout_s" and value == 0):
                raise ValueError(f"{field.name} must not be negative, and a timeout not 0, got {value!r}")
