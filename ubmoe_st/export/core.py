"""Export: one view of a checkpoint as a plain model of another tool: transformers, ONNX, OpenVINO, llama.cpp.

Nothing here is read back by this package. Every file is written for stock readers, under the names that most of
them know: sentence-transformers with its backends, vLLM, text-embeddings-inference, onnxruntime, llama.cpp.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ubmoe_st.cards import CARD, export_card, with_licence
from ubmoe_st.checkpoint import GENERATOR_FOLDER, is_checkpoint, is_part
from ubmoe_st.export.adapters import write_gguf_lora, write_peft
from ubmoe_st.export.folders import (
    write_cross_encoder_files,
    write_encoder_files,
    write_generator_files,
    write_multi_vector_files,
    write_safetensors,
)
from ubmoe_st.export.gguf import write_gguf
from ubmoe_st.export.graphs import PEAK_LIMIT, write_graph
from ubmoe_st.files import replacing_by_name, replacing_folder
from ubmoe_st.model import UBMoE
from ubmoe_st.streaming import StreamedUBMoE

View = Literal["encoder", "generator"]
Format = Literal["hf", "multivector", "cross-encoder", "gguf", "onnx", "openvino", "peft", "gguf-lora"]
Quantization = Literal["f16", "int8"]

_NEEDS = {
    "hf": (),
    "multivector": (),
    "cross-encoder": (),
    "gguf": ("gguf",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "peft": (),
    "gguf-lora": ("gguf",),
}
_ADAPTERS = ("peft", "gguf-lora")
_FILES = ("gguf", "gguf-lora")
"""Formats of one file."""
_QUANTIZATIONS: dict[str, tuple[str, ...]] = {
    "hf": (),
    "multivector": (),
    "cross-encoder": (),
    "gguf": ("f16", "int8"),
    "onnx": ("int8",),
    "openvino": ("int8",),
    "peft": (),
    "gguf-lora": (),
}
_GRAPHS = ("onnx", "openvino")
"""Folders that an export has and a checkpoint has not."""


def export(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    view: View = "encoder",
    format: Format = "hf",
    quantize: Quantization | None = None,
    calibration: Sequence[str] | None = None,
    peak_limit: float = PEAK_LIMIT,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write one view of a checkpoint as a plain model, all or nothing.

    Args:
        checkpoint: A checkpoint folder or the Hub id of one.
        out: Folder to write; for `gguf` and `gguf-lora` a file that ends in `.gguf`.
        view: `encoder` (full attention, `bi` experts) or `generator` (the base model).
        format: `hf`: safetensors for transformers and sentence-transformers, in the dtype of the checkpoint.
            `multivector`: the encoder for `MultiVectorEncoder` of sentence-transformers, a unit vector for each token,
            compared by MaxSim. `cross-encoder`: the generator for `CrossEncoder` of sentence-transformers, with the
            scores of `UBMoE.rank` by `yes_no`; whatever the `view`. `onnx`, `openvino`: a graph in fp32 with dynamic
            batch and length; of the generator without KV cache. `gguf`: one file for llama.cpp, in fp32. `peft`,
            `gguf-lora`: the low-rank experts alone, as an adapter on the base for PEFT, and for llama.cpp beside the
            base's own GGUF.
        quantize: `int8`: 8-bit weights (and activations, for `onnx` and `openvino`, of the encoder only). `f16`:
            16-bit weights, for `gguf`. None: no quantisation.
        calibration: Texts to measure activations with, for `int8` of `onnx` and `openvino`. None: those of
            `calibration.txt` beside this module.
        peak_limit: `int8` of `onnx` and `openvino` keeps a linear layer in fp32 whose largest input is more than so
            many times the mean size of its inputs.
        overwrite: Replace what is there.

    Returns:
        `out`, `view`, `format`, `quantize`, `bytes` written, and `kept_fp32`, the layers that int8 left alone.

    Raises:
        FileExistsError: If `out` is there and `overwrite` is False.
        ImportError: If a library is missing; names the extra.
        TypeError: If `calibration` is one text.
        ValueError: If an argument is unknown, or the format cannot hold this model.
    """
    target = Path(out)
    _check_arguments(target, view, format, quantize, overwrite)
    _check_int8_arguments(format, quantize, calibration, peak_limit)
    if format == "cross-encoder":
        view = "generator"
    # Of a graph or a cross-encoder the weights are run; the other formats copy them, one tensor at a time.
    if format in ("onnx", "openvino", "cross-encoder"):
        dtype: dict[str, Any] = {} if format == "cross-encoder" else {"model_kwargs": {"dtype": torch.float32}}
        model = UBMoE(checkpoint, device="cpu", **dtype)
    else:
        model = StreamedUBMoE(checkpoint)
    kept: list[str] = []
    output: str | None = None
    if format in _FILES:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing_by_name(target, unique=True) as temporary:
            if format == "gguf":
                write_gguf(model, temporary, view, quantize)
            else:
                write_gguf_lora(model, temporary)
        size = target.stat().st_size
    elif format == "peft":
        with replacing_folder(target, overwrite=overwrite, keep=_is_of_others) as folder:
            write_peft(model, folder)
            _pass_on_terms(model, folder)
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    else:
        with replacing_folder(target, overwrite=overwrite, keep=_is_of_others) as folder:
            if format == "cross-encoder":
                write_cross_encoder_files(model, folder)
            elif format == "multivector":
                write_multi_vector_files(model, folder)
            elif view == "encoder":
                write_encoder_files(model, folder, baked=format != "hf")
            else:
                write_generator_files(model, folder)
            if format in ("hf", "multivector", "cross-encoder"):
                write_safetensors(model, folder, view)
            else:
                kept, output = write_graph(model, folder, view, format, quantize, calibration, peak_limit)
            card = export_card(model.ubmoe_config, model.prompts, view, format, quantize, output)
            (folder / CARD).write_text(card, encoding="utf-8")
            _pass_on_terms(model, folder)
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"out": str(target), "view": view, "format": format, "quantize": quantize, "bytes": size, "kept_fp32": kept}


def _is_of_others(entry: Path) -> bool:
    """Whether an entry of a folder that an export replaces is not a part of an older export."""
    return entry.name == GENERATOR_FOLDER or not (is_part(entry.name) or entry.name in _GRAPHS)


def _pass_on_terms(model: UBMoE, folder: Path) -> None:
    """Terms and notices of the checkpoint, and its licence in the card of the export."""
    views: Any = model[0]
    for name, content in views.notices.items():
        (folder / name).write_bytes(content)
    card = views.folder / CARD
    said = card.read_text(encoding="utf-8") if card.is_file() else ""
    text = (folder / CARD).read_text(encoding="utf-8")
    (folder / CARD).write_text(with_licence(text, model.ubmoe_config, said), encoding="utf-8")


def _check_int8_arguments(
    format: str, quantize: str | None, calibration: Sequence[str] | None, peak_limit: float
) -> None:
    if isinstance(calibration, str):
        raise TypeError("calibration must be a list of texts, got one text")
    given = {"calibration": calibration is not None, "peak_limit": peak_limit != PEAK_LIMIT}
    odd = next((name for name, is_given in given.items() if is_given), None)
    if odd is not None and not (format in _GRAPHS and quantize == "int8"):
        raise ValueError(
            f"{odd} is of int8 of {' and '.join(_GRAPHS)}, and format {format} with quantize={quantize!r} measures no "
            "activations: leave it out"
        )


def _check_arguments(target: Path, view: str, format: str, quantize: str | None, overwrite: bool) -> None:
    if view not in get_args(View):
        raise ValueError(f"view must be one of {', '.join(get_args(View))}, got {view!r}")
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}, got {format!r}")
    if quantize is not None and quantize not in _QUANTIZATIONS[format]:
        known = [name for name, kinds in _QUANTIZATIONS.items() if quantize in kinds]
        hint = (
            f"formats with {quantize}: {', '.join(known)}" if known else f"known: {', '.join(get_args(Quantization))}"
        )
        raise ValueError(f"format {format} cannot be written as {quantize}; {hint}")
    if format == "multivector" and view == "generator":
        raise ValueError("format multivector holds the token vectors of the encoder; leave view='encoder'")
    if format in _ADAPTERS and view == "generator":
        raise ValueError(f"format {format} holds the bi experts; the generator is the base itself, without any adapter")
    if quantize == "int8" and view == "generator" and format in ("onnx", "openvino"):
        raise ValueError(f"int8 of the generator is not written as {format}; take format='gguf' with quantize='int8'")
    needed = (*_NEEDS[format], *(("nncf",) if format == "openvino" and quantize else ()))
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        extra = "gguf" if format in _FILES else format
        raise ImportError(f"format {format} needs {', '.join(missing)}: pip install 'ubmoe-st[{extra}]'")
    if format in _FILES and target.suffix != ".gguf":
        raise ValueError(f"format {format} writes one file: expected a name that ends in .gguf, got {target}")
    inside = next((f for f in (target, *target.resolve().parents) if is_checkpoint(f)), None)
    if inside is not None:
        raise FileExistsError(f"{inside} is a checkpoint, which an export does not change; choose another folder")
    taken = target.exists() if format in _FILES else target.is_file() or (target.is_dir() and any(target.iterdir()))
    if taken and not overwrite:
        raise FileExistsError(f"{target} exists; choose another name, or pass overwrite=True")
    if target.is_dir() and format in _FILES:
        raise FileExistsError(f"{target} is a folder; expected the name of a file to write")
