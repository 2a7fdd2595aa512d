"""Averages of experts: against the mean of the merged matrices, and the cosines of numpy."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from training.averaging import average, main
from ubmoe_st.experts import load_low_rank, save_low_rank
from ubmoe_st.upcycling import DELTA_NAME, HEAD_NAME, PROJECTION_NAME

RANK, WIDTH, INNER, SIZE = 3, 10, 14, 6


@pytest.fixture
def folders(tmp_path):
    """Experts and their further training; the second's projection is turned and twice as long."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    first = {f"layers.{n}.mlp.up_proj": (normal(RANK, WIDTH), normal(INNER, RANK)) for n in range(2)}
    second = {k: (a + 0.3 * normal(*a.shape), b + 0.3 * normal(*b.shape)) for k, (a, b) in first.items()}
    weight, bias = normal(SIZE, WIDTH), normal(SIZE)
    turn = torch.linalg.qr(normal(SIZE, SIZE))[0]
    layers = ({"weight": weight, "bias": bias}, {"weight": 2 * turn @ weight, "bias": 2 * turn @ bias})
    for name, experts, layer in zip(("a", "b"), (first, second), layers):
        (tmp_path / name).mkdir()
        save_low_rank(experts, tmp_path / name / DELTA_NAME, {"base_sha256": {"x": "1"}})
        save_file(layer, tmp_path / name / PROJECTION_NAME)
        (tmp_path / name / "recipe.json").write_text(json.dumps({"name": name}))
    return tmp_path / "a", tmp_path / "b"


def products(folder):
    return {name: (b @ a).numpy() for name, (a, b) in load_low_rank(folder / DELTA_NAME)[0].items()}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_experts_are_the_mean_as_far_as_the_rank_goes(folders, tmp_path, share):
    (folders[0] / HEAD_NAME).write_bytes(b"of the first alone")
    lost = average(*folders, share, tmp_path / "out")
    assert not (tmp_path / "out" / HEAD_NAME).exists()
    first, second, found = (products(folder) for folder in (*folders, tmp_path / "out"))
    squares = whole = 0.0
    for name, product in found.items():
        mean = (1 - share) * first[name] + share * second[name]
        u, s, v = np.linalg.svd(mean)
        assert np.abs((u[:, :RANK] * s[:RANK]) @ v[:RANK] - product).max() < 1e-4  # Eckart-Young
        assert np.linalg.matrix_rank(product, tol=1e-3) == RANK
        squares, whole = squares + (s[RANK:] ** 2).sum(), whole + (s**2).sum()
    assert lost == pytest.approx((squares / whole) ** 0.5, abs=1e-6)
    assert (lost > 1e-3) == (share == 0.3)
    assert load_low_rank(tmp_path / "out" / DELTA_NAME)[1] == {"base_sha256": {"x": "1"}}
    assert json.loads((tmp_path / "out" / "recipe.json").read_text()) == {"name": "a"}


def test_other_prompts_are_told(folders, tmp_path, caplog):
    average(tmp_path / "a", tmp_path / "b", 0.5, tmp_path / "out")
    assert not caplog.records
    (tmp_path / "b" / "recipe.json").write_text(json.dumps({"prompts": {"query": "q: "}}))
    average(tmp_path / "a", tmp_path / "b", 0.5, tmp_path / "out")
    assert [record.getMessage().partition("differ in ")[2] for record in caplog.records] == [
        "prompts; the mean has that of the first"
    ]


def test_the_second_may_be_of_another_rank(folders, tmp_path):
    experts, metadata = load_low_rank(folders[1] / DELTA_NAME)
    save_low_rank({name: (a[:2], b[:, :2]) for name, (a, b) in experts.items()}, folders[1] / DELTA_NAME, metadata)
    assert average(*folders, 0.0, tmp_path / "out") < 1e-6
    average(*folders, 0.4, tmp_path / "out")
    first, second, found = (products(folder) for folder in (*folders, tmp_path / "out"))
    for name, product in found.items():
        u, s, v = np.linalg.svd(0.6 * first[name] + 0.4 * second[name])
        assert np.abs((u[:, :RANK] * s[:RANK]) @ v[:RANK] - product).max() < 1e-4
        assert np.linalg.matrix_rank(second[name], tol=1e-3) == 2


def test_a_turned_projection_is_turned_back(folders, tmp_path):
    average(*folders, 0.5, tmp_path / "out")
    found, first = (load_file(folder / PROJECTION_NAME) for folder in (tmp_path / "out", folders[0]))
    for key in first:  # the second is the first, turned and longer: so the mean is the first
        assert torch.allclose(found[key], first[key], atol=1e-5)


def test_what_does_not_fit_is_refused_and_nothing_is_written(folders, tmp_path, capsys):
    first, second = folders
    with pytest.raises(ValueError, match=r"share must be between 0 and 1, got 1\.5"):
        average(first, second, 1.5, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"expected a folder with bi_delta"):
        average(first, tmp_path, 0.5, tmp_path / "out")
    shutil.copytree(second, tmp_path / "bare")
    (tmp_path / "bare" / PROJECTION_NAME).unlink()
    with pytest.raises(ValueError, match=r"only one of .* has projection"):
        average(first, tmp_path / "bare", 0.5, tmp_path / "out")
    experts, metadata = load_low_rank(second / DELTA_NAME)
    save_low_rank(experts, tmp_path / "bare" / DELTA_NAME, {**metadata, "base_sha256": {"x": "2"}})
    with pytest.raises(ValueError, match="trained on different weights"):
        average(first, tmp_path / "bare", 0.5, tmp_path / "out")
    narrow = {name: (a[:, :5], b) for name, (a, b) in experts.items()}
    save_low_rank(narrow, second / DELTA_NAME, metadata)
    with pytest.raises(SystemExit):
        main([str(first), str(second), "--out", str(tmp_path / "out")])
    assert "differ in their layers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_of_the_readme_is_whole(capsys):
    text = (Path(__file__).parent.parent / "training" / "README.md").read_text()
    arguments = re.search(r"`python -m training\.averaging (.*?)`", text)[1].split()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert "expected a folder with bi_delta" in capsys.readouterr().err
    assert ended.value.code == 1  # not 2: nothing is missing in the line
