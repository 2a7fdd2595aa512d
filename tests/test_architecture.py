"""The sources keep to their order: imports go one way, heavy libraries load where they are used."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ubmoe_st"
ORDER = [
    "files",
    "forking",
    "padding",
    "watch",
    "detokenization",
    "chat_templates",
    "configuration",
    "shards",
    "classification",
    "multi_vector",
    "experts",
    "generator",
    "checkpoint",
    "source",
    "cards",
    "hub",
    "wheels",
    "bases",
    "compute",
    "transformer",
    "quantization",
    "generation",
    "ranking",
    "lossless",
    "adapters",
    "model",
    "streaming",
    "upcycling",
    "planning",
    "export",
    "terminal",
    "answers",
    "plan_command",
    "index_commands",
    "serving",
    "cli",
]
BESIDE = {"dependence": {"configuration", "experts", "generator", "model"}, "index": {"configuration"}}
ABOVE = ("answers", "index_commands", "serving", "cli")  # may use those beside
LAZY = {"faiss", "mteb", "lm_eval", "peft", "pyarrow", "matplotlib", "bm25s", "ray", "gguf"}
LAZY |= {"torchao", "onnx", "onnxruntime", "openvino", "nncf", "llama_cpp_py_sync", "xllamacpp", "uvicorn"}


def imports(file: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(file.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def own_modules(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("ubmoe_st.")} - {"__version__"}


def sources(name: str) -> list[Path]:
    """The files of a module or of a package."""
    return sorted((PACKAGE / name).glob("*.py")) or [PACKAGE / f"{name}.py"]


def test_imports_go_one_way():
    checked = 0
    for position, name in enumerate(ORDER):
        found = own_modules(set().union(*(imports(file, top_level_only=name == "cli") for file in sources(name))))
        allowed = {name, *ORDER[:position]} | (set(BESIDE) if name in ABOVE else set())
        assert found <= allowed | {"UBMoE", "upcycle"}, f"{name} imports {found - allowed}"
        checked += len(found)
    assert checked > 5


def test_modules_beside_stay_beside():
    for name, allowed in BESIDE.items():
        for file in sources(name):
            assert own_modules(imports(file)) <= allowed | {name, *ORDER[:0]}, file


def test_training_and_benchmarks_do_not_reach_into_private_names():
    files = [*ROOT.glob("training/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py")]
    assert files
    for file in files:
        private = [name for name in imports(file) if name.startswith("ubmoe_st") and re.search(r"\._", name)]
        assert not private, f"{file.name}: {private}"


def test_heavy_libraries_load_where_they_are_used():
    for file in PACKAGE.rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(file, top_level_only=True)}
        assert not roots & LAZY, f"{file.name} imports {roots & LAZY} at the top"


@pytest.mark.parametrize("code", ["import ubmoe_st", "import ubmoe_st.cli"])
def test_the_command_line_starts_without_torch(code):
    check = f"{code}; import sys; print([m for m in ('torch', 'transformers', 'faiss', 'fastapi') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_public_names_are_importable():
    import ubmoe_st

    assert sorted(ubmoe_st.__all__) == dir(ubmoe_st)
    assert all(hasattr(ubmoe_st, name) for name in ubmoe_st.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ubmoe_st.nothing
