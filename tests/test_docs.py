"""Every Python block of README and MODEL_CARD runs, and the files they name exist."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.models import save_with_head

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "MODEL_CARD.md"]


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_python_block_runs(name, checkpoint, tmp_path):
    """On a tiny model under the released one's name; `make test-real` runs them on the real one."""
    save_with_head(checkpoint, tmp_path / "models" / "ubmoe-135m")
    found = blocks(name)
    assert found
    script = "\n".join(found)
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.real
@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_python_block_runs_on_the_real_model(name):
    script = "\n".join(blocks(name))
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize(
    "name", [*DOCUMENTS, "training/README.md", "benchmarks/README.md", "docs/indexing.md", "docs/scaling.md"]
)
def test_links_lead_to_files(name):
    text = (ROOT / name).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    missing = [link for link in links if not ((ROOT / name).parent / link).exists()]
    assert not missing


def test_the_snippet_comes_early():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert "from ubmoe_st import UBMoE" in lines[:15]


def test_every_target_of_the_makefile_that_the_readme_names_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)", (ROOT / "README.md").read_text()))
    assert named
    assert named <= targets


def walks() -> dict[str, list[str]]:
    sections = (ROOT / "docs" / "walks.md").read_text().split("\n## ")[1:]
    return {title: text.strip().splitlines() for title, _, text in (section.partition("\n") for section in sections)}


def resolve(name: str) -> object:
    """`file.function` or `file.Class.method` under ubmoe_st."""
    parts = name.split(".")
    depth = next(n for n in range(1, len(parts)) if not (ROOT / "ubmoe_st" / Path(*parts[:n])).is_dir())
    found: object = importlib.import_module(".".join(["ubmoe_st", *parts[:depth]]))
    for attribute in parts[depth:]:
        found = getattr(found, attribute)
    return found


@pytest.mark.parametrize("walk", walks())
def test_a_walk_is_short_and_the_functions_it_names_exist(walk):
    lines = walks()[walk]
    assert len(lines) <= 10
    names = re.findall(r"`([a-z]\w*(?:\.\w+)+)`", "\n".join(lines))
    names = [name for name in names if not name.endswith(".json")]
    assert len(names) >= 5
    for name in names:
        assert callable(resolve(name)), name


def test_there_are_four_walks_and_a_wrong_name_is_found():
    assert len(walks()) == 4
    with pytest.raises(AttributeError):
        resolve("model.UBMoE.nothing")
