"""Scripts that run an export in a process of its own, without this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

# An import hook that hides packages, put before scripts that run in a process of their own.
HIDE = """
import sys, importlib.util as util
for name in {hidden!r}:
    sys.modules[name] = None
"""

# Arguments: GGUF file, `encode` or `generate`, texts as JSON.
LLAMA_CPP = """
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
    return json.load(urlopen(body, timeout=600))
result = {"ids": [post("/tokenize", content=text, add_special=True, parse_special=False)["tokens"] for text in texts]}
if mode == "encode":
    result["vectors"] = [entry["embedding"] for entry in post("/v1/embeddings", input=texts)["data"]]
else:
    choice = {"n_predict": 12, "temperature": 0, "top_k": 1, "repeat_penalty": 1, "return_tokens": True}
    result["tokens"] = [post("/completion", prompt=ids, **choice)["tokens"] for ids in result["ids"]]
print(json.dumps(result))
"""

# Arguments: GGUF file of a base, of an adapter or an empty text, texts as JSON, and `causal` for causal attention.
LLAMA_CPP_ADAPTER = """
import json, sys
from urllib.request import Request, urlopen
import xllamacpp
path, adapter, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
attention = "CAUSAL" if "causal" in sys.argv[4:] else "NON_CAUSAL"
params = xllamacpp.CommonParams()
params.model.path, params.embedding, params.n_ctx = path, True, 128
params.n_parallel, params.cpuparams.n_threads, params.warmup, params.verbosity = 1, 1, False, 0
params.attention_type = getattr(xllamacpp.llama_attention_type, f"LLAMA_ATTENTION_TYPE_{attention}")
params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
if adapter:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
server = xllamacpp.Server(params)
request = {"input": texts, "embd_normalize": -1}
body = Request(server.listening_address + "/v1/embeddings", json.dumps(request).encode())
print(json.dumps([entry["embedding"] for entry in json.load(urlopen(body, timeout=600))["data"]]))
"""

# Arguments: folder of an export, then those of `ENCODE`: texts as JSON.
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
ENGINES = {"onnx": ONNX_SCRIPT, "openvino": OPENVINO_SCRIPT}


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
