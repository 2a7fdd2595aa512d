"""Mixtures of texts: drawn by seed, kinds, passages and what belongs to them, corruptions, bad files."""

from __future__ import annotations

import gzip
import json
import random

import pytest
from helpers.models import WORDS

from training.mixtures import Texts, TextSource
from training.texts import draw
from training.variants import _JUDGEMENTS, QUESTIONS, contrasts, corrupt, has_contrast, roughen

LINES = [f"{a} {b} cat {c} on the mat" for a, b, c in zip(WORDS * 3, WORDS[::-1] * 3, sorted(WORDS) * 3)]
PASSAGE = "The cat sits on the old red mat. A blue bird sleeps in the tree under the house. The dog runs in the train."


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "instruct").mkdir()
    with gzip.open(tmp_path / "train" / "lines.txt.gz", "wt") as out:
        out.write("\n".join([*LINES, "one two", *LINES[:5]]) + "\n")
    rows = [{"id": n, "title": f"title of {n}", "text": f"Number {n}. {PASSAGE}"} for n in range(20)]
    with gzip.open(tmp_path / "train" / "passages.jsonl.gz", "wt") as out:
        out.write("\n".join(map(json.dumps, rows)))
    asked = [
        {"instruction": f"which {n}", "input": f"{n} {PASSAGE}", "category": "ab"[n % 2], "output": ""}
        for n in range(20)
    ]
    with gzip.open(tmp_path / "instruct" / "asked.jsonl.gz", "wt") as out:
        out.write("\n".join(map(json.dumps, asked)))
    return tmp_path


def passages(**changes):
    return TextSource(
        **{"file": "passages", "kind": "passages", "count": 20, "words": (5, 40), "title": "title", **changes}
    )


def test_the_same_seed_draws_the_same_and_parts_share_nothing(folder):
    def texts(**changes):
        sources = [TextSource("lines", count=20), passages(count=5)]
        return draw(Texts(sources, **changes), folder)

    first = texts()
    assert first == texts()
    assert first.texts != texts(seed=1).texts
    assert not set(first.texts) & set(texts(part=1).texts)
    assert len(set(first.texts)) == len(first.texts) == 25
    assert all(4 <= len(text.split()) <= 28 for text in first.texts[:20])
    assert first.kinds == ["sentences"] * 20 + ["passages"] * 5
    both = [TextSource("lines", count=8), TextSource("lines", "corruptions", count=3, words=(6, 9))]
    parts = [draw(Texts(both, part=part), folder) for part in (0, 1)]
    drawn = [[corpus.texts[bundle[0]] for bundle in corpus.bundles] for corpus in parts]
    assert [len(rows) for rows in drawn] == [11, 11]  # none is lost because another source has it
    assert len({*drawn[0], *drawn[1]}) == 22
    fewer = draw(Texts([TextSource("lines", count=5), passages(count=5)], part=1), folder)
    assert set(fewer.texts) & set(first.texts)  # of another mixture: rows come again, as the docs say
    with pytest.raises(ValueError, match="part 9"):
        texts(part=9)
    shares = draw(Texts([TextSource("lines", share=0.5)], count=20), folder)
    assert len(shares.texts) == 10


def test_every_row_is_in_one_bundle(folder):
    sources = [
        passages(title_apart=0.5, sentence_apart=0.5),
        TextSource("lines", kind="corruptions", count=10, words=(6, 9)),
        TextSource("lines", kind="queries", count=99, join=True),
        TextSource("asked", "passages", 99, words=(5, 30), column="input", query="instruction"),
    ]
    corpus = draw(Texts(sources), folder)
    rows = [row for bundle in corpus.bundles for row in bundle]
    assert rows == list(range(len(corpus.texts)))
    assert len(corpus.kinds) == len(corpus.texts)
    joining = [corpus.bundles[n] for n in sorted(corpus.joining)]
    assert joining
    assert all(len(bundle) == 1 and corpus.kinds[bundle[0]] == "queries" for bundle in joining)
    asked = [bundle for bundle in corpus.bundles if corpus.texts[bundle[-1]].startswith("which")]
    assert len(asked) == 20
    for bundle in asked:  # each passage has its own question
        assert corpus.texts[bundle[0]].split()[0] == corpus.texts[bundle[1]].split()[1]


def test_passages_are_cut_and_bring_their_titles(folder):
    whole = draw(Texts([passages(titled=1.0, title_apart=1.0, sentence_apart=1.0)]), folder)
    for bundle in whole.bundles:
        text, title, sentence = (whole.texts[row] for row in bundle)
        assert [whole.kinds[row] for row in bundle] == ["passages", "titles", "sentences"]
        assert text.startswith(f"{title}. Number {title.split()[-1]}. The cat")
        assert sentence in PASSAGE
    plain = draw(Texts([passages(lengths=[7], words=(5, 40))]), folder)
    assert {len(text.split()) for text in plain.texts} == {7}
    assert all(text.startswith("Number") for text in plain.texts)
    moved = draw(Texts([passages(lengths=[7], anywhere=1.0)]), folder)
    assert sum(text.startswith("Number") for text in moved.texts) < 8
    assert all(text in PASSAGE for text in moved.texts if "Number" not in text and not text[0].isdigit())
    longest = draw(Texts([passages(words=(5, 12))]), folder)
    assert {len(text.split()) for text in longest.texts} == {12}


def test_a_value_to_skip_that_no_row_has_is_named(folder, caplog):
    source = TextSource("asked", "passages", 99, words=(5, 50), column="input", skip={"category": ["a", "no such"]})
    assert len(draw(Texts([source]), folder).texts) == 10
    assert [record.getMessage() for record in caplog.records] == [
        "asked: no row has a value of `skip`: 'no such' in 'category'; is it spelt so?"
    ]


def test_rows_to_skip_are_skipped(folder):
    source = {"file": "asked", "kind": "passages", "count": 99, "words": (5, 50), "column": "input"}
    assert len(draw(Texts([TextSource(**source)]), folder).texts) == 20
    kept = draw(Texts([TextSource(**source, skip={"category": ["a"]})]), folder).texts
    assert sorted(int(text.split()[0]) for text in kept) == list(range(1, 20, 2))
    with pytest.raises(ValueError, match="expected a column 'categor'"):
        draw(Texts([TextSource(**source, skip={"categor": ["a"]})]), folder)


def test_fragments_look_like_queries(folder):
    (folder / "some.txt").write_text("\n".join(f"The Cat {word}." for word in WORDS))
    texts = draw(Texts([TextSource(str(folder / "some.txt"), "fragments", 99, words=(3, 3))]), folder).texts
    assert all(text[0] == "t" and not text.endswith(".") for text in texts)
    assert 0 < sum("Cat" in text for text in texts) < len(texts)
    assert [roughen("The Cat sits.", lower) for lower in (False, True)] == ["the Cat sits", "the cat sits"]


def test_a_dataset_of_the_hub_is_read_by_split_and_column(folder, monkeypatch):
    (folder / "set").mkdir()
    rows = [{"question": line, "answer": f"{line} so"} for line in LINES[:12]]
    (folder / "set" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv("HF_HOME", str(folder / "home"))
    name = f"hf:{folder / 'set'}#train"
    found = draw(Texts([TextSource(f"{name}:question", count=50)]))
    assert set(found.texts) == set(LINES[:12])
    pairs = draw(Texts([TextSource(name, "passages", 50, column="answer", query="question")]))
    assert all(pairs.texts[a] == f"{pairs.texts[b]} so" for a, b in pairs.bundles)
    for file, said in ((f"{name}:nothing", "expected a column 'nothing'"), ("hf:x", "expected hf:NAME")):
        with pytest.raises(ValueError, match=said):
            draw(Texts([TextSource(file, count=50)]))


def test_another_encoding_is_one_line_with_file_and_line(folder):
    (folder / "latin.txt").write_bytes("the cat sits on\nthe caf\xe9 on the mat\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt, line 2: expected UTF-8, got byte 0xe9"):
        draw(Texts([TextSource(str(folder / "latin.txt"), count=5)]))
    (folder / "half.txt.gz").write_bytes(gzip.compress(b"the cat sits on the mat\n" * 99)[:40])
    with pytest.raises(ValueError, match="no whole gzip file"):
        draw(Texts([TextSource(str(folder / "half.txt.gz"), count=5)]))
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt\.gz"):
        draw(Texts([TextSource("nothing", count=5)]), folder)


def test_corruptions_are_graded_and_differ():
    sentence = "The old cat was sitting on a red mat"
    rng = random.Random(0)
    seen = set()
    for _ in range(40):
        found = corrupt(sentence, ["train", "bird"], rng, 3)
        assert len(found) == len(set(found)) == 3
        assert sentence not in found
        seen |= set(found)
    own = set(sentence.lower().split())
    foreign = [len(set(text.lower().split()) - own - {"not"}) for text in seen]
    assert max(foreign) > 1  # half of the words replaced
    assert 0 in foreign
    assert any("was not" in text for text in seen)
    assert any(text in ("The old cat was", "the old cat was") for text in seen)  # a half
    assert any(set(text.lower().split()) == {"old", "cat", "sitting", "red", "mat"} for text in seen)  # telegraphic
    assert corrupt("go", ["train"], rng) == []


def test_a_corruption_group_of_one_is_refused(folder):
    (folder / "short.txt").write_text("stop\n")
    with pytest.raises(ValueError, match="a group of one text teaches nothing"):
        draw(Texts([TextSource(str(folder / "short.txt"), "corruptions", 5, words=(1, 9))]))
    with pytest.raises(ValueError, match="corruptions must be >= 1"):
        TextSource("x", "corruptions", 5, corruptions=0)


def test_contrasts_keep_the_topic_and_change_the_question_or_the_judgement(folder):
    rng = random.Random(0)
    for question, rest in (
        ("Who wrote the old book?", " wrote the old book?"),
        ("what kind of cat is on the mat", " is on the mat"),
        ("How many people live in the red house", " people live in the red house"),
    ):
        found = contrasts(question, rng, 5)
        assert len({*found, question}) == 6
        assert all(other.endswith(rest) and other[0].isupper() == question[0].isupper() for other in found)
    assert len(contrasts("who wrote it", rng, 99)) == len(QUESTIONS) - 1
    opposite, same, *_ = contrasts("The food was good, and I loved it.", rng, 4)
    words = {number: {word for word in side.split()} for number, side in enumerate(_JUDGEMENTS[0])}
    for judged, side in ((opposite, 1), (same, 0)):
        assert judged.split()[3].strip(",") in words[side] - {"good"}
        assert judged.split()[:3] + judged.split()[4:6] == ["The", "food", "was", "and", "I"]
    assert opposite.split()[6] in "hated disliked regretted despised avoided"
    assert contrasts("Better late than never", rng) == ["Worse late than never"]
    assert not has_contrast("The cat sits on the mat.")
    assert contrasts("The cat sits on the mat.", rng) == []
    lines = ["The cat sits on the mat.", "what is on the old mat", "A good cat sits on it."]
    (folder / "some.txt").write_text("\n".join(lines))
    source = TextSource(str(folder / "some.txt"), "contrasts", 9, words=(3, 9), corruptions=2)
    corpus = draw(Texts([source]), folder)
    assert sorted(corpus.texts[bundle[0]] for bundle in corpus.bundles) == [
        "A good cat sits on it.",
        "what is on the old mat",
    ]
    assert [len(bundle) for bundle in corpus.bundles] == [3, 3]
    (folder / "none.txt").write_text(lines[0])
    with pytest.raises(ValueError, match="no text"):
        draw(Texts([TextSource(str(folder / "none.txt"), "contrasts", 9, words=(3, 9))]), folder)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "either `count` or `share`"),
        ({"count": 1, "words": (5, 2)}, "fewest, most"),
        ({"count": 1, "title": "t"}, "title is for kind: passages"),
        ({"count": 1, "kind": "passages", "titled": 0.5}, "need `title`"),
        ({"count": 1, "kind": "passages", "join": True}, "join is for texts"),
    ],
)
def test_sources_that_cannot_be_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        TextSource("x", **values)
