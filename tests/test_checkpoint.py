"""A checkpoint that is not whole is refused before anything is built, and saving is all or nothing."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ubmoe_st import UBMoE, UBMoEConfig
from ubmoe_st import checkpoint as layout
from ubmoe_st.checkpoint import CheckpointError


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


def test_every_changed_byte_is_found_by_verify(copy):
    for file in [p for p in sorted(copy.rglob("*")) if p.is_file() and p.name != layout.SUMS_FILE]:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        original = file.read_bytes()
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=f"{file.name} has changed"):
            UBMoE(str(copy), verify=True)
        file.write_bytes(original)
    layout.verify_sums(copy)


def test_an_index_that_names_an_absent_file(copy):
    edit(copy / layout.INDEX_FILE, lambda c: c["weight_map"].update({"norm.weight": "model-other.safetensors"}))
    with pytest.raises(CheckpointError, match=r"names model-other.safetensors, which is missing"):
        UBMoE(str(copy))


def test_an_index_that_leads_out_of_the_folder(copy):
    edit(copy / layout.INDEX_FILE, lambda c: c["weight_map"].update({"norm.weight": "../x.safetensors"}))
    with pytest.raises(CheckpointError, match="is not a file beside it"):
        UBMoE(str(copy))


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
