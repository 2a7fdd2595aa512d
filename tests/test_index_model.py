"""The index with real sentence-transformers modules, and how much memory and time it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers.encoders import HashEncoder
from helpers.models import make_base, make_checkpoint
from sentence_transformers import SentenceTransformer

from ubmoe_st.index import CorpusError, EmbeddingIndex

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random bidirectional BERT with a word tokenizer, saved and loaded as a stock checkpoint."""
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "query", ":"] + [f"w{n}" for n in range(200)]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path_factory.mktemp("bert")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    import torch

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    transformer = Transformer(str(folder), max_seq_length=40)
    sentence_model = SentenceTransformer(
        modules=[transformer, Pooling(32), Normalize()], prompts={"query": "query: ", "document": ""}, device="cpu"
    )
    checkpoint = tmp_path_factory.mktemp("model") / "tiny"
    sentence_model.save_pretrained(str(checkpoint))
    return SentenceTransformer(str(checkpoint), device="cpu")


def rows(count: int) -> list[dict]:
    generator = np.random.default_rng(1)
    return [
        {"id": str(n), "text": " ".join(f"w{w}" for w in generator.integers(200, size=generator.integers(1, 60)))}
        for n in range(count)
    ]


def test_vectors_are_those_of_encode_document(model, tmp_path):
    corpus = rows(120)
    index = EmbeddingIndex.build(model, corpus, tmp_path / "i", batch_tokens=200, window_tokens=900)
    expected = model.encode_document([row["text"] for row in corpus])
    stored = index.vectors([row["id"] for row in corpus])
    np.testing.assert_allclose(stored, expected, atol=1e-5)
    scores, _ = index.search("w3 w4 w5", 10)
    cosines = expected @ model.encode_query("w3 w4 w5")
    assert not np.allclose(model.encode_query("w3 w4"), model.encode_document("w3 w4"), atol=1e-3), "no query prompt"
    np.testing.assert_allclose(scores[0], np.sort(cosines)[::-1][:10], atol=1e-5)


def test_the_index_remembers_its_model(model, tmp_path):
    EmbeddingIndex.build(model, rows(10), tmp_path / "i")
    index = EmbeddingIndex.open(tmp_path / "i")
    assert index.search("w1 w2", 3)[0].shape == (1, 3)
    assert type(index.model).__name__ == "SentenceTransformer"
    assert index.info["model"]["prompts"]["query"] == "query: "


def test_the_same_weights_in_half_precision_pass_and_others_do_not(model, tmp_path):
    import torch

    EmbeddingIndex.build(model, rows(10), tmp_path / "i")
    folder = EmbeddingIndex.open(tmp_path / "i").info["model"]["folder"]
    half = SentenceTransformer(folder, device="cpu", model_kwargs={"torch_dtype": torch.bfloat16})
    assert next(half.parameters()).dtype == torch.bfloat16
    EmbeddingIndex.open(tmp_path / "i", model=half)
    other = SentenceTransformer(folder, device="cpu")
    other.prompts = {**other.prompts, "query": "w9 w9 w9 w9 w9 w9"}
    with pytest.raises(ValueError, match="prompts"):
        EmbeddingIndex.open(tmp_path / "i", model=other)
    other = SentenceTransformer(folder, device="cpu")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    with pytest.raises(ValueError, match="not the model"):
        EmbeddingIndex.open(tmp_path / "i", model=other)


def test_a_model_that_is_changed_afterwards_answers_no_more(model, tmp_path):
    """By a step of an optimizer, through `.data`, by another prompt; what was as before is not embedded again."""
    import copy

    import torch

    model = copy.deepcopy(model)
    index = EmbeddingIndex.build(model, rows(10), tmp_path / "i")
    wanted = index.search("w1 w2", 3)
    weight = next(p for p in model.parameters() if p.ndim == 2)
    before, calls, encode = weight.detach().clone(), [], model.encode
    model.encode = lambda *args, **kwargs: calls.append(args) or encode(*args, **kwargs)
    index.search("w1 w2", 3)
    assert len(calls) == 1, "a model that did not change was asked more than the query"
    changes = {
        "version": lambda: weight.detach().add_(torch.randn_like(weight)),
        "data": lambda: weight.data.add_(torch.randn_like(weight)),
        "prompts": lambda: model.prompts.update(query="w9 w9 w9 w9 w9 w9 "),
    }
    for name, change in changes.items():
        change()
        for _ in range(2):
            with pytest.raises(ValueError, match="not the model"):
                index.search("w1 w2", 3)
        assert index.model is model, name
        model.prompts.update(query="query: ")
        weight.data.copy_(before)
        found = index.search("w1 w2", 3)
        assert found[1] == wanted[1]
        np.testing.assert_allclose(found[0], wanted[0], atol=1e-6)
    weight.data.mul_(1 + 1e-6)  # hardly another model
    np.testing.assert_allclose(index.search("w1 w2", 3)[0], wanted[0], atol=1e-4)


def test_a_model_that_is_set_otherwise_answers_no_more(model, tmp_path):
    """Its adapters are switched off, it pools otherwise or gives fewer dimensions: no number of it has changed."""
    import copy

    peft = pytest.importorskip("peft")
    model = copy.deepcopy(model)
    network, pooling = model[0].model, model[1]
    network.add_adapter(peft.LoraConfig(r=2, target_modules=["query", "value", "dense"], init_lora_weights=False))
    index = EmbeddingIndex.build(model, rows(10), tmp_path / "i")
    wanted = index.search("w1 w2", 3)[1]
    changes = {
        "adapters": (network.disable_adapters, network.enable_adapters),
        "pooling": (lambda: setattr(pooling, "pooling_mode", "max"), lambda: setattr(pooling, "pooling_mode", "mean")),
        "dimensions": (lambda: setattr(model, "truncate_dim", 8), lambda: setattr(model, "truncate_dim", None)),
    }
    for name, (change, undo) in changes.items():
        change()
        with pytest.raises(ValueError, match=r"not the model|dimensions, the model gives 8"):
            index.search("w1 w2", 3)
        undo()
        assert index.search("w1 w2", 3)[1] == wanted, name


def test_a_changed_model_answers_nobody_while_it_is_looked_at(model, tmp_path):
    """A second thread asks while the first embeds the probe texts again."""
    import copy

    import torch

    model = copy.deepcopy(model)
    index = EmbeddingIndex.build(model, rows(10), tmp_path / "i")
    index.search("w1 w2", 3)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    looked_at, encode, second = [], index._embedder.documents, []

    def ask() -> None:
        with pytest.raises(ValueError, match="not the model"):
            index.search("w1 w2", 3)
        second.append("refused")

    def documents(texts):
        if not looked_at:
            looked_at.append(True)
            other = threading.Thread(target=ask)
            other.start()
            other.join()
        return encode(texts)

    index._embedder.documents = documents
    with pytest.raises(ValueError, match="not the model"):
        index.search("w1 w2", 3)
    assert looked_at
    assert second == ["refused"]


def test_one_changed_weight_or_prompt_stops_a_resumed_build(model, tmp_path):
    import torch

    from ubmoe_st.index.embedder import weights_fingerprint

    EmbeddingIndex.build(model, rows(3), tmp_path / "i")
    folder = EmbeddingIndex.open(tmp_path / "i").info["model"]["folder"]
    other = SentenceTransformer(folder, device="cpu")
    assert weights_fingerprint(other) == weights_fingerprint(model)
    with torch.no_grad():
        next(other.parameters())[1, 2] += 1e-3
    assert weights_fingerprint(other) != weights_fingerprint(model)


def test_a_fingerprint_sums_weights_in_parts(model, monkeypatch):
    """Torch copies what it sums in another type: a table of embeddings would be there twice as wide."""
    import torch

    from ubmoe_st.index import embedder

    whole = embedder.weights_fingerprint(model)
    sizes, summed = [], torch.Tensor.sum

    def noted(tensor, *arguments, **options):
        sizes.append(tensor.numel())
        return summed(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "sum", noted)
    monkeypatch.setattr(embedder, "SUMMED_TOGETHER", 7)
    assert embedder.weights_fingerprint(model) == whole
    few = max(sizes)
    monkeypatch.setattr(embedder, "SUMMED_TOGETHER", 1 << 40)
    assert embedder.weights_fingerprint(model) == whole
    assert max(sizes) > few


def test_chunks_follow_the_tokenizer_and_fit_the_model(model, tmp_path):
    corpus = rows(30)
    index = EmbeddingIndex.build(model, corpus, tmp_path / "i", chunk_tokens=12, overlap_tokens=2)
    for row in corpus:
        chunks = index.entries(row["id"])
        assert all(len(model.tokenizer.tokenize(chunk.text)) <= 12 for chunk in chunks)
        assert " ".join(row["text"].split()[:12]) == chunks[0].text
        assert chunks[-1].end == len(row["text"])
    assert len(index) > 60


def test_tokenizing_ahead_does_not_disturb_other_threads(model, tmp_path):
    """Threads that encode while an index is built get the serial vectors, and so does the index."""
    texts = [row["text"] for row in rows(50)]
    serial = model.encode_document(texts)
    stop, problems = threading.Event(), []

    def work() -> None:
        while not stop.is_set():
            if not np.allclose(model.encode_document(texts), serial, atol=1e-5):
                problems.append("changed")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        index = EmbeddingIndex.build(model, rows(400), tmp_path / "i", batch_tokens=400, window_tokens=2000)
    finally:
        stop.set()
        thread.join()
    assert not problems
    expected = model.encode_document([row["text"] for row in rows(400)])
    np.testing.assert_allclose(index.vectors([str(n) for n in range(400)]), expected, atol=1e-5)


def test_torch_and_faiss_live_in_one_process():
    """Both bring an OpenMP runtime: each is imported first once, then both compute."""
    body = """
import numpy as np
x = np.random.default_rng(0).normal(size=(2000, 64)).astype("float32")
{imports}
index = faiss.index_factory(64, "IVF16,SQ8", faiss.METRIC_INNER_PRODUCT)
index.train(x); index.add(x)
for _ in range(3):
    torch.from_numpy(x) @ torch.from_numpy(x).T
    index.search(x[:100], 5)
print("fine")
"""
    for imports in ("import torch, faiss", "import faiss, torch"):
        done = subprocess.run(
            [sys.executable, "-c", body.format(imports=imports)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.stdout.strip() == "fine", done.stderr[-2000:]


MEASURE = """
import json, os, sys, types
from pathlib import Path
root, count, folder, options = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
package = types.ModuleType("ubmoe_st")
package.__path__ = [str(root / "ubmoe_st")]
sys.modules["ubmoe_st"] = package
os.fsync = lambda descriptor: None
import numpy as np
from ubmoe_st.index import CorpusError, EmbeddingIndex

class Encoder:
    prompts = {}
    def encode(self, inputs, **_):
        return np.array([np.frombuffer((text * 4)[:512].encode().ljust(512), np.uint8) for text in inputs], "float32")

def corpus(count):
    for number in range(count):
        yield {"id": f"document-{number}", "text": f"{number * 2654435761 % 2**32:x} " * 40}

index = EmbeddingIndex.build(Encoder(), corpus(count), folder, window_tokens=16384, **options)
# VmHWM and not getrusage, which starts from what the parent process had.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"rows": len(index), "peak_kib": peak, "files": len(index.info["index"]["files"])}))
"""


def measure(count: int, folder: Path, **options) -> dict:
    command = [sys.executable, "-c", MEASURE, str(ROOT), str(count), str(folder), json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")


@needs_proc
def test_a_corpus_twenty_times_larger_takes_no_more_memory(tmp_path):
    options = {"kind": "flat", "segment_rows": 1000, "memory_budget": "64MB"}
    small, large = measure(1000, tmp_path / "small", **options), measure(20_000, tmp_path / "large", **options)
    assert large["rows"] == 20 * small["rows"]
    assert small["peak_kib"] > 50_000
    assert large["peak_kib"] < 1.1 * small["peak_kib"], (small, large)


@needs_proc
def test_making_an_index_stays_within_the_budget(tmp_path):
    """The index would hold 41 MB and take twice that to make; ten rows show what the libraries alone take."""
    least = measure(10, tmp_path / "least")
    found = measure(20_000, tmp_path / "i", kind="ivf-flat", memory_budget="64MB")
    assert found["files"] == 3, "one file was enough, so this test would be vacuous"
    assert found["peak_kib"] < least["peak_kib"] + 64_000_000 / 1024, (least, found)


class Words:
    """A fast tokenizer whose tokens are words and punctuation marks, between two special tokens."""

    is_fast = True

    def __init__(self) -> None:
        tokenizers = pytest.importorskip("tokenizers")
        known = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2}
        self.backend_tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="[UNK]"))
        self.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        self.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )

    def __call__(self, texts, **options):
        return {"input_ids": [encoding.ids for encoding in self.backend_tokenizer.encode_batch(list(texts))]}


class ReadsLittle(HashEncoder):
    """Reads 16 tokens; keeps the texts that it was given as the model sees them, prompt and all."""

    max_seq_length = 16

    def __init__(self, prompt: str = "") -> None:
        super().__init__(12)
        self.tokenizer, self.prompts, self.read = Words(), {"passage": prompt}, []

    def encode_document(self, inputs, **options):
        self.read += [self.prompts["passage"] + text for text in inputs]
        return self.encode(inputs, **options)

    def longest(self) -> int:
        probes = 4  # the probe texts were read first
        return max(map(len, self.tokenizer(self.read[probes:])["input_ids"]))


def test_what_the_model_does_not_read_is_counted_and_said_once(tmp_path, caplog):
    rows = [{"id": n, "text": "word " * length} for n, length in enumerate((14, 15, 3, 40))]
    index = EmbeddingIndex.build(ReadsLittle(), rows, tmp_path / "i", window_tokens=5)
    assert index.info["sources"][0]["entries_cut"] == 2
    assert caplog.text.count("2 of 4 entries") == 1
    assert index.add([{"id": 9, "text": "word " * 30}, {"id": 10, "text": "word"}]) == 2
    assert [source["entries_cut"] for source in index.info["sources"]] == [2, 1]
    prompted = EmbeddingIndex.build(ReadsLittle("a b "), rows, tmp_path / "p")
    assert prompted.info["sources"][0]["entries_cut"] == 3
    unknown = EmbeddingIndex.build(HashEncoder(12), [{"id": 1, "text": "word " * 9999}], tmp_path / "u")
    assert "entries_cut" not in unknown.info["sources"][0], "a model without a tokenizer says nothing of what it reads"


def test_chunks_are_read_whole_with_title_and_prompt(tmp_path):
    text = " ".join(f"w{n}," for n in range(60))
    rows = [{"id": n, "title": "T " * n, "text": text} for n in range(8)]
    for prompt, chunk_tokens in (("", 14), ("a b ", 12), ("a b ", 5)):
        model = ReadsLittle(prompt)
        out = tmp_path / f"i{prompt.strip()}{chunk_tokens}"
        index = EmbeddingIndex.build(model, rows, out, chunk_tokens=chunk_tokens, overlap_tokens=2)
        assert model.longest() <= 16
        assert "entries_cut" not in index.info["sources"][0]
        for n in range(8):
            covered = set()
            for entry in index.entries(n):
                covered |= set(range(entry.start, entry.end))
            assert {i for i, letter in enumerate(text) if letter != " "} <= covered
    assert ReadsLittle().tokenizer(["a"])["input_ids"] == [[1, 0, 2]], "else no token of the model's own is reserved"


def test_chunks_that_cannot_be_read_whole_are_refused(tmp_path):
    rows = [{"id": 1, "text": "word " * 40}]
    for prompt, most in (("", 14), ("a b ", 12)):
        with pytest.raises(ValueError, match=f"chunk_tokens=15 does not fit.*give at most {most}"):
            EmbeddingIndex.build(ReadsLittle(prompt), rows, tmp_path / "i", chunk_tokens=15)
    long_title = [{"id": 2, "title": "T " * 13, "text": "word " * 40}]
    with pytest.raises(CorpusError, match="title that leaves 1 of the 16 tokens"):
        EmbeddingIndex.build(ReadsLittle(), long_title, tmp_path / "t", chunk_tokens=10)
    index = EmbeddingIndex.build(ReadsLittle(), rows + long_title, tmp_path / "s", chunk_tokens=10, on_bad_row="skip")
    assert index.info["sources"][0]["bad_rows"] == 1
    EmbeddingIndex.build(ReadsLittle(), long_title, tmp_path / "w", chunk_tokens=10, with_title=False)


def with_limit(folder, limit):
    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = limit
    return model


def test_an_index_reads_texts_as_far_as_its_build_did(tmp_path):
    folder = make_checkpoint(make_base(tmp_path / "base"), tmp_path / "ubmoe")
    text = " ".join(["the cat sits on a mat and a dog runs in"] * 5)
    EmbeddingIndex.build(with_limit(folder, 16), [{"id": "old", "text": text}], tmp_path / "i")
    index = EmbeddingIndex.open(tmp_path / "i")
    assert index.add([{"id": "new", "text": text}]) == 1
    assert [source["entries_cut"] for source in index.info["sources"]] == [1, 1]
    old, new = index.vectors(["old", "new"])
    np.testing.assert_allclose(old, new, atol=1e-6)
    full = with_limit(folder, 128).encode_document([text], normalize_embeddings=True)[0]
    assert new @ full < 0.99, "else nothing was cut"
    with pytest.warns(UserWarning, match="1 of 1 queries are longer than the 16 tokens"):
        assert index.search(text, 1)[0][0, 0] > 0.9999

    longer = EmbeddingIndex.open(tmp_path / "i", model=with_limit(folder, 128))
    with pytest.raises(ValueError, match="reads 128 tokens, the index was built with 16: set its max_seq_length to 16"):
        longer.add([{"id": "third", "text": text}])
    assert "third" not in longer


def test_a_limit_that_is_set_later_counts(tmp_path):
    folder = make_checkpoint(make_base(tmp_path / "base"), tmp_path / "ubmoe")
    model = with_limit(folder, 128)
    index = EmbeddingIndex.build(model, [{"id": "a", "text": "the cat"}], tmp_path / "i")
    model.max_seq_length = 16
    with pytest.warns(UserWarning, match="1 of 1 queries are longer than the 16 tokens"):
        index.search("the cat " * 20, 1)
    with pytest.raises(ValueError, match="reads 16 tokens, the index was built with 128: set its max_seq_length"):
        index.add([{"id": "b", "text": "the cat " * 20}])
    model.max_seq_length = 128
    assert index.add([{"id": "b", "text": "the cat " * 20}]) == 1


def test_a_model_that_is_kept_reads_as_the_index_that_was_built_anew(tmp_path):
    folder = make_checkpoint(make_base(tmp_path / "base"), tmp_path / "ubmoe")
    rows = [{"id": "a", "text": "the cat " * 20}]
    EmbeddingIndex.build(with_limit(folder, 32), rows, tmp_path / "i")
    index = EmbeddingIndex.open(tmp_path / "i")
    assert index.model.max_seq_length == 32
    EmbeddingIndex.build(with_limit(folder, 24), rows, tmp_path / "i", overwrite=True)
    assert index.refresh()
    assert index.model.max_seq_length == 24


def test_queries_are_counted_with_their_own_prompt(tmp_path):
    folder = make_checkpoint(make_base(tmp_path / "base"), tmp_path / "ubmoe")
    prompts = {"query": "the cat " * 30, "document": ""}
    model = SentenceTransformer(str(folder), device="cpu", prompts=prompts)
    model.max_seq_length = 96
    index = EmbeddingIndex.build(model, [{"id": "a", "text": "the cat"}], tmp_path / "i")
    words = ["dog", "mat", "red", "old"] * 20
    with pytest.warns(UserWarning, match="1 of 1 queries .* 96 tokens the model reads, 60 of them the prompt"):
        cut = index.query_vectors(" ".join(words))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(cut, index.query_vectors(" ".join(words[:36])), atol=1e-5)
    model.prompts = {"query": "", "document": "the cat " * 30}
    asked = EmbeddingIndex.build(model, [{"id": "a", "text": "the cat"}], tmp_path / "j")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked.search(" ".join(words), 1)


def test_a_cut_that_the_model_makes_is_remembered(tmp_path):
    folder = make_checkpoint(make_base(tmp_path / "base"), tmp_path / "ubmoe")
    rows = [{"id": n, "text": f"the cat {'old ' * n}"} for n in range(5)]
    model = SentenceTransformer(str(folder), device="cpu", truncate_dim=16)
    built = EmbeddingIndex.build(model, rows, tmp_path / "i")
    assert (built.dimension, built.info["model"]["truncate_dim"]) == (16, 16)
    scores, ids = EmbeddingIndex.open(tmp_path / "i", truncate_dim=16).search("the cat", 2)
    assert ids == built.search("the cat", 2)[1]
    whole = SentenceTransformer(str(folder), device="cpu").encode([row["text"] for row in rows])[:, :16]
    query = whole[0] / np.linalg.norm(whole[0])
    cosines = np.sort(whole @ query / np.linalg.norm(whole, axis=1))[::-1]
    np.testing.assert_allclose(scores[0], cosines[:2], atol=1e-5)
    # An index of before it was remembered: the same build finds it whole, and it takes the model that cuts.
    info = json.loads((tmp_path / "i" / "index_info.json").read_text())
    info["model"]["truncate_dim"] = info["sources"][0]["config"]["truncate_dim"] = None
    (tmp_path / "i" / "index_info.json").write_text(json.dumps(info))
    assert EmbeddingIndex.build(model, rows, tmp_path / "i").version == built.version
    old = EmbeddingIndex.open(tmp_path / "i", model=model)
    assert old.add([{"id": "new", "text": "a dog"}]) == 1
    assert old.search("the cat", 2)[1] == ids
