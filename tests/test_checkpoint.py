"""A checkpoint that is not whole is refused before anything is built, and saving is all or nothing."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentence_transformers.sentence_transformer.modules import Dense, Pooling

from ubmoe_st import UBMoE, UBMoEConfig
from ubmoe_st import checkpoint as layout
from ubmoe_st.checkpoint import CheckpointError
from ubmoe_st.files import sha256_of


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_an_untouched_checkpoint_passes(copy):
    assert layout.check_checkpoint(copy).base_architecture == "LlamaForCausalLM"
    files = {p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()} - {layout.SUMS_FILE}
    assert set(layout.verify_sums(copy)) == files
    UBMoE(str(copy), verify=True)


@pytest.mark.parametrize(
    "name",
    [
        layout.SHARED_FILE,
        layout.BI_FILE,
        layout.INDEX_FILE,
        layout.UNI_FILE,
        layout.DELTA_FILE,
        layout.GENERATOR_CONFIG,
    ],
)
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=name.rpartition("/")[2]):
        UBMoE(str(copy))


@pytest.mark.parametrize("name", [layout.SHARED_FILE, layout.BI_FILE, layout.UNI_FILE, layout.DELTA_FILE])
@pytest.mark.parametrize("cut", [1, 5000, "header", "all"])
def test_a_truncated_shard_is_named(copy, name, cut):
    file = copy / name
    data = file.read_bytes()
    keep = {"header": 40, "all": 0}.get(cut, len(data) - cut if isinstance(cut, int) else 0)
    file.write_bytes(data[: max(keep, 0)])
    with pytest.raises(CheckpointError, match=rf"{name} is (truncated|not a safetensors)"):
        UBMoE(str(copy))


@pytest.mark.parametrize("name", [layout.SHARED_FILE, layout.BI_FILE, layout.UNI_FILE, layout.DELTA_FILE])
def test_facts_name_a_missing_shard(copy, name):
    layout.facts(copy)
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        layout.facts(copy)


def test_every_changed_byte_is_found_by_verify(copy):
    for file in [p for p in sorted(copy.rglob("*")) if p.is_file() and p.name != layout.SUMS_FILE]:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        original = file.read_bytes()
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=f"{file.name} has changed"):
            UBMoE(str(copy), verify=True)
        file.write_bytes(original)
    with open(copy / layout.SUMS_FILE, "a") as sums:
        sums.write("\n")
    layout.verify_sums(copy)


@pytest.mark.parametrize(
    "name", ["generator/generation_config.json", "chat_template.jinja", "1_Pooling/added.json", "spiece.model"]
)
def test_a_file_that_was_added_and_is_read_is_found_by_verify(copy, name):
    for harmless in (".gitattributes", "generator/.DS_Store", "notes.txt", "runs/config.json"):
        (copy / harmless).parent.mkdir(exist_ok=True)
        (copy / harmless).write_text("{}")
    layout.verify_sums(copy)
    (copy / name).unlink(missing_ok=True)
    layout.write_sums(copy)
    layout.verify_sums(copy)
    (copy / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"SHA256SUMS: {name} is not listed"):
        UBMoE(str(copy), verify=True)


def test_an_index_that_names_an_absent_file(copy):
    edit(copy / layout.INDEX_FILE, lambda c: c["weight_map"].update({"norm.weight": "model-other.safetensors"}))
    with pytest.raises(CheckpointError, match=r"names model-other.safetensors, which is missing"):
        UBMoE(str(copy))


def test_an_index_that_leads_out_of_the_folder(copy):
    edit(copy / layout.INDEX_FILE, lambda c: c["weight_map"].update({"norm.weight": "../x.safetensors"}))
    with pytest.raises(CheckpointError, match="is not a file beside it"):
        UBMoE(str(copy))


def header_of(file):
    """The header of a safetensors file, and what follows."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_header(file, header, data):
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def link_out(folder):
    outside = shutil.move(folder / layout.BI_FILE, folder.parent / "bi.safetensors")
    (folder / layout.BI_FILE).symlink_to(outside)
    return "model-bi.safetensors is a link out"


def link_the_generator_out(folder):
    outside = shutil.move(folder / "generator", folder.parent / "elsewhere")
    (folder / "generator").symlink_to(outside)
    return "generator is a link out"


def lead_a_module_out(folder):
    shutil.copytree(folder / "1_Pooling", folder.parent / "1_Pooling")
    edit(folder / "modules.json", lambda modules: modules[1].update(path="../1_Pooling"))
    return "modules.json names the folder"


def name_a_module_at_length(folder):
    edit(folder / "modules.json", lambda modules: modules[1].update(path="x" * 300))
    return "modules.json names the folder"


def name_a_file_at_length(folder):
    edit(folder / layout.INDEX_FILE, lambda index: index["weight_map"].update({"norm.weight": "x" * 300}))
    return "is not a file beside it"


def halve_a_surrogate_pair(folder):
    """Python's JSON takes it; the library that reads the tensors does not."""
    header, data = header_of(folder / layout.BI_FILE)
    header["__metadata__"] = {"format": "\ud800"}
    put_header(folder / layout.BI_FILE, header, data)
    return "its header is not JSON"


def lay_weights_beside(folder):
    """transformers prefers one file to an index, and would read other weights than were checked."""
    shutil.copy(folder / layout.SHARED_FILE, folder / "model.safetensors")
    return "model.safetensors lies beside"


def pickle_a_module(folder):
    (folder / "1_Pooling" / "pytorch_model.bin").write_bytes(b"")
    return "1_Pooling/pytorch_model.bin is a pickle"


def ask_for_many_layers(folder):
    """The shapes would be looked up in a model made for it, layer by layer."""
    edit(folder / "config.json", lambda config: config.update(num_hidden_layers=10**9, layer_types=None))
    return "asks for 1000000000 layers"


def nest_json_deeply(folder):
    (folder / layout.INDEX_FILE).write_text("[" * 200_000)
    return "index.json is not valid JSON"


def nest_a_header_deeply(folder):
    data = (folder / layout.BI_FILE).read_bytes()
    (folder / layout.BI_FILE).write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000 + data)
    return "its header is not JSON"


def overlap_two_tensors(folder):
    """The length fits, and two tensors would be read from the same place."""
    header, data = header_of(folder / layout.BI_FILE)
    first, second = [key for key in header if key.endswith("up_proj.weight")][:2]
    header[first]["data_offsets"] = header[second]["data_offsets"]
    put_header(folder / layout.BI_FILE, header, data)
    return "is said to be at"


def claim_an_endless_tensor(folder):
    header, data = header_of(folder / layout.BI_FILE)
    next(entry for key, entry in header.items() if key.endswith("up_proj.weight"))["shape"] = [2**40, 2**20]
    put_header(folder / layout.BI_FILE, header, data)
    return "is said to be at"


def map_tensors_to_a_number(folder):
    edit(folder / layout.INDEX_FILE, lambda index: index["weight_map"].update({"layers.0.mlp.up_proj.weight": 3}))
    return "expected a `weight_map`"


@pytest.mark.parametrize(
    "change",
    [
        link_out,
        link_the_generator_out,
        lead_a_module_out,
        name_a_module_at_length,
        name_a_file_at_length,
        halve_a_surrogate_pair,
        lay_weights_beside,
        pickle_a_module,
        ask_for_many_layers,
        nest_json_deeply,
        nest_a_header_deeply,
        overlap_two_tensors,
        claim_an_endless_tensor,
        map_tensors_to_a_number,
    ],
)
def test_what_leads_astray_is_refused_before_it_is_read(copy, change):
    with pytest.raises(CheckpointError, match=change(copy)):
        layout.check_checkpoint(copy)


def test_links_of_the_hubs_cache_and_links_inside_are_read(copy, tmp_path):
    """As the Hub's client lays out a snapshot: every file is a link to a blob."""
    snapshot = tmp_path / "models--org--m" / "snapshots" / "0123"
    blobs = tmp_path / "models--org--m" / "blobs"
    blobs.mkdir(parents=True)
    shutil.copy(copy / layout.SHARED_FILE, copy / "generator" / layout.SHARED_FILE)  # as on the Hub
    layout.write_sums(copy)
    stored = layout.facts(copy)["bytes"]["stored"]
    for number, file in enumerate(path for path in copy.rglob("*") if path.is_file()):
        name = snapshot / file.relative_to(copy)
        name.parent.mkdir(parents=True, exist_ok=True)
        name.symlink_to(shutil.move(file, blobs / str(number)))
    (tmp_path / "link").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "link"):
        layout.check_checkpoint(path)
        layout.verify_sums(path)
        UBMoE(str(path), verify=True)
    assert layout.facts(snapshot)["layers"] == 3
    assert layout.facts(snapshot)["bytes"]["stored"] == stored
    second = snapshot / "generator" / layout.SHARED_FILE
    second.unlink()
    second.symlink_to((snapshot / layout.SHARED_FILE).resolve())
    held = sum(file.stat().st_size for file in blobs.iterdir())
    assert layout.facts(snapshot)["bytes"]["stored"] == held - second.stat().st_size


@pytest.mark.parametrize("behind", [[], ["Dense"]])
@pytest.mark.parametrize("modes", ["mean", ("mean", "max")])
def test_facts_count_the_dimensions_of_a_vector(checkpoint, tmp_path, modes, behind):
    pooling = Pooling(32, modes)
    behind = [Dense(pooling.get_embedding_dimension(), 5) for _ in behind]
    model = UBMoE(modules=[UBMoE(str(checkpoint))[0], pooling, *behind], device="cpu")
    model.save(str(tmp_path / "m"))
    assert layout.facts(tmp_path / "m")["dimension"] == model.encode("a cat").shape[0]


@pytest.mark.parametrize("name", ["../outside.txt", "absolute", "linked.txt"])
def test_checksums_of_files_elsewhere_are_refused(copy, tmp_path, name):
    (tmp_path / "outside.txt").write_text("x")
    (copy / "linked.txt").symlink_to(tmp_path / "outside.txt")
    name = str(tmp_path / "outside.txt") if name == "absolute" else name
    with open(copy / layout.SUMS_FILE, "a") as sums:
        sums.write(f"{sha256_of(tmp_path / 'outside.txt')}  {name}\n")
    with pytest.raises(CheckpointError, match="which is not in"):
        layout.verify_sums(copy)


@pytest.mark.parametrize("name", [layout.SHARED_FILE, layout.BI_FILE, layout.UNI_FILE, layout.DELTA_FILE])
def test_a_wrong_shape_is_named(copy, name):
    tensors = load_file(copy / name)
    key = sorted(tensors)[0]
    tensors[key] = torch.zeros(*[size + 1 for size in tensors[key].shape])
    save_file(tensors, copy / name)
    with pytest.raises(CheckpointError, match=name):
        UBMoE(str(copy))


def test_a_newer_layout_says_how_to_update(copy):
    edit(copy / layout.GENERATOR_CONFIG, lambda c: c["ubmoe"].update(layout_version=99, news=1))
    with pytest.raises(CheckpointError, match=r"layout version 99.*pip install -U"):
        UBMoE(str(copy))


def test_a_stock_model_folder_is_refused_with_the_way_out(base):
    with pytest.raises(CheckpointError, match="upcycle"):
        UBMoE(str(base))


def test_config_round_trip_and_bad_values():
    config = UBMoEConfig("org/base", "LlamaForCausalLM", expert_rank=16)
    assert UBMoEConfig.from_dict(config.to_dict()) == config
    for change, message in (
        ({"routing": "both"}, "routing must be one of"),
        ({"routing": "router"}, "names no router kind"),
        ({"router": "gate"}, "router must be one of"),
        ({"expert_rank": 0}, "at least 1"),
        ({"colour": "red"}, "unknown keys"),
    ):
        with pytest.raises(ValueError, match=message):
            UBMoEConfig.from_dict({**config.to_dict(), **change})


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_save_leaves_the_old_checkpoint(copy, monkeypatch, error):
    model = UBMoE(str(copy))
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(layout, "write_sums", fail)
    with pytest.raises(error if isinstance(error, type) else OSError):
        model.save(str(copy))
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]
    with pytest.raises(error if isinstance(error, type) else OSError):
        model.save(str(copy.parent / "new"))
    assert not (copy.parent / "new").exists()


def test_saving_over_a_checkpoint_keeps_the_files_of_others(copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "old-shard.safetensors").write_bytes(b"x")
    UBMoE(str(copy)).save(str(copy))
    assert (copy / "notes.txt").read_text() == "mine"
    assert not (copy / "old-shard.safetensors").exists()
    UBMoE(str(copy))


@pytest.mark.parametrize("alignment", [0, 8, 24, 56])
def test_tensors_start_where_asked(tmp_path, alignment):
    file = tmp_path / "t.safetensors"
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7)}
    layout.save_tensors(tensors, file, alignment)
    assert layout.data_start(file) % 64 == alignment
    assert all(torch.equal(load_file(file)[key], tensor) for key, tensor in tensors.items())


def test_the_same_model_is_written_as_the_same_bytes(checkpoint, tmp_path):
    """Ten times: the order that safetensors gives two values of metadata is drawn anew for each file."""
    model = UBMoE(str(checkpoint))
    sums = set()
    for number in range(10):
        model.save(str(tmp_path / str(number) / checkpoint.name))
        sums.add((tmp_path / str(number) / checkpoint.name / layout.SUMS_FILE).read_text())
    assert len(sums) == 1
    assert sums == {(checkpoint / layout.SUMS_FILE).read_text()}
    for name in (layout.BI_FILE, layout.DELTA_FILE):
        with safe_open(checkpoint / name, "pt") as file:
            assert len(file.metadata()) == 2
