"""Checkpoints made and exported without their weights in memory: from file to file, one tensor at a time.

The model stands on the meta device and is an ordinary `UBMoETransformer` otherwise, so the same code writes the same
bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from typing_extensions import Self

from ubmoe_st import checkpoint, shards
from ubmoe_st.bases import Base, refuse_own_head, small_model, stock_config
from ubmoe_st.checkpoint import weight_files
from ubmoe_st.configuration import RouterKind, Routing
from ubmoe_st.experts import LowRank, TokenRouter, check_low_rank, is_ffn_key, merged
from ubmoe_st.generator import causal_config, meta_causal_lm, tied_keys, uni_keys
from ubmoe_st.model import UBMoE
from ubmoe_st.source import SmallSource
from ubmoe_st.transformer import UBMoETransformer

_WIDENED = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
"""Where classes of transformers name the modules that they load in fp32."""

_NO_SETTINGS = {
    "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "id2label",
    "initializer_range", "is_causal", "label2id", "max_position_embeddings", "pad_token_id", "pretraining_tp",
    "problem_type", "transformers_version", "use_cache",
}  # fmt: skip
"""Keys of a config that change no hidden state outside of training."""


def can_stream(folder: Path) -> bool:
    """Whether the tensors of a base have, in its files, the names and shapes of the stock causal LM.

    Where transformers renames, merges or widens tensors when it loads them, the base has to be loaded.
    """
    try:
        config: Any = stock_config(folder)
        files = shards.TensorFiles(weight_files(folder))
        lm = meta_causal_lm(config)
    except (KeyError, OSError, ValueError):
        return False  # The code that loads it says what is wrong.
    backbone = getattr(lm, lm.base_model_prefix)
    widened = (getattr(kind, name, None) for kind in (lm, backbone) for name in _WIDENED)
    tied = tied_keys(lm)
    return not any(widened) and all(
        name in files and files.spec(name).shape == tuple(tensor.shape)
        for name, tensor in lm.state_dict().items()
        if name not in tied
    )


def dense_experts(base: Base, tuned: Path, encoder: PreTrainedModel) -> Mapping[str, Tensor]:
    """The FFN tensors of a fine-tuned copy of a base, of which nothing else may differ; compared one by one.

    Args:
        base: The base.
        tuned: Folder of the copy.
        encoder: The base's backbone, for its names and its type.

    Raises:
        ValueError: If another tensor, or a setting of the config, differs.
    """
    dtype = encoder.dtype
    check_same_config(base, tuned)
    original, changed = (shards.TensorFiles(weight_files(folder)) for folder in (base.path, tuned))
    lm = meta_causal_lm(causal_config(encoder.config))
    tied = tied_keys(lm)  # some files have them a second time
    refuse_own_head(tuned, lm)
    names, others = (set(files) - tied for files in (original, changed))
    if names != others:
        raise ValueError(f"{tuned} is not the same model as {base.name}: {sorted(names ^ others)[0]}")
    ffn = {key: name for key, name in uni_keys(lm).items() if is_ffn_key(key)}
    for name in sorted(names - set(ffn.values())):
        if not torch.equal(original[name].to(dtype), changed[name].to(dtype)):
            raise ValueError(
                f"{tuned}: {name} differs from the base {base.name}; only FFN weights may be trained, since all "
                "others are shared with the generator"
            )

    def read(name: str) -> Tensor:
        return changed[name].to(dtype)

    specs = {key: shards.spec_of(changed.spec(name).shape, dtype) for key, name in ffn.items()}
    return shards.LazyTensors({key: (specs[key], partial(read, name)) for key, name in ffn.items()})


def check_same_config(base: Base, tuned: Path) -> None:
    """Refuse a fine-tuned copy of a base that computes otherwise: its experts were trained to that.

    Raises:
        ValueError: Naming the setting.
    """
    first, second = (
        {key: value for key, value in stock_config(path).to_dict().items() if key not in _NO_SETTINGS}
        for path in (base.path, tuned)
    )
    for key in sorted(first.keys() | second.keys()):
        if first.get(key) != second.get(key):
            raise ValueError(
                f"{tuned}: {key} of its config is {second.get(key)!r}, of the base {base.name} {first.get(key)!r}; "
                "only FFN weights may be trained"
            )


class StreamedTransformer(UBMoETransformer):
    """The views of a base or of a checkpoint without their weights, for saving and exporting alone."""

    source_class = SmallSource

    def __init__(self, model_name_or_path: str, **kwargs: Any) -> None:
        self._dense: Mapping[str, Tensor] | None = None
        super().__init__(model_name_or_path, **kwargs)
        root = Path(model_name_or_path)
        own = [root / file for file in (checkpoint.SHARED_FILE, checkpoint.BI_FILE)]
        self._files = shards.TensorFiles(own if checkpoint.is_checkpoint(root) else weight_files(root))
        self._generator_files = (
            shards.TensorFiles([root / checkpoint.UNI_FILE]) if checkpoint.is_checkpoint(root) else self._files
        )
        self.source.check_unchanged()  # all files that are open now are of one checkpoint

    def _load_model(
        self,
        model_name_or_path: str,
        transformer_task: Any,
        config: PretrainedConfig,
        backend: str,
        is_peft_model: bool,
        **model_kwargs: Any,
    ) -> PreTrainedModel:
        dtype = model_kwargs.get("dtype") or "auto"
        if isinstance(dtype, str):
            dtype = (
                getattr(torch, dtype)
                if dtype != "auto"
                else config.dtype or shards.first_dtype(weight_files(Path(model_name_or_path)))
            )
        config.dtype = dtype
        with torch.device("meta"):
            return AutoModel.from_config(config, dtype=dtype)

    def probe(self) -> PreTrainedModel:
        """A small random model of the same architecture."""
        return small_model(self.model.config)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Self:
        # .to(), .half(): there is nothing to move.
        return self

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Refused: the weights are not in memory.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("this model is for saving and exporting, its weights are not in memory; load it with UBMoE")

    # --- experts -------------------------------------------------------------------------------------------------

    def set_low_rank_experts(self, low_rank: LowRank) -> None:  # noqa: D102 - as of the class above
        linears = {name: module for name, module in self.model.named_modules() if isinstance(module, nn.Linear)}
        for name, pair in low_rank.items():
            if name not in linears or not is_ffn_key(f"{name}."):
                raise ValueError(f"{name} is not a linear FFN layer of {type(self.model).__name__}")
            check_low_rank(linears[name], *pair, name=name)
        self.low_rank = dict(low_rank)
        if self.ubmoe_config is not None:
            self.ubmoe_config.expert_rank = max(lora_a.shape[0] for lora_a, _ in low_rank.values())

    def set_dense_experts(  # noqa: D102 - as of the class above
        self, ffn: Mapping[str, Tensor], low_rank: LowRank | None = None
    ) -> None:
        own = {key: tuple(tensor.shape) for key, tensor in self.model.state_dict().items() if is_ffn_key(key)}
        found = {key: spec.shape for key, spec in shards.specs_of(ffn).items()}
        odd = next((key for key in sorted({*own, *found}) if own.get(key) != found.get(key)), None)
        if odd is not None:
            raise ValueError(f"{odd}: expected shape {own.get(odd)}, got {found.get(odd)} in the dense experts")
        self._dense, self.low_rank = ffn, low_rank

    def set_routers(self, state: dict[str, Tensor], kind: RouterKind) -> None:  # noqa: D102 - as of the class above
        if self.ubmoe_config is None:
            raise ValueError("routers belong to a checkpoint or a module made by `from_base`")
        config = self.model.config
        own = TokenRouter(config.hidden_size, kind).state_dict()
        wanted = {
            f"layers.{layer}.router.{name}": tensor.shape
            for layer in range(config.num_hidden_layers)
            for name, tensor in own.items()
        }
        found = {key: tensor.shape for key, tensor in state.items()}
        odd = next((key for key in sorted({*wanted, *found}) if wanted.get(key) != found.get(key)), None)
        if odd is not None:
            raise ValueError(f"routers: expected {odd} of shape {wanted.get(odd)}, got {found.get(odd)}")
        self._routers = {key: tensor.to(self.model.dtype) for key, tensor in state.items()}
        self.ubmoe_config.router = kind

    def _current_low_rank(self, encoder: Mapping[str, Tensor], uni: Mapping[str, Tensor]) -> LowRank | None:
        # Nothing in memory can have been changed since it was set.
        return self._load_low_rank()

    def _changed(self, encoder: Mapping[str, Tensor], uni: Mapping[str, Tensor]) -> str | None:
        # Nothing in memory; but the sums of a base would be those of another one.
        if self.base is not None and self.ubmoe_config is not None and not self.ubmoe_config.base_sha256:
            self.source.check_unchanged()
        return None

    # --- tensors -------------------------------------------------------------------------------------------------

    def encoder_state(self) -> Mapping[str, Tensor]:  # type: ignore[override]
        """Tensors of the encoder under their stock names; each is read, and merged, when it is asked for."""
        stored = self.folder is not None
        prefix = "" if stored else f"{meta_causal_lm(causal_config(self.model.config)).base_model_prefix}."
        makers = {}
        for key, tensor in self.model.state_dict().items():
            spec = shards.spec_of(tuple(tensor.shape), self._dtype_of(tensor))
            if self._dense is not None and key in self._dense:
                make = partial(self._read, self._dense, key, tensor)
            else:
                make = partial(self._read, self._files, f"{prefix}{key}", tensor)
            pair = (self.low_rank or {}).get(key.removesuffix(".weight")) if not stored else None
            makers[key] = (spec, partial(_merged, make, *pair) if pair is not None else make)
        return shards.LazyTensors(makers)

    def uni_tensors(self) -> Mapping[str, Tensor]:  # type: ignore[override]
        """What the generator has beside the shared tensors, by backbone name; read when it is asked for."""
        lm = meta_causal_lm(causal_config(self.model.config))
        state = lm.state_dict()
        return shards.LazyTensors(
            {
                key: (
                    shards.spec_of(tuple(state[name].shape), self._dtype_of(state[name])),
                    partial(self._read, self._generator_files, key if self.folder else name, state[name]),
                )
                for key, name in uni_keys(lm).items()
            }
        )

    def generator_state(self) -> Mapping[str, Tensor]:
        """Tensors of the base model under their stock names, each once."""
        lm = meta_causal_lm(causal_config(self.model.config))
        parts: dict[str, tuple[shards.Described, str]] = {}
        for tensors in (shards.pick(self.encoder_state(), lambda key: not is_ffn_key(key)), self.uni_tensors()):
            if isinstance(tensors, shards.Described):
                parts |= {key: (tensors, key) for key in tensors}
        names = {name: name.removeprefix(f"{lm.base_model_prefix}.") for name in lm.state_dict()}
        return shards.LazyTensors(
            {
                name: (parts[key][0].spec(key), partial(parts[key][0].__getitem__, key))
                for name, key in names.items()
                if key in parts
            }
        )

    def generator(self, routing: Routing = "uni") -> PreTrainedModel:
        """The causal LM of the base on the meta device: for its class and its configs.

        Raises:
            ValueError: If another routing is asked for.
        """
        if routing != "uni":
            raise ValueError(f"without weights there is the routing uni alone, got {routing!r}")
        lm = meta_causal_lm(causal_config(self.model.config))
        if self.generation_config is not None:
            lm.generation_config = self.generation_config
        return lm

    def _dtype_of(self, tensor: Tensor) -> torch.dtype:
        return self.model.dtype if tensor.is_floating_point() else tensor.dtype

    def _read(self, tensors: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
        stored = tensors[name]
        found = stored.to(self._dtype_of(like))
        if found.dtype == torch.float16 != stored.dtype and found.isinf().any() and not stored.isinf().any():
            raise ValueError(
                f"{name} holds {stored.abs().max().item():.3g}, beyond the range of float16; take dtype='bfloat16'"
            )
        return found


class StreamedUBMoE(UBMoE):
    """A checkpoint whose weights stay on disk, for exporting."""

    def _load_module_class_from_ref(self, class_ref: str, *args: Any, **kwargs: Any) -> type:
        found = super()._load_module_class_from_ref(class_ref, *args, **kwargs)
        return StreamedTransformer if found is UBMoETransformer else found


def _merged(make: Callable[[], Tensor], lora_a: Tensor, lora_b: Tensor) -> Tensor:
    return merged(make(), lora_a, lora_b)
