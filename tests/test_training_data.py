"""Texts: drawn by seed, development sets only."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("peft")

from helpers.training import make_training_data

from training.data import read_sentences, sts_pairs
from training.recipe import Mixture

RECIPES = Path(__file__).parent.parent / "training" / "recipes"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_training_data(tmp_path_factory.mktemp("data"))


def test_sentences_are_drawn_by_seed(data):
    mixture = Mixture({str(data / "sentences.txt"): 0.5}, count=60, words=(5, 9))
    drawn = read_sentences(mixture)
    assert drawn == read_sentences(mixture)
    assert drawn != read_sentences(Mixture(**{**mixture.__dict__, "seed": 1}))
    assert 5 < len(drawn) <= 30
    assert all(5 <= len(line.split()) <= 9 for line in drawn)
    with pytest.raises(ValueError, match="development sets only"):
        sts_pairs("STSB-test", data)
    assert len(sts_pairs("STSB-dev", data, 7)[2]) == 7
