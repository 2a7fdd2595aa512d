"""What a checkpoint of any base will take, from the base's config alone: parameters, bytes, memory, hours.

The model stands on the meta device, so a 7B is planned in seconds on any machine. Parameters and bytes of weight files
are exact. What training keeps for the backward pass is counted on that same model, tensor by tensor; the rest of the
memory, and the hours, are arithmetic that each part's docstring states.

Shape letters: B batch, T tokens, D hidden, F FFN, R rank.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModel, PretrainedConfig, PreTrainedModel

from ubmoe_st import bases, checkpoint, shards
from ubmoe_st.experts import LowRankLinear, find_ffns, is_ffn_key, low_rank_header, replace_module
from ubmoe_st.generator import causal_config, meta_causal_lm, uni_keys
from ubmoe_st.hub import download

Precision = Literal["float32", "bf16-mixed", "bfloat16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)

DELTA_BYTES = 2
"""Of a number of the stored low-rank experts, which `export_experts` writes in 16 bit."""

GRADIENT_BYTES = 4
OPTIMIZER_BYTES = 8
"""Of each trained number, which is fp32: AdamW keeps two moments."""

USABLE = 0.9
"""Share of a GPU's memory that tensors can have; the rest are the driver's context, kernels and fragmentation."""

_ATTENTION = "ubmoe_planned"


@dataclass(frozen=True)
class Setting:
    """What is to be trained and on what; every number of a plan follows from it and the config."""

    rank: int | None = 16
    """Of the low-rank experts. None: dense experts are trained."""

    precision: Precision = "float32"
    """`float32`; `bf16-mixed`: autocast over fp32 weights, what `trainer.bf16` does; `bfloat16`: the frozen weights are
    loaded in bf16, adapters stay fp32."""

    batch: int = 32
    """Texts that one GPU reads in one step: rows times the columns that are read (two for pairs)."""

    text_tokens: int = 64
    """Tokens of each text, padding included."""

    checkpointing: bool = False
    """Whether each layer is computed again in the backward pass (`gradient_checkpointing`)."""

    gpus: int = 1
    gpu_memory_gb: float = 80.0
    """Of one GPU, 10^9 bytes."""

    shard: bool = False
    """Whether weights, gradients and optimizer are divided over the GPUs (FSDP2 or ZeRO-3), instead of copied."""

    train_tokens: float = 1e9
    """Tokens that training reads in all."""

    peak_tflops: float = 989.0
    """Of one GPU at this precision, dense. 989: bf16 of an H100 SXM by its data sheet."""

    utilization: float = 0.35
    """Share of the peak that is reached. A statement, not a measurement: measure a few steps and put it in."""

    dollars_per_gpu_hour: float | None = None

    context_tokens: int = 4096
    """Longest sequence when generating, prompt included."""

    generate_batch: int = 1

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        for name in ("rank", "batch", "text_tokens", "gpus", "context_tokens", "generate_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("gpu_memory_gb", "train_tokens", "peak_tflops"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 < self.utilization <= 1:
            raise ValueError(f"utilization is a share above 0 and at most 1, got {self.utilization}")


def plan(
    base: str | os.PathLike[str], setting: Setting | None = None, *, dtype: torch.dtype | str | None = None
) -> dict[str, Any]:
    """What a checkpoint of a base takes, without reading a weight.

    Args:
        base: A `config.json`, a folder that has one, a Hub id (only its config is downloaded), a GGUF file or a short
            name.
        setting: Of the training and the use. None: the defaults.
        dtype: Of the checkpoint. None: as the config says, else as the weights beside it are stored, else float32.

    Returns:
        For JSON: `name`, `architecture`, `dtype`, `parameters` (counts), `files` (bytes by name; weights only),
        `stored_bytes`, `training` (bytes on each GPU by part, and whether it fits), `encoding` and `generating`
        (bytes), `time`, and `setting`.

    Raises:
        FileNotFoundError: If there is no such config.
        ValueError: If it is not of a dense decoder, or one that stays causal, of which no checkpoint can be made.
    """
    wanted = setting or Setting()
    config, alignment, sources = _read(base)
    kind = _dtype_of(config, dtype)
    shape = Shape(config)
    _check_bidirectional(config)
    files = shape.files(kind, wanted.rank, alignment, sources)
    encode = {
        "weights": (shape.shared + shape.bi) * kind.itemsize,
        "activations": shape.forward_bytes(wanted.batch, wanted.text_tokens, kind.itemsize),
    }
    both = shape.shared + shape.uni
    low_memory = both * kind.itemsize + shape.delta(wanted.rank) * kind.itemsize if wanted.rank else None
    cache = shape.cache_bytes(wanted.generate_batch, wanted.context_tokens, kind.itemsize)
    prompt = shape.prompt_bytes(wanted.generate_batch, wanted.context_tokens, kind.itemsize)
    training = _training(shape, wanted)
    return {
        "name": str(base),
        "architecture": type(shape.lm).__name__,
        "dtype": str(kind).removeprefix("torch."),
        "parameters": {
            "base": both,
            "shared": shape.shared,
            "bi": shape.bi,
            "uni": shape.uni,
            "delta": shape.delta(wanted.rank),
            "stored": both + shape.bi + shape.delta(wanted.rank),
            "active_encoding": shape.shared + shape.bi,
            "active_generating": both,
            "trained": shape.trained(wanted.rank),
        },
        "files": files,
        "stored_bytes": sum(files.values()),
        "training": training,
        "encoding": {**encode, "total": sum(encode.values())},
        "generating": {
            "base_weights": both * kind.itemsize,
            "both_views": (both + shape.bi) * kind.itemsize,
            "both_views_low_memory": low_memory,
            "cache": cache,
            "activations": prompt,
            "total": (low_memory or (both + shape.bi) * kind.itemsize) + cache + prompt,
        },
        "time": _time(shape, wanted),
        "setting": asdict(wanted),
    }


def _read(base: str | os.PathLike[str]) -> tuple[PretrainedConfig, int, list[str]]:
    """The config, where tensors start in the base's files modulo 64 bytes, and the names of these files."""
    path = Path(base).expanduser()
    if path.is_file() and path.suffix == ".json":
        return _config(path), 0, ["model.safetensors"]
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} has no config.json: expected the folder of a transformers model")
        files = sorted(path.glob("*.safetensors"))
        read = [file for file in checkpoint.weight_files(path) if file.is_file()]
        start = checkpoint.data_start(read[0]) % shards.CACHE_LINE if read else 0
        config = _config(path / "config.json")
        if read and getattr(config, "dtype", None) is None:
            config.dtype = shards.first_dtype(read)
        return config, start, [file.name for file in files] or ["model.safetensors"]
    text = str(base)
    if text in bases.SHORT_NAMES or path.is_file():
        found = bases.resolve_base(base)
        config, start, _ = _read(found.path)
        return config, start, [file.name for file in found.source_files]
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or path.suffix in {".json", ".gguf"}:
        raise FileNotFoundError(
            f"{text} does not exist; expected a config.json, a model folder, a GGUF file or a Hub id"
        )
    folder = download(text, wanted="a config.json or a model folder", allow_patterns=["config.json"])
    return _read(folder)


def _config(path: Path) -> PretrainedConfig:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = content.get("model_type")
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a model's config: expected a JSON object with `model_type` ({error})"
        ) from error
    if not isinstance(kind, str):
        raise ValueError(f"{path} is not a model's config: it has no `model_type`")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"{path}: this version of transformers does not know model_type {kind!r}; try a newer one")
    config = bases.stock_config(path)
    bases.check_decoder(bases.Base(path, str(path), "folder", ()))
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"):
        if not {name, config.attribute_map.get(name)} & content.keys():
            raise ValueError(
                f"{path} has no {name}, and the {getattr(config, name, None)} that transformers takes instead is of "
                "another model: give the config.json as its makers published it"
            )
        if not getattr(config, name) > 0:
            raise ValueError(f"{path} describes no model that can be made: {name} is {getattr(config, name)}")
    return config


def _check_bidirectional(config: PretrainedConfig) -> None:
    both: Any = copy.deepcopy(config)
    both.is_causal = False
    with _made_or_refused():
        try:
            bases.check_bidirectional(bases.small_model(both, layers=1))
        except ValueError:  # a later layer may see what the first does not
            bases.check_bidirectional(bases.small_model(both))


def _dtype_of(config: PretrainedConfig, dtype: torch.dtype | str | None) -> torch.dtype:
    found = dtype if dtype is not None else getattr(config, "dtype", None) or torch.float32
    if isinstance(found, str):
        named = getattr(torch, found, None)
        if not isinstance(named, torch.dtype):
            raise ValueError(f"dtype must be the name of a torch type such as bfloat16, got {found!r}")
        found = named
    return found


class Shape:
    """The sizes of a base and of its experts, from the stock causal LM on the meta device.

    Args:
        config: Of the base.

    Raises:
        ValueError: If it cannot be split into a shared part and one dense FFN a layer.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = causal_config(config)
        self.config.dtype = torch.float32
        with _made_or_refused():
            self.lm = meta_causal_lm(self.config)
        backbone: Any = getattr(self.lm, self.lm.base_model_prefix)
        self.ffns = find_ffns(backbone)
        state = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
        own = {name: tuple(tensor.shape) for name, tensor in self.lm.state_dict().items()}
        self.shapes = {
            "shared": {name: shape for name, shape in state.items() if not is_ffn_key(name)},
            "bi": {name: shape for name, shape in state.items() if is_ffn_key(name)},
            "uni": {key: own[name] for key, name in uni_keys(self.lm).items()},
        }
        self.shared, self.bi, self.uni = (_count(self.shapes[part]) for part in ("shared", "bi", "uni"))
        self.linears = {
            f"{prefix}.{name}": (module.in_features, module.out_features)
            for prefix, ffn in self.ffns.items()
            for name, module in ffn.named_modules()
            if isinstance(module, nn.Linear)
        }
        hidden = self.config.hidden_size
        self.hidden = hidden
        self.ffn_width = max(wide for wide, out in self.linears.values() if out == hidden)
        self.layers = len(self.ffns)
        self.heads = self.config.num_attention_heads
        self.head_width = getattr(self.config, "head_dim", None) or hidden // self.heads
        self.key_heads = getattr(self.config, "num_key_value_heads", None) or self.heads
        self.matrices = sum(module.weight.numel() for module in backbone.modules() if isinstance(module, nn.Linear))

    def delta(self, rank: int | None) -> int:
        """Numbers of the low-rank experts; none where they are dense."""
        return sum(rank * (a + b) for a, b in self.linears.values()) if rank else 0

    def trained(self, rank: int | None) -> int:
        """Numbers that take a gradient in stage 1."""
        return self.delta(rank) or self.bi

    def files(self, dtype: torch.dtype, rank: int | None, alignment: int, sources: list[str]) -> dict[str, int]:
        """Bytes of each weight file of the checkpoint; see `checkpoint` for what is where.

        Args:
            dtype: Of the weights.
            rank: Of the low-rank experts. None: there is no file of them.
            alignment: Where the tensors of the base start in their file, modulo 64 bytes.
            sources: Names of the base's weight files, which the header of the low-rank file lists.
        """
        names = {"shared": checkpoint.SHARED_FILE, "bi": checkpoint.BI_FILE, "uni": checkpoint.UNI_FILE}
        sizes = {}
        for part, file in names.items():
            specs = {key: shards.spec_of(shape, dtype) for key, shape in self.shapes[part].items()}
            sizes[file] = shards.file_bytes(specs, shards.aligned_header(specs, alignment))
        if rank:
            specs = {}
            for name, (a, b) in self.linears.items():
                specs[f"{name}.lora_A"] = shards.spec_of((rank, a), torch.float16)
                specs[f"{name}.lora_B"] = shards.spec_of((b, rank), torch.float16)
            metadata = low_rank_header({"base_sha256": dict.fromkeys(sources, "0" * 64)})
            sizes[checkpoint.DELTA_FILE] = shards.file_bytes(specs, shards.header_bytes(specs, metadata))
        return sizes

    def forward_bytes(self, batch: int, tokens: int, item: int) -> int:
        """Most that a pass without gradients holds beside the weights: three of (B, T, F) and four of (B, T, D)."""
        return batch * tokens * (3 * self.ffn_width + 4 * self.hidden) * item

    def prompt_bytes(self, batch: int, tokens: int, item: int) -> int:
        """Most that reading a prompt as long as the context holds beside weights and cache, with one token's scores."""
        return self.forward_bytes(batch, tokens, item) + 2 * batch * self.config.vocab_size * 4

    def cache_bytes(self, batch: int, tokens: int, item: int) -> int:
        """Keys and values of every layer; sliding layers are counted as full ones."""
        return 2 * self.layers * batch * tokens * self.key_heads * self.head_width * item

    def saved_bytes(self, rank: int | None, batch: int, tokens: int, dtype: torch.dtype) -> int:
        """Bytes that one pass of the encoder in training keeps for its backward pass, parameters left out.

        The encoder runs once on the meta device with low-rank experts, and every tensor that autograd saves is
        counted once. Attention counts as a fused kernel (sdpa, flash): it keeps queries, keys, values and its output.
        """
        AttentionInterface.register(_ATTENTION, _fused_attention)
        config = copy.deepcopy(self.config)
        config.use_cache = False
        with torch.device("meta"):
            model = AutoModel.from_config(config, attn_implementation=_ATTENTION, dtype=dtype)
        model.requires_grad_(False).train()
        _make_trainable(model, rank)
        parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()._cdata
            if storage not in parameters:
                kept[storage] = tensor
            return tensor

        with _made_or_refused(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
            # Held until counted: a freed storage's address is given to the next one.
            out = model(input_ids=ids).last_hidden_state
        total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        return total + out.numel() * out.element_size()


@contextlib.contextmanager
def _made_or_refused() -> Iterator[None]:
    """Stock classes check little of a config, and each in its own way."""
    try:
        yield
    except (RuntimeError, LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
        reason = str(error).partition("\n")[0]  # torch puts the calls of its C++ below
        raise ValueError(f"the config describes no model that can be made: {reason}") from error


def _count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def _make_trainable(model: PreTrainedModel, rank: int | None) -> None:
    for prefix, ffn in find_ffns(model).items():
        for name, linear in list(ffn.named_modules()):
            if not isinstance(linear, nn.Linear):
                continue
            if rank is None:
                linear.requires_grad_(True)
                continue
            halves = torch.empty(rank, linear.in_features), torch.empty(linear.out_features, rank)
            low_rank = LowRankLinear(linear, *halves)
            low_rank.lora_A.requires_grad_(True)
            low_rank.lora_B.requires_grad_(True)
            replace_module(model, f"{prefix}.{name}", low_rank)


class _FusedAttention(torch.autograd.Function):
    """Shapes and saved tensors of a fused attention kernel, without its arithmetic."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


def _fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    groups = getattr(module, "num_key_value_groups", 1)
    # As transformers does for a masked batch: each head has its own copy of its group's keys and values.
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


def _training(shape: Shape, wanted: Setting) -> dict[str, Any]:
    """Bytes on each GPU in one step of stage 1.

    weights       the encoder alone, without the generator's FFNs and head. `bf16-mixed` holds fp32 and, for the
                  backward pass, the bf16 copies that autocast makes of the matrices (of one layer with checkpointing)
    gradients, optimizer   of the trained numbers, 4 and 8 bytes
    activations   `Shape.saved_bytes`; with checkpointing the input of every layer, and all of one layer
    workspace     of the backward pass of one FFN: two of (B, T, F), one of (B, T, D)
    gathered      with sharding: one layer's weights as a whole, and the next one's
    """
    mixed = wanted.precision == "bf16-mixed"
    weight_item = 2 if wanted.precision == "bfloat16" else 4
    run = torch.float32 if wanted.precision == "float32" else torch.bfloat16
    texts = wanted.batch, wanted.text_tokens
    whole = shape.saved_bytes(wanted.rank, *texts, run)
    inputs = wanted.batch * wanted.text_tokens * shape.hidden * run.itemsize
    recomputed = shape.layers * inputs + whole // shape.layers
    parts = wanted.gpus if wanted.shard else 1
    stored = shape.shared + shape.bi
    trained = shape.trained(wanted.rank)
    adapters = trained if wanted.rank else 0
    copies = 2 * shape.matrices // (shape.layers if wanted.checkpointing or wanted.shard else 1) if mixed else 0
    result: dict[str, Any] = {
        "weights": (stored * weight_item + adapters * 4) // parts + copies,
        "gradients": trained * GRADIENT_BYTES // parts,
        "optimizer": trained * OPTIMIZER_BYTES // parts,
        "activations": recomputed if wanted.checkpointing else whole,
        "workspace": wanted.batch * wanted.text_tokens * (2 * shape.ffn_width + shape.hidden) * run.itemsize,
        "gathered": 2 * shape.matrices // shape.layers * run.itemsize if parts > 1 else 0,
    }
    result["total"] = sum(result.values())
    result["activations_without_checkpointing"] = whole
    result["activations_with_checkpointing"] = recomputed
    result["fits"] = result["total"] <= USABLE * wanted.gpu_memory_gb * 1e9
    return result


def _time(shape: Shape, wanted: Setting) -> dict[str, Any]:
    """Hours of stage 1 at the stated share of the peak.

    A token costs 2 operations for each number of a matrix in the forward pass, and 2 in the backward pass, which
    passes through frozen matrices; 2 more for each number that trains; 4 T D' L in attention (D' = heads * head width),
    twice that in the backward pass. Checkpointing adds a forward pass.
    """
    adapters = shape.delta(wanted.rank)
    attention = 4 * wanted.text_tokens * shape.heads * shape.head_width * shape.layers
    forward = 2 * (shape.matrices + adapters) + attention
    backward = 2 * (shape.matrices + adapters) + 2 * attention + 2 * shape.trained(wanted.rank)
    each = forward + backward + (forward if wanted.checkpointing else 0)
    flops = each * wanted.train_tokens
    seconds = flops / (wanted.gpus * wanted.peak_tflops * 1e12 * wanted.utilization)
    gpu_hours = seconds * wanted.gpus / 3600
    rate = wanted.dollars_per_gpu_hour
    return {
        "flops_per_token": each,
        "flops": flops,
        "tokens_per_s": round(wanted.train_tokens / seconds),
        "hours": round(seconds / 3600, 3),
        "gpu_hours": round(gpu_hours, 3),
        "dollars": round(gpu_hours * rate, 2) if rate is not None else None,
    }
