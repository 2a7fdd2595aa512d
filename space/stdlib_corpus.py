"""A real corpus that is on every machine: the docstrings of the Python standard library.

Source files are parsed, never imported. Each entry is a module, class or function with the first paragraph of its
docstring.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED = {
    "__pycache__",
    "distutils",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "tkinter",
    "turtledemo",
    "turtle.py",
    "venv",
}
MAX_CHARACTERS = 240


def entries(library: Path | None = None) -> Iterator[dict[str, str]]:
    """Entries `{id, title, text}` of every public module, class and function with a docstring.

    Args:
        library: Folder of the library's sources. None: that of the running Python.
    """
    root = library or Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if SKIPPED.intersection(parts) or any(
            part.startswith(("_", "config-")) and part != "__init__.py" for part in parts
        ):
            continue
        module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue
        seen: set[str] = set()
        for kind, name, docstring in _documented(tree, module):
            if name not in seen:
                seen.add(name)
                yield {"id": name, "title": f"{kind} {name}", "text": docstring}


def _documented(tree: ast.Module, module: str) -> Iterator[tuple[str, str, str]]:
    if text := _first_paragraph(tree):
        yield "module", module, text
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            if text := _first_paragraph(node):
                yield "class", f"{module}.{node.name}", text
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and not member.name.startswith("_"):
                    if text := _first_paragraph(member):
                        yield "method", f"{module}.{node.name}.{member.name}", text
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            if text := _first_paragraph(node):
                yield "function", f"{module}.{node.name}", text


def _first_paragraph(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    docstring = inspect.cleandoc(ast.get_docstring(node) or "")
    text = " ".join(docstring.split("\n\n")[0].split())
    return text[:MAX_CHARACTERS] if any(character.isalpha() for character in text) else ""


def write_corpus(file: Path) -> int:
    """Write the corpus as jsonl.

    Args:
        file: Where to.

    Returns:
        How many entries there are.
    """
    rows = list(entries())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


if __name__ == "__main__":
    sys.stdout.write(f"{write_corpus(Path(sys.argv[1]))} entries\n")
