"""What llama.cpp needs of a checkpoint: a base GGUF, the `bi` experts as an adapter, and a few facts."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ubmoe_st import checkpoint
from ubmoe_st.bases import cache_folder, installed_gguf
from ubmoe_st.files import replacing_by_name, sha256_of
from ubmoe_st.hub import download

_PLACES = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
_VOCABULARY = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generator/generation_config.json")
_ADAPTER = 1  # Part of the name of a written adapter: another one is written anew.

POOLS_WITHOUT_PROMPTS = "pools without its prompts, which llama.cpp cannot"
_PROMPTS = {"query": "", "document": ""}
"""Those of sentence-transformers where a checkpoint names none: its default prompt is not for queries and documents."""


@dataclass(frozen=True)
class Parts:
    """A checkpoint for llama.cpp.

    Attributes:
        gguf: The base model.
        experts: The `bi` experts, `bi_delta.safetensors`.
        pooling: `mean`, `cls` or `lasttoken`.
        include_prompt: Whether the prompt's tokens are pooled, too; llama.cpp cannot leave them out.
        dense: Linear layers behind the pooling: weight, (out, in), and bias, (out,).
        truncate_dim: How many of the first dimensions are kept. None: all.
        max_seq_length: Tokens of the longest text that the encoder reads. None: nothing is said.
        nfc: Whether the tokenizer composes characters first, which llama.cpp does not.
        prompts: Of the encoder, by name.
        default_prompt: Name of the prompt of a text that comes without one.
        chat_template: Jinja template. None: the model does not chat.
        special_tokens: That the template may name: `bos_token`, `eos_token`, ...
        defaults: The base's generation config.
    """

    gguf: Path
    experts: Path
    pooling: str = "mean"
    include_prompt: bool = True
    dense: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    truncate_dim: int | None = None
    max_seq_length: int | None = None
    nfc: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    chat_template: str | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)


def parts_of(path: str | os.PathLike[str], gguf: str | os.PathLike[str] | None = None) -> Parts:
    """The parts of a checkpoint; see `NativeUBMoE.from_checkpoint`."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = download(str(path), wanted="a checkpoint folder or the Hub id of one")
    if not checkpoint.is_checkpoint(folder):
        raise checkpoint.CheckpointError(
            f"{checkpoint.GENERATOR_CONFIG} is missing from {path}: not a UBMoE checkpoint"
        )
    config = checkpoint.read_config(folder)
    if config.expert_rank is None:
        raise ValueError(f"the bi experts of {path} are dense, and llama.cpp takes them as an adapter of low rank only")
    if config.routing != "uni":
        raise ValueError(
            f"{path} generates with routing {config.routing!r}, and llama.cpp with the base model alone; serve it with "
            "engine torch"
        )
    stock = _json(folder / "config_sentence_transformers.json")
    tokenizer = _json(folder / "tokenizer_config.json")
    prompts = _PROMPTS | {name: prompt or "" for name, prompt in (stock.get("prompts") or {}).items()}
    base = Path(gguf).expanduser() if gguf is not None else _base_of(folder, config)
    if not base.is_file():
        raise FileNotFoundError(f"{base} does not exist; expected a GGUF file of {config.base_model}")
    template = folder / "chat_template.jinja"
    modules = _modules_of(folder)
    pooling = _pooling_of(modules, any(prompts.values()))
    named = (name for name in ("bos_token", "eos_token", "pad_token", "unk_token") if name in tokenizer)
    default = stock.get("default_prompt_name")
    return Parts(
        gguf=base,
        experts=folder / checkpoint.DELTA_FILE,
        pooling=str(pooling["pooling_mode"]),
        include_prompt=pooling.get("include_prompt", True),
        dense=_dense_of(modules),
        truncate_dim=stock.get("truncate_dim"),
        max_seq_length=_json(folder / "sentence_bert_config.json").get("max_seq_length")
        or tokenizer.get("model_max_length"),
        nfc=(_json(folder / "tokenizer.json").get("normalizer") or {}).get("type") == "NFC",
        prompts=prompts,
        default_prompt=default if default in prompts else None,
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else tokenizer.get("chat_template"),
        special_tokens={name: _token(tokenizer[name]) for name in named},
        defaults=_json(folder / checkpoint.GENERATOR_FOLDER / "generation_config.json"),
    )


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _token(entry: Any) -> str:
    return str(entry["content"] if isinstance(entry, dict) else entry or "")


def _modules_of(folder: Path) -> list[tuple[str, Path]]:
    """Kind and folder of each sentence-transformers module."""
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    return [(module["type"].rpartition(".")[2], folder / module["path"]) for module in modules]


def _pooling_of(modules: list[tuple[str, Path]], prompted: bool) -> dict[str, Any]:
    """Settings of the pooling."""
    kinds = [kind for kind, _ in modules]
    other = [kind for kind in kinds[1:] if kind not in ("Pooling", "Dense", "Normalize")]
    settings = [_json(place / "config.json") for kind, place in modules if kind == "Pooling"]
    mode = settings[0].get("pooling_mode") if len(settings) == 1 else None
    if other or mode not in ("mean", "cls", "lasttoken"):
        found = other[0] if other else f"pooling {mode}"
        raise ValueError(f"llama.cpp pools by mean, cls or lasttoken and nothing else, the checkpoint has {found}")
    if kinds[1] != "Pooling":
        raise ValueError(
            f"llama.cpp pools first, and the checkpoint has {kinds[1]} before it; serve it with engine torch"
        )
    if "Normalize" in kinds and "Dense" in kinds[kinds.index("Normalize") :]:
        raise ValueError(
            "llama.cpp's vectors are normalised last, and the checkpoint has a Dense behind a Normalize; serve it with "
            "engine torch"
        )
    if prompted and not settings[0].get("include_prompt", True):
        raise ValueError(f"the checkpoint {POOLS_WITHOUT_PROMPTS}; serve it with engine torch")
    return settings[0]


def _dense_of(modules: list[tuple[str, Path]]) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """The linear layers between pooling and normalising, which llama.cpp has no place for."""
    found = []
    for kind, place in modules:
        if kind != "Dense":
            continue
        activation = str(_json(place / "config.json").get("activation_function", "none named"))
        if activation.rpartition(".")[2] != "Identity":
            raise ValueError(
                f"the Dense in {place} has {activation} behind it; serve this checkpoint with engine torch"
            )
        tensors = dict(_tensors(place / "model.safetensors"))
        weight = tensors["linear.weight"]
        found.append((weight, tensors.get("linear.bias", np.zeros(len(weight), np.float32))))
    return tuple(found)


def _cache() -> Path:
    folder = cache_folder() / "native"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _base_of(folder: Path, config: Any) -> Path:
    installed = installed_gguf(config.base_model)
    if installed is not None and sha256_of(installed) in config.base_sha256.values():
        return installed
    file = _cache() / f"base-{_generator_sha256(folder)[:16]}-f16.gguf"
    if not file.is_file():
        from ubmoe_st.export import export

        export(folder, file, view="generator", format="gguf", quantize="f16", overwrite=True)
    return file


def _generator_sha256(folder: Path) -> str:
    """Of all that a GGUF of the generator is made of."""
    names = [checkpoint.SHARED_FILE, checkpoint.UNI_FILE, checkpoint.GENERATOR_CONFIG, *_VOCABULARY]
    return hashlib.sha256(
        "".join(f"{name} {sha256_of(folder / name)}\n" for name in names if (folder / name).is_file()).encode()
    ).hexdigest()


def adapter_of(experts: Path, architecture: str) -> Path:
    """Low-rank experts as an adapter for llama.cpp, written once into the cache.

    Args:
        experts: `bi_delta.safetensors` of a checkpoint.
        architecture: llama.cpp's name of the base's architecture.
    """
    file = _cache() / f"bi-{sha256_of(experts)[:16]}-{architecture}-{_ADAPTER}.gguf"
    if not file.is_file():
        with replacing_by_name(file, unique=True) as temporary:
            write_adapter(experts, temporary, architecture)
    return file


def write_adapter(experts: Path, out: Path, architecture: str) -> None:
    """Write low-rank experts as a LoRA adapter for llama.cpp.

    Args:
        experts: `bi_delta.safetensors` of a checkpoint.
        out: The GGUF file.
        architecture: llama.cpp's name of the base's architecture.

    Raises:
        ValueError: If an expert is of a layer that llama.cpp does not have under that name.
    """
    import gguf

    writer = gguf.GGUFWriter(out, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    # 0: B @ A is added as it is, whatever the rank.
    writer.add_float32("adapter.lora.alpha", 0.0)
    for name, tensor in _tensors(experts):
        layer, _, rest = name.removeprefix("layers.").partition(".")
        _, _, place = rest.partition("mlp.")
        linear, _, side = place.partition(".")
        if not name.startswith("layers.") or linear not in _PLACES or side not in ("lora_A", "lora_B"):
            raise ValueError(
                f"{experts.name}: llama.cpp has no place for {name}; serve this checkpoint with engine torch"
            )
        writer.add_tensor(f"blk.{layer}.{_PLACES[linear]}.weight.{side.lower()}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(file: Path) -> list[tuple[str, np.ndarray]]:
    """Names and float32 arrays, without torch; numpy has no bfloat16 of its own."""
    from safetensors import deserialize

    found = []
    for name, entry in deserialize(file.read_bytes()):
        if entry["dtype"] == "BF16":
            array = (np.frombuffer(entry["data"], np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            array = np.frombuffer(entry["data"], {"F32": np.float32, "F16": np.float16}[entry["dtype"]])
        found.append((name, np.ascontiguousarray(array.reshape(entry["shape"]).astype(np.float32))))
    return found
