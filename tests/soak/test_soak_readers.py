"""Every reader of files that somebody else may have made: a documented error or a right answer.

Nothing outside of the folder is opened, nothing is unpickled, and memory is bounded while it reads.
"""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.encoders import HashEncoder
from helpers.models import TEXTS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from training.command import read_recipe
from training.recipe import ContrastiveRecipe
from ubmoe_st import EmbeddingIndex
from ubmoe_st import checkpoint as layout
from ubmoe_st.bases import resolve_base
from ubmoe_st.checkpoint import CheckpointError
from ubmoe_st.experts import load_low_rank, load_routers
from ubmoe_st.files import read_json
from ubmoe_st.index.corpus import Corpus, CorpusError, CorpusFields
from ubmoe_st.index.manifest import Journal, Manifest
from ubmoe_st.index.storage import map_npy
from ubmoe_st.shards import TensorFiles

MEMORY = 1 << 30
"""Bytes that a reader may take beyond what the process has."""
BAIT = "bait.json"
NASTY = [
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", " ", "x", ".", "..", "/", "\x00", "\ud800", "x" * 5000, f"../{BAIT}", f"../../{BAIT}", "generator",
    [], {}, [None], [[]], {"": None}, ["x", 1], [-1, 10**12], [10**9] * 9,
]  # fmt: skip
DEEP = b"[" * 200_000
watched: dict[str, list] | None = None


def _audit(event: str, arguments: tuple) -> None:
    if watched is not None:
        if event == "open" and BAIT in str(arguments[0]):
            watched["outside"].append(arguments[0])
        elif event == "pickle.find_class":
            watched["unpickled"].append(arguments)


sys.addaudithook(_audit)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Refuses to let a reader open the bait, unpickle anything or take much memory."""
    global watched
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    watched = {"outside": [], "unpickled": []}
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        found, watched = watched, None
    assert found == {"outside": [], "unpickled": []}


def mutated_json(draw: st.DrawFn, content: bytes) -> bytes:
    """A JSON text with one value replaced, removed or added."""
    document = json.loads(content)
    place, key = None, None
    inner = document
    while isinstance(inner, dict | list) and inner and (place is None or draw(st.integers(0, 4))):
        key = draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        place, inner = inner, inner[key]
    value = draw(st.sampled_from(NASTY))
    how = draw(st.integers(0, 9))
    if place is None or how == 0:
        document = value
    elif how == 1:
        del place[key]
    elif how == 2 and isinstance(place, dict):
        place[draw(st.sampled_from(["", "..", f"../{BAIT}", "x"]))] = place.pop(key)
    elif how == 3 and isinstance(inner, int):
        place[key] = draw(st.integers(-(2**70), 2**70))
    else:
        place[key] = value
    return json.dumps(document).encode()


def mutated_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """A file that was cut, or in which bytes were changed, added or taken out."""
    how = draw(st.integers(0, 4))
    begin = draw(st.integers(0, max(0, min(len(content) - 1, 3000) if draw(st.booleans()) else len(content) - 1)))
    if how == 0:
        return content[:begin]
    if how == 1:
        return draw(st.sampled_from([b"", DEEP, b"{" + b'"a":' + DEEP, b"\x00" * 100, b"\xff" * 100]))
    piece = draw(st.binary(min_size=1, max_size=16))
    if how == 2:
        return content[:begin] + piece + content[begin + len(piece) :]
    if how == 3:
        return content[:begin] + piece + content[begin:]
    return content[:begin] + content[begin + len(piece) :]


def mutated_safetensors(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file whose header was mutated and may still have its right length."""
    if draw(st.booleans()):
        return mutated_bytes(draw, content)
    length = int.from_bytes(content[:8], "little")
    header = mutated_json(draw, content[8 : 8 + length])
    stated = draw(st.sampled_from([len(header), len(header), len(header), 0, length, 2**63, 99_999_999]))
    return stated.to_bytes(8, "little") + header + content[8 + length :]


def mutated_npy(draw: st.DrawFn, content: bytes) -> bytes:
    """A .npy file with another header."""
    if draw(st.booleans()):
        return mutated_bytes(draw, content)
    descr = draw(st.sampled_from(["<f4", "|O", "<U9", "V8", ">f4", "", "<f4,<f4", "<M8[s]", "xx"]))
    shape = draw(st.sampled_from([(3,), (-1, 4), (2**62, 4), (10**12, 10**12), (), (0, 0), (3.5, 4), ("x",), None]))
    header = {"descr": descr, "fortran_order": draw(st.sampled_from([False, True, None, "x"])), "shape": shape}
    text = draw(st.sampled_from([repr(header), "(" * 3000, "[" * 9000 + "]" * 9000, "{", "__import__('os')"]))
    data = (text + "\n").encode("latin1")
    version = draw(st.sampled_from([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"]))
    size = len(data).to_bytes(2 if version == b"\x01\x00" else 4, "little", signed=False)
    return b"\x93NUMPY" + version + size + data + content[128:]


def fuzz(
    folder: Path,
    names: list[str],
    read: Callable[[], object],
    allowed: tuple[type[BaseException], ...],
    examples: int,
    extra: Callable[[st.DrawFn, bytes], bytes] | None = None,
) -> tuple[int, int]:
    """Mutate one file of a folder at a time, and read.

    Args:
        folder: What is read; every file is as it was after each example.
        names: The files that are mutated.
        read: The reader.
        allowed: What it may raise.
        examples: How many.
        extra: A mutation beside those of bytes, and of JSON where it is JSON.

    Returns:
        Examples, and how many of them were refused.
    """
    (folder.parent / BAIT).write_text("{}")
    (folder.parent.parent / BAIT).write_text("{}")
    counts, wordless = [0, 0], []

    @st.composite
    def change(draw: st.DrawFn) -> tuple[str, bytes]:
        name = draw(st.sampled_from(names))
        content = (folder / name).read_bytes()
        ways = [mutated_bytes]
        if extra is not None and not name.endswith(".json"):
            ways += [extra, extra]
        if name.endswith(".json"):
            ways += [mutated_json] * 4
        return name, draw(st.sampled_from(ways))(draw, content)

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(change())
    def run(changed: tuple[str, bytes]) -> None:
        name, content = changed
        counts[0] += 1
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        try:
            with guarded():
                read()
        except allowed as error:
            counts[1] += 1
            wordless.extend([] if str(error) else [error])
        finally:
            (folder / name).write_bytes(before)

    run()
    read()  # it is as it was
    assert wordless == []
    assert counts[1] > examples // 4, "hardly anything was refused: the changes do not matter"
    return counts[0], counts[1]


@pytest.fixture
def report(figure):
    return lambda name, found: figure(f"{name}: {found[0]:,} changed files read, {found[1]:,} refused")


@pytest.fixture
def model(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "inner" / "m"))


def test_checkpoints(model, amount, report):
    def read():
        layout.check_checkpoint(model)
        layout.facts(model)

    jsons = [layout.INDEX_FILE, layout.GENERATOR_CONFIG, "config.json", "modules.json"]
    report("JSON of checkpoints", fuzz(model, jsons, read, (CheckpointError,), amount(60, 3000)))
    weights = [layout.SHARED_FILE, layout.BI_FILE, layout.UNI_FILE, layout.DELTA_FILE]
    found = fuzz(model, weights, read, (CheckpointError,), amount(60, 3000), mutated_safetensors)
    report("safetensors of checkpoints", found)


def test_checksums(model, amount, report):
    sums = layout.SUMS_FILE

    def lines(draw: st.DrawFn, content: bytes) -> bytes:
        name = draw(st.sampled_from([f"../{BAIT}", f"../../{BAIT}", str(model.parent / BAIT), "..", "", "\x00", "x"]))
        return content + f"{'0' * 64}  {name}\n".encode()

    report(sums, fuzz(model, [sums], lambda: layout.verify_sums(model), (CheckpointError,), amount(60, 3000), lines))


def test_experts_and_safetensors(model, tmp_path, amount, report):
    delta = model / layout.DELTA_FILE
    routers = tmp_path / "inner" / "routers.safetensors"
    from safetensors.torch import save_file
    from torch import ones

    save_file({"layers.0.router.proj.weight": ones(2, 8)}, routers, {"kind": "soft"})

    def read():
        load_low_rank(delta)
        load_routers(routers)
        tensors = TensorFiles([delta])
        assert sum(tensors[name].numel() for name in tensors) > 0

    names = [layout.DELTA_FILE, "../routers.safetensors"]
    report("experts and routers", fuzz(model, names, read, (ValueError,), amount(60, 3000), mutated_safetensors))


def test_indexes(tmp_path, amount, report):
    folder = tmp_path / "inner" / "i"
    rows = [{"id": f"d{n}", "text": f"some text number {n}", "year": n} for n in range(30)]
    encoder = HashEncoder(8)
    index = EmbeddingIndex.build(encoder, rows, folder, segment_rows=16, window_tokens=60, batch_tokens=20)
    index.delete("d3")

    def read():
        index = EmbeddingIndex.open(folder)
        index.search(np.ones(8, np.float32), 3, filter={"year": {"<": 20}})
        index.search(np.ones(8, np.float32), 3)
        list(index)
        index.entries("d5")
        repr(index.info)

    report(
        "index_info.json", fuzz(folder, ["index_info.json"], read, (ValueError, FileNotFoundError), amount(80, 3000))
    )
    arrays = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.npy"))]
    assert len(arrays) > 4
    found = fuzz(
        folder,
        arrays,
        lambda: [map_npy(folder / name) for name in arrays],
        (ValueError,),
        amount(60, 3000),
        mutated_npy,
    )
    report(".npy of indexes", found)
    # With sizes that fit, so that what is inside is read.
    info = json.loads((folder / "index_info.json").read_text())

    def read_any_size():
        for part in [*(f for s in info["segments"] for f in [(s["folder"], s["files"])])]:
            for name, record in part[1].items():
                record["bytes"] = (folder / part[0] / name).stat().st_size
        for record in (info["dead"], info["model"]["probes"]):
            record["bytes"] = (folder / record["file"]).stat().st_size
        (folder / "index_info.json").write_text(json.dumps(info))
        read()

    inside = [*arrays, *(path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.arrow")))]
    found = fuzz(folder, inside, read_any_size, (ValueError, KeyError), amount(80, 3000), mutated_npy)
    report("parts of indexes", found)


def test_journals(tmp_path, amount, report):
    from helpers.encoders import Stops
    from helpers.index_driver import CUT, small

    folder = tmp_path / "inner" / "i"
    folder.parent.mkdir()
    with pytest.raises(KeyboardInterrupt):
        EmbeddingIndex.build(Stops(9), small(tmp_path), folder, **CUT)

    def read():
        Journal.read(folder)
        with contextlib.suppress(FileNotFoundError):
            Manifest.read(folder)

    report("journal.json", fuzz(folder, ["build/journal.json"], read, (ValueError,), amount(60, 3000)))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "jsonl.gz", "parquet", "txt"])
def test_corpora(tmp_path, ending, amount, report):
    import gzip

    folder = tmp_path / "inner" / "c"
    folder.mkdir(parents=True)
    rows = [{"id": f"d{n}", "text": f"some text {n} \U0001f44d", "title": "t", "n": {"a": [n]}} for n in range(20)]
    file = folder / f"c.{ending}"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if ending == "parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pa.parquet.write_table(pa.Table.from_pylist(rows), file)
    elif ending in ("csv", "tsv"):
        mark = "," if ending == "csv" else "\t"
        file.write_text(
            "".join(f"{mark.join(line)}\n" for line in [["id", "text"], *([r["id"], r["text"]] for r in rows)])
        )
    else:
        file.write_bytes(gzip.compress(lines.encode()) if ending.endswith("gz") else lines.encode())

    def deep(draw: st.DrawFn, content: bytes) -> bytes:
        depth = draw(st.sampled_from([10, 200, 330, 480, 600, 900, 990, 5000]))
        nested = '{"a":' * depth + "1" + "}" * depth if draw(st.booleans()) else "[" * depth + "]" * depth
        row = f'{{"id": "x", "text": "y", "m": {nested}}}\n'.encode()
        changed = row + lines.encode()
        return gzip.compress(changed) if ending.endswith("gz") else changed

    fields = CorpusFields(max_row_bytes=4 << 20)
    source = str(folder if ending == "txt" else file)
    extra = deep if ending.startswith("jsonl") else None

    def read():
        found = list(Corpus(source, fields))
        for row in found:
            repr(row)
        if not found or any(hasattr(row, "reason") for row in found):
            raise CorpusError("some rows are bad")

    report(f".{ending}", fuzz(folder, [file.name], read, (CorpusError,), amount(40, 3000), extra))


def test_recipes(tmp_path, amount, report):
    folder = tmp_path / "inner" / "r"
    folder.mkdir(parents=True)
    recipe = {
        "base": "b", "out": "o", "rank": 2, "prompts": {}, "trainer": {"max_steps": 1},
        "sentences": {"files": {"a": 1.0}, "words": [1, 2]},
        "teacher": [{"kind": "sentence-transformers", "model": "m", "folder": "f"}],
        "loss": "similarity", "head": "training",
    }  # fmt: skip
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))

    def values(draw: st.DrawFn, content: bytes) -> bytes:
        if draw(st.booleans()):
            return mutated_json(draw, json.dumps(recipe).encode())
        evil = [
            "!!python/object/apply:os.system [ls]",
            "&a [*a]",
            "!!binary x",
            "? {}",
            "1: 2",
            "{[]: 1}",
            "%YAML 9",
            "---\n---",
        ]
        return content + draw(st.sampled_from([f"{line}\n" for line in evil])).encode()

    def read():
        read_recipe(ContrastiveRecipe, folder / "r.yaml")

    report("recipes", fuzz(folder, ["r.yaml"], read, (ValueError,), amount(24, 3000), values))


def test_adapters(base, tmp_path, amount, report):
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    from ubmoe_st import UBMoETransformer
    from ubmoe_st.adapters import read_adapter

    folder = tmp_path / "inner" / "a"
    config = LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    tuned = get_peft_model(AutoModel.from_pretrained(base), config)
    tuned.save_pretrained(folder)
    found = resolve_base(base)
    module = UBMoETransformer.from_base(base)

    def read():
        read_adapter(module, found, folder)

    names = ["adapter_config.json", "adapter_model.safetensors"]
    allowed = (ValueError, FileNotFoundError)
    report("adapters", fuzz(folder, names, read, allowed, amount(20, 600), mutated_safetensors))


def test_gguf(gguf_checkpoint_of, tmp_path, monkeypatch, amount, report):
    pytest.importorskip("gguf")
    from ubmoe_st.export import export

    folder = tmp_path / "inner" / "g"
    folder.mkdir(parents=True)
    export(gguf_checkpoint_of("llama")[1], folder / "m.gguf", format="gguf", view="generator")
    monkeypatch.setenv("UBMOE_CACHE", str(tmp_path / "cache"))

    def read():
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        resolve_base(folder / "m.gguf")

    report(".gguf", fuzz(folder, ["m.gguf"], read, (ValueError,), amount(6, 200)))


def test_json_of_any_kind(tmp_path, amount, report):
    folder = tmp_path / "inner" / "j"
    folder.mkdir(parents=True)
    (folder / "a.json").write_text(json.dumps({"a": TEXTS}))
    found = fuzz(folder, ["a.json"], lambda: read_json(folder / "a.json"), (ValueError,), amount(80, 3000))
    report("JSON files", found)
