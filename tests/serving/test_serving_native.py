"""llama.cpp over one base GGUF: vectors as of `UBMoE`, tokens as of plain llama.cpp, both at the same time."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
import torch
from helpers.engines import cosine, in_process
from helpers.gguf import GGUF_TEXTS, make_gguf_checkpoint
from helpers.models import TEXTS, make_checkpoint
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from ubmoe_st import UBMoE
from ubmoe_st.export import export
from ubmoe_st.serving.engine import Sampling
from ubmoe_st.serving.native import NativeUBMoE

missing = [name for name in ("xllamacpp", "llama_cpp_py_sync", "gguf") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason="needs the extra llama-cpp")

PROMPTS = ["the cat", "a red bird sleeps in", "In 1984 the cat's"]
PLAIN = """
import json, sys
from urllib.request import Request, urlopen
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.verbosity = sys.argv[1], 128, 1, 0
params.cpuparams.n_threads, params.warmup = 1, False
server = xllamacpp.Server(params)
tokens = []
for prompt in json.loads(sys.argv[2]):
    greedy = {"temperature": 0, "top_k": 1, "repeat_penalty": 1}
    request = {"prompt": prompt, "n_predict": 24, "return_tokens": True, **greedy}
    body = Request(server.listening_address + "/completion", json.dumps(request).encode())
    tokens.append(json.load(urlopen(body, timeout=60))["tokens"])
print(json.dumps(tokens))
"""


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def files(request, gguf_checkpoint_of, tmp_path_factory):
    """A checkpoint and the GGUF of its base in fp32."""
    _, checkpoint = gguf_checkpoint_of(request.param)
    base = tmp_path_factory.mktemp("native") / "base.gguf"
    export(checkpoint, base, view="generator", format="gguf")
    return checkpoint, base


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UBMOE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def native(files, tmp_path):
    checkpoint, base = files
    model = NativeUBMoE.from_checkpoint(checkpoint, gguf=base, name="tiny", context=128, longest_text=64, threads=1)
    yield model
    model.close()


def tokens_of(model, prompt, count=24, **options):
    found = []
    model.generate_tokens(model.continuation_ids(prompt), Sampling(count, **options), lambda t: found.append(t) or True)
    return found


def test_vectors_are_those_of_the_torch_encoder(native, files):
    model = UBMoE(str(files[0]), device="cpu")
    expected = model.encode(GGUF_TEXTS)
    assert [tokens.ids for tokens in native.tokenize(GGUF_TEXTS, None)] == model.tokenizer(GGUF_TEXTS)["input_ids"]
    found = native.encode(GGUF_TEXTS)
    assert cosine(found, expected).min() > 0.9999
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    # Neighbours in a pass change nothing, nor does what was embedded before.
    alone = np.stack([native.encode(text) for text in reversed(GGUF_TEXTS)])[::-1]
    np.testing.assert_allclose(found, alone, atol=2e-4)
    base = model[0].generator("uni").model(**model.tokenizer(TEXTS[:1], return_tensors="pt")).last_hidden_state.mean(1)
    assert cosine(base.detach().numpy(), expected[:1])[0] < 0.99, "the base gives these vectors, too"


def test_a_dense_layer_is_applied_to_what_llama_cpp_pools(files, tmp_path):
    checkpoint, base = files
    model = UBMoE(str(checkpoint), device="cpu")
    width = model.get_embedding_dimension()
    layer = Dense(width, width // 2, activation_function=torch.nn.Identity())
    model.insert(2, layer)
    model.save(str(tmp_path / "projected"))
    expected = UBMoE(str(tmp_path / "projected"), device="cpu").encode(GGUF_TEXTS)
    native = NativeUBMoE.from_checkpoint(tmp_path / "projected", gguf=base, context=128, longest_text=64, threads=1)
    assert native.dimension == width // 2 == expected.shape[1]
    assert cosine(native.encode(GGUF_TEXTS), expected).min() > 0.9999
    native.close()
    with torch.no_grad():
        layer.linear.bias.add_(1.0)
    assert cosine(model.encode(GGUF_TEXTS), expected).min() < 0.99, "the bias changes nothing: the test says nothing"


def test_prompts_and_dimensions_are_those_of_the_torch_encoder(files, tmp_path):
    """A default prompt is none for queries and documents, and `truncate_dim` cuts what llama.cpp gives."""
    checkpoint, base = files
    options = {"prompts": {"other": "the red "}, "default_prompt_name": "other", "truncate_dim": 8}
    UBMoE(str(checkpoint), device="cpu", **options).save(str(tmp_path / "cut"))
    model = UBMoE(str(tmp_path / "cut"), device="cpu")
    native = NativeUBMoE.from_checkpoint(tmp_path / "cut", gguf=base, context=128, longest_text=64, threads=1)
    assert native.dimension == 8
    for found, expected in (
        (native.encode(TEXTS), model.encode(TEXTS)),
        (native.encode_query(TEXTS), model.encode_query(TEXTS)),
        (native.encode_document(TEXTS), model.encode_document(TEXTS)),
    ):
        assert found.shape == expected.shape == (len(TEXTS), 8)
        assert cosine(found, expected).min() > 0.9999
    assert cosine(model.encode(TEXTS), model.encode_query(TEXTS)).min() < 0.99
    native.close()


def test_long_texts_are_cut_as_the_checkpoint_says(files, tmp_path):
    """Also where that is less than llama.cpp would embed texts at once, of which it would end the process."""
    checkpoint, base = files
    model = UBMoE(str(checkpoint), device="cpu")
    model.max_seq_length = 8
    model.save(str(tmp_path / "short"))
    native = NativeUBMoE.from_checkpoint(tmp_path / "short", gguf=base, context=128, threads=1)
    long = "the cat sleeps in the old tree under the house and the dog runs"
    assert native.longest_text == 8 < len(model.token_ids(long))
    found, expected = native.encode([long, *GGUF_TEXTS]), model.encode([long, *GGUF_TEXTS])
    assert cosine(found, expected).min() > 0.9999
    assert cosine(found[:1], UBMoE(str(checkpoint), device="cpu").encode([long]))[0] < 0.99
    with pytest.raises(ValueError, match="longest_text must be at least 1"):
        NativeUBMoE.from_checkpoint(checkpoint, gguf=base, longest_text=0)
    native.close()


def test_a_closed_model_says_so(files):
    checkpoint, base = files
    native = NativeUBMoE.from_checkpoint(checkpoint, gguf=base, context=128, longest_text=64, threads=1)
    whole = native.generate("the cat", max_new_tokens=40)
    pieces = native.generate("the cat", max_new_tokens=40, stream=True)
    found = [next(pieces)]
    closing = threading.Thread(target=native.close)
    closing.start()
    found += pieces  # the memory is not taken from under it
    closing.join()
    assert "".join(found) == whole
    native.close()
    for call in (
        lambda: native.encode(["a cat"]),
        lambda: native.generate("the cat"),
        lambda: native.tokenize(["a"], None),
    ):
        with pytest.raises(ValueError, match="is closed"):
            call()


def test_bad_arguments_are_told(native):
    whole = native.generate("the cat", max_new_tokens=12)
    stop = whole[3:6]
    assert native.generate("the cat", max_new_tokens=12, stop=stop) == whole[: whole.index(stop)]
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
            native.generate("the cat", max_new_tokens=wrong)
    with pytest.raises(TypeError, match="position 1 is of type NoneType"):
        native.encode(["a", None])


def test_tokens_are_those_of_plain_llama_cpp(native, files):
    expected = in_process(PLAIN, files[1], json.dumps(PROMPTS))
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        found = tokens_of(native, prompt)
        assert len(tokens) > 10 or native.is_end(found[-1])
        assert found[: len(tokens)] == tokens


def test_threads_that_embed_and_generate_get_the_serial_results(native):
    vectors, tokens = native.encode(GGUF_TEXTS), tokens_of(native, "the cat")
    with ThreadPoolExecutor(4) as pool:
        embed = [pool.submit(native.encode, GGUF_TEXTS) for _ in range(8)]
        talk = [pool.submit(tokens_of, native, "the cat") for _ in range(8)]
    assert all(np.array_equal(future.result(), vectors) for future in embed)
    assert all(future.result() == tokens for future in talk)


def test_seeds_chats_streams_and_stops(native):
    drawn = [native.generate("the cat", max_new_tokens=10, temperature=2.0, seed=seed) for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    chat = [{"role": "user", "content": "the cat"}]
    whole = native.generate(chat, max_new_tokens=12)
    pieces = list(native.generate(chat, max_new_tokens=12, stream=True))
    assert "".join(pieces) == whole
    assert whole == native.decode([t for t in tokens_of(native, chat, 12) if not native.is_end(t)])
    stop = whole[3:5]
    assert native.generate(chat, max_new_tokens=12, stop=[stop]) == whole[: whole.index(stop)]
    with pytest.raises(ValueError, match="ends with the assistant's turn is continued by"):
        native.generate([*chat, {"role": "assistant", "content": "the"}])
    for content in ([{"type": "text", "text": "the"}], None):
        with pytest.raises(ValueError, match="the chat template does not take this chat"):
            native.generate([{"role": "user", "content": content}])


def test_the_same_app_serves_it(native, files):
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from ubmoe_st.serving import create_app

    with TestClient(create_app(native)) as client:
        answer = client.post("/v1/embeddings", json={"input": GGUF_TEXTS, "input_type": "query"}).json()
        found = [entry["embedding"] for entry in answer["data"]]
        assert cosine(found, UBMoE(str(files[0]), device="cpu").encode_query(GGUF_TEXTS)).min() > 0.9999
        body = {"prompt": "the cat", "max_tokens": 8}
        text = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        assert text == native.generate("the cat", max_new_tokens=8)
        ranked = client.post("/v1/rerank", json={"query": "a cat", "documents": ["a", "b"]})
        assert ranked.status_code == 501
        assert "--engine torch" in ranked.json()["error"]["message"]
        long = client.post("/v1/embeddings", json={"input": "the cat " * 100})
        assert "64 tokens" in long.json()["error"]["message"]


def test_an_index_can_be_searched_with_it(native, files, tmp_path):
    from ubmoe_st import EmbeddingIndex

    rows = [{"id": str(number), "text": text} for number, text in enumerate(TEXTS)]
    EmbeddingIndex.build(UBMoE(str(files[0]), device="cpu"), rows, tmp_path / "index")
    with pytest.raises(ValueError, match="the model reads 64 tokens, the index was built with 128"):
        EmbeddingIndex.open(tmp_path / "index", model=native)
    with closing(NativeUBMoE.from_checkpoint(files[0], gguf=files[1], threads=1)) as whole:
        index = EmbeddingIndex.open(tmp_path / "index", model=whole)
        assert index.search_entries(TEXTS[2], 1)[0][0].id == "2"


def test_no_torch_is_loaded(files, tmp_path):
    script = (
        "import sys; from ubmoe_st.serving import NativeUBMoE\n"
        "model = NativeUBMoE.from_checkpoint(sys.argv[1], gguf=sys.argv[2], threads=1)\n"
        "assert model.encode(['a', 'b']).shape == (2, 32) and model.generate('the cat', max_new_tokens=4)\n"
        "print([name for name in ('torch', 'transformers', 'sentence_transformers') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script, *map(str, files)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def test_without_an_installed_gguf_the_base_is_written_once(files, tmp_path):
    model = NativeUBMoE.from_checkpoint(files[0], threads=1)
    written = model.parts.gguf
    assert written.is_relative_to(tmp_path / "cache")
    assert cosine(model.encode(TEXTS), UBMoE(str(files[0]), device="cpu").encode(TEXTS)).min() > 0.999
    model.close()
    before = written.stat().st_mtime_ns
    NativeUBMoE.from_checkpoint(files[0], threads=1).close()
    assert written.stat().st_mtime_ns == before


def test_bases_that_share_their_ffns_alone_are_written_apart(tmp_path):
    first, one = make_gguf_checkpoint(tmp_path / "first", "llama")
    shutil.copytree(first, tmp_path / "other")
    lm = AutoModelForCausalLM.from_pretrained(first)
    with torch.no_grad():
        for layer in lm.model.layers:
            layer.self_attn.q_proj.weight.mul_(-1)
    lm.save_pretrained(tmp_path / "other")
    other = make_checkpoint(tmp_path / "other", tmp_path / "two")
    with closing(NativeUBMoE.from_checkpoint(str(one))) as native:
        vectors = native.encode(TEXTS)
    with closing(NativeUBMoE.from_checkpoint(str(other))) as native:
        assert cosine(native.encode(TEXTS), UBMoE(str(other)).encode(TEXTS)).min() > 0.999
        assert cosine(native.encode(TEXTS), vectors).min() < 0.99, "both are the same: vacuous"


def test_characters_are_composed_where_the_tokenizer_composes_them(tmp_path):
    base, _ = make_gguf_checkpoint(tmp_path / "plain", "llama")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.save_pretrained(base)
    checkpoint = make_checkpoint(base, tmp_path / "nfc")
    text, composed = "Gro\u0308\u00dfe of the cat", "Gr\u00f6\u00dfe of the cat"
    with pytest.warns(UserWarning, match=r"composes characters \(NFC\)"):
        native = NativeUBMoE.from_checkpoint(str(checkpoint))
    with closing(native):
        ids = native.tokenizer([text, composed])["input_ids"]
    assert ids == UBMoE(str(checkpoint)).tokenizer([text, composed])["input_ids"]
    assert ids[0] == ids[1] != UBMoE(str(tmp_path / "plain" / "checkpoint")).tokenizer([text])["input_ids"][0]


def test_a_prompt_that_is_not_pooled_is_refused(files, tmp_path):
    checkpoint, base = files
    model = UBMoE(str(checkpoint))
    model[1].include_prompt = False
    model.save(str(tmp_path / "left-out"))
    with closing(NativeUBMoE.from_checkpoint(str(tmp_path / "left-out"), gguf=base)) as native:
        assert cosine(native.encode(TEXTS), model.encode(TEXTS)).min() > 0.999
        assert np.array_equal(native.encode(TEXTS, prompt=""), native.encode(TEXTS))
        with pytest.raises(ValueError, match=r"pools without its prompts, which llama\.cpp cannot; leave `prompt` out"):
            native.encode(TEXTS, prompt="the old ")


def test_what_llama_cpp_cannot_do_is_refused(files, tmp_path):
    checkpoint, base = files
    with pytest.raises(ValueError, match="not a UBMoE checkpoint"):
        NativeUBMoE.from_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a GGUF file"):
        NativeUBMoE.from_checkpoint(checkpoint, gguf=tmp_path / "none.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF and nothing else")
    with pytest.raises(ValueError, match="could not read"):
        NativeUBMoE.from_checkpoint(checkpoint, gguf=broken)
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    config = json.loads((other / "generator" / "config.json").read_text())
    config["ubmoe"]["expert_rank"] = None
    (other / "generator" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="dense"):
        NativeUBMoE.from_checkpoint(other, gguf=base)
    mixing = tmp_path / "mixing"
    shutil.copytree(checkpoint, mixing)
    config = json.loads((checkpoint / "generator" / "config.json").read_text())
    config["ubmoe"]["routing"] = "bi"
    (mixing / "generator" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"routing 'bi', and llama\.cpp with the base model alone"):
        NativeUBMoE.from_checkpoint(mixing, gguf=base)
    model = UBMoE(str(checkpoint), device="cpu")
    width = model.get_embedding_dimension()
    model.insert(2, Dense(width, 3, activation_function=torch.nn.Identity()))
    model.insert(2, Normalize())
    model.save(str(tmp_path / "ordered"))
    with pytest.raises(ValueError, match="a Dense behind a Normalize"):
        NativeUBMoE.from_checkpoint(tmp_path / "ordered", gguf=base)
    prompted = tmp_path / "prompted"
    shutil.copytree(checkpoint, prompted)
    (prompted / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean", "include_prompt": false}')
    (prompted / "config_sentence_transformers.json").write_text('{"prompts": {"query": "find: "}}')
    with pytest.raises(ValueError, match="engine torch"):
        NativeUBMoE.from_checkpoint(prompted, gguf=base)


def test_an_index_counts_by_its_tokens(files, tmp_path):
    from ubmoe_st import EmbeddingIndex

    with closing(NativeUBMoE.from_checkpoint(files[0], gguf=files[1], threads=1, longest_text=64)) as short:
        assert short.max_seq_length == 64
        rows = [{"id": "a", "text": "cat " * 100 + "dog " * 50}, {"id": "b", "text": "a cat"}]
        cut = EmbeddingIndex.build(short, rows, tmp_path / "cut")
        assert cut.info["sources"][0]["entries_cut"] == 1
        chunks = EmbeddingIndex.build(short, rows, tmp_path / "chunks", chunk_tokens=40)
        assert len(chunks.texts("a")) > 2
        assert max(map(len, short.tokenizer(chunks.texts("a"))["input_ids"])) <= 64
        with pytest.raises(ValueError, match="chunk_tokens=200 does not fit: the model reads 64 tokens"):
            EmbeddingIndex.build(short, rows, tmp_path / "no", chunk_tokens=200)
        with pytest.warns(UserWarning, match="1 of 1 queries are longer than the 64 tokens"):
            cut.search("cat " * 100, 1)
    with closing(NativeUBMoE.from_checkpoint(files[0], gguf=files[1], threads=1, longest_text=128)) as whole:
        index = EmbeddingIndex.build(whole, rows[1:], tmp_path / "long")
    with (
        closing(NativeUBMoE.from_checkpoint(files[0], gguf=files[1], threads=1, longest_text=64)) as short,
        pytest.raises(ValueError, match="the model reads 64 tokens, the index was built with 128"),
    ):
        index.use_model(short)
