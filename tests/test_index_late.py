"""Late chunking: chunks of a document that the model has read in one piece, against torch without this package."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.encoders import HashEncoder
from helpers.models import SIZES, WORDS, make_base, make_checkpoint
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import processors
from transformers import AutoModel, AutoTokenizer

from ubmoe_st import UBMoE
from ubmoe_st.index import EmbeddingIndex
from ubmoe_st.index.embedder import Embedder, TokenCounter, chunk_spans
from ubmoe_st.index.late import OVERLAP_SHARE, passes_of

PROMPT = "the old "


def words(count: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


ROWS = [
    {"id": "a", "title": "a red tree", "text": words(40, 0)},
    {"id": "b", "text": words(5, 1)},
    {"id": "c", "text": words(23, 2)},
    {"id": "d", "title": "the mat", "text": words(17, 3)},
]
OPTIONS = {"chunk_tokens": 8, "overlap_tokens": 2, "window_tokens": 30, "batch_tokens": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose tokenizer begins with a special token."""
    place = tmp_path_factory.mktemp("late")
    base = make_base(place / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SIZES["bos_token_id"])]
    )
    tokenizer.save_pretrained(base)
    return make_checkpoint(base, place / "ubmoe")


@pytest.fixture(scope="module")
def model(folder):
    return UBMoE(str(folder), device="cpu", prompts={"document": PROMPT})


@pytest.fixture(scope="module")
def late(model, tmp_path_factory):
    return EmbeddingIndex.build(model, ROWS, tmp_path_factory.mktemp("late") / "i", late_chunking=True, **OPTIONS)


def by_torch(folder, row: dict, start: int, end: int) -> np.ndarray:
    """The vector of one chunk: mean over its own tokens and those before the text, all read with the whole document."""
    encoder, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    before = PROMPT + (f"{row['title']}\n" if "title" in row else "")
    read = tokenizer(before + row["text"], return_offsets_mapping=True)
    with torch.no_grad():
        tokens = encoder(torch.tensor([read["input_ids"]])).last_hidden_state[0]
    start, end = start + len(before), end + len(before)
    kept = [last <= len(before) or (first >= start and last <= end) for first, last in read["offset_mapping"]]
    vector = tokens[torch.tensor(kept)].mean(0).numpy()
    return vector / np.linalg.norm(vector)


def test_chunks_are_pooled_from_the_whole_document(folder, model, late, tmp_path):
    alone = EmbeddingIndex.build(model, ROWS, tmp_path / "alone", **OPTIONS)
    assert list(alone) == list(late)
    rows = {row["id"]: row for row in ROWS}
    chunks = {row["id"]: late.entries(row["id"]) for row in ROWS}
    assert [len(found) for found in chunks.values()] == [7, 1, 4, 3]
    for name, entries in chunks.items():
        expected = np.stack([by_torch(folder, rows[name], entry.start, entry.end) for entry in entries])
        np.testing.assert_allclose(late.vectors(name), expected, atol=1e-5)
        difference = np.abs(late.vectors(name) - alone.vectors(name)).max(1)
        if len(entries) > 1:
            assert difference.min() > 0.01, "a chunk does not see its document, so this test would be vacuous"
        else:
            assert difference.max() < 1e-5


def test_pieces_of_a_long_document_overlap_and_hold_every_chunk_once(folder):
    tokenizer = Embedder(SentenceTransformer(str(folder), device="cpu")).copy_tokenizer()
    several = 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        wanted = int(random.integers(2, 9))
        limit = int(random.integers(wanted + 6, 60))
        counter = TokenCounter(tokenizer, limit, PROMPT)
        title = "a red tree" if seed % 2 else None
        text = words(int(random.integers(1, 300)), seed)
        spans = chunk_spans(text, counter, min(wanted, counter.room(title)), int(random.integers(0, wanted)) // 2)
        passes = passes_of(text, spans, title, counter)
        held = [chunk for one in passes for chunk in one.chunks]
        assert sorted(number for number, _, _ in held) == list(range(len(spans)))
        for one in passes:
            assert one.length == counter.sizes([one.text])[0] <= counter.limit
            assert one.text[one.head :] in text
            assert one.text[: one.head] == (f"{title}\n" if title else "")
            for number, start, end in one.chunks:
                assert one.text[start:end] == text[slice(*spans[number])]
        if len(passes) > 1 and limit > 6 * wanted + 12:
            several += 1
            places = [text.index(one.text[one.head :]) for one in passes]
            ends = [place + len(one.text) - one.head for place, one in zip(places, passes)]
            shared = [end - place for end, place in zip(ends, places[1:])]
            assert min(shared) > 0, "neighbouring pieces have nothing in common"
            assert max(shared) < max(len(one.text) for one in passes) * 2 / OVERLAP_SHARE
        assert (len(passes) == 1) == (counter.sizes([f"{title}\n{text}" if title else text])[0] <= counter.limit)
    assert several > 3


def test_what_the_model_cannot_read_at_once_is_read_in_pieces(folder, tmp_path):
    short = UBMoE(str(folder), device="cpu")
    short.max_seq_length = 21
    options = {"late_chunking": True, "chunk_tokens": 5}
    index = EmbeddingIndex.build(short, [{"id": "x", "text": words(60, 7)}], tmp_path / "i", **options)
    assert "entries_cut" not in index.info["sources"][0]
    counter = Embedder(short).counter()
    text = words(60, 7)
    entries = index.entries("x")
    passes = passes_of(text, [(entry.start, entry.end) for entry in entries], None, counter)
    assert len(passes) > 3
    whole = UBMoE(str(folder), device="cpu")
    for one in passes:
        rows = [{"id": "piece", "text": one.text}]
        piece = EmbeddingIndex.build(whole, rows, tmp_path / str(one.chunks[0][0]), **options)
        for number, start, end in one.chunks:
            found = [entry for entry in piece.entries("piece") if (entry.start, entry.end) == (start, end)]
            np.testing.assert_allclose(
                index.vectors(entries[number].id), piece.vectors([entry.id for entry in found]), atol=1e-5
            )


def test_a_build_that_was_stopped_gives_the_same_bytes(model, late, tmp_path, monkeypatch):
    calls = []
    finished = Embedder.finished

    def stops(self, vectors):
        calls.append(len(vectors))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return finished(self, vectors)

    monkeypatch.setattr(Embedder, "finished", stops)
    with pytest.raises(KeyboardInterrupt):
        EmbeddingIndex.build(model, ROWS, tmp_path / "i", late_chunking=True, **OPTIONS)
    journal = json.loads((tmp_path / "i/build/journal.json").read_text())
    assert 0 < journal["rows"] < len(late)
    with pytest.raises(ValueError, match=r"begun differently.*late_chunking"):
        EmbeddingIndex.build(model, ROWS, tmp_path / "i", **OPTIONS)
    EmbeddingIndex.build(model, ROWS, tmp_path / "i", late_chunking=True, **OPTIONS)
    for name in ("vectors.npy", "entries.arrow"):
        mine, whole = (next((place / "segments").rglob(name)).read_bytes() for place in (tmp_path / "i", late.path))
        assert mine == whole


def test_an_index_keeps_to_it(model, late, tmp_path):
    index = EmbeddingIndex.build(model, ROWS[:1], tmp_path / "i", late_chunking=True, **OPTIONS)
    assert index.info["options"]["late_chunking"] is True
    index.add(ROWS[1:])
    index.reindex("flat")
    index.compact()
    assert index.info["options"]["late_chunking"] is True
    names = list(late)
    np.testing.assert_allclose(index.vectors(names), late.vectors(names), atol=1e-5)
    plain = EmbeddingIndex.build(model, ROWS[:1], tmp_path / "plain", **OPTIONS)
    assert "late_chunking" not in plain.info["options"]  # nor in indexes of before


def test_models_without_a_mean_of_tokens_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="say how long they are with chunk_tokens"):
        EmbeddingIndex.build(model, ROWS, tmp_path / "i", late_chunking=True)
    with pytest.raises(ValueError, match=r"pools tokens by their mean .* got HashEncoder"):
        EmbeddingIndex.build(HashEncoder(), ROWS, tmp_path / "i", late_chunking=True, chunk_tokens=8)
    last = SentenceTransformer(modules=[model[0], Pooling(32, "lasttoken")], device="cpu")
    with pytest.raises(ValueError, match=r"pools tokens by their mean .* got lasttoken"):
        EmbeddingIndex.build(last, ROWS, tmp_path / "i", late_chunking=True, chunk_tokens=8)
    assert not (tmp_path / "i" / "index_info.json").exists()


def test_chunks_have_the_dimensions_that_the_model_keeps(folder, late, tmp_path):
    model = UBMoE(str(folder), device="cpu", prompts={"document": PROMPT}, truncate_dim=8)
    index = EmbeddingIndex.build(model, ROWS, tmp_path / "i", late_chunking=True, **OPTIONS)
    whole = late.vectors(list(late))[:, :8]
    found = index.vectors(list(index))
    assert np.abs(found - whole / np.linalg.norm(whole, axis=1, keepdims=True)).max() < 1e-5
