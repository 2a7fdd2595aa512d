"""Many threads on one model give what one thread gives, also while another one saves it."""

from __future__ import annotations

import threading

import numpy as np
from helpers.models import TEXTS, WORDS

from ubmoe_st import EmbeddingIndex, UBMoE
from ubmoe_st.checkpoint import verify_sums

THREADS = 8


def calls_of(model: UBMoE, index: EmbeddingIndex) -> list:
    """Encode, generate, search and rank, each with several arguments; every call gives plain values."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(8)]

    def found(query: str) -> list:
        scores, ids = index.search(query, 3)
        return [scores.tobytes(), ids]

    return [
        *(lambda text=text: model.encode(text).tobytes() for text in texts),
        *(lambda text=text: model.encode([text, TEXTS[0]], batch_size=2).tobytes() for text in texts[:2]),
        *(lambda text=text: model.generate(text, max_new_tokens=4) for text in texts[:4]),
        *(lambda text=text: found(text) for text in texts[:4]),
        *(lambda text=text: model.rank(text, TEXTS) for text in texts[:2]),
    ]


def test_threads_give_the_serial_results_while_another_saves(checkpoint, tmp_path, amount, figure):
    model = UBMoE(str(checkpoint), device="cpu")
    rows = [{"id": f"d{number}", "text": text} for number, text in enumerate(TEXTS)]
    index = EmbeddingIndex.build(model, rows, tmp_path / "i")
    calls = calls_of(model, index)
    expected = [call() for call in calls]
    assert len({repr(value) for value in expected}) > len(calls) // 2, "the calls give the same: vacuous"
    each, wrong, saves, ended = amount(15, 2000), [], [], threading.Event()
    start = threading.Barrier(THREADS + 1)

    def work(seed: int) -> None:
        order = np.random.default_rng(seed).integers(len(calls), size=each)
        start.wait()
        for number in order.tolist():
            try:
                if calls[number]() != expected[number]:
                    wrong.append(f"call {number} differs")
            except Exception as error:  # a thread has no other way to tell
                wrong.append(f"call {number}: {error!r}")

    def save() -> None:
        start.wait()
        while not ended.is_set() or not saves:
            try:
                model.save(str(tmp_path / "m"))
                verify_sums(tmp_path / "m")
                saves.append(1)
            except Exception as error:
                wrong.append(f"save: {error!r}")
                return

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(THREADS)]
    saver = threading.Thread(target=save)
    for thread in [*threads, saver]:
        thread.start()
    for thread in threads:
        thread.join()
    ended.set()
    saver.join()
    figure(f"{THREADS} threads x {each:,} calls, {len(saves)} saves meanwhile, {len(wrong)} other results")
    assert wrong == []
    assert np.array_equal(UBMoE(str(tmp_path / "m"), device="cpu").encode(TEXTS), model.encode(TEXTS))
