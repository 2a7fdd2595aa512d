"""Whatever texts come, and however many: finite vectors, memory and open files that do not grow."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path

import numpy as np
import pytest
from helpers.benchmark_data import make_base
from helpers.models import TEXTS, WORDS, make_checkpoint

from ubmoe_st import UBMoE

PIECES = [
    "",
    " ",
    "\t\n\r\v\f",
    "\x00",
    "".join(map(chr, range(32))) + "\x7f\x80\x9f",
    "\ud800",
    "\udfff\ud800",
    "\ufeff",
    "\ufffe\uffff\U0010ffff",
    "\u200b\u200c\u200d\u2060",
    "\u202eabc\u202c\u2067def\u2069",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\U0001f1e9\U0001f1ea\U0001f1eb",
    "\U0001f44d\U0001f3fd\ufe0f",
    "e\u0301" * 40,
    "a" + "\u0316\u0317\u0335" * 60,
    "\u0e33\u0e33\u0e33\u1100\u1161\u11a8",
    "\u3000\u00a0\u2028\u2029\u0085",
    "<s></s><pad><unk><eos>",
    "{{ 7 * 7 }}{% for x in y %}",
    "[/usr/bin] [bold]dict[str, int]",
    "%s %n \\x00 \\u0000 ${HOME} $(ls)",
    "NaN", "-inf", "1e400", "0" * 500,
    "the cat", "THE", "\u00df\u1e9e\u0130\u0131\ufb01",
    "\U00020000\U0001d4d0",
]  # fmt: skip


def odd_text(rng: random.Random) -> str:
    """A text of the pieces above, of any code points, or of one piece very often."""
    kind = rng.random()
    if kind < 0.6:
        return "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 6)))
    if kind < 0.95:
        return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randint(1, 40)))
    return rng.choice(PIECES) * rng.randint(1, 2000)


@pytest.fixture(scope="module")
def byte_checkpoint(tmp_path_factory) -> Path:
    """A model that has a token for every byte, so that nothing odd becomes the unknown token."""
    folder = tmp_path_factory.mktemp("bytes")
    return make_checkpoint(make_base(folder / "base"), folder / "ubmoe-tiny")


@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_odd_texts_give_finite_vectors(kind, checkpoint, byte_checkpoint, amount, figure):
    model = UBMoE(str(checkpoint if kind == "words" else byte_checkpoint), device="cpu")
    model.max_seq_length = 64
    rng = random.Random(kind)
    count = amount(150, 10_000)
    texts = [*PIECES, "cat " * 100_000, *(odd_text(rng) for _ in range(count - len(PIECES) - 1))]
    norms = []
    for start in range(0, count, 50):
        vectors = model.encode(texts[start : start + 50])
        assert np.isfinite(vectors).all(), [text for text, v in zip(texts[start:], vectors) if not np.isfinite(v).all()]
        norms += np.linalg.norm(vectors, axis=1).tolist()
    assert len(norms) == count
    assert np.allclose(norms, 1, atol=1e-4)
    said = 0
    for text in [*texts[: len(PIECES)], *texts[len(PIECES) + 1 :: 100]]:
        if model.token_ids(text[:200]):
            said += isinstance(model.generate(text[:200], max_new_tokens=2), str)
        else:
            with pytest.raises(ValueError, match="is empty: there is nothing to continue"):
                model.generate(text[:200], max_new_tokens=2)
    for text in texts[: len(PIECES) : 3]:
        if text.strip():
            assert all(np.isfinite(hit["score"]) for hit in model.rank(text, ["the cat", text]))
    figure(f"{count:,} odd texts by {kind} encoded and {said} continued, all vectors finite and of length 1")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc")
def test_memory_and_open_files_do_not_grow(checkpoint, amount, figure):
    model = UBMoE(str(checkpoint), device="cpu")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 40))) for _ in range(500)]
    encodes, generations = amount(400, 50_000), amount(30, 2000)

    def encode(count: int) -> None:
        for number in range(count):
            model.encode(texts[number % len(texts)])

    def generate(count: int) -> None:
        for number in range(count):
            if number % 4:
                model.generate(texts[number % len(texts)], max_new_tokens=4)
            else:
                "".join(model.generate(TEXTS[0], max_new_tokens=4, stream=True))

    grown = {}
    for name, work, count in (("encodes", encode, encodes), ("generations", generate, generations)):
        work(max(20, count // 10))
        gc.collect()
        before, files = resident_bytes(), len(os.listdir("/proc/self/fd"))
        work(count)
        gc.collect()
        grown[name] = (resident_bytes() - before) / 2**20
        assert len(os.listdir("/proc/self/fd")) == files, name
        figure(f"{count:,} {name}: {grown[name]:+.1f} MiB of resident memory, no more open files")
    assert max(grown.values()) < 16, grown
