"""An index that changes: additions, deletions and compaction against a plain dictionary, with readers and kills."""

from __future__ import annotations

import json
import signal
import threading

import numpy as np
import pytest
from helpers.encoders import HashEncoder, Stops
from helpers.index_driver import CUT, drive

from ubmoe_st.index import CorpusError, EmbeddingIndex, core
from ubmoe_st.index.search import Searcher
from ubmoe_st.index.workplace import Workplace


def check(index: EmbeddingIndex, expected: dict[str, str], encoder: HashEncoder) -> None:
    """The index holds exactly `expected` (id to text) and finds it like numpy does."""
    assert len(index) == len(expected)
    assert sorted(index) == sorted(expected)
    order = list(index)
    assert index.texts(order) == [expected[name] for name in order]
    if not order:
        return
    matrix = np.stack([encoder.vector(expected[name]) for name in order])
    scores, ids = index.search("a query", 5)
    cosines = matrix @ encoder.vector("a query")
    best = np.argsort(-cosines, kind="stable")[:5]
    assert ids == [[order[n] for n in best]]
    np.testing.assert_allclose(scores[0], cosines[best], atol=2e-6)


@pytest.mark.parametrize("seed", range(4))
def test_any_series_of_changes_ends_like_a_dictionary(tmp_path, seed):
    encoder = HashEncoder(12)
    generator = np.random.default_rng(seed)
    expected = {f"d{n}": f"text {n}" for n in range(40)}
    rows = [{"id": name, "text": text} for name, text in expected.items()]
    index = EmbeddingIndex.build(encoder, rows, tmp_path / "i", **CUT)
    for step in range(12):
        action = generator.choice(["add", "upsert", "delete", "compact", "skip"])
        names = [f"d{n}" for n in generator.choice(120, 15, replace=False)]
        new = {name: f"text {name} of step {step}" for name in names}
        if action == "add":
            fresh = {name: text for name, text in new.items() if name not in expected}
            if fresh:
                assert index.add([{"id": n, "text": t} for n, t in fresh.items()]) == len(fresh)
            expected |= fresh
        elif action == "upsert":
            index.upsert([{"id": n, "text": t} for n, t in new.items()])
            expected |= new
        elif action == "skip":
            index.add([{"id": n, "text": t} for n, t in new.items()], on_duplicate="skip")
            expected = new | expected
        elif action == "delete":
            known = [name for name in names if name in expected]
            assert index.delete(names, missing_ok=True) == len(known)
            expected = {name: text for name, text in expected.items() if name not in known}
        else:
            index.compact()
            assert index.info["stored_rows"] == len(expected)
        check(index, expected, encoder)
    check(EmbeddingIndex.open(tmp_path / "i", model=encoder, verify=True), expected, encoder)
    assert index.verify() == []


def test_a_document_is_replaced_and_deleted_with_all_its_chunks(tmp_path):
    encoder = HashEncoder(12)
    rows = [{"id": f"d{n}", "text": " ".join(f"w{n}-{m}" for m in range(35))} for n in range(6)]
    index = EmbeddingIndex.build(encoder, rows, tmp_path / "i", chunk_tokens=10, **CUT)
    assert len(index) == 24
    index.upsert([{"id": "d2", "text": "short now"}])
    assert index.texts("d2") == ["short now"]
    assert len(index) == 21
    assert index.delete("d3") == 4
    assert index.delete("d4#1") == 1
    assert [entry.id for entry in index.entries("d4")] == ["d4#0", "d4#2", "d4#3"]
    index.compact()
    assert len(index) == index.info["stored_rows"] == 16
    assert [entry.id for entry in index.entries("d4")] == ["d4#0", "d4#2", "d4#3"]
    with pytest.raises(KeyError, match="'d3'"):
        index.delete(["d1", "d3"])
    assert len(index.entries("d1")) == 4


def test_neighbouring_versions_of_one_id_are_told_apart(tmp_path):
    rows = [{"id": "a", "text": "w " * 25}, {"id": "a", "text": "v " * 25}, {"id": "a", "text": "u " * 25}]
    index = EmbeddingIndex.build(HashEncoder(12), rows, tmp_path / "i", chunk_tokens=10, on_duplicate="upsert")
    assert len(index) == 3
    assert {text[0] for text in index.texts("a")} == {"u"}


def test_an_addition_that_was_stopped_goes_on_and_guards_the_index(tmp_path):
    encoder = HashEncoder(16, batch_noise=1e-3)
    first = [{"id": f"d{n}", "text": f"some text number {n}"} for n in range(20)]
    more = [{"id": f"e{n}", "text": f"some more text number {n}"} for n in range(60)]
    EmbeddingIndex.build(encoder, first, tmp_path / "i", **CUT)
    index = EmbeddingIndex.open(tmp_path / "i", model=Stops(12))
    with pytest.raises(KeyboardInterrupt):
        index.add(more)
    assert len(EmbeddingIndex.open(tmp_path / "i", verify=True)) == 20
    index = EmbeddingIndex.open(tmp_path / "i", model=encoder)
    for change in (lambda: index.delete("d1"), index.compact, lambda: index.reindex("flat")):
        with pytest.raises(ValueError, match="has not finished"):
            change()
    with pytest.raises(CorpusError, match="not the one this build began with"):
        index.add(more[1:])
    assert index.add(more) == 60
    whole = EmbeddingIndex.build(encoder, first, tmp_path / "whole", **CUT)
    whole.add(more)
    names = list(index)
    assert names == list(whole)
    assert index.vectors(names).tobytes() == whole.vectors(names).tobytes()
    index.add([{"id": "z", "text": "last"}])
    assert len(index) == 81


def test_an_addition_that_is_repeated_after_its_commit_is_done_already(tmp_path, monkeypatch):
    """Killed between the commit and the clearing up, or simply called again: the count, and nothing changes."""
    encoder = HashEncoder(16)
    more = [{"id": f"e{n}", "text": f"some more text number {n}"} for n in range(60)]
    index = EmbeddingIndex.build(encoder, [{"id": "a", "text": "b"}], tmp_path / "i", **CUT)

    clear = Workplace.clear

    def stop(workplace):
        if EmbeddingIndex.open(workplace.folder).version == 2:
            raise KeyboardInterrupt
        return clear(workplace)

    with monkeypatch.context() as patch:
        patch.setattr(Workplace, "clear", stop)
        with pytest.raises(KeyboardInterrupt):
            index.add(more)
    assert (tmp_path / "i" / "build" / "journal.json").exists()
    index = EmbeddingIndex.open(tmp_path / "i", model=encoder)
    done = len(encoder.batches)
    assert index.add(more) == 60
    assert not (tmp_path / "i" / "build").exists()
    assert index.add(more) == 60
    assert (len(index), index.version, len(encoder.batches)) == (61, 2, done), "something was embedded again"
    with pytest.raises(CorpusError, match="'e0' is already there"):
        index.add(row for row in more)
    assert index.discard_unfinished()
    with pytest.raises(CorpusError, match="'e0' is already there"):
        index.add(more[:59])
    assert index.discard_unfinished()
    index.reindex("int8")
    done = len(encoder.batches)
    assert (index.add(more), index.version, len(encoder.batches)) == (60, 3, done), "that changes no row"
    index.delete("e5")
    with pytest.raises(CorpusError, match="'e0' is already there"):
        index.add(more)


def test_a_stopped_addition_can_be_thrown_away(tmp_path):
    EmbeddingIndex.build(HashEncoder(16), [{"id": "a", "text": "b"}], tmp_path / "i", **CUT)
    index = EmbeddingIndex.open(tmp_path / "i", model=Stops(6))
    with pytest.raises(KeyboardInterrupt):
        index.add([{"id": f"e{n}", "text": f"some more text number {n}"} for n in range(60)])
    assert index.discard_unfinished()
    assert not index.discard_unfinished()
    assert index.delete("a") == 1
    assert len(index) == 0
    assert index.search(np.ones(16), 3)[0].shape == (1, 0)
    with pytest.raises(ValueError, match="nothing to compact"):
        index.compact()


def test_an_addition_with_another_model_is_refused(tmp_path):
    EmbeddingIndex.build(HashEncoder(16), [{"id": "a", "text": "b"}], tmp_path / "i")
    with pytest.raises(ValueError, match="not the model"):
        EmbeddingIndex.open(tmp_path / "i", model=HashEncoder(16, salt="x"))
    with pytest.raises(ValueError, match="open it with model="):
        EmbeddingIndex.open(tmp_path / "i").add([{"id": "c", "text": "d"}])


def test_readers_see_one_version_while_a_writer_works(tmp_path):
    """Rows always come in pairs of versions; a reader that opens at any time finds a whole version."""
    encoder = HashEncoder(8)
    rows = [{"id": f"d{n}", "text": f"version 0 of {n}"} for n in range(30)]
    writer = EmbeddingIndex.build(encoder, rows, tmp_path / "i", **CUT)
    stop, problems, seen = threading.Event(), [], set()

    def read() -> None:
        mine = HashEncoder(8)
        while not stop.wait(0.01):
            try:
                index = EmbeddingIndex.open(tmp_path / "i", model=mine)
                for _ in range(3):
                    texts = index.texts([f"d{n}" for n in range(30)])
                    versions = {text.split()[1] for text in texts}
                    assert len(versions) == 1, versions
                    assert index.search("q", 50)[0].shape == (1, 30)
                seen.update(versions)
            except Exception as error:
                problems.append(error)
                return

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for version in range(1, 9):
        writer.upsert([{"id": f"d{n}", "text": f"version {version} of {n}"} for n in range(30)])
        if version % 4 == 0:
            writer.compact()
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems, problems[0]
    assert len(seen) > 1


def test_a_kill_during_any_change_leaves_the_old_or_the_new_version(tmp_path):
    """Add, delete, compact, reindex and BM25 are killed at each of their renames; then a new writer takes over."""
    body = """
    import shutil
    out = Path(sys.argv[3])
    rows = [{"id": f"d{n}", "text": f"some text number {n}"} for n in range(40)]
    encoder = HashEncoder(16)
    whole = out / "whole"
    EmbeddingIndex.build(encoder, rows, whole, window_tokens=60, batch_tokens=20, segment_rows=25)
    more = [{"id": f"d{n}", "text": f"changed text number {n}"} for n in range(30, 50)]
    fresh = [{"id": f"e{n}", "text": f"fresh text number {n}"} for n in range(20)]
    changes = {
        "add": lambda index: index.upsert(more),
        "new": lambda index: index.add(fresh),
        "delete": lambda index: index.delete([f"d{n}" for n in range(5)]),
        "compact": lambda index: index.compact(),
        "reindex": lambda index: index.reindex("faiss:SQ8"),
        "bm25": lambda index: index.build_bm25(),
    }
    first = EmbeddingIndex.open(whole, model=encoder)
    first.delete("d39")
    real, kills = os.replace, 0
    for name, change in changes.items():
        at = 0
        outcome = "killed"
        while outcome == "killed":
            at += 3  # odd: before a rename, even: after it
            folder = out / f"{name}-{at}"
            shutil.copytree(whole, folder)
            def work():
                index = EmbeddingIndex.open(folder, model=encoder)
                count = 0
                def replace(a, b):
                    nonlocal count
                    count += 1
                    if 2 * count - 1 == at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    real(a, b)
                    if 2 * count == at:
                        os.kill(os.getpid(), signal.SIGKILL)
                os.replace = replace
                change(index)
            outcome = finish(attempt(work))
            kills += outcome == "killed"
            def again():
                index = EmbeddingIndex.open(folder, model=encoder, verify=True)
                before = [f"d{n}" for n in range(39)]
                added = {"add": [f"d{n}" for n in range(39, 50)], "new": [row["id"] for row in fresh]}.get(name, [])
                after = before[5:] if name == "delete" else before + added
                state = sorted(index)
                if state not in (sorted(before), sorted(after)):
                    raise ValueError(state)
                if not (name == "delete" and state == sorted(after)):
                    change(index)
                if sorted(index) != sorted(after) or index.verify():
                    raise ValueError(f"{sorted(index)} {index.verify()}")
                index.compact()
                scores, ids = index.search("some text number 9", 1)
                if ids != [["d9"]] or index.verify() or list(folder.rglob("*.tmp")):
                    raise ValueError(f"{ids} {index.verify()} {list(folder.rglob('*.tmp'))}")
            finish(attempt(again))
    print(kills)
    """
    (tmp_path / "c.jsonl").write_text(json.dumps({"id": "a", "text": "b"}))
    assert int(drive(body, str(tmp_path / "c.jsonl"), str(tmp_path))) > 18
    assert signal.SIGKILL


def test_automatic_ids_go_on_where_they_ended(tmp_path):
    encoder = HashEncoder(12)
    index = EmbeddingIndex.build(encoder, ["first", "second"], tmp_path / "i")
    assert index.add(["third"]) == 1
    assert index.upsert(["fourth", "fifth"]) == 2
    check(index, dict(zip("01234", ("first", "second", "third", "fourth", "fifth"))), encoder)
    assert index.add(["fourth", "fifth"], on_duplicate="upsert") == 2  # the last thing added, again: nothing is done
    assert len(index) == 5
    index.delete(["3", 4])
    index.compact()
    assert index.add(iter([{"text": "sixth", "id": 5}])) == 1
    assert list(index) == ["0", "1", "2", "5"]
    numbered = EmbeddingIndex.build(encoder, [{"text": "a"}, {"text": "b"}], tmp_path / "n", id_field=None)
    numbered.add([{"text": "c"}])
    check(numbered, {"0": "a", "1": "b", "2": "c"}, encoder)


def test_the_same_rows_by_another_rule_are_no_repetition(tmp_path):
    encoder = HashEncoder(12)
    rows = [{"id": "a", "text": "old text"}, {"id": "b", "text": "bee"}]
    index = EmbeddingIndex.build(encoder, rows, tmp_path / "i")
    new = [{"id": "a", "text": "new text"}, {"id": "c", "text": "cee"}]
    assert index.add(new, on_duplicate="skip") == 1
    version = index.info["version"]
    assert index.add(new, on_duplicate="skip") == 1  # again: nothing is done
    assert index.info["version"] == version
    assert index.upsert(new) == 2
    check(index, {"a": "new text", "b": "bee", "c": "cee"}, encoder)
    twice = [{"id": "a", "text": "first"}, {"id": "a", "text": "second"}]
    for rule, text in (("skip", "first"), ("upsert", "second")):
        made = EmbeddingIndex.build(encoder, twice, tmp_path / rule, on_duplicate=rule)
        assert made.texts("a") == EmbeddingIndex.build(encoder, twice, tmp_path / rule, on_duplicate=rule).texts("a")
        assert made.texts("a") == [text]
        for other in {"raise", "skip", "upsert"} - {rule}:
            with pytest.raises(ValueError, match="another corpus, model or options"):
                EmbeddingIndex.build(encoder, twice, tmp_path / rule, on_duplicate=other)
    # A rule that had nothing to decide may be another one.
    for first, second in (("raise", "upsert"), ("skip", "raise")):
        made = EmbeddingIndex.build(encoder, rows, tmp_path / f"{first}-{second}", on_duplicate=first)
        again = EmbeddingIndex.build(encoder, rows, tmp_path / f"{first}-{second}", on_duplicate=second)
        assert again.info["version"] == made.info["version"]
    bad = [*rows, {"id": "c", "text": ""}]
    EmbeddingIndex.build(encoder, bad, tmp_path / "bad", on_bad_row="skip")
    with pytest.raises(ValueError, match="another corpus, model or options"):
        EmbeddingIndex.build(encoder, bad, tmp_path / "bad")


@pytest.mark.parametrize("change", [lambda i: i.delete(["a"]), lambda i: i.add([{"id": "c", "text": "cee"}])])
def test_a_build_over_an_index_that_was_changed_says_so(tmp_path, change):
    rows = [{"id": "a", "text": "a text"}, {"id": "b", "text": "bee"}]
    index = EmbeddingIndex.build(HashEncoder(12), rows, tmp_path / "i")
    change(index)
    with pytest.raises(ValueError, match=r"has been changed since it was built.*build_bm25\(\)"):
        EmbeddingIndex.build(HashEncoder(12), rows, tmp_path / "i")
    assert len(EmbeddingIndex.open(tmp_path / "i")) == len(index)


def test_an_addition_without_ids_is_resumed_under_the_same_ids(tmp_path):
    def texts():
        return [f"text {n}" for n in range(60)]

    EmbeddingIndex.build(HashEncoder(16, batch_noise=1e-3), ["zero"], tmp_path / "i", **CUT)
    with pytest.raises(KeyboardInterrupt):
        EmbeddingIndex.open(tmp_path / "i", model=Stops(4)).add(texts())
    assert (tmp_path / "i" / "build" / "journal.json").is_file()
    index = EmbeddingIndex.open(tmp_path / "i", model=HashEncoder(16, batch_noise=1e-3))
    assert index.add(texts()) == 60
    assert list(index) == [str(number) for number in range(61)]
    assert index.texts(60) == ["text 59"]


def test_a_document_may_be_called_like_a_chunk_of_another(tmp_path):
    rows = [{"id": "page", "text": "a b c d"}, {"id": "page#0", "text": "e f g h"}]
    index = EmbeddingIndex.build(HashEncoder(12), rows, tmp_path / "i", chunk_tokens=2)
    assert list(index) == ["page#0", "page#1", "page#0#0", "page#0#1"]
    assert "page#0" in index
    for ambiguous in (index.texts, index.vectors, index.delete):
        with pytest.raises(ValueError, match="a document and also a chunk"):
            ambiguous("page#0")
    assert index.texts("page#0", namespace="chunk") == ["a b"]
    assert index.texts("page#0", namespace="document") == ["e f", "g h"]
    assert index.vectors(list(index), namespace="chunk").shape == (4, 12)
    assert index.delete("page#0", namespace="document") == 2
    assert index.delete("page#0", namespace="document", missing_ok=True) == 0
    assert list(index) == ["page#0", "page#1"]
    with pytest.raises(ValueError, match="namespace is document, chunk or None"):
        index.texts("page", namespace="row")


def test_whole_numbers_are_ids_in_every_method(tmp_path):
    rows = [{"id": np.int64(n), "text": f"row {n} and on", "title": f"T{n}"} for n in range(5)]
    index = EmbeddingIndex.build(HashEncoder(12), rows, tmp_path / "i", chunk_tokens=2)
    assert 3 in index
    assert np.int32(3) in index
    assert "3" in index
    assert 9 not in index
    assert None not in index
    assert index.texts(np.int64(3)) == index.texts("3")
    assert index.vectors([np.int64(3), 4]).shape == (4, 12)
    assert index.delete(np.int64(3)) == 2


def test_filters_see_id_title_and_parent(tmp_path):
    encoder = HashEncoder(12)
    rows = [{"id": n, "text": f"row {n} and on", "title": f"T{n}" if n else None, "n": n} for n in range(5)]
    index = EmbeddingIndex.build(encoder, rows, tmp_path / "i", chunk_tokens=2)

    def found(spec, index=index):
        return sorted(index.search("a query", 20, filter=spec)[1][0])

    assert found({"parent": 3}) == found({"parent": "3"}) == found({"title": "T3"}) == ["3#0", "3#1"]
    assert found({"id": ["1#0", "4#1"]}) == ["1#0", "4#1"]
    assert found({"title": {"exists": False}}) == ["0#0", "0#1"]
    assert found(lambda fields: fields["parent"] == "2" and fields["n"] == 2) == ["2#0", "2#1"]
    plain = EmbeddingIndex.build(
        encoder, [{"key": f"k{n}", "id": n, "text": f"r {n}"} for n in range(12)], tmp_path / "p", id_field="key"
    )
    assert found({"id": {">=": 10}}, plain) == ["k10", "k11"], "a row's own field comes first"
    assert found({"id": ["7", 8]}, plain) == ["k7", "k8"]


@pytest.mark.parametrize("change", ["compact", "rebuild", "bm25"])
def test_an_open_reader_keeps_its_words_and_its_model(tmp_path, change):
    """What a reader has not used yet is of its version, too, when a writer has replaced it."""
    encoder = HashEncoder(12)
    rows = [{"id": f"d{n}", "text": f"word{n % 7} word{n % 5} and text {n}"} for n in range(40)]
    writer = EmbeddingIndex.build(encoder, rows, tmp_path / "i")
    writer.build_bm25()
    expected = {mode: writer.search("word3 text", 5, mode=mode) for mode in ("bm25", "hybrid")}
    reader, other = EmbeddingIndex.open(tmp_path / "i"), EmbeddingIndex.open(tmp_path / "i")
    before = tmp_path / "i" / reader.info["bm25"]["folder"]
    probes = tmp_path / "i" / reader.info["model"]["probes"]["file"]
    writer.delete([f"d{n}" for n in range(20)])
    if change == "compact":
        writer.compact()
    elif change == "bm25":
        writer.build_bm25()
    else:
        EmbeddingIndex.build(HashEncoder(12, salt="other"), rows[:9], tmp_path / "i", overwrite=True)
        assert not probes.exists(), "the probes are still there, so this test would be vacuous"
    assert not before.exists(), "the BM25 part is still there, so this test would be vacuous"
    reader.check_same_model(other)
    reader.use_model(encoder)
    for mode, (scores, ids) in expected.items():
        found = reader.search("word3 text", 5, mode=mode)
        assert found[1] == ids
        np.testing.assert_array_equal(found[0], scores)


@pytest.mark.parametrize("opened_with_model", [True, False])
def test_a_text_query_during_a_refresh_brings_no_model_of_the_old_version(tmp_path, monkeypatch, opened_with_model):
    old, new = HashEncoder(12), HashEncoder(12, salt="other")
    rows = [{"id": f"d{n}", "text": f"word{n} and text"} for n in range(9)]
    EmbeddingIndex.build(old, rows, tmp_path / "i")
    reader = EmbeddingIndex.open(tmp_path / "i", model=old if opened_with_model else None)
    probes = reader._snapshot.probes.copy()
    monkeypatch.setattr(reader, "find_model", lambda: old if np.array_equal(reader._snapshot.probes, probes) else new)
    EmbeddingIndex.build(new, rows, tmp_path / "i", overwrite=True)
    asked = []

    def searcher(*args):
        thread = threading.Thread(target=lambda: asked.append(reader.search("word3 and text", 1)[1]))
        thread.start()
        thread.join()
        return Searcher(*args)

    monkeypatch.setattr(core, "Searcher", searcher)
    assert reader.refresh()
    assert asked == [[["d3"]]]
    assert reader.search("word5 and text", 1)[1] == [["d5"]]
    assert reader.model is new
