"""Token vectors of the encoder: what stock `MultiVectorEncoder` makes of the export, against numpy."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from helpers.engines import in_process, tree
from helpers.models import TEXTS
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Dropout, Normalize, Pooling
from transformers import AutoModel, AutoTokenizer

from ubmoe_st import UBMoE
from ubmoe_st.export import export
from ubmoe_st.model import UBMoETransformer
from ubmoe_st.multi_vector import multi_vector_encoder

QUERIES = ["the red bird", "a dog"]
SCRIPT = """
import json, sys
from sentence_transformers import MultiVectorEncoder
model = MultiVectorEncoder(sys.argv[1], device="cpu")
queries, documents = (json.loads(text) for text in sys.argv[2:])
asked, said = model.encode_query(queries), model.encode_document(documents, batch_size=3)
scores = model.similarity(asked, said).tolist()
print(json.dumps({"scores": scores, "documents": [one.tolist() for one in said]}))
"""


def tokens_of(folder, text: str, weight: np.ndarray | None = None) -> np.ndarray:
    """Unit vectors of the tokens of one text, by stock transformers and numpy, (T, D)."""
    encoder, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        vectors = encoder(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].numpy()
    vectors = vectors if weight is None else vectors @ weight.T
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def maxsim(asked: list[np.ndarray], said: list[np.ndarray]) -> np.ndarray:
    return np.array([[(a @ b.T).max(axis=1).sum() for b in said] for a in asked])


def test_the_stock_class_opens_the_export_in_a_process_without_this_package(checkpoint, tmp_path):
    facts = export(checkpoint, tmp_path / "out", format="multivector")
    found = in_process(SCRIPT, tmp_path / "out", json.dumps(QUERIES), json.dumps(TEXTS))
    asked, said = ([tokens_of(checkpoint, text) for text in texts] for texts in (QUERIES, TEXTS))
    for ours, theirs in zip(found["documents"], said, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    expected = maxsim(asked, said)
    np.testing.assert_allclose(found["scores"], expected, atol=1e-4)
    assert np.ptp(expected, axis=1).min() > 0.05
    assert facts["format"] == "multivector"
    assert not any("Pooling" in name or name.startswith("generator") for name in tree(tmp_path / "out"))


def test_token_vectors_in_memory_share_the_weights(checkpoint):
    model = UBMoE(str(checkpoint), device="cpu")
    encoder = multi_vector_encoder(model)
    asked, said = ([tokens_of(checkpoint, text) for text in texts] for texts in (QUERIES, TEXTS))
    found = encoder.similarity(encoder.encode_query(QUERIES), encoder.encode_document(TEXTS))
    np.testing.assert_allclose(found, maxsim(asked, said), atol=1e-4)
    assert encoder[0] is model[0]


def test_a_projection_is_that_of_each_token(base, tmp_path):
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    dense = Dense(32, 8, bias=False, activation_function=torch.nn.Identity(), init_weight=weight)
    model = UBMoE(modules=[UBMoETransformer.from_base(base), Pooling(32), dense, Normalize()], device="cpu")
    model.save(str(tmp_path / "checkpoint"))
    export(tmp_path / "checkpoint", tmp_path / "out", format="multivector")
    asked, said = (
        [tokens_of(tmp_path / "checkpoint", text, weight.numpy()) for text in texts] for texts in (QUERIES, TEXTS)
    )
    for encoder in (MultiVectorEncoder(str(tmp_path / "out"), device="cpu"), multi_vector_encoder(model)):
        found = encoder.encode_document(TEXTS)
        scores = encoder.similarity(encoder.encode_query(QUERIES), found)
        np.testing.assert_allclose(scores, maxsim(asked, said), atol=1e-4)
        assert found[0].shape[1] == 8
    assert model[2].module_input_name == "sentence_embedding"


def test_dimensions_that_are_not_cut_are_told_of(checkpoint, tmp_path):
    cut = UBMoE(str(checkpoint), device="cpu", truncate_dim=8)
    cut.save(str(tmp_path / "cut"))
    told = r"to 8 dimensions \(truncate_dim\), and token vectors keep all"
    with pytest.warns(UserWarning, match=told):
        export(tmp_path / "cut", tmp_path / "out", format="multivector")
    with pytest.warns(UserWarning, match=told):
        encoder = multi_vector_encoder(cut)
    for one in (encoder, MultiVectorEncoder(str(tmp_path / "out"), device="cpu")):
        assert one.encode_query(["a dog"])[0].shape[-1] == 32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        multi_vector_encoder(UBMoE(str(checkpoint), device="cpu"))


def test_models_and_views_without_token_vectors_are_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="token vectors of the encoder"):
        export(checkpoint, tmp_path / "out", format="multivector", view="generator")
    assert not (tmp_path / "out").exists()
    model = UBMoE(str(checkpoint), device="cpu")
    with pytest.raises(ValueError, match="module 2 is a Dropout"):
        multi_vector_encoder(SentenceTransformer(modules=[model[0], model[1], Dropout(0.1)], device="cpu"))
    with pytest.raises(TypeError, match="begins with a Transformer, got str"):
        multi_vector_encoder("models/ubmoe-135m")
