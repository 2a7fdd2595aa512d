"""Export: one view of a checkpoint as a plain model of another tool: transformers, ONNX, OpenVINO, llama.cpp."""

from .core import Format, Quantization, View, export

__all__ = ["Format", "Quantization", "View", "export"]
