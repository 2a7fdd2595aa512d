"""mteb runs: local forms of official tasks, values against numpy, resuming, mock run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.benchmark_data import make_base, make_data
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

mteb = pytest.importorskip("mteb")

from benchmarks import data as local  # noqa: E402
from benchmarks import embedding  # noqa: E402
from benchmarks.mteb_model import model_meta, wrap  # noqa: E402
from benchmarks.peers import open_encoder  # noqa: E402
from benchmarks.results import read_json  # noqa: E402

REAL = Path("../shared/data")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return open_encoder("base-causal", base=str(make_base(tmp_path_factory.mktemp("base"))))


def spearman_by_hand(model, columns: dict) -> float:
    first, second = model.encode(columns["sentence1"]), model.encode(columns["sentence2"])
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return 100 * spearmanr((first * second).sum(1) / norms, columns["score"])[0]


def test_sets_and_unknown_tasks(data):
    names, missing = embedding.expand(["sts"], online=False, folder=data)
    assert names == list(embedding.AVG9)
    assert missing == ["STS22"]
    names, missing = embedding.expand([embedding.BENCHMARK], online=False, folder=data)
    assert "STSBenchmark" in names
    assert "ArguAna" in missing
    with pytest.raises(ValueError, match="nearest: STSBenchmark"):
        embedding.expand(["STSBenchmak"], online=False, folder=data)
    with pytest.raises(ValueError, match="only on the Hub"):
        embedding.expand(["ArguAna"], online=False, folder=data)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data folder is not there")
@pytest.mark.parametrize("name", embedding.AVG9)
def test_the_local_form_is_the_official_task(name):
    """Same class, columns, metric and split; rows and mean score as in the statistics mteb ships of its own data."""
    official, ours = embedding.official_task(name), embedding.local_task(name, REAL)
    assert type(ours) is type(official)
    assert ours.metadata.main_score == official.metadata.main_score == "cosine_spearman"
    rows = ours.dataset["en-en" if name == "STS17" else "test"]
    rows = rows["test"] if name == "STS17" else rows
    assert set(rows.column_names) == {*official.column_names, "score"}
    statistics = official.metadata.descriptive_stats["test"]
    if name == "STS17":
        statistics = statistics["hf_subset_descriptive_stats"]["en-en"]
    assert len(rows) == statistics["num_samples"]
    assert np.mean(rows["score"]) == pytest.approx(statistics["label_statistics"]["avg_score"], abs=0.003)
    length = sum(map(len, rows["sentence1"])) / statistics["text1_statistics"]["total_text_length"]
    assert 0.97 < length < 1.01


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data folder is not there")
def test_local_banking77_is_the_official_task():
    ours = embedding.local_task("Banking77Classification", REAL)
    official = embedding.official_task("Banking77Classification")
    assert type(ours) is type(official)
    statistics = official.metadata.descriptive_stats["test"]
    assert len(ours.dataset["test"]) == statistics["num_samples"]
    assert len(set(ours.dataset["test"]["label"])) == statistics["label_statistics"]["unique_labels"]


def test_scores_are_those_of_numpy_and_finished_tasks_are_kept(encoder, data, tmp_path, monkeypatch):
    names = ["STS12", "SICK-R", "STSBenchmark:validation"]
    options = {"folder": data, "out": tmp_path, "mteb_files": tmp_path / "mteb", "resamples": 20, "progress": False}
    content = read_json(embedding.run(encoder, names, **options))
    values = {(score["task"], score["split"]): score["value"] for score in content["scores"]}
    for task, split in (("STS12", "test"), ("SICK-R", "test"), ("STSBenchmark", "validation")):
        columns = local.sts_pairs(data, task, split)
        assert values[task, split] == pytest.approx(spearman_by_hand(encoder.model, columns), abs=1e-3)
    assert len(set(values.values())) == 3
    assert (tmp_path / "mteb" / "local").is_dir()
    for score in content["scores"]:
        assert score["low"] < score["value"] < score["high"]

    monkeypatch.setattr(embedding, "score_task", lambda *a, **k: pytest.fail("a finished task ran again"))
    said: list[str] = []
    embedding.run(encoder, names, **options, say=said.append)
    assert [line.endswith("(kept)") for line in said] == [True] * 3


def test_an_interrupted_run_keeps_its_finished_tasks(encoder, data, tmp_path, monkeypatch):
    real, calls = embedding.score_task, []

    def stop_at_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    options = {"folder": data, "out": tmp_path, "resamples": 5, "progress": False}
    monkeypatch.setattr(embedding, "score_task", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        embedding.run(encoder, ["STS12", "STS13"], **options)
    path = embedding.run(encoder, ["STS12", "STS13"], **options)
    assert [score["task"] for score in read_json(path)["scores"]] == ["STS12", "STS13"]
    assert len(calls) == 3


def test_sicks_own_test_split_is_the_end_of_mtebs(encoder, data):
    task = embedding.local_task("SICK-R", data)
    options = {"resamples": 5, "progress": False, "sick_test_rows": 24}
    scores = embedding.score_task(wrap(encoder), task, "test", seed=0, **options)
    rows = local.read_table(data / "eval" / "sts" / "SICK-R-test.tsv")
    columns = {"sentence1": [r["s1"] for r in rows], "sentence2": [r["s2"] for r in rows]}
    columns["score"] = [float(r["score"]) for r in rows]
    assert [score["task"] for score in scores] == ["SICK-R", embedding.SICK_TEST]
    assert scores[1]["value"] == pytest.approx(spearman_by_hand(encoder.model, columns), abs=1e-3)
    assert scores[0]["value"] != pytest.approx(scores[1]["value"], abs=1e-3)


def test_averages_need_all_of_their_tasks():
    scores = [{"task": t, "split": "test", "value": float(i), "sd": 0.7} for i, t in enumerate(embedding.AVG7)]
    found = embedding.averages(scores)
    assert set(found) == {"avg7"}
    assert found["avg7"]["value"] == 3.0
    assert found["avg7"]["sd"] == pytest.approx(0.7 / np.sqrt(7))
    assert embedding.averages(scores[:-1]) == {}


@pytest.mark.parametrize("name", ["toy", "trec", "mr", "Banking77Classification"])
def test_local_retrieval_and_classification_run_in_mteb(encoder, data, name):
    task = embedding.local_task(name, data)
    (score,) = embedding.score_task(wrap(encoder), task, "test", seed=0, resamples=5, progress=False)
    assert 0 < score["value"] <= 100


def test_mteb_uses_the_prompts_of_the_checkpoint(encoder, data, tmp_path):
    encoder.model.save(str(tmp_path / "prompted"))
    prompted = open_encoder(str(tmp_path / "prompted"))
    prompted.model.prompts = {"query": "find: ", "document": "text: "}
    model = wrap(prompted)
    embedding.score_task(model, embedding.local_task("toy", data), "test", seed=0, resamples=5, progress=False)
    assert {key[:2] for key in model.model._vectors} == {("encode_query", "find: "), ("encode_document", "text: ")}


def test_mtebs_own_mock_run_passes(encoder, tmp_path):
    """Every text task kind of mteb runs on the model through the metadata we ship."""
    encoder.model.save(str(tmp_path / "model"))
    model = model_meta(tmp_path / "model").load_model()
    assert model.mteb_model_meta.name == "ubmoe-st/ubmoe-135m"
    kinds = {"MockSTSTask", "MockRetrievalTask", "MockClassificationTask", "MockClusteringTask"}
    tasks = [t for t in mteb.mocks.mock_run.get_compatible_mock_tasks(model) if t.metadata.name in kinds]
    assert {t.metadata.name for t in tasks} >= {"MockSTSTask", "MockRetrievalTask"}
    results = mteb.mock_run(model)
    assert results.all_passed, results.to_markdown()
    assert sum(isinstance(status, mteb.TaskResult) for _, status in results.items()) >= 10


def test_sizes_in_the_metadata_are_those_of_the_opened_model(checkpoint):
    """What mteb's list of models asks for is there, and is what the opened encoder has."""
    meta = model_meta(checkpoint, release_date="2026-11-25")
    stock = SentenceTransformer(str(checkpoint))
    assert meta.n_parameters == sum(parameter.numel() for parameter in stock.parameters())
    assert meta.n_embedding_parameters == stock[0].model.get_input_embeddings().weight.numel()
    assert meta.embed_dim == stock.get_embedding_dimension()
    assert meta.max_tokens == stock.max_seq_length
    assert meta.release_date == "2026-11-25"
    assert meta.name == f"ubmoe-st/{Path(checkpoint).name}"
    assert model_meta(checkpoint, name="somebody/else").name == "somebody/else"
    assert model_meta().n_parameters is None
    assert model_meta().name == "ubmoe-st/ubmoe-135m"


def test_metadata_say_the_licence_of_the_checkpoint_and_what_its_teachers_have_seen(checkpoint, tmp_path):
    """A derivative of Gemma is not under Apache-2.0, and a student of MS MARCO's students has seen MS MARCO."""
    folder = tmp_path / "taught"
    shutil.copytree(checkpoint, folder)
    card = (folder / "README.md").read_text(encoding="utf-8").removeprefix("---\n")
    lines = [line for line in card.splitlines(keepends=True) if not line.startswith("license")]
    (folder / "README.md").write_text("---\nlicense: gemma\n" + "".join(lines), encoding="utf-8")
    config = json.loads((folder / "generator" / "config.json").read_text(encoding="utf-8"))
    config["ubmoe"]["training"] = "distilled from all-MiniLM-L6-v2"
    (folder / "generator" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    meta = model_meta(folder)
    assert meta.license == "gemma"
    teacher = mteb.get_model_meta("sentence-transformers/all-MiniLM-L6-v2").training_datasets
    assert teacher
    assert teacher <= meta.training_datasets
    assert not teacher & model_meta(checkpoint).training_datasets
