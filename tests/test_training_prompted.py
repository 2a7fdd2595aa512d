"""The prompted reader: states against a plain forward pass, BOS, cutting."""

from __future__ import annotations

import pytest
import torch
from helpers.models import TEXTS, make_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel

from training.prompted import PromptedReader

PREFIX, SUFFIX = "the cat sits on ", " in the"


def tokenizer_with(start: bool, end: bool = False):
    """The tiny tokenizer, with BOS before a text and EOS after it where asked for."""
    tokenizer = make_tokenizer()
    template = " ".join(["<s>"] * start + ["$A"] + ["</s>"] * end)
    ids = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


@pytest.mark.parametrize("prefix", [PREFIX, ""])
@pytest.mark.parametrize(("start", "end"), [(True, False), (False, False), (True, True)])
@torch.no_grad()
def test_states_are_those_of_one_pass_over_the_whole_text_with_its_bos(base, prefix, start, end):
    model, tokenizer = AutoModel.from_pretrained(base).eval(), tokenizer_with(start, end)
    reader = PromptedReader(model, tokenizer, prefix, SUFFIX)
    found = reader.states(reader.tokens(TEXTS))
    assert found.shape == (len(TEXTS), 1, 32)
    for text, row in zip(TEXTS, found[:, 0]):
        ids = tokenizer(prefix + text + SUFFIX)["input_ids"][: -1 if end else None]
        assert (ids[0] == tokenizer.bos_token_id) == start
        torch.testing.assert_close(row, model(torch.tensor([ids])).last_hidden_state[0, -1], rtol=1e-4, atol=1e-4)
        other = torch.tensor([ids[1:] if start else [tokenizer.bos_token_id, *ids]])
        assert (row - model(other).last_hidden_state[0, -1]).abs().max() > 1e-2, "BOS does not matter: vacuous"


@torch.no_grad()
def test_layers_are_the_hidden_states_asked_for(base):
    model = AutoModel.from_pretrained(base).eval()
    reader = PromptedReader(model, make_tokenizer(), PREFIX, SUFFIX)
    found = reader.states(reader.tokens(TEXTS), [0, 2])
    ids = make_tokenizer()(PREFIX + TEXTS[1] + SUFFIX, return_tensors="pt")["input_ids"]
    states = model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found[1], torch.stack([states[0][0, -1], states[2][0, -1]]), rtol=1e-4, atol=1e-4)


def test_a_long_text_loses_its_end_and_keeps_the_suffix():
    reader = PromptedReader(None, make_tokenizer(), PREFIX, SUFFIX, max_tokens=6)
    short, long = reader.tokens(["the cat", "the cat and the dog sleeps under the house"])
    ids = make_tokenizer()("the cat and the in the")["input_ids"]
    assert short == make_tokenizer()("the cat in the")["input_ids"]
    assert long == ids
