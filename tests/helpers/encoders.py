"""Encoders for the index tests that need neither torch nor weights."""

from __future__ import annotations

import hashlib
import time

import numpy as np


def text_vector(text: str, dimension: int) -> np.ndarray:
    """A pseudo-random direction that depends on the text alone."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).normal(size=dimension)


class HashEncoder:
    """Gives each text its own direction.

    With `batch_noise` a vector also depends a little on the batch it was in, as floats of real models do: whoever forms
    other batches gets other bytes.
    """

    max_seq_length = 512

    def __init__(self, dimension: int = 16, batch_noise: float = 0.0, delay: float = 0.0, salt: str = "") -> None:
        self.dimension, self.batch_noise, self.delay, self.salt = dimension, batch_noise, delay, salt
        self.prompts: dict[str, str] = {}
        self.batches: list[int] = []

    def encode(self, inputs, batch_size=32, show_progress_bar=False):
        time.sleep(self.delay)
        self.batches.append(len(inputs))
        noise = self.batch_noise * (len(inputs) + max(map(len, inputs)) / 100)
        return np.array([text_vector(self.salt + text, self.dimension) for text in inputs]) + noise

    def vector(self, text: str) -> np.ndarray:
        """The unit vector of one text."""
        vector = text_vector(self.salt + text, self.dimension)
        return vector / np.linalg.norm(vector)


class Stops(HashEncoder):
    """Fails after some batches, as a machine would."""

    def __init__(self, after: int, **options) -> None:
        super().__init__(16, batch_noise=1e-3, **options)
        self.after = after

    def encode(self, inputs, **kwargs):
        if len(self.batches) >= self.after:
            raise KeyboardInterrupt
        return super().encode(inputs, **kwargs)
