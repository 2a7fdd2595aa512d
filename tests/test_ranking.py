"""Ranking by the generator equals ten lines of torch on the untouched base, without cache, padding and batches."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
from helpers.benchmark_data import make_base as make_byte_base
from helpers.models import TEXTS, make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from ubmoe_st import UBMoE, ranking, upcycle
from ubmoe_st.ranking import DOCUMENT_CUE, QUERY_CUE, YES_NO_PROMPT

QUERY = "the red bird"
DOCUMENTS = ["a cat sits on the mat", "a red bird sleeps in the old tree under the house", "train", "", "dog and cat"]
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


@pytest.fixture(scope="module")
def model(checkpoint):
    return UBMoE(str(checkpoint), device="cpu")


@pytest.fixture(scope="module")
def byte_base(tmp_path_factory):
    base = make_byte_base(tmp_path_factory.mktemp("ranking") / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(base)
    return base


@pytest.fixture(scope="module")
def chat_model(byte_base, tmp_path_factory):
    return UBMoE(str(make_checkpoint(byte_base, tmp_path_factory.mktemp("ranking") / "ubmoe")), device="cpu")


def likelihoods(base, query: str, documents: list[str]) -> list[float]:
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    asked = tokenizer(query, add_special_tokens=False)["input_ids"]
    scores = []
    for document in documents:
        before = tokenizer(DOCUMENT_CUE + document)["input_ids"]
        ids = torch.tensor([before + tokenizer(QUERY_CUE, add_special_tokens=False)["input_ids"] + asked])
        with torch.no_grad():
            logs = lm(ids, use_cache=False).logits[0].log_softmax(-1)
        scores.append(sum(logs[-len(asked) - 1 + i, token].item() for i, token in enumerate(asked)) / len(asked))
    return scores


def scores_of(results: list[dict], count: int) -> list[float]:
    by_number = {result["corpus_id"]: result["score"] for result in results}
    return [by_number[number] for number in range(count)]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_likelihood_is_that_of_the_base_model(base_of, checkpoint_of, architecture):
    model = UBMoE(str(checkpoint_of(architecture)), device="cpu")
    expected = likelihoods(base_of(architecture), QUERY, DOCUMENTS)
    assert max(expected) - min(expected) > 0.1
    for batch_size in (1, 2, 32):
        results = model.rank(QUERY, DOCUMENTS, batch_size=batch_size)
        assert scores_of(results, len(DOCUMENTS)) == pytest.approx(expected, abs=2e-4)
        assert [r["score"] for r in results] == sorted((r["score"] for r in results), reverse=True)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_logits_at_a_time_are_bounded_and_scores_stay(base_of, checkpoint_of, monkeypatch, architecture):
    """Of few rows together where several fit, and of parts of the query where not even one does."""
    model = UBMoE(str(checkpoint_of(architecture)), device="cpu")
    query = TEXTS[1]
    expected = likelihoods(base_of(architecture), query, DOCUMENTS)
    sizes: list[int] = []
    model.generator.register_forward_hook(lambda module, args, output: sizes.append(output.logits.numel() * 4))
    row, largest = 4 * 48, {}
    asked = len(model[0].token_ids(query, add_special_tokens=False))
    for positions in (10_000, 2 * asked, asked, 7, 1):
        monkeypatch.setattr(ranking, "LOGITS_BYTES", positions * row)
        sizes.clear()
        assert scores_of(model.rank(query, DOCUMENTS), len(DOCUMENTS)) == pytest.approx(expected, abs=2e-4)
        largest[positions] = max(sizes) // row
        assert largest[positions] <= positions
    assert largest == {10_000: len(DOCUMENTS) * asked, 2 * asked: 2 * asked, asked: asked, 7: 7, 1: 1}


def test_yes_no_is_the_log_odds_of_the_base_model(chat_model, byte_base):
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(byte_base).eval(), AutoTokenizer.from_pretrained(byte_base)
    expected = []
    for document in DOCUMENTS:
        content = YES_NO_PROMPT.format(query=QUERY, document=document)
        text = f"user: {content}\nassistant: "
        with torch.no_grad():
            logits = lm(torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])).logits[0, -1]
        yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("yes", "no"))
        expected.append((logits[yes] - logits[no]).item())
    assert max(expected) - min(expected) > 0.01
    for batch_size in (1, 3):
        results = chat_model.rank(QUERY, DOCUMENTS, method="yes_no", batch_size=batch_size)
        assert scores_of(results, len(DOCUMENTS)) == pytest.approx(expected, abs=2e-4)


def test_results_have_the_form_of_the_cross_encoder(model):
    best = model.rank(QUERY, DOCUMENTS, 2, True)
    assert len(best) == 2
    assert all(list(result) == ["corpus_id", "score", "text"] for result in best)
    assert all(result["text"] == DOCUMENTS[result["corpus_id"]] for result in best)
    assert list(model.rank(QUERY, DOCUMENTS)[0]) == ["corpus_id", "score"]


@pytest.mark.parametrize("method", ["likelihood", "yes_no"])
def test_documents_that_do_not_fit_are_cut_and_counted(chat_model, method):
    long = "bird " * 400
    with pytest.warns(UserWarning, match="2 of 3 documents do not fit"):
        results = chat_model.rank(QUERY, [long, "a cat", long + "house"], method=method)
    assert sorted(result["corpus_id"] for result in results) == [0, 1, 2]
    first, _, third = scores_of(results, 3)
    assert first == pytest.approx(third, abs=2e-4)  # they differ behind the cut alone
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chat_model.rank(QUERY, ["a cat"], method=method)
    with pytest.raises(ValueError, match="leaves no room for a document"):
        chat_model.rank("bird " * 400, ["a cat"], method=method)


def test_bad_input(model):
    with pytest.raises(ValueError, match="documents is empty"):
        model.rank(QUERY, [])
    with pytest.raises(ValueError, match="query is empty"):
        model.rank(" ", ["a"])
    with pytest.raises(TypeError, match="documents must be a list of texts, got str"):
        model.rank(QUERY, "a cat")
    with pytest.raises(TypeError, match="position 1 must be a text, got int"):
        model.rank(QUERY, ["a", 3])
    with pytest.raises(TypeError, match="query must be one text, got list"):
        model.rank([QUERY], ["a"])
    with pytest.raises(ValueError, match="method must be one of likelihood, yes_no"):
        model.rank(QUERY, ["a"], method="maxsim")
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        model.rank(QUERY, ["a"], top_k=0)
    for wrong in ({"top_k": 1.5}, {"top_k": True}, {"batch_size": 2.0}):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))} must be a whole number"):
            model.rank(QUERY, ["a"], **wrong)
    with pytest.raises(ValueError, match="does not tell yes from no"):
        model.rank(QUERY, ["a"], method="yes_no")


def test_the_stock_cross_encoder_opens_the_export_and_scores_alike(chat_model, tmp_path):
    from sentence_transformers import CrossEncoder

    from ubmoe_st.export import export

    out = tmp_path / "cross-encoder"
    export(chat_model[0].folder, out, format="cross-encoder")
    stock = CrossEncoder(str(out), device="cpu").rank(QUERY, DOCUMENTS)
    ours = chat_model.rank(QUERY, DOCUMENTS, method="yes_no")
    assert scores_of(stock, len(DOCUMENTS)) == pytest.approx(scores_of(ours, len(DOCUMENTS)), abs=2e-4)
    assert [result["corpus_id"] for result in stock] == [result["corpus_id"] for result in ours]


def test_the_export_reads_what_ranking_reads_whatever_the_encoder_reads(byte_base, tmp_path):
    from sentence_transformers import CrossEncoder

    from ubmoe_st.export import export

    cut = upcycle(byte_base, None, out=tmp_path / "cut", max_seq_length=16)
    export(cut, tmp_path / "out", format="cross-encoder")
    stock = CrossEncoder(str(tmp_path / "out"), device="cpu").rank(QUERY, DOCUMENTS)
    ours = UBMoE(str(cut), device="cpu").rank(QUERY, DOCUMENTS, method="yes_no")
    assert scores_of(stock, len(DOCUMENTS)) == pytest.approx(scores_of(ours, len(DOCUMENTS)), abs=2e-4)
    assert len({result["score"] for result in ours}) == len(DOCUMENTS), "all are the same: vacuous"


def test_a_date_in_the_template_is_told_of(byte_base, tmp_path):
    from ubmoe_st.export import export

    shutil.copytree(byte_base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(byte_base)
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }} " + CHAT
    tokenizer.save_pretrained(tmp_path / "base")
    dated = upcycle(tmp_path / "base", None, out=tmp_path / "dated")
    with pytest.warns(UserWarning, match="may name the date: the export keeps that of today"):
        export(dated, tmp_path / "out", format="cross-encoder")
