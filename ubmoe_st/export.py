"""Export: one view of a checkpoint as a plain model of another tool: transformers, ONNX, OpenVINO, llama.cpp.

Nothing here is read back by this package. Every file is written for stock readers, under the names that most of
them know: sentence-transformers with its backends, vLLM, text-embeddings-inference, onnxruntime, llama.cpp.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from torch import Tensor, nn

from ubmoe_st import checkpoint as layout
from ubmoe_st.bases import save_tokenizer
from ubmoe_st.export_gguf import generator_state, write_gguf
from ubmoe_st.files import replacing_by_name, replacing_folder
from ubmoe_st.model import REQUIREMENTS, UBMoE

View = Literal["encoder", "generator"]
Format = Literal["hf", "gguf", "onnx", "openvino"]
Quantization = Literal["f16", "int8"]

_NEEDS = {
    "hf": (),
    "gguf": ("gguf",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
}
_QUANTIZATIONS: dict[str, tuple[str, ...]] = {
    "hf": (),
    "gguf": ("f16", "int8"),
    "onnx": ("int8",),
    "openvino": ("int8",),
}
_ONNX_FILE_LIMIT_BYTES = 1_800_000_000
"""Protobuf ends at 2 GB; larger weights go into a file beside the graph."""

PEAK_LIMIT = 150.0
"""A linear layer whose largest input is so many times the mean size of its inputs is kept in fp32 by int8."""

CALIBRATION: tuple[str, ...] = (
    "The train to the coast leaves at 7:45 from platform 3.",
    "How do I copy a folder with all its files?",
    "She put the kettle on, opened the window and waited for the rain.",
    "Interest rates rose by a quarter of a point in March, the third increase this year.",
    "red shoes",
    "Two dogs run after a ball on a wet lawn.",
    "def area(radius): return 3.14159 * radius ** 2",
    "Water boils at a lower temperature in the mountains because the air presses less on it.",
    "The committee has not decided yet whether the bridge will be repaired or replaced.",
    "Was ist der Unterschied zwischen einem Fluss und einem Kanal?",
    "A man is slicing an onion.",
    "Nobody in the village remembered when the mill had stopped working.",
    "Error 404: the page that you asked for was not found on this server.",
    "The patient was given 50 mg twice a day for two weeks and recovered fully.",
    "what causes the seasons",
    "Prices include tax; delivery takes three to five working days within the country.",
    "He plays the violin in an orchestra and repairs clocks in his free time.",
    "The cell wall gives a plant its shape and keeps it from taking up too much water.",
    "Le musée est fermé le lundi.",
    "In 1969 two men walked on the Moon while a third one stayed in orbit.",
    "A list keeps the order of its entries, a set does not, and neither is a dictionary.",
    "Three children are building a castle of sand near the sea, and a woman takes a picture of them.",
    "Please find the signed contract attached, and let me know if anything is missing.",
    "The smallest planet of the solar system is also the fastest one.",
    "Is it safe to leave a phone charging overnight?",
    "The court found that the company had known of the fault for at least six years.",
    "Parse a CSV file and print the sum of its second column.",
    "Bread, milk, eggs, two lemons",
    "Most birds of this species leave for the south in October and come back in April.",
    "The film is long, slow and beautiful; I would not watch it a second time.",
    "Light needs about eight minutes from the Sun to the Earth.",
    "The old stadium, in which the team had played since 1923, was torn down last summer to make room for a park, a "
    "library and some four hundred flats, most of which were sold before the first stone had been laid.",
)
"""Sentences of many kinds, to measure the ranges of activations with when a caller gives none."""

# The names that every reader of sentence-transformers folders knows.
_MODULE_NAMES = {Pooling: "Pooling", Dense: "Dense", Normalize: "Normalize"}
_PARTS = re.compile(
    r"onnx|openvino|\d+_(Pooling|Dense|Normalize)"
    r"|(modules|sentence_bert_config|config_sentence_transformers|generation_config)\.json"
)
_POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


def export(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    view: View = "encoder",
    format: Format = "hf",
    quantize: Quantization | None = None,
    calibration: Sequence[str] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write one view of a checkpoint as a plain model, all or nothing.

    Args:
        checkpoint: A checkpoint folder or the Hub id of one.
        out: Folder to write; for `gguf` a file that ends in `.gguf`.
        view: `encoder` (full attention, `bi` experts) or `generator` (the base model).
        format: `hf`: safetensors for transformers and sentence-transformers, in the dtype of the checkpoint. `onnx`,
            `openvino`: a graph in fp32 with dynamic batch and length; of the generator without KV cache. `gguf`: one
            file for llama.cpp, in fp32.
        quantize: `int8`: 8-bit weights (and activations, for `onnx` and `openvino`, of the encoder only). `f16`:
            16-bit weights, for `gguf`. None: no quantisation.
        calibration: Texts to measure activations with, for `int8` of `onnx` and `openvino`. None: `CALIBRATION`.
        overwrite: Replace what is there.

    Returns:
        `out`, `view`, `format`, `quantize`, `bytes` written, and `kept_fp32`, the layers that int8 left alone.

    Raises:
        FileExistsError: If `out` is there and `overwrite` is False.
        ImportError: If a library is missing; names the extra.
        ValueError: If an argument is unknown, or the format cannot hold this model.
    """
    target = Path(out)
    _check_arguments(target, view, format, quantize, overwrite)
    dtype: dict[str, Any] = {} if format == "hf" else {"model_kwargs": {"dtype": torch.float32}}
    model = UBMoE(checkpoint, device="cpu", **dtype)
    kept: list[str] = []
    if format == "gguf":
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing_by_name(target, unique=True) as temporary:
            write_gguf(model, temporary, view, quantize)
        size = target.stat().st_size
    else:
        with replacing_folder(target, overwrite=overwrite, keep=layout.is_of_others) as folder:
            texts = list(calibration) if calibration is not None else list(CALIBRATION)
            kept = _write_folder(model, folder, view, format, quantize, texts)
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            written = {entry.name for entry in folder.iterdir()}
        _remove_old_parts(target, written)
    return {"out": str(target), "view": view, "format": format, "quantize": quantize, "bytes": size, "kept_fp32": kept}


def _remove_old_parts(target: Path, written: set[str]) -> None:
    """Of an export that was overwritten, remove what the new one does not have; the files of others stay."""
    for entry in target.iterdir():
        if entry.name in written or not _PARTS.fullmatch(entry.name):
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


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
    if quantize == "int8" and view == "generator" and format in ("onnx", "openvino"):
        raise ValueError(f"int8 of the generator is not written as {format}; take --format gguf --quantize int8")
    needed = (*_NEEDS[format], *(("nncf",) if format == "openvino" and quantize else ()))
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"format {format} needs {', '.join(missing)}: pip install 'ubmoe-st[{format}]'")
    if format == "gguf" and target.suffix != ".gguf":
        raise ValueError(f"format gguf writes one file: expected a name that ends in .gguf, got {target}")
    inside = next((f for f in (target, *target.resolve().parents) if layout.is_checkpoint(f)), None)
    if inside is not None:
        raise FileExistsError(f"{inside} is a checkpoint, which an export does not change; choose another folder")
    taken = target.exists() if format == "gguf" else target.is_file() or (target.is_dir() and any(target.iterdir()))
    if taken and not overwrite:
        raise FileExistsError(f"{target} exists; choose another name, or pass --overwrite")
    if target.is_dir() and format == "gguf":
        raise FileExistsError(f"{target} is a folder; expected the name of a file to write")


def _write_folder(
    model: UBMoE, folder: Path, view: str, format: str, quantize: str | None, calibration: list[str]
) -> list[str]:
    kept: list[str] = []
    if view == "encoder":
        _write_encoder_files(model, folder, baked=format != "hf")
    else:
        _write_generator_files(model, folder)
    if format == "hf":
        _write_safetensors(model, folder, view)
    else:
        graph = _EncoderGraph(model) if view == "encoder" else _GeneratorGraph(model)
        ratios = _peaks(model, calibration) if quantize else {}
        kept = [name for name, ratio in ratios.items() if ratio > PEAK_LIMIT]
        if format == "onnx":
            (folder / "onnx").mkdir()
            _write_onnx(graph, folder / "onnx" / "model.onnx", kept if quantize else None)
        else:
            (folder / "openvino").mkdir()
            feeds = _feeds(model, calibration) if quantize else None
            _write_openvino(graph, folder / "openvino" / "openvino_model.xml", kept, feeds)
    (folder / "README.md").write_text(_readme(model, view, format, quantize), encoding="utf-8")
    return kept


# --- the files around the weights ----------------------------------------------------------------------------------


def _write_encoder_files(model: UBMoE, folder: Path, *, baked: bool) -> None:
    """Config, tokenizer and sentence-transformers modules.

    Args:
        model: The checkpoint.
        folder: Where to.
        baked: Whether full attention is part of a graph, and not something that transformers has to honour.
    """
    views: Any = model[0]
    config = views.model.config
    stock = config.to_dict() | {"is_causal": False, "architectures": [type(views.model).__name__]}
    stock = {key: value for key, value in stock.items() if key not in ("_name_or_path", "_attn_implementation")}
    rope = stock.get("rope_parameters") or {}
    if "rope_theta" in rope:
        # The key of transformers before version 5; text-embeddings-inference and others read no other.
        stock["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            stock["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if config.model_type == "llama":
        # What text-embeddings-inference reads in the place of `is_causal`. Gemma gives this key another meaning.
        stock["use_bidirectional_attention"] = True
    _write_json(folder / "config.json", stock)
    _write_tokenizer(model, folder, batches=baked)
    _write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": model[0].max_seq_length, "do_lower_case": False}
    )
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    behind: list[Any] = list(model)[1:]
    for index, module in enumerate(behind, 1):
        name = next((short for kind, short in _MODULE_NAMES.items() if type(module) is kind), None)
        if name is None:
            raise ValueError(
                f"module {index} of the checkpoint is a {type(module).__name__}; exports know "
                f"{', '.join(_MODULE_NAMES.values())}"
            )
        path = folder / f"{index}_{name}"
        path.mkdir()
        module.save(str(path))
        if isinstance(module, Pooling):
            # Not sorted: some readers take the first key that is true for the mode.
            (path / "config.json").write_text(json.dumps(_pooling_config(module), indent=2) + "\n", encoding="utf-8")
        modules.append(
            {"idx": index, "name": str(index), "path": path.name, "type": f"sentence_transformers.models.{name}"}
        )
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    settings: dict[str, Any] = {
        "model_type": "SentenceTransformer",
        "prompts": dict(model.prompts),
        "default_prompt_name": model.default_prompt_name,
        "similarity_fn_name": model.similarity_fn_name,
    }
    if not baked:
        settings["requirements"] = REQUIREMENTS
    _write_json(folder / "config_sentence_transformers.json", settings)


def _pooling_config(pooling: Pooling) -> dict[str, Any]:
    modes = [pooling.pooling_mode] if isinstance(pooling.pooling_mode, str) else list(pooling.pooling_mode)
    return {
        "word_embedding_dimension": pooling.embedding_dimension,
        **{key: mode in modes for mode, key in _POOLING_KEYS.items()},
        "include_prompt": pooling.include_prompt,
    }


def _write_generator_files(model: UBMoE, folder: Path) -> None:
    lm = model.generator
    config = lm.config.to_dict() | {"architectures": [type(lm).__name__]}
    _write_json(
        folder / "config.json", {k: v for k, v in config.items() if k not in ("_name_or_path", layout.CONFIG_KEY)}
    )
    if lm.generation_config is not None:
        lm.generation_config.save_pretrained(folder)
    _write_tokenizer(model, folder, batches=False)


def _write_tokenizer(model: UBMoE, folder: Path, *, batches: bool) -> None:
    """The tokenizer as transformers 4 and 5 read it.

    Args:
        model: The checkpoint.
        folder: Where to.
        batches: Whether `tokenizer.json` itself pads and truncates, for readers without transformers.
    """
    tokenizer: Any = model.tokenizer
    save_tokenizer(tokenizer, folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(file, {key: value for key, value in config.items() if key not in ("is_local", "local_files_only")})
    if not batches or not (folder / "tokenizer.json").is_file():
        return
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    side = "Left" if tokenizer.padding_side == "left" else "Right"
    pad = tokenizer.pad_token or tokenizer.eos_token
    content["padding"] = {
        "strategy": "BatchLongest",
        "direction": side,
        "pad_to_multiple_of": None,
        "pad_id": tokenizer.convert_tokens_to_ids(pad),
        "pad_type_id": 0,
        "pad_token": pad,
    }
    length: Any = model[0].max_seq_length
    if length is not None:
        content["truncation"] = {
            "direction": "Right",
            "max_length": int(length),
            "strategy": "LongestFirst",
            "stride": 0,
        }
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _write_safetensors(model: UBMoE, folder: Path, view: str) -> None:
    views: Any = model[0]
    alignment = 0
    if views.folder is not None:
        alignment = layout.data_start(views.folder / layout.SHARED_FILE) % layout.CACHE_LINE
    state = views.encoder_state() if view == "encoder" else generator_state(model.generator)
    layout.save_tensors(state, folder / "model.safetensors", alignment)


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


# --- graphs ----------------------------------------------------------------------------------------------------------


class _EncoderGraph(nn.Module):
    """The encoder view and what stands behind it, as one function of two tensors."""

    def __init__(self, model: UBMoE) -> None:
        super().__init__()
        views: Any = model[0]
        self.network = views.model
        self.behind = nn.ModuleList(list(model)[1:])
        self.outputs = ["last_hidden_state", "sentence_embedding"]
        leaves_out = any(isinstance(module, Pooling) and not module.include_prompt for module in self.behind)
        if leaves_out and any(model.prompts.values()):
            # How many tokens are prompt is known to sentence-transformers, not to a graph.
            self.outputs = ["last_hidden_state"]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """(B, T), (B, T) -> hidden states (B, T, D), and vectors (B, D')."""
        hidden = self.network(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        if len(self.outputs) == 1:
            return (hidden,)
        features: dict[str, Any] = {"token_embeddings": hidden, "attention_mask": attention_mask}
        module: Any
        for module in self.behind:
            features = module(features)
        return hidden, features["sentence_embedding"]


class _GeneratorGraph(nn.Module):
    """The generator view without KV cache."""

    def __init__(self, model: UBMoE) -> None:
        super().__init__()
        self.network = model.generator
        self.outputs = ["logits"]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """(B, T), (B, T) -> logits (B, T, V)."""
        return (self.network(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits,)


def _example() -> tuple[Tensor, Tensor]:
    # Not 0 or 1 in any dimension, and padded: a tracer takes neither for a constant.
    ids = torch.arange(14).reshape(2, 7) % 5 + 3
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return ids, mask


def _write_onnx(graph: Any, file: Path, peaks: list[str] | None) -> None:
    """Export a graph with `torch.onnx`.

    Args:
        graph: The graph.
        file: `model.onnx`.
        peaks: Linear layers to keep in fp32 in an int8 model. None: no quantisation.
    """
    ids, mask = _example()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("sequence")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph.eval(),
            (ids, mask),
            input_names=["input_ids", "attention_mask"],
            output_names=graph.outputs,
            dynamic_shapes={"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}},
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx returned no program")
    nodes = _onnx_nodes(program.model, peaks) if peaks else []
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # traces with the paths of this machine
    size = sum(p.numel() * p.element_size() for p in graph.parameters())
    if peaks is None:
        _save_onnx(program, file, external=size > _ONNX_FILE_LIMIT_BYTES)
        return
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
        plain = Path(temporary) / "plain.onnx"
        _save_onnx(program, plain, external=size > _ONNX_FILE_LIMIT_BYTES)
        quantize_dynamic(
            plain,
            file,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            # Seven bits: processors without VNNI add pairs of products in 16 bits, which eight bits overflow.
            reduce_range=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=nodes,
            use_external_data_format=size > 4 * _ONNX_FILE_LIMIT_BYTES,
        )


def _save_onnx(program: Any, file: Path, *, external: bool) -> None:
    program.save(str(file), external_data=external)
    sidecar = file.with_name(f"{file.name}.data")
    if not sidecar.is_file():
        return
    import onnx

    # The one name under which optimum finds it.
    model = onnx.load(str(file), load_external_data=False)
    wanted = f"{file.name}_data"
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = wanted
    sidecar.rename(file.with_name(wanted))
    onnx.save(model, str(file))


def _onnx_nodes(model: Any, layers: Sequence[str]) -> list[str]:
    """Names of the matrix products of linear layers, `layers.0.mlp.down_proj`."""
    found: dict[str, str] = {}
    for node in model.graph.all_nodes():
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        for layer in layers:
            if f"network.{layer}" in scopes:
                found[layer] = node.name
    lost = [layer for layer in layers if layer not in found]
    if lost:
        raise RuntimeError(f"the ONNX graph has no matrix product for {lost[0]}; export without --quantize")
    return list(found.values())


def _write_openvino(graph: Any, file: Path, peaks: list[str], feeds: list[dict[str, Any]] | None) -> None:
    """Convert a graph with OpenVINO.

    Args:
        graph: The graph.
        file: `openvino_model.xml`.
        peaks: Linear layers to keep in fp32 in an int8 model.
        feeds: Inputs to measure activations with. None: no quantisation.
    """
    import openvino

    ids, mask = _example()
    network = graph.network
    if "logits" in graph.outputs or "sliding_attention" in (getattr(network.config, "layer_types", None) or ()):
        # A row of padding may see nothing at all. OpenVINO's fused attention makes it NaN, which spreads; the eager
        # one masks with a finite number.
        network.set_attn_implementation("eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = openvino.convert_model(graph.eval(), example_input={"input_ids": ids, "attention_mask": mask})
    for node, name in zip(model.inputs, ("input_ids", "attention_mask"), strict=True):
        node.get_tensor().set_names({name})
    for node, name in zip(model.outputs, graph.outputs, strict=True):
        node.get_tensor().set_names({name})
    if feeds is not None:
        model = _nncf_int8(model, peaks, feeds)
    openvino.save_model(model, file, compress_to_fp16=False)


def _nncf_int8(model: Any, peaks: list[str], feeds: list[dict[str, Any]]) -> Any:
    import logging

    import nncf

    nncf.set_log_level(logging.ERROR)
    names = [operation.get_friendly_name() for operation in model.get_ops() if operation.get_type_name() == "MatMul"]
    ignored = [name for name in names if any(re.search(rf"{re.escape(layer)}(/|$)", name) for layer in peaks)]
    if len(ignored) < len(peaks):
        raise RuntimeError(f"the OpenVINO graph has {len(ignored)} matrix products for the {len(peaks)} layers to keep")
    return nncf.quantize(
        model,
        nncf.Dataset(feeds),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(feeds),
        ignored_scope=nncf.IgnoredScope(names=ignored),
    )


def _feeds(model: UBMoE, texts: list[str]) -> list[dict[str, Any]]:
    views: Any = model[0]
    feeds = []
    for text in texts:
        batch = views.preprocess([text])
        feeds.append({name: batch[name].numpy() for name in ("input_ids", "attention_mask")})
    return feeds


def _peaks(model: UBMoE, texts: list[str]) -> dict[str, float]:
    """Largest input of each linear layer of the encoder, in units of the mean size of its inputs.

    A few huge inputs widen the scale that all inputs of a layer share in int8, until the others round to nothing.

    Args:
        model: The checkpoint.
        texts: Texts to measure with.

    Raises:
        ValueError: If there are no texts.
    """
    if not texts:
        raise ValueError("int8 needs texts to measure activations with, got none")
    largest: dict[str, float] = {}
    total: dict[str, tuple[float, int]] = {}
    handles = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            size = inputs[0].detach().abs()
            largest[name] = max(largest.get(name, 0.0), float(size.max()))
            mean, count = total.get(name, (0.0, 0))
            total[name] = (mean + float(size.sum()), count + size.numel())

        return hook

    views: Any = model[0]
    encoder = views.model
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(watch(name)))
    try:
        with torch.inference_mode():
            for text in texts:
                batch = views.preprocess([text])
                encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: largest[name] * count / max(amount, 1e-30) for name, (amount, count) in total.items()}


# --- the card --------------------------------------------------------------------------------------------------------


def _readme(model: UBMoE, view: str, format: str, quantize: str | None) -> str:
    config = model.ubmoe_config
    base = config.base_model if config else "unknown"
    what = "encoder view (full attention, `bi` experts)" if view == "encoder" else "generator view (the base model)"
    kind = f"{format}, {quantize}" if quantize else format
    library = "sentence-transformers" if view == "encoder" else "transformers"
    lines = [
        "---",
        f"library_name: {library}",
        f"pipeline_tag: {'sentence-similarity' if view == 'encoder' else 'text-generation'}",
        *([f"base_model: {base}"] if "/" in base else []),
        "---",
        "",
        f"The {what} of a UBMoE checkpoint on {base}, exported as {kind}.",
        "",
        "```python",
        _snippet(view, format),
        "```",
        "",
    ]
    if view == "encoder" and any(model.prompts.values()):
        shown = ", ".join(f"{name}: {text!r}" for name, text in model.prompts.items() if text)
        lines += [f"Prompts ({shown}) are put before a text by sentence-transformers, not by the tokenizer.", ""]
    return "\n".join(lines)


_ENCODER_INPUTS = """from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")  # pads and truncates
batch = tokenizer.encode_batch(["a text", "another text"])
inputs = {"input_ids": np.array([x.ids for x in batch])}
inputs["attention_mask"] = np.array([x.attention_mask for x in batch])"""
_GENERATOR_INPUTS = """
ids = np.array([[1, 2, 3]])  # a whole text: there is no KV cache
inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}"""


def _snippet(view: str, format: str) -> str:
    """Python that runs an export from within its folder, with as few libraries as possible."""
    if format == "hf" and view == "encoder":
        return """from sentence_transformers import SentenceTransformer

print(SentenceTransformer(".").encode(["a text", "another text"]).shape)"""
    if format == "hf":
        return """from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
print(tokenizer.decode(model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=20)[0]))"""
    inputs = _ENCODER_INPUTS if view == "encoder" else _GENERATOR_INPUTS
    output = "sentence_embedding" if view == "encoder" else "logits"
    if format == "onnx":
        return f"""import numpy as np
import onnxruntime
{inputs}
session = onnxruntime.InferenceSession("onnx/model.onnx")
print(session.run(["{output}"], inputs)[0].shape)"""
    return f"""import numpy as np
import openvino
{inputs}
model = openvino.compile_model("openvino/openvino_model.xml", "CPU")
print(model(inputs)["{output}"].shape)"""
