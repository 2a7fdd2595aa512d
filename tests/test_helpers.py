"""What test files share lies in tests/helpers: no test file is imported, conftest holds fixtures alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from helpers.loopback_hub import ROUTES

TESTS = Path(__file__).parent


def imported(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_no_file_imports_a_test_file_or_conftest():
    files = list(TESTS.rglob("*.py"))
    shared = 0
    for file in files:
        found = imported(file)
        shared += any(name.startswith("helpers.") for name in found)
        wrong = [name for name in found if name == "conftest" or name.startswith("test_")]
        assert not wrong, f"{file.name} imports {wrong}: move what they share to tests/helpers"
    assert shared > 10, "nothing imports helpers, so this test would be vacuous"


def test_conftest_defines_fixtures_alone():
    body = ast.parse((TESTS / "conftest.py").read_text()).body
    defined = [node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign))]
    assert defined
    for node in defined:
        assert isinstance(node, ast.FunctionDef), ast.unparse(node)[:80]
        assert "fixture" in ast.unparse(node.decorator_list[0])


def test_the_decisions_count_the_endpoints_of_the_loopback_hub():
    text = (TESTS.parent / "docs" / "decisions.md").read_text()
    (count,) = re.findall(r"implements the (\d+)\s+endpoints", text)
    assert int(count) == len(ROUTES)
