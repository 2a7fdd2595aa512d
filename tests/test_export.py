"""Exports run in the engines that they are for, without this package, and agree with the checkpoint."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from helpers.models import TEXTS, make_base, make_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from ubmoe_st import UBMoE
from ubmoe_st import export as module
from ubmoe_st.cli import app
from ubmoe_st.export import export

# An import hook that hides packages, put before scripts that run in a process of their own.
HIDE = """
import sys, importlib.util as util
for name in {hidden!r}:
    sys.modules[name] = None
"""
ST_SCRIPT = """
import json, sys
import torch
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
with torch.no_grad():
    a, b = (model[0].auto_model(torch.tensor([[4, 5, 6, last]])).last_hidden_state[0, 0] for last in (7, 8))
print(json.dumps({"vectors": model.encode(json.loads(sys.argv[2])).tolist(), "full": not torch.equal(a, b)}))
"""
READER = """
import json, os, sys
import numpy as np
from tokenizers import Tokenizer
os.chdir(sys.argv[1])
tokenizer = Tokenizer.from_file("tokenizer.json")
def inputs(texts):
    batch = tokenizer.encode_batch(texts)
    ids, mask = zip(*((x.ids, x.attention_mask) for x in batch))
    return {"input_ids": np.array(ids), "attention_mask": np.array(mask)}
"""
ONNX_SCRIPT = (
    READER
    + """
import onnxruntime
session = onnxruntime.InferenceSession("onnx/model.onnx", providers=["CPUExecutionProvider"])
names = [x.name for x in session.get_outputs()]
def run(feed):
    return dict(zip(names, session.run(names, feed)))
"""
)
OPENVINO_SCRIPT = (
    READER
    + """
import openvino
model = openvino.compile_model("openvino/openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
names = [x.get_any_name() for x in model.outputs]
def run(feed):
    found = model(feed)
    return {name: found[name] for name in names}
"""
)
ENCODE = """
texts = json.loads(sys.argv[2])
together = run(inputs(texts))
alone = [run(inputs([text]))["sentence_embedding"][0] for text in texts]
print(json.dumps({
    "names": names,
    "vectors": together["sentence_embedding"].tolist(),
    "alone": [x.tolist() for x in alone],
    "shape": list(together["last_hidden_state"].shape),
}))
"""
LOGITS = """
ids = np.array(json.loads(sys.argv[2]))
print(json.dumps(run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"].tolist()))
"""
ENGINES = {"onnx": ONNX_SCRIPT, "openvino": OPENVINO_SCRIPT}
LLAMA_SCRIPT = """
import json, sys
from urllib.request import Request, urlopen
import xllamacpp
path, mode, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
params = xllamacpp.CommonParams()
params.model.path, params.embedding, params.n_ctx = path, mode == "encode", 128
params.n_parallel, params.cpuparams.n_threads, params.warmup, params.verbosity = 1, 1, False, 0
# The cache in fp32: the default, fp16, moves near ties of a random model.
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
def post(endpoint, **request):
    body = Request(server.listening_address + endpoint, json.dumps(request).encode())
    return json.load(urlopen(body, timeout=60))
result = {"ids": [post("/tokenize", content=text, add_special=True, parse_special=False)["tokens"] for text in texts]}
if mode == "encode":
    result["vectors"] = [entry["embedding"] for entry in post("/v1/embeddings", input=texts)["data"]]
else:
    choice = {"n_predict": 12, "temperature": 0, "top_k": 1, "repeat_penalty": 1, "return_tokens": True}
    result["tokens"] = [post("/completion", prompt=ids, **choice)["tokens"] for ids in result["ids"]]
print(json.dumps(result))
"""
needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs the extra onnx")
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs the extra openvino")
needs_llama = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs the extra serve")


def in_process(script: str, *arguments: object, hidden: tuple[str, ...] = ("ubmoe_st",)) -> object:
    run = subprocess.run(
        [sys.executable, "-c", HIDE.format(hidden=hidden) + script, *(str(x) for x in arguments)],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def cosine(a, b) -> np.ndarray:
    a, b = np.asarray(a), np.asarray(b)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def tree(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


# --- transformers and sentence-transformers --------------------------------------------------------------------------


def test_hf_encoder_in_stock_sentence_transformers(checkpoint, tmp_path):
    facts = export(checkpoint, tmp_path / "out")
    found = in_process(ST_SCRIPT, tmp_path / "out", json.dumps(TEXTS))
    expected = UBMoE(str(checkpoint)).encode(TEXTS)
    assert np.abs(np.array(found["vectors"]) - expected).max() < 1e-6
    assert found["full"]
    assert facts["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert not any(name.startswith("generator") for name in tree(tmp_path / "out"))


def test_hf_encoder_files_hold_the_keys_that_servers_read(checkpoint, tmp_path):
    """vLLM: architectures, is_causal, module types, pooling. text-embeddings-inference: its own names of the same."""
    export(checkpoint, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["LlamaModel"]
    assert config["is_causal"] is False
    assert config["use_bidirectional_attention"] is True
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert {"hidden_act", "initializer_range", "max_position_embeddings", "num_key_value_heads"} <= config.keys()
    modules = json.loads((tmp_path / "out/modules.json").read_text())
    assert [entry["type"].removeprefix("sentence_transformers.models.") for entry in modules] == [
        "Transformer",
        "Pooling",
        "Normalize",
    ]
    pooling = json.loads((tmp_path / "out/1_Pooling/config.json").read_text())
    assert pooling["word_embedding_dimension"] == 32
    assert [key for key, value in pooling.items() if value is True] == ["pooling_mode_mean_tokens", "include_prompt"]
    bert = json.loads((tmp_path / "out/sentence_bert_config.json").read_text())
    assert bert == {"max_seq_length": UBMoE(str(checkpoint)).max_seq_length, "do_lower_case": False}
    tokenizer = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("architecture", ["llama", "llama-untied", "gemma3"])
def test_hf_generator_is_the_base(architecture, checkpoint_of, base_of, tmp_path):
    export(checkpoint_of(architecture), tmp_path / "out", view="generator")
    ids = torch.tensor([[4, 5, 6, 7, 8]])
    base = AutoModelForCausalLM.from_pretrained(base_of(architecture))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(found(ids).logits, base(ids).logits)
        other = UBMoE(str(checkpoint_of(architecture))).generator_for("bi")
        assert not torch.equal(other(ids).logits, base(ids).logits)
    assert torch.equal(found.generate(ids, max_new_tokens=6), base.generate(ids, max_new_tokens=6))
    assert "ubmoe" not in json.loads((tmp_path / "out/config.json").read_text())


# --- onnxruntime and OpenVINO ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "format", [pytest.param("onnx", marks=needs_onnx), pytest.param("openvino", marks=needs_openvino)]
)
def test_graph_of_the_encoder(format, architecture, checkpoint_of, tmp_path):
    """In a process without torch and transformers; padded batches, of other sizes than the traced one."""
    export(checkpoint_of(architecture), tmp_path / "out", format=format)
    found = in_process(
        ENGINES[format] + ENCODE,
        tmp_path / "out",
        json.dumps(TEXTS),
        hidden=("ubmoe_st", "torch", "transformers", "sentence_transformers"),
    )
    model = UBMoE(str(checkpoint_of(architecture)))
    expected = model.encode(TEXTS)
    lengths = [len(ids) for ids in model.tokenizer(TEXTS)["input_ids"]]
    assert len(set(lengths)) > 2, "no padding: the test would say nothing of masks"
    assert found["names"] == ["last_hidden_state", "sentence_embedding"]
    assert found["shape"] == [len(TEXTS), max(lengths), 32]
    assert np.abs(np.array(found["vectors"]) - expected).max() < 1e-4
    assert np.abs(np.array(found["alone"]) - expected).max() < 1e-4
    assert np.abs(expected[0] - expected[1]).max() > 0.01


@pytest.mark.parametrize(
    "format", [pytest.param("onnx", marks=needs_onnx), pytest.param("openvino", marks=needs_openvino)]
)
def test_graph_of_the_generator(format, checkpoint, base, tmp_path):
    export(checkpoint, tmp_path / "out", view="generator", format=format)
    ids = [[4, 5, 6, 7, 8], [9, 8, 7, 6, 5], [4, 4, 4, 4, 4]]
    found = np.array(in_process(ENGINES[format] + LOGITS, tmp_path / "out", json.dumps(ids)))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(base)(torch.tensor(ids)).logits.numpy()
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.fixture(scope="module")
def peaked(base, tmp_path_factory) -> Path:
    """A checkpoint whose second layer has a few huge activations before its down projection."""
    from transformers import AutoTokenizer

    lm = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        up = lm.model.layers[1].mlp.up_proj.weight
        up[3] *= 300
        lm.model.layers[1].mlp.down_proj.weight[:, 3] /= 300
    folder = tmp_path_factory.mktemp("peaked")
    lm.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "base")
    return make_checkpoint(folder / "base", folder / "checkpoint", low_rank=False)


@pytest.mark.parametrize(
    "format", [pytest.param("onnx", marks=needs_onnx), pytest.param("openvino", marks=needs_openvino)]
)
def test_int8_keeps_peaked_layers_in_fp32(format, peaked, tmp_path, monkeypatch):
    ratios = module._peaks(UBMoE(str(peaked)), TEXTS)
    second, first = sorted(ratios.values())[-2:]
    assert first > 1.5 * second
    monkeypatch.setattr(module, "PEAK_LIMIT", (first * second) ** 0.5)
    facts = export(peaked, tmp_path / "out", format=format, quantize="int8", calibration=TEXTS)
    assert facts["kept_fp32"] == ["layers.1.mlp.down_proj"]
    expected = UBMoE(str(peaked)).encode(TEXTS)
    script = ENGINES[format] + ENCODE
    kept = in_process(script, tmp_path / "out", json.dumps(TEXTS))["vectors"]
    # A random network of 32 dimensions doubles what rounding does; the released model is in docs/experiments.md.
    assert cosine(kept, expected).min() > 0.8
    assert np.abs(np.array(kept) - expected).max() > 1e-5, "nothing was quantised"
    monkeypatch.setattr(module, "PEAK_LIMIT", 1e9)
    export(peaked, tmp_path / "all", format=format, quantize="int8", calibration=TEXTS)
    everything = in_process(script, tmp_path / "all", json.dumps(TEXTS))["vectors"]
    if format == "onnx":  # nncf smooths peaks away itself; on a network this small what is left is chance
        assert cosine(everything, expected).mean() < cosine(kept, expected).mean()


@needs_onnx
def test_readme_of_an_export_runs(checkpoint, tmp_path):
    import re

    for view, format in (("encoder", "hf"), ("encoder", "onnx"), ("generator", "hf")):
        folder = tmp_path / f"{view}-{format}"
        export(checkpoint, folder, view=view, format=format)
        script = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
        run = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-2000:]
        assert run.stdout.strip()


@needs_onnx
def test_large_onnx_weights_go_under_the_name_that_optimum_looks_for(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_ONNX_FILE_LIMIT_BYTES", 1000)
    export(checkpoint, tmp_path / "out", format="onnx")
    assert {"onnx/model.onnx", "onnx/model.onnx_data"} <= tree(tmp_path / "out")
    found = in_process(ONNX_SCRIPT + ENCODE, tmp_path / "out", json.dumps(TEXTS))
    assert np.abs(np.array(found["vectors"]) - UBMoE(str(checkpoint)).encode(TEXTS)).max() < 1e-4


@needs_onnx
def test_exports_name_no_folder_of_this_machine(checkpoint, tmp_path):
    export(checkpoint, tmp_path / "out", format="onnx")
    here = str(Path(module.__file__).parents[1]).encode()
    for name in tree(tmp_path / "out"):
        assert here not in (tmp_path / "out" / name).read_bytes(), name


# --- llama.cpp -------------------------------------------------------------------------------------------------------

ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GGUF_MODELS = {
    "llama": {},
    "llama-untied": {"attention_bias": True},
    "llama-rope": {"rope_parameters": ROPE_LLAMA3},
    "qwen2": {},
    "qwen3": {},
}
GGUF_TEXTS = [*TEXTS, "In 1984 the cat's tree had 12 birds.", "Größe"]


def bpe_tokenizer(digits: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alone = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([alone, cut]) if digits else cut
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
    )
    backend.train_from_iterator([*TEXTS, "12 birds in 1984 in 1984 in 1984"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def gguf_checkpoint_of(tmp_path_factory):
    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            architecture = name if name != "llama-rope" else "llama"
            base = make_base(folder / "base", architecture, vocab_size=320, **GGUF_MODELS[name])
            for file in base.glob("tokenizer*"):
                file.unlink()
            bpe_tokenizer(digits=name == "llama").save_pretrained(base)
            made[name] = base, make_checkpoint(base, folder / "checkpoint")
        return made[name]

    return get


@needs_llama
@pytest.mark.parametrize("name", GGUF_MODELS)
def test_gguf_encoder_in_llama_cpp(name, gguf_checkpoint_of, tmp_path):
    _, checkpoint = gguf_checkpoint_of(name)
    export(checkpoint, tmp_path / "model.gguf", format="gguf")
    found = in_process(LLAMA_SCRIPT, tmp_path / "model.gguf", "encode", json.dumps(GGUF_TEXTS))
    model = UBMoE(str(checkpoint))
    assert found["ids"] == model.tokenizer(GGUF_TEXTS)["input_ids"]
    expected = model.encode(GGUF_TEXTS)
    assert cosine(found["vectors"], expected).min() > 0.9999
    model[0].model.config.is_causal = True
    causal = model.encode(GGUF_TEXTS)
    assert cosine(causal, expected).min() < 0.99, "causal vectors are the same: the test says nothing"


@needs_llama
@pytest.mark.parametrize(("quantize", "limit"), [("f16", 0.9999), ("int8", 0.995)])
def test_gguf_in_fewer_bits(quantize, limit, gguf_checkpoint_of, tmp_path):
    _, checkpoint = gguf_checkpoint_of("llama")
    full = export(checkpoint, tmp_path / "full.gguf", format="gguf")
    facts = export(checkpoint, tmp_path / "model.gguf", format="gguf", quantize=quantize)
    assert facts["bytes"] < 0.9 * full["bytes"]
    found = in_process(LLAMA_SCRIPT, tmp_path / "model.gguf", "encode", json.dumps(GGUF_TEXTS))
    expected = UBMoE(str(checkpoint)).encode(GGUF_TEXTS)
    assert cosine(found["vectors"], expected).min() > limit
    assert np.abs(cosine(found["vectors"], expected) - 1).max() > 1e-9


@needs_llama
@pytest.mark.parametrize("name", GGUF_MODELS)
def test_gguf_generator_gives_the_tokens_of_the_base(name, gguf_checkpoint_of, tmp_path):
    base, checkpoint = gguf_checkpoint_of(name)
    export(checkpoint, tmp_path / "model.gguf", view="generator", format="gguf")
    prompts = ["the cat", "a red bird sleeps in"]
    found = in_process(LLAMA_SCRIPT, tmp_path / "model.gguf", "generate", json.dumps(prompts))
    lm = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = UBMoE(str(checkpoint)).tokenizer
    for prompt, tokens in zip(prompts, found["tokens"], strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        new = lm.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
        assert tokens[: len(new)] == new


@needs_llama
def test_the_serving_example_embeds_and_chats_in_one_process(gguf_checkpoint_of, tmp_path):
    base, checkpoint = gguf_checkpoint_of("llama")
    command = [sys.executable, "-m", "examples.serve", str(checkpoint), "--folder", str(tmp_path), "--threads", "1"]
    ports = ["--encoder-port", "0", "--generator-port", "0"]
    with subprocess.Popen([*command, *ports], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as run:
        try:
            embeddings, chat = (next(line for line in run.stdout if line.startswith("http")).strip() for _ in range(2))

            def post(address, **request):
                with urlopen(Request(address, json.dumps(request).encode()), timeout=60) as answer:
                    return json.load(answer)

            found = post(embeddings, model="encoder", input=GGUF_TEXTS)["data"]
            expected = UBMoE(str(checkpoint)).encode(GGUF_TEXTS)
            assert cosine([entry["embedding"] for entry in found], expected).min() > 0.9999
            assert np.abs(cosine(expected[:1], expected[1:]) - 1).max() > 0.01
            messages = [{"role": "user", "content": "the cat"}]
            said = post(chat, model="generator", messages=messages, max_tokens=4, temperature=0)
            assert said["usage"]["completion_tokens"] == 4
            text = post(chat.replace("chat/", ""), model="generator", prompt="the cat", max_tokens=6, temperature=0)
            lm, tokenizer = AutoModelForCausalLM.from_pretrained(base), UBMoE(str(checkpoint)).tokenizer
            ids = torch.tensor([tokenizer("the cat")["input_ids"]])
            new = lm.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
            assert text["choices"][0]["text"] == tokenizer.decode(new)
        finally:
            run.terminate()
    assert run.returncode == 0


# --- errors ----------------------------------------------------------------------------------------------------------


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["export", *(str(argument) for argument in arguments)])
    assert result.exit_code == 1, result.output
    # In this process progress bars may have been chosen long ago; the error is what comes after them.
    error = result.stderr[result.stderr.index("error:") :]
    assert len(error.strip().splitlines()) == 1, result.stderr
    return error


def test_command_line(checkpoint, tmp_path):
    arguments = ["export", str(checkpoint), str(tmp_path / "out"), "--view", "generator"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["view"], facts["format"], facts["kept_fp32"]) == ("generator", "hf", [])
    assert "exists" in refused(*arguments[1:])
    assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0
    assert CliRunner().invoke(app, [*arguments, "--format", "coreml"]).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere/at/all", "out"), "no local folder"),
        (("{model}", "out", "--quantize", "int8"), "format hf cannot be written as int8"),
        (("{model}", "out", "--format", "gguf"), "a name that ends in .gguf"),
        (("{model}", "out.gguf", "--format", "gguf"), "byte-level BPE"),
        (("{gemma}", "out.gguf", "--format", "gguf"), "convert_hf_to_gguf.py"),
        (("{model}", "{model}", "--overwrite"), "is a checkpoint"),
        (("{model}", "out", "--format", "openvino", "--view", "generator", "--quantize", "int8"), "--format gguf"),
        (("{model}", "out", "--format", "onnx", "--quantize", "int8", "--calibration", "no.txt"), "does not exist"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(arguments, message, checkpoint_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {"model": checkpoint_of("llama"), "gemma": checkpoint_of("gemma3")}
    assert message in refused(*(argument.format(**folders) for argument in arguments))
    assert list(tmp_path.iterdir()) == []
    assert (folders["model"] / "SHA256SUMS").is_file()


@pytest.mark.parametrize(("format", "name"), [("onnx", "onnxscript"), ("openvino", "openvino"), ("gguf", "gguf")])
def test_a_missing_library_names_the_extra(format, name, checkpoint, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda x, *rest: None if x == name else find(x, *rest))
    with pytest.raises(ImportError, match=rf"{name}.*pip install 'ubmoe-st\[{format}\]'"):
        export(checkpoint, tmp_path / "out.gguf", format=format)


def test_an_interrupted_export_leaves_the_old_one(checkpoint, tmp_path, monkeypatch):
    export(checkpoint, tmp_path / "out")
    before = {name: (tmp_path / "out" / name).read_bytes() for name in tree(tmp_path / "out")}

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write_safetensors", fail)
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, tmp_path / "out", view="generator", overwrite=True)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in tree(tmp_path / "out")} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_overwriting_leaves_no_part_of_another_export(checkpoint, tmp_path):
    export(checkpoint, tmp_path / "out")
    export(checkpoint, tmp_path / "out", view="generator", overwrite=True)
    export(checkpoint, tmp_path / "fresh", view="generator")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")
