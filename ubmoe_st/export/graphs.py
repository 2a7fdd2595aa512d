"""Export as a graph, ONNX or OpenVINO: one function from token ids and mask to vectors, or to logits."""

from __future__ import annotations

import ast
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn

from ubmoe_st.compute import calibration_texts
from ubmoe_st.model import UBMoE

PEAK_LIMIT = 150.0
"""A linear layer whose largest input is so many times the mean size of its inputs is kept in fp32 by int8."""
ONNX_FILE_LIMIT_BYTES = 1_800_000_000
"""Protobuf ends at 2 GB; larger weights go into a file beside the graph."""


def write_graph(
    model: UBMoE,
    folder: Path,
    view: str,
    format: str,
    quantize: str | None,
    calibration: Sequence[str] | None,
    peak_limit: float,
) -> tuple[list[str], str]:
    """Write a view as `onnx/model.onnx` or `openvino/openvino_model.xml`.

    Args:
        model: The checkpoint, in fp32.
        folder: Of the export.
        view: `encoder` or `generator`.
        format: `onnx` or `openvino`.
        quantize: None or `int8`.
        calibration: Texts to measure activations with, for `int8`. None: those of `calibration.txt`.
        peak_limit: See `PEAK_LIMIT`.

    Returns:
        The linear layers that int8 left in fp32, and the last output: vectors or logits, if the graph has them.
    """
    graph = EncoderGraph(model) if view == "encoder" else GeneratorGraph(model)
    texts = calibration_texts() if calibration is None else list(calibration)
    kept = [name for name, ratio in peaks(model, texts).items() if ratio > peak_limit] if quantize else []
    (folder / format).mkdir()
    if format == "onnx":
        write_onnx(graph, folder / "onnx" / "model.onnx", kept if quantize else None)
    else:
        inputs = _feeds(model, texts) if quantize else None
        _write_openvino(graph, folder / "openvino" / "openvino_model.xml", kept, inputs)
    return kept, graph.outputs[-1]


class EncoderGraph(nn.Module):
    """The encoder view and what stands behind it, as one function of two tensors."""

    def __init__(self, model: UBMoE) -> None:
        super().__init__()
        views: Any = model[0]
        self.network = views.model
        self.behind = nn.ModuleList(list(model)[1:])
        self.truncate_dim = model.truncate_dim
        self.outputs = ["last_hidden_state", "sentence_embedding"]
        leaves_out = any(isinstance(module, Pooling) and not module.include_prompt for module in self.behind)
        if leaves_out and any(model.prompts.values()):
            # How many tokens are prompt is known to sentence-transformers, not to a graph.
            self.outputs = ["last_hidden_state"]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """(B, T), (B, T) -> hidden states (B, T, D), and the vectors that `encode` gives, (B, D')."""
        hidden = self.network(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        if len(self.outputs) == 1:
            return (hidden,)
        features: dict[str, Any] = {"token_embeddings": hidden, "attention_mask": attention_mask}
        module: Any
        for module in self.behind:
            features = module(features)
        return hidden, features["sentence_embedding"][:, : self.truncate_dim]


class GeneratorGraph(nn.Module):
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


def write_onnx(graph: Any, file: Path, peaks: list[str] | None, file_limit_bytes: int = ONNX_FILE_LIMIT_BYTES) -> None:
    """Export a graph with `torch.onnx`.

    Args:
        graph: The graph.
        file: `model.onnx`.
        peaks: Linear layers to keep in fp32 in an int8 model. None: no quantisation.
        file_limit_bytes: Larger weights go into a file beside the graph.
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
        _save_onnx(program, file, external=size > file_limit_bytes)
        return
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # A byte each; everything else, as the embeddings, stays in four.
    linears = {name: module for name, module in graph.named_modules() if isinstance(module, nn.Linear)}
    quantised = sum(m.weight.numel() for name, m in linears.items() if name.removeprefix("network.") not in peaks)
    with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
        plain = Path(temporary) / "plain.onnx"
        _save_onnx(program, plain, external=size > file_limit_bytes)
        quantize_dynamic(
            plain,
            file,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            # Seven bits: processors without VNNI add pairs of products in 16 bits, which eight bits overflow.
            reduce_range=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=nodes,
            use_external_data_format=size - 3 * quantised > file_limit_bytes,
        )
    _name_weights(file)


def _save_onnx(program: Any, file: Path, *, external: bool) -> None:
    program.save(str(file), external_data=external)
    _name_weights(file)


def _name_weights(file: Path) -> None:
    """Give the file of weights beside a graph, where there is one, the one name under which optimum finds it."""
    sidecar = file.with_name(f"{file.name}.data")
    if not sidecar.is_file():
        return
    import onnx

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
        raise RuntimeError(f"the ONNX graph has no matrix product for {lost[0]}; export it with quantize=None")
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


def peaks(model: UBMoE, texts: list[str]) -> dict[str, float]:
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
