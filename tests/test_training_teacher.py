"""The teacher: vectors against a plain forward pass, resume on disk, targets against numpy."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import TEXTS, make_tokenizer
from transformers import AutoModelForCausalLM

import training.teacher as stage
from training.mixtures import Mixture
from training.prompted import PromptedReader, special_start
from training.recipe import ContrastiveRecipe
from training.targets import targets, targets_of, teacher_targets
from training.teacher import other_models, teacher_vectors
from training.teacher_settings import EmbedderTeacher, LexicalTeacher, PromptedTeacher
from training.texts import Corpus
from ubmoe_st.bases import resolve_base

SENTENCES = [f"{a} {b} cat runs on the mat"[: 20 + n] for n, (a, b) in enumerate(zip(TEXTS * 3, TEXTS[::-1] * 3))]


@pytest.fixture
def teacher(tmp_path):
    return PromptedTeacher(
        prefix="the cat sits on ",
        suffix=" in the",
        layers=[1, 2],
        folder=str(tmp_path / "t"),
        dimension=6,
        batch_size=5,
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen2-sliding", "phi3-fused"])
@pytest.mark.parametrize("layers", [[1, 2], [0, 3]])
def test_vectors_are_those_of_one_plain_causal_pass_over_the_whole_prompt(
    base_of, teacher, architecture, layers, monkeypatch
):
    # AutoTokenizer puts its own class over the tokenizer of some model types.
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **kwargs: make_tokenizer())
    teacher.layers = layers
    found = teacher_vectors(base_of(architecture), teacher, SENTENCES)
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(base_of(architecture)).eval(), make_tokenizer()
    expected = []
    for text in SENTENCES:
        ids = tokenizer(teacher.prefix + text + teacher.suffix, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            states = lm(ids, output_hidden_states=True).hidden_states
        expected.append(torch.stack([states[layer][0, -1] for layer in layers]).numpy())
    assert found.dtype == np.float16
    assert np.abs(found - np.stack(expected)).max() < 2e-2 * np.abs(expected).max()
    assert np.abs(found[0] - found[1]).max() > 0.1
    if layers == [1, 2]:  # other last tokens, or another prompt, would be noticed
        teacher.suffix, teacher.folder = " on the", teacher.folder + "2"
        assert np.abs(teacher_vectors(base_of(architecture), teacher, SENTENCES) - found).max() > 0.1


def test_an_interrupted_run_goes_on_and_shards_fill_one_file(base, teacher, monkeypatch):
    monkeypatch.setattr(stage, "CHUNK", 4)
    computed = []
    original = stage.PromptedBase.vectors

    def spy(self, texts, kinds):
        if len(computed) == 1:
            raise KeyboardInterrupt
        computed.append(list(texts))
        return original(self, texts, kinds)

    monkeypatch.setattr(stage.PromptedBase, "vectors", spy)
    with pytest.raises(KeyboardInterrupt):
        teacher_vectors(base, teacher, SENTENCES)
    with pytest.raises(ValueError, match="lacks 2 of 3 chunks"):
        teacher_vectors(base, teacher, SENTENCES, compute=False)
    monkeypatch.setattr(stage.PromptedBase, "vectors", original)
    teacher_vectors(base, teacher, SENTENCES, shard=(0, 2))
    with pytest.raises(ValueError, match="lacks 1 of 3"):
        teacher_vectors(base, teacher, SENTENCES, compute=False)
    teacher_vectors(base, teacher, SENTENCES, shard=(1, 2))
    found = np.array(teacher_vectors(base, teacher, SENTENCES, compute=False))
    teacher.folder += "-whole"
    assert np.array_equal(found, teacher_vectors(base, teacher, SENTENCES))
    assert np.abs(found).min(axis=(1, 2)).max() > 0
    assert (np.abs(found).max(axis=(1, 2)) > 0.1).all()


def test_vectors_that_are_lost_are_computed_anew(base, teacher, monkeypatch):
    """Marks of what is done say nothing without the vectors, which would be zeros."""
    monkeypatch.setattr(stage, "CHUNK", 4)
    whole = np.array(teacher_vectors(base, teacher, SENTENCES))
    file = Path(teacher.folder) / stage.VECTORS
    for lose in (file.unlink, lambda: file.write_bytes(file.read_bytes()[:100])):
        lose()
        with pytest.raises(ValueError, match="lacks 3 of 3 chunks"):
            teacher_vectors(base, teacher, SENTENCES, compute=False)
        assert np.array_equal(teacher_vectors(base, teacher, SENTENCES), whole)


def test_vectors_of_something_else_are_refused(base, base_of, teacher):
    teacher_vectors(base, teacher, SENTENCES)
    with pytest.raises(ValueError, match="another sentences_sha256"):
        teacher_vectors(base, teacher, SENTENCES[::-1])
    with pytest.raises(ValueError, match="another base_sha256"):
        teacher_vectors(base_of("llama-untied"), teacher, SENTENCES)
    with pytest.raises(ValueError, match="another layers"):  # equal as numbers; 1.0 is the last layer
        teacher_vectors(base, replace(teacher, layers=[float(n) for n in teacher.layers]), SENTENCES)
    manifest = json.loads((stage.Path(teacher.folder) / stage.MANIFEST).read_text())
    assert manifest["shape"] == [len(SENTENCES), 2, 32]
    teacher.suffix = "x"
    with pytest.raises(ValueError, match="another suffix"):
        teacher_vectors(base, teacher, SENTENCES)


@pytest.mark.parametrize("whitening", [0.0, 0.25, 1.0])
def test_targets_equal_the_formula_in_numpy(teacher, whitening, monkeypatch):
    monkeypatch.setattr(stage, "CHUNK", 7)
    teacher.whitening = whitening
    vectors = (np.random.default_rng(0).normal(size=(50, 2, 8)) * np.arange(1, 9) + 3).astype(np.float16)
    found = teacher_targets(vectors, teacher).numpy()
    x = vectors.astype(np.float64)
    x = x - x.mean(0)
    x = (x / np.linalg.norm(x, axis=-1, keepdims=True)).reshape(50, -1)
    x = x - x.mean(0)
    _, s, v = np.linalg.svd(x, full_matrices=False)
    y = x @ v[:6].T * (s[:6] / s[0]) ** -whitening
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    # Components have no sign of their own: compare similarities.
    assert np.abs(found @ found.T - y @ y.T).max() < 1e-4
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-5
    assert np.abs(y @ y.T - np.eye(50)).max() > 0.3
    with pytest.raises(ValueError, match=r"lower teacher\.dimension"):
        teacher_targets(vectors[:5], teacher)


@pytest.fixture
def embedder(checkpoint, tmp_path):
    return EmbedderTeacher(model=str(checkpoint), folder=str(tmp_path / "e"), batch_size=5)


def with_start_token():
    """The tokenizer of the tests, with a post-processor that puts `<s>` before every text, as Gemma does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.mark.parametrize(
    ("architecture", "prefix"), [("llama", "the cat sits on "), ("llama", ""), ("gemma3", "the cat sits on ")]
)
def test_the_prompt_begins_with_what_the_tokenizer_puts_before_a_text(
    base_of, teacher, architecture, prefix, monkeypatch
):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **kwargs: with_start_token())
    teacher.prefix = prefix
    assert special_start(with_start_token()) == [1]
    assert special_start(make_tokenizer()) == []
    found = teacher_vectors(base_of(architecture), teacher, SENTENCES)
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(base_of(architecture)).eval(), with_start_token()
    expected = {}
    for special in (True, False):
        states = []
        for text in SENTENCES:
            whole = teacher.prefix + text + teacher.suffix
            ids = tokenizer(whole, add_special_tokens=special, return_tensors="pt")["input_ids"]
            with torch.inference_mode():
                hidden = lm(ids, output_hidden_states=True).hidden_states
            states.append(torch.stack([hidden[layer][0, -1] for layer in teacher.layers]).numpy())
        expected[special] = np.stack(states)
    size = np.abs(expected[True]).max()
    assert np.abs(found - expected[True]).max() < 2e-2 * size
    if architecture == "llama":  # in the small windows of the other one the token is out of sight
        assert np.abs(found - expected[False]).max() > 5e-2 * size
    manifest = json.loads((stage.Path(teacher.folder) / stage.MANIFEST).read_text())
    assert manifest["special_start"] == [1]


def test_long_texts_are_read_few_at_a_time(base, teacher, monkeypatch):
    texts, sizes, original = ["the cat runs on the mat " * n for n in (1, 40, 2, 35, 1)], [], PromptedReader.states
    expected = teacher_vectors(base, teacher, texts)
    monkeypatch.setattr(stage, "_PASS_TOKENS", 100)
    monkeypatch.setattr(
        PromptedReader,
        "states",
        lambda self, rows, *args: sizes.append((len(rows), max(map(len, rows)))) or original(self, rows, *args),
    )
    found = teacher_vectors(base, replace(teacher, folder=teacher.folder + "-few"), texts)
    assert [count for count, _ in sizes] == [1, 1, 3]
    assert sizes[0][1] > 100 > 3 * sizes[2][1]
    assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()


def test_what_fp16_cannot_hold_is_refused_and_nothing_is_written(base, teacher, monkeypatch):
    original = stage.PromptedBase.vectors
    for factor, said in ((1e6, r"beyond the 65504 of fp16; set teacher\.scale=0\.\d+"), (np.nan, "NaN or infinite")):
        monkeypatch.setattr(
            stage.PromptedBase, "vectors", lambda self, *args, factor=factor: original(self, *args) * factor
        )
        with pytest.raises(ValueError, match=said):
            teacher_vectors(base, teacher, SENTENCES)
        assert not stage.Path(teacher.folder).exists()
    monkeypatch.setattr(stage.PromptedBase, "vectors", original)
    plain = teacher_targets(teacher_vectors(base, teacher, SENTENCES), teacher)
    teacher.scale, teacher.folder = 1 / 64, teacher.folder + "-scaled"
    scaled = teacher_vectors(base, teacher, SENTENCES)
    assert np.abs(scaled).max() < 1
    assert (teacher_targets(scaled, teacher) @ plain.T).diagonal().min() > 0.999


def test_an_embedder_gives_its_own_unit_vectors_with_the_prompt_of_each_kind(base, checkpoint, embedder):
    from sentence_transformers import SentenceTransformer

    kinds = ["queries" if n % 3 else "passages" for n in range(len(SENTENCES))]
    embedder.prompts = {"queries": "the bird ", "default": "a train "}
    found = teacher_vectors(base, embedder, SENTENCES, kinds)
    stock = SentenceTransformer(str(checkpoint), device="cpu")
    prompts = [embedder.prompts.get(kind, "a train ") for kind in kinds]
    expected = np.stack([stock.encode(text, prompt=prompt) for text, prompt in zip(SENTENCES, prompts)])
    assert found.dtype == np.float16
    assert np.abs(found - expected).max() < 2e-3
    assert np.abs(stock.encode(SENTENCES) - expected).max() > 1e-2
    assert torch.equal(targets_of(found, embedder, "teacher"), torch.from_numpy(np.array(found)))
    embedder.center = True
    centred = found.astype(np.float64) - found.astype(np.float64).mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    assert np.abs(targets_of(found, embedder, "teacher").numpy() - centred).max() < 1e-4
    with pytest.raises(ValueError, match="another kinds_sha256"):
        teacher_vectors(base, embedder, SENTENCES, kinds[::-1])
    embedder.prompts = {"default": "a train "}
    with pytest.raises(ValueError, match="another prompts"):
        teacher_vectors(base, embedder, SENTENCES, kinds)


def test_an_embedder_computes_in_bf16_where_it_is_told_to_or_the_processor_can(base, checkpoint, embedder, monkeypatch):
    from sentence_transformers import SentenceTransformer

    expected, errors, folder = SentenceTransformer(str(checkpoint), device="cpu").encode(SENTENCES), {}, embedder.folder
    for bf16, can in ((False, True), ("auto", False), ("auto", True), (True, False)):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda can=can: {"avx512_bf16": can}, raising=False)
        embedder.folder, embedder.bf16 = f"{folder}-{bf16}-{can}", bf16
        found = teacher_vectors(base, embedder, SENTENCES)
        errors[bf16, can] = np.abs(found.astype(np.float32) - expected).max()
        assert (found.astype(np.float32) * expected).sum(1).min() > 0.999
    assert errors[False, True] == errors["auto", False] < 1e-3 < errors["auto", True] == errors[True, False]


def test_a_prompted_base_computes_in_bf16_where_it_is_told_to(base, teacher, monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **kwargs: make_tokenizer())
    expected, folder = teacher_vectors(base, teacher, SENTENCES).astype(np.float32), teacher.folder
    errors = {}
    for bf16 in (False, True):
        teacher.folder, teacher.bf16 = f"{folder}-{bf16}", bf16
        found = teacher_vectors(base, teacher, SENTENCES).astype(np.float32)
        errors[bf16] = np.abs(found - expected).max() / np.abs(expected).max()
    assert errors[False] == 0
    assert 0 < errors[True] < 0.03
    teacher.folder = folder  # vectors of both kinds may stand in one folder
    assert np.array_equal(teacher_vectors(base, teacher, SENTENCES).astype(np.float32), expected)


def test_what_the_same_base_alone_has_taught_is_no_other_model(base, base_of, checkpoint, embedder, tmp_path):
    """A student of itself teaches itself; of another base, or taught by others, it is another model."""
    named = EmbedderTeacher("a/b", str(tmp_path / "n"))
    asked = PromptedTeacher(prefix="p", suffix="s", layers=[1], folder="y")
    recipe = ContrastiveRecipe(
        str(base), "x", sentences=Mixture({"x": 1}), teacher=asked, loss="similarity", head="training"
    )

    def others(training, base):
        folder = tmp_path / str(training)
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
        config = json.loads((folder / "generator" / "config.json").read_text())
        config["ubmoe"]["training"] = training
        (folder / "generator" / "config.json").write_text(json.dumps(config))
        embedder.model = str(folder)
        recipe.teacher = [asked, embedder, named]
        return other_models(recipe, resolve_base(base))

    assert others("self-distilled", base) == [named]
    assert others("self-distilled", base_of("qwen2-sliding")) == [embedder, named]
    assert others("distilled from a and b", base) == [embedder, named]
    assert others(None, base) == [embedder, named]
    recipe.teacher = [asked]
    assert other_models(recipe, resolve_base(base)) == []
    assert (recipe.supervision_of([]), recipe.supervision_of(["b"])) == ("self-distilled", "distilled from b")


def test_an_embedder_whose_memory_runs_out_goes_on_in_smaller_batches(base, checkpoint, embedder, monkeypatch, caplog):
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(str(checkpoint), device="cpu").encode(SENTENCES)
    load, asked = stage.Embedder.load, []

    def small(teacher, device="cpu", most=2):
        model = load(teacher, device)
        encode = model.model.encode

        def limited(texts, **options):
            asked.append(options["batch_size"])
            if options["batch_size"] > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.76 GiB.")
            return encode(texts, **options)

        model.model.encode = limited
        return model

    monkeypatch.setattr(stage.Embedder, "load", small)
    embedder.batch_size = 9
    found = teacher_vectors(base, embedder, SENTENCES)
    assert np.abs(found - expected).max() < 2e-3
    assert asked == [9, 4, 2]
    assert "batches of 2 texts now" in caplog.text
    embedder.folder += "-none"
    monkeypatch.setattr(stage.Embedder, "load", lambda *args: small(*args, most=0))
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        teacher_vectors(base, embedder, SENTENCES)
    assert asked[3:] == [9, 4, 2, 1]
    assert not (Path(embedder.folder) / "teacher.json").exists()


@pytest.mark.parametrize(("given", "read"), [("true", True), ("false", False), ("auto", "auto"), ("half", None)])
def test_a_recipe_says_in_what_an_embedder_computes(given, read):
    from training.command import read_recipe

    file = Path(__file__).parent.parent / "training" / "recipes" / "smoke-distilled.yaml"
    if read is None:
        with pytest.raises(ValueError, match="bf16 must be one of auto, True, False, got 'half'"):
            read_recipe(ContrastiveRecipe, file, [f"teacher.0.bf16={given}"])
    else:
        found = read_recipe(ContrastiveRecipe, file, [f"teacher.0.bf16={given}"]).teachers[0].bf16
        assert (found, type(found)) == (read, type(read))


def test_an_embedder_goes_on_where_it_was_stopped(base, embedder, monkeypatch):
    monkeypatch.setattr(stage, "CHUNK", 4)
    original, computed = stage.Embedder.vectors, []

    def spy(self, texts, kinds):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(list(texts))
        return original(self, texts, kinds)

    monkeypatch.setattr(stage.Embedder, "vectors", spy)
    with pytest.raises(KeyboardInterrupt):
        teacher_vectors(base, embedder, SENTENCES)
    computed.clear()
    found = np.array(teacher_vectors(base, embedder, SENTENCES))
    assert computed == [SENTENCES[8:]]
    monkeypatch.setattr(stage.Embedder, "vectors", lambda *args: pytest.fail("computed again"))
    assert np.array_equal(found, teacher_vectors(base, embedder, SENTENCES, compute=False))
    assert (np.linalg.norm(found.astype(np.float32), axis=1) > 0.99).all()


def test_texts_longer_than_the_teacher_reads_are_counted(base, checkpoint, embedder, tmp_path, caplog):
    from sentence_transformers import SentenceTransformer

    short = SentenceTransformer(str(checkpoint), device="cpu")
    short.max_seq_length = 8
    short.save_pretrained(str(tmp_path / "short"))
    embedder.model = str(tmp_path / "short")
    texts = [*TEXTS, "cat " * 8, "cat " * 9]
    with pytest.raises(ValueError, match="2 of 6 texts are longer than the 8 tokens of short"):
        teacher_vectors(base, embedder, texts)
    assert not stage.Path(embedder.folder).exists()
    embedder.cut = True
    with caplog.at_level("WARNING"):
        found = teacher_vectors(base, embedder, texts)
    assert "2 of 6 texts" in caplog.text
    assert np.abs(found[4] - found[5]).max() < 2e-3
    short.prompts["default"], short.default_prompt_name = "the cat ", "default"
    model = stage.Embedder(short, replace(embedder, prompts={}))
    assert model.count_cut(["cat " * 6, "cat " * 7], ["sentences"] * 2) == 1  # with the model's own prompt


def test_what_is_no_embedder_is_refused(base, embedder, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # pauses between attempts to reach a Hub
    for model in (str(base), "nobody/nothing"):
        embedder.model = model
        with pytest.raises(ValueError, match="expected a sentence-transformers model"):
            teacher_vectors(base, embedder, SENTENCES)
    assert not stage.Path(embedder.folder).exists()
    assert embedder.label == "nothing"


@pytest.mark.parametrize("shard", ["2/2", "1", "0/0", "a/b", "-1/2", "1/2/3", ""])
def test_a_shard_that_is_none_is_one_line(capsys, shard):
    """Before, some of them computed nothing and said nothing."""
    with pytest.raises(SystemExit) as ended:
        stage.main(["no.yaml", f"--shard={shard}"])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --shard: expected k/n with k from 0 to n - 1")
    assert error.count("\n") == 1
    assert stage.read_shard("1/2") == (1, 2)


def test_messages_name_the_key_of_a_teacher_in_its_recipe(base, teacher, tmp_path):
    teacher_vectors(base, teacher, SENTENCES)
    corpus, resolved = Corpus(SENTENCES[::-1], ["sentences"] * len(SENTENCES)), resolve_base(base)
    for given, key in ((teacher, "teacher"), ([teacher], r"teacher\.0")):
        recipe = ContrastiveRecipe(
            str(base), "out", loss="similarity", head="training", teacher=given, sentences=Mixture({})
        )
        with pytest.raises(ValueError, match=rf"--set {key}\.folder="):
            targets(recipe, resolved, corpus)
    with pytest.raises(ValueError, match=r"set teacher\.1\.scale="):
        stage.to_half(np.full((1, 2), 1e6, np.float32), ["a"], teacher, "teacher.1")


def test_a_manifest_that_is_not_written_leaves_nothing(tmp_path, monkeypatch):
    def killed(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        stage._write_manifest(tmp_path / "t", {"shape": [1]})
    assert list((tmp_path / "t").iterdir()) == []


@pytest.mark.parametrize(("dimension", "error"), [(4096, 1e-3), (64, 5 / 64**0.5)])
def test_overlap_of_letters_is_the_tf_idf_of_scikit_learn(base, tmp_path, dimension, error):
    from sklearn.feature_extraction.text import TfidfVectorizer

    teacher = LexicalTeacher(folder=str(tmp_path / "l"), dimension=dimension, weights={"fragments": 0})
    kinds = ["fragments" if n % 5 == 2 else "sentences" for n in range(len(SENTENCES))]
    known = [n for n, kind in enumerate(kinds) if kind == "sentences"]
    found = teacher_vectors(base, teacher, SENTENCES, kinds).astype(np.float32)
    own = [SENTENCES[n] for n in known]
    counts = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, min_df=2).fit_transform(own)
    expected = (counts @ counts.T).toarray()
    assert np.abs(found[known] @ found[known].T - expected).max() < error
    assert found.shape[1] == min(dimension, counts.shape[1])
    assert 0.2 < expected[0, 2] < 0.9
    assert (expected == 0).any()
    assert not found[[n for n in range(len(SENTENCES)) if n not in known]].any()
    # What it was not asked about is part of what the folder holds.
    for other in ({}, {"titles": 0.0}):
        with pytest.raises(ValueError, match="another left_out"):
            teacher_vectors(base, replace(teacher, weights=other), SENTENCES, kinds)
    with pytest.raises(ValueError, match="another kinds_sha256"):
        teacher_vectors(base, teacher, SENTENCES, kinds[::-1])


def test_overlap_of_letters_needs_letters_that_are_shared(base, tmp_path):
    teacher = LexicalTeacher(folder=str(tmp_path / "l"), dimension=16)
    with pytest.raises(ValueError, match=r"no group of 3 to 5 characters in at least 2 of 2 texts; lower `least`"):
        teacher_vectors(base, teacher, ["abc", "xyz"])
    assert not (tmp_path / "l").exists()
    found = teacher_vectors(base, teacher, ["the cat", "the dog", "??"])
    assert np.abs(np.linalg.norm(found[:2].astype(np.float32), axis=1) - 1).max() < 1e-3
    assert not found[2].any()


def test_what_a_teacher_is_not_asked_about_has_no_part_in_its_targets(base, teacher, embedder, tmp_path):
    kinds = ["passages" if n % 4 == 1 else "sentences" for n in range(len(SENTENCES))]
    corpus = Corpus(list(SENTENCES), kinds)
    known = np.array([kind == "sentences" for kind in kinds])
    short = Corpus([text for text, kind in zip(SENTENCES, kinds) if kind == "sentences"], ["sentences"] * known.sum())
    embedder.center, teacher.dimension = True, 4

    def recipe(given):
        return ContrastiveRecipe(
            str(base), "out", loss="similarity", head="training", teacher=given, sentences=Mixture({})
        )

    for number, asked in enumerate((teacher, embedder)):
        whole = replace(asked, folder=str(tmp_path / f"whole{number}"), weights={"passages": 0})
        part = replace(asked, folder=str(tmp_path / f"part{number}"))
        first = EmbedderTeacher(embedder.model, str(tmp_path / "first"))
        found = targets(recipe([first, whole]), resolve_base(base), corpus)[1]
        alone = targets(recipe(part), resolve_base(base), short)[0]
        assert torch.allclose(found[known], alone.float(), atol=1e-4)
        assert not found[~known].any()
        assert not torch.allclose(alone.float()[0], alone.float()[1], atol=1e-2)
    unread = replace(whole, folder=str(tmp_path / "unread"))
    assert len(targets(recipe([first, unread]), resolve_base(base), corpus, of_all_kinds=True)) == 1
    assert not (tmp_path / "unread").exists()
    with pytest.raises(ValueError, match="put another teacher first"):
        recipe([whole, first])
