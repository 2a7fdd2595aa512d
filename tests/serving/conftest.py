"""One tiny model behind an app, for the tests of a file."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from ubmoe_st import UBMoE


@pytest.fixture(scope="module")
def model(checkpoint):
    loaded = UBMoE(str(checkpoint), low_memory=True, device="cpu")
    loaded.prompts = {"query": "the red ", "document": ""}
    return loaded


@pytest.fixture(scope="module")
def engine(model):
    from ubmoe_st.serving.engine import TorchEngine

    return TorchEngine(model, "tiny")


@pytest.fixture(scope="module")
def url(engine):
    from helpers.requests import running

    from ubmoe_st.serving import create_app

    with running(create_app(engine, local=True)) as address:
        yield address


@pytest.fixture(scope="module")
def lm(base):
    return AutoModelForCausalLM.from_pretrained(base)
