"""Recipes: what is refused and in which words, `--set`, the shipped ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("peft")

from helpers.training import make_recipe, make_training_data

from training import contrastive
from training.batches import LengthBuckets
from training.command import check_same_recipe, one_line_errors, read_recipe
from training.mixtures import Groups, Mixture, Texts, TextSource
from training.recipe import ContrastiveRecipe, RouterRecipe
from training.teacher_settings import EmbedderTeacher, PromptedTeacher

RECIPES = Path(__file__).parent.parent / "training" / "recipes"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_training_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def recipe(base, data, tmp_path, monkeypatch):
    monkeypatch.setenv("UBMOE_DATA", str(data))
    return make_recipe(base, data, tmp_path / "run")


def test_a_recipe_without_noise_is_refused(recipe):
    with pytest.raises(ValueError, match="nothing to learn"):
        recipe(ffn_dropout=0.0)


def test_another_recipe_is_refused_where_something_was_trained(recipe, tmp_path):
    check_same_recipe(recipe(rank=4), tmp_path)
    check_same_recipe(recipe(), tmp_path)  # the first one trained nothing
    (tmp_path / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    check_same_recipe(recipe(trainer={"max_steps": 9}), tmp_path)
    with pytest.raises(ValueError, match="another 'rank'"):
        check_same_recipe(recipe(rank=4), tmp_path)
    with pytest.raises(ValueError, match=r"another 'trainer\.seed'"):
        check_same_recipe(recipe(trainer={"seed": 9}), tmp_path)
    with pytest.raises(ValueError, match=r"another 'trainer\.dataloader_drop_last'"):
        check_same_recipe(recipe(trainer={"dataloader_drop_last": True}), tmp_path)


@pytest.mark.parametrize("text", ["base: [\n", "[" * 20_000, "!!python/object/apply:os.system [ls]\n", "{[]: 1}\n"])
def test_what_is_not_yaml_is_a_value_error(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"recipe\.yaml"):
        contrastive.read_recipe(contrastive.ContrastiveRecipe, tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: here\nout: there\npooling: meen\n", "pooling must be one of"),
        ("base: here\nout: there\nhead: outputt\n", "head must be one of training, output"),
        ("- base\n", "expected `key: value` lines"),
        ("base: [\n", "error: "),
        ("base: here\nout: there\ntrainer: {max_steps: 3}\nrank: 2\ntrainer: {seed: 1}\n", "'trainer' stands twice"),
        ("base: here\nout: there\ntrainer:\n  seed: 1\n  seed: 2\n", "'seed' stands twice"),
        (None, "No such file"),
    ],
)
def test_a_bad_recipe_is_one_line(tmp_path, capsys, text, said):
    file = tmp_path / "recipe.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as ended:
        contrastive.main([str(file)])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_recipes_are_valid(file):

    if "\ncheckpoint:" in file.read_text():
        assert read_recipe(RouterRecipe, file).kind == "soft"
        return
    found = read_recipe(ContrastiveRecipe, file, ["trainer.max_steps=7", "train=ffn"])
    assert found.trainer["max_steps"] == 7
    assert found.sentences is None or isinstance(found.sentences, Mixture)
    if found.texts is not None and "-hub" in file.name:
        assert all(source.file.startswith("hf:") for source in found.texts.sources)


def test_wrong_recipes_are_refused(tmp_path, recipe):
    (tmp_path / "r.yaml").write_text("base: b\nout: o\nsentences: {files: {}}\nffn_dropout: 0.1\n")
    assert read_recipe(ContrastiveRecipe, tmp_path / "r.yaml").rank == 16
    changed = read_recipe(ContrastiveRecipe, tmp_path / "r.yaml", ["trainer.learning_rate=1e-3"])
    assert changed.trainer["learning_rate"] == 0.001
    with pytest.raises(ValueError, match="unknown key 'learning_rat'"):
        read_recipe(ContrastiveRecipe, tmp_path / "r.yaml", ["learning_rat=3"])
    with pytest.raises(ValueError, match="sentences: unknown key 'coun'"):
        read_recipe(ContrastiveRecipe, tmp_path / "r.yaml", ["sentences.coun=3"])
    with pytest.raises(ValueError, match="key=value"):
        read_recipe(ContrastiveRecipe, tmp_path / "r.yaml", ["rank"])
    with pytest.raises(ValueError, match="train must be one of"):
        recipe(train="mlp")
    with pytest.raises(ValueError, match="teacher"):
        recipe(loss="distillation")


def test_a_stream_needs_pairs_and_an_end(recipe):
    with pytest.raises(ValueError, match="rows of `pairs`"):
        recipe(shuffle_buffer=5)
    with pytest.raises(ValueError, match=r"set trainer\.max_steps"):
        recipe(shuffle_buffer=5, sentences=None, pairs="x", trainer={"max_steps": -1})


def read(tmp_path, *changes, text="base: b\nout: o\nsentences: {files: {}}\nffn_dropout: 0.1\n"):
    (tmp_path / "r.yaml").write_text(text)
    return read_recipe(ContrastiveRecipe, tmp_path / "r.yaml", changes)


def test_words_and_numbers_are_read_as_they_are_written(tmp_path):
    found = read(
        tmp_path, "trainer.eval_strategy=no", "trainer.a=off", "trainer.b=true", "trainer.c=1e-3", "trainer.d=12"
    )
    assert found.trainer == {"eval_strategy": "no", "a": "off", "b": True, "c": 0.001, "d": 12}
    text = "base: b\nout: o\nsentences: {files: {}}\nffn_dropout: 1e-1\ntrainer: {save_strategy: no, x: 2024-01-01}\n"
    assert read(tmp_path, text=text).trainer == {"save_strategy": "no", "x": "2024-01-01"}
    assert read(tmp_path, text=text).ffn_dropout == 0.1
    assert read(tmp_path, 'prompt="query: "').prompt == "query: "
    numbers = read(tmp_path, "trainer.a=1_000", "trainer.b=-7", "trainer.c=010", "trainer.d=12:30", "trainer.e=0")
    assert numbers.trainer == {"a": 1000, "b": -7, "c": "010", "d": "12:30", "e": 0}
    merged = (
        "base: b\nout: o\nsentences: {files: {}}\nffn_dropout: 0.1\ntrainer: {<<: {seed: 1, max_steps: 2}, seed: 3}\n"
    )
    assert read(tmp_path, text=merged).trainer == {"seed": 3, "max_steps": 2}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("prompt=query: ", r"--set 'prompt=\"query: \"'"),
        ("prompt=a: b: c", r"--set 'prompt=\"a: b: c\"'"),
        ("rank=many", "rank must be a whole number or null, got 'many'"),
        ("rank=1.5", "rank must be a whole number"),
        ("length_buckets=no", "length_buckets must be true or false"),
        ("evaluate=STSB-dev", "evaluate must be a mapping"),
        ("out.x=1", "out is a single value"),
        ("sentences.words=[1]", "sentences: words must have 2 values"),
        ("teacher.0.folder=x", "unknown key '0'"),
        ("scale=true", "scale must be a number"),
        ("scale=.nan", "scale must be a finite number"),
        ("scale=0", "scale must be above 0"),
        ("rank=0", "rank must be at least 1"),
        ("max_seq_length=0", "max_seq_length must be at least 1"),
        ("batch_tokens=0", "batch_tokens must be at least 1"),
        ("sentences.count=-3", "sentences: count must be at least 1"),
        ("sentences.use=0", "sentences: use must be at least 1"),
        ("distillation.cosine=-1", "distillation: cosine must be at least 0"),
        ("ffn_dropout=1.5", "ffn_dropout is a rate"),
        ("attention_dropout=-0.1", "attention_dropout is a rate"),
        ("save_minutes=0", "save_minutes must be above 0"),
        ("early_stopping_patience=3", "early_stopping_patience counts evaluations"),
    ],
)
def test_a_change_that_cannot_be_is_refused_in_words(tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        read(tmp_path, change)


def test_a_command_stopped_by_hand_says_how_to_go_on(capsys, tmp_path):
    @one_line_errors
    def command():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "stopped; run the same command again to go on\n"


SIMILARITY = """
base: b
out: o
loss: similarity
head: training
batch_tokens: 100
groups: {neighbours: 4}
texts:
  count: 100
  sources:
    - {file: a, share: 0.5}
    - {file: b, kind: passages, title: title, titled: 0.3, count: 10, words: [20, 150]}
teacher:
  - {kind: sentence-transformers, model: all-MiniLM-L6-v2, folder: t1, prompts: {queries: 'q: '}}
  - {kind: sentence-transformers, model: here/ubmoe-135m/, folder: t2, weight: 0.3, center: true}
  - {kind: prompted-base, prefix: p, suffix: s, layers: [1], folder: t3}
"""


def test_teachers_come_alone_or_in_a_list_and_name_the_training(tmp_path):
    found = read(tmp_path, "teacher.1.folder=x", "texts.sources.0.share=0.25", text=SIMILARITY)
    first, second, third = found.teachers
    assert isinstance(first, EmbedderTeacher)
    assert isinstance(third, PromptedTeacher)
    assert (first.prompts, second.folder, second.weight, second.center) == ({"queries": "q: "}, "x", 0.3, True)
    assert found.supervision == "distilled from all-MiniLM-L6-v2 and ubmoe-135m"
    assert found.texts.sources[0].share == 0.25
    assert found.texts.sources[1].words == (20, 150)
    assert found.groups == Groups(neighbours=4)
    assert found.views == 1
    alone = SIMILARITY[: SIMILARITY.index("teacher:")] + "teacher: {prefix: p, suffix: s, layers: [1], folder: t}\n"
    assert read(tmp_path, text=alone).supervision == "self-distilled"  # without a kind: the prompted base, as ever


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["teacher.0.kind=oracle"], "kind must be one of prompted-base, sentence-transformers, lexical, got 'oracle'"),
        (["teacher.0.kind=[]"], r"kind must be one of prompted-base, sentence-transformers, lexical, got \[\]"),
        (["teacher.0.modle=x"], "unknown key 'modle'"),
        (["teacher.0.weight=0"], "weights must be greater than 0"),
        (["teacher.0.batch_size=0"], "teacher.0: batch_size must be at least 1"),
        (["teacher.2.dimension=0"], "teacher.2: dimension must be at least 1"),
        (["similarity.temperature=0"], "similarity: temperature must be above 0"),
        (["similarity.shift=-1"], "similarity: shift must be at least 0"),
        (["similarity.within=1.5"], "similarity: within is a share from 0 to 1"),
        (["groups.neighbours=0"], "groups: neighbours must be at least 1"),
        (["texts.part=-1"], "texts: part must be at least 0"),
        (["texts.count=-3"], "texts: count must be at least 1"),
        (["texts.sources.0.share=7"], "texts: sources.0: share is a share from 0 to 1, got 7"),
        (["texts.sources.1.titled=7"], "texts: sources.1: titled is a share from 0 to 1, got 7"),
        (["texts.sources.1.count=-3"], "texts: sources.1: count must be at least 1"),
        (["texts.sources.1.lengths=[0]"], r"texts: sources.1: lengths must be at least 1, got \[0\]"),
        (["matryoshka_dims=[0]"], r"matryoshka_dims must be at least 1, got \[0\]"),
        (["evaluate={STSB-dev: 0}"], "evaluate: STSB-dev must be at least 1 pair"),
        (["teacher.1.folder=t1"], "a `folder` of its own"),
        (["teacher.7.folder=t1"], "expected a number from 0 to 2"),
        (["loss=distillation"], "needs one `teacher`"),
        (["batch_tokens=null"], "set it"),
        (["head=null"], "similarity.cosine needs `head`"),
        (["head=output", "project=true"], "choose one"),
        (["project=true", "components=0"], "at least 1"),
        (["components=true"], "components turns the layer of `project: true`"),
        (["groups=null", "similarity.within=0.5"], "needs `groups`"),
        (["similarity.contrastive=0.5"], "needs `texts` with passages"),
        (["similarity.contrastive=-1"], "similarity: contrastive must be at least 0"),
        (["pairs=x"], "exactly one of"),
        (["texts.count=null"], "needs `count`"),
    ],
)
def test_recipes_of_distillation_that_cannot_be_are_refused(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        read(tmp_path, *changes, text=SIMILARITY)


def test_keys_that_do_nothing_are_refused_where_a_recipe_is_read(tmp_path, recipe):
    teacher = "teacher={prefix: p, suffix: s, layers: [1], folder: t}"
    distilled = ["loss=distillation", "head=training", teacher]
    similar = ["loss=similarity", "head=training", teacher]
    for changes, said in (
        ([teacher], "teacher does nothing with loss: MultipleNegativesRankingLoss, it is for distillation and similar"),
        (["similarity.kl=2"], "similarity does nothing"),
        (["distillation.contrastive=2"], "distillation does nothing"),
        (["mini_batch_size=4"], "mini_batch_size does nothing"),
        ([*distilled, "similarity.kl=2"], "similarity does nothing with loss: distillation, it is for similarity"),
        ([*distilled, "mini_batch_size=4"], "mini_batch_size does nothing"),
        ([*similar, "scale=7"], "scale does nothing with loss: similarity"),
        ([*similar, "distillation.contrastive=2"], "distillation does nothing"),
        (["batch_tokens=100", "length_buckets=false"], "length_buckets does nothing with batch_tokens"),
        (["batch_tokens=100", "trainer.per_device_train_batch_size=8"], "per_device_train_batch_size does nothing"),
        (["batch_tokens=100", "trainer.batch_sampler=no_duplicates"], "batch_sampler does nothing with batch_tokens"),
        (["rank=null", "alpha=3"], "alpha does nothing without rank"),
        (["columns=[anchor]"], "columns does nothing without pairs"),
        (["evaluate={STSB-dev: 100}"], "add `eval_strategy: steps`"),
    ):
        with pytest.raises(ValueError, match=rf"r\.yaml: .*{said}"):
            read(tmp_path, *changes)
    cached = "loss=CachedMultipleNegativesRankingLoss"
    for changes in (
        distilled, similar, [*distilled, "scale=7", "distillation.contrastive=2"], [*similar, "similarity.kl=2"],
        [cached, "mini_batch_size=4", "scale=7"], ["length_buckets=false"], ["evaluate={}"],
        ["evaluate={STSB-dev: 100}", "trainer.eval_strategy=no"],
        ["evaluate={STSB-dev: 1}", "trainer.eval_strategy=steps"],
    ):  # fmt: skip
        read(tmp_path, *changes)


IDLE = """
base: b
out: o
loss: similarity
head: training
groups: {}
batch_tokens: 100
texts:
  sources:
    - {file: a, count: 5, kind: corruptions}
    - {file: b, count: 5, kind: passages, words: &words [10, 100]}
    - {file: c, count: 5, kind: passages, words: *words}
teacher:
  - {kind: sentence-transformers, model: m, folder: t1}
  - {kind: lexical, folder: t2, weights: {fragments: 0}}
"""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["teacher.1.weights={corruptions: 0}"], "weights: expected kinds of text .* sentences and fragments"),
        (["teacher.0.prompts={query: x}"], "prompts: expected kinds of text .*, default.*got 'query'"),
        (["prompts={contrasts: x}", "pool_prompt=true"], "prompts: expected kinds of text .*got 'contrasts'"),
        (["texts.sources.1.lengths=[20, 150]"], r"most of words, 100, got lengths up to 150; set words: \[10, 150\]"),
        (["texts.sources.1.corruptions=5"], "corruptions does nothing with kind: passages"),
        (["texts.sources.1.title=t"], "title does nothing without"),
        (["texts.count=9"], "count does nothing without a `share`"),
        (["texts.sources.1.kind=sentences", "texts.sources.2.kind=queries", "texts.sources.2.join=true"],
         "c: join does nothing without a source of kind: passages"),
        (["groups=null", "texts.sources.0.join=true"], "join of a source does nothing without `groups`"),
        (["similarity={kl: 0, temperature: 0.5}"], "temperature does nothing"),
        (["teacher={kind: lexical, folder: t, weight: 2}"], "weight and weights do nothing with a single teacher"),
    ],
)  # fmt: skip
def test_what_no_text_reads_is_refused(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        read(tmp_path, *changes, text=IDLE)


def test_a_change_is_of_one_place_although_an_alias_repeats_it(tmp_path):
    found = read(tmp_path, "texts.sources.2.words.1=60", "teacher.0.prompts={queries: q, default: d}", text=IDLE)
    assert [source.words for source in found.texts.sources[1:]] == [(10, 100), (10, 60)]


def test_layer_one_is_not_the_whole_depth(recipe, tmp_path):
    def asked(layers):
        teacher = PromptedTeacher(prefix="p", suffix="s", layers=layers, folder="t")
        return recipe(loss="similarity", head="training", teacher=teacher)

    check_same_recipe(asked([1]), tmp_path)
    (tmp_path / "trained.safetensors").touch()
    check_same_recipe(asked([1]), tmp_path)
    with pytest.raises(ValueError, match=r"another 'teacher.layers' \('\[\[1\]\]', now '\[\[1.0\]\]'\)"):
        check_same_recipe(asked([1.0]), tmp_path)


def test_a_run_goes_on_without_idle_keys_of_its_texts(recipe, tmp_path):
    def of(**changes):
        texts = Texts([TextSource("a", count=5, **changes)], count=None if not changes else 9)
        return recipe(sentences=None, texts=texts)

    check_same_recipe(of(corruptions=5), tmp_path)
    (tmp_path / "trained.safetensors").touch()
    check_same_recipe(of(), tmp_path)
    with pytest.raises(ValueError, match="another 'texts'"):
        check_same_recipe(of(words=(5, 6)), tmp_path)


def test_a_run_with_a_key_that_did_nothing_is_opened_and_goes_on_without_it(recipe, tmp_path):
    check_same_recipe(recipe(mini_batch_size=4), tmp_path)
    (tmp_path / "trained.safetensors").touch()
    assert read_recipe(ContrastiveRecipe, tmp_path / "recipe.json", finished=True).mini_batch_size == 4
    check_same_recipe(recipe(), tmp_path)
    with pytest.raises(ValueError, match="another 'scale'"):
        check_same_recipe(recipe(scale=4), tmp_path)


def test_processes_that_write_the_recipe_at_once_do_not_share_a_temporary_file(recipe, tmp_path):
    (tmp_path / "recipe.json.tmp").write_text("of another process")
    check_same_recipe(recipe(), tmp_path)
    assert (tmp_path / "recipe.json.tmp").read_text() == "of another process"
    assert json.loads((tmp_path / "recipe.json").read_text())["rank"] == 2


def test_rough_needs_the_column_that_it_changes(recipe):
    pairs = {"sentences": None, "pairs": "x", "rough": 0.5}
    assert recipe(**pairs, columns=["anchor", "answer"]).rough == 0.5
    with pytest.raises(ValueError, match=r"rough changes the column `anchor`, got the columns \['query', 'answer'\]"):
        recipe(**pairs, columns=["query", "answer"])


def test_a_run_from_before_a_key_existed_goes_on(recipe, tmp_path):
    check_same_recipe(recipe(), tmp_path)
    (tmp_path / "trained.safetensors").touch()
    stored = json.loads((tmp_path / "recipe.json").read_text())
    for key in ("ridge", "groups", "similarity"):
        del stored[key]
    (tmp_path / "recipe.json").write_text(json.dumps(stored))
    check_same_recipe(recipe(save_minutes=1.0), tmp_path)
    with pytest.raises(ValueError, match="another 'ridge'"):
        check_same_recipe(recipe(ridge=5), tmp_path)


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ({"max_steps": 0}, "max_steps must be at least 1, or -1 for whole epochs, got 0"),
        ({"max_steps": -3}, "max_steps must be at least 1"),
        ({"max_steps": "many"}, "max_steps must be a number"),
        ({"max_steps": None}, "max_steps must be a number, a whole one, got None"),
        ({"max_steps": 2.0}, "max_steps must be a number, a whole one, got 2.0"),
        ({"learning_rate": None}, "learning_rate must be a number, got None"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        ({"num_train_epochs": 0}, "num_train_epochs must be above 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
        ({"bf16": "no"}, "bf16 must be true or false, got 'no'"),
        ({"gradient_checkpointing": "off"}, "gradient_checkpointing must be true or false, got 'off'"),
        ({"load_best_model_at_end": "no"}, "load_best_model_at_end must be true or false"),
        ({"greater_is_better": "no"}, "greater_is_better must be true or false"),
    ],
)
def test_values_of_the_trainer_that_say_something_else_are_refused(recipe, trainer, said):
    """Of no step the trainer makes three epochs, or none, and the base is exported as trained; any text is true."""
    with pytest.raises(ValueError, match=said):
        contrastive.training_arguments(recipe(trainer=trainer))


def test_a_batch_sampler_of_the_trainer_is_the_one_that_samples(recipe):
    assert contrastive.training_arguments(recipe()).batch_sampler is LengthBuckets
    chosen = contrastive.training_arguments(recipe(trainer={"batch_sampler": "no_duplicates"})).batch_sampler
    assert chosen == "no_duplicates"


def test_numbers_of_a_router_recipe_that_leave_nothing_are_refused():
    for wrong in ({"held_out": -1}, {"count": 0}, {"max_tokens": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least"):
            RouterRecipe("checkpoint", "out", ["rows"], **wrong)


def test_the_target_of_a_balance_without_weight_is_refused(tmp_path):
    text = "checkpoint: x\nout: y\ninstructions: [z]\nbalance_target: 0.2\n"
    (tmp_path / "router.yaml").write_text(text)
    with pytest.raises(ValueError, match="balance_target does nothing without balance"):
        read_recipe(RouterRecipe, tmp_path / "router.yaml")
    assert read_recipe(RouterRecipe, tmp_path / "router.yaml", ["balance=0.1"]).balance_target == 0.2
