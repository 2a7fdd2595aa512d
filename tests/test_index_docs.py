"""Every Python block of docs/indexing.md runs, in order, on a tiny model under the released one's name."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.models import WORDS

ROOT = Path(__file__).parents[1]


def test_every_python_block_runs(checkpoint, tmp_path):
    for name in ("bm25s", "langchain_core", "llama_index.core"):
        pytest.importorskip(name)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "ubmoe-135m").symlink_to(checkpoint)
    rows = [
        {
            "id": name,
            "text": " ".join(WORDS[(number * 7 + step * step) % 19] for step in range(3 + number % 5)),
            "lang": ["en", "de", "fr"][number % 3],
            "year": 1900 + number % 110,
            "stars": number % 9,
        }
        for number, name in enumerate(["a", "b", "c", *(f"doc-{n}" for n in range(1100))])
    ]
    with gzip.open(tmp_path / "corpus.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    more = [{**row, "id": f"more-{row['id']}"} for row in rows[:20]]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "indexing.md").read_text(), re.DOTALL)
    assert len(blocks) > 6
    command = [sys.executable, "-c", "\n".join(blocks)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "1121 rows from row 0" in run.stdout
    info = json.loads((tmp_path / "my-index" / "index_info.json").read_text())
    assert info["index"]["kind"] == "ivf-pq", "the index was never made anew, so half of the text would be untested"


def test_the_text_names_what_is_there():
    """Kinds, options and files of the text exist, and the other way round."""
    from typer.testing import CliRunner

    from ubmoe_st.cli import app
    from ubmoe_st.index.kinds import KINDS

    text = (ROOT / "docs" / "indexing.md").read_text()
    assert all(f"`{kind}`" in text for kind in KINDS)
    options = set(re.findall(r"ubmoe index[^`\n]*?(--[a-z-]+)", text))
    shown = CliRunner().invoke(app, ["index", "--help"], env={"COLUMNS": "200"}).output
    assert options
    assert all(option in shown for option in options)
