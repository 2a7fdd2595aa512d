"""P2: the checkpoint opens in a fresh environment that has stock sentence-transformers and not this package."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from helpers.models import TEXTS
from sentence_transformers import SentenceTransformer

from ubmoe_st import UBMoE

SCRIPT = """
import importlib.util, json, sys
import torch
from sentence_transformers import SentenceTransformer
assert importlib.util.find_spec("ubmoe_st") is None, "the package is installed here"
model = SentenceTransformer(sys.argv[1], device="cpu")
encoder = model[0].auto_model
with torch.no_grad():
    a, b = (encoder(torch.tensor([[4, 5, 6, last]])).last_hidden_state[0, 0] for last in (7, 8))
print(json.dumps({
    "vectors": model.encode(json.loads(sys.argv[2])).tolist(),
    "first_token_sees_last": not torch.equal(a, b),
    "modules": [type(module).__module__ for module in model],
}))
"""


def test_modules_json_names_stock_classes_only(checkpoint):
    modules = json.loads((checkpoint / "modules.json").read_text())
    assert [entry["type"].split(".")[0] for entry in modules] == ["sentence_transformers"] * 3
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["is_causal"] is False
    assert config["architectures"] == ["LlamaModel"]
    assert "auto_map" not in config
    requirements = json.loads((checkpoint / "config_sentence_transformers.json").read_text())["requirements"]
    assert requirements["transformers"]["specifier"] == ">=5.2"
    assert requirements["sentence-transformers"] == ">=6"
    assert {p.suffix for p in checkpoint.rglob("*") if p.is_file()} <= {".json", ".safetensors", ".md", ".jinja", ""}


def test_old_libraries_are_told_so(checkpoint, tmp_path):
    import shutil

    folder = shutil.copytree(checkpoint, tmp_path / "future")
    file = folder / "config_sentence_transformers.json"
    config = json.loads(file.read_text())
    config["requirements"]["transformers"]["specifier"] = ">=999"
    file.write_text(json.dumps(config))
    with pytest.raises(ImportError, match="transformers"):
        SentenceTransformer(str(folder))


def compare(python: str, script: str, checkpoint: Path, folder: Path) -> None:
    """Run the script in a process of its own and compare its vectors with ours."""
    run = subprocess.run(
        [python, "-c", script, str(checkpoint), json.dumps(TEXTS)],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    found, expected = np.array(result["vectors"]), UBMoE(str(checkpoint)).encode(TEXTS)
    cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() > 0.99999
    assert result["first_token_sees_last"]
    assert all(name.startswith("sentence_transformers.") for name in result["modules"])


def test_p2_in_a_process_that_cannot_import_this_package(checkpoint, tmp_path):
    # -P and an empty folder keep the sources away; the import hook hides an installed copy.
    hide = "import sys\nsys.modules['ubmoe_st'] = None\nimport importlib.util as u\nfind = u.find_spec\n"
    hide += "u.find_spec = lambda name, package=None: None if name == 'ubmoe_st' else find(name, package)\n"
    compare(sys.executable, hide + SCRIPT, checkpoint, tmp_path)


@pytest.mark.venv
def test_p2_in_a_new_virtual_environment(checkpoint, tmp_path):
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    constraints = Path(__file__).parents[1] / "constraints.txt"
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(constraints)]
    subprocess.run([*pip, "torch"], check=True)
    subprocess.run([*pip, "sentence-transformers"], check=True)
    compare(str(python), SCRIPT, checkpoint, tmp_path)
