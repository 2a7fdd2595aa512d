"""The classification head: against the closed form of numpy, and states of stock transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.models import TEXTS, random_experts
from sklearn.linear_model import Ridge
from transformers import AutoModel, AutoTokenizer

from training.classification import STRENGTH, check_experts, fit_head, inner_states
from ubmoe_st import UBMoE, upcycle
from ubmoe_st.upcycling import DELTA_NAME, export_experts


def test_states_are_those_of_stock_transformers(checkpoint):
    texts = [" ".join(TEXTS * n) for n in (2, 1, 3)] + TEXTS
    encoder, tokenizer = AutoModel.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(checkpoint)
    wanted = []
    for text in texts:
        with torch.no_grad():
            found = encoder(torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True)
        wanted.append(found.hidden_states[2][0, -1].numpy())
    found = inner_states(UBMoE(str(checkpoint), device="cpu")[0], texts, 2, batch_size=3).numpy()
    error = np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    assert error.max() < 0.05  # bf16 where the processor has it
    assert np.linalg.norm(np.ptp(wanted, axis=0)) > 1


def test_the_head_is_a_ridge_regression_in_its_components():
    random = np.random.default_rng(0)
    x = random.normal(size=(300, 12)) * 3 + 1
    teachers = [x @ random.normal(size=(12, k)) + 0.3 * random.normal(size=(300, k)) for k in (5, 9)]
    teachers = [t / np.linalg.norm(t, axis=1, keepdims=True) for t in teachers]
    head = fit_head(torch.from_numpy(x).float(), [torch.from_numpy(t).half() for t in teachers], 2, 4, 0.5)
    # scikit-learn's penalty is not relative to the variance of the columns.
    size = (x - x.mean(0)).std()
    fitted = Ridge(alpha=STRENGTH * len(x)).fit((x - x.mean(0)) / size, np.hstack(teachers))
    outputs = fitted.predict((x - x.mean(0)) / size)
    outputs -= outputs.mean(0)
    u, s, _ = np.linalg.svd(outputs, full_matrices=False)
    found = head.linear(torch.from_numpy(x).float()).numpy() / size
    kept = u[:, :4] * s[:4]
    np.testing.assert_allclose(
        found @ found.T / np.trace(found @ found.T), kept @ kept.T / np.trace(kept @ kept.T), atol=2e-5
    )
    whole = outputs @ outputs.T
    assert np.abs(whole / np.trace(whole) - kept @ kept.T / np.trace(kept @ kept.T)).max() > 1e-3
    assert found.mean(0) == pytest.approx(0, abs=1e-3)
    features = {"attention_mask": torch.ones(300, 1, dtype=torch.long)}
    added = head(torch.from_numpy(x).float()[:, None], features)
    np.testing.assert_allclose(torch.linalg.norm(added, dim=1).numpy(), 0.5, atol=1e-6)


def test_more_components_than_there_can_be_are_refused():
    states, target = torch.randn(20, 12), torch.randn(20, 5)
    with pytest.raises(ValueError, match="up to 5 components, got 6"):
        fit_head(states, [target], 1, 6, 0.5)
    with pytest.raises(ValueError, match="up to 3 components, got 5"):
        fit_head(states[:4], [target[:4]], 1, 5, 0.5)


def test_states_are_those_behind_the_prompt(checkpoint):
    module = UBMoE(str(checkpoint), device="cpu")[0]
    found = inner_states(module, TEXTS, 2, prompt="the red ")
    wanted = inner_states(module, [f"the red {text}" for text in TEXTS], 2)
    np.testing.assert_allclose(found, wanted, atol=0.02 * float(wanted.norm(dim=1).max()))
    assert (found - inner_states(module, TEXTS, 2)).norm(dim=1).min() > 0.05 * wanted.norm(dim=1).max()


def test_a_model_of_other_experts_is_refused(base, checkpoint, tmp_path):
    model = UBMoE(str(checkpoint), device="cpu")
    folders = []
    for name, scale in (("a", 0.1), ("b", 0.2)):
        model[0].set_low_rank_experts(random_experts(model[0], scale=scale))
        folders.append(export_experts(model[0], tmp_path / name) / DELTA_NAME)
    built = UBMoE(str(upcycle(base, tmp_path / "a", out=tmp_path / "built", dtype="bfloat16")), device="cpu")
    check_experts(built[0], folders[0], "built")
    with pytest.raises(ValueError, match=r"built does not hold the experts of .*b: build it"):
        check_experts(built[0], folders[1], "built")
