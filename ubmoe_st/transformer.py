"""`UBMoETransformer`: the encoder view as a sentence-transformers module, which keeps the generator view beside it."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from typing_extensions import Self

from ubmoe_st import checkpoint, classification
from ubmoe_st.bases import Base, check_bidirectional, check_decoder, refuse_own_head, resolve_base, save_tokenizer
from ubmoe_st.classification import ClassificationHead, save_head
from ubmoe_st.compute import FastEncoder, choose
from ubmoe_st.configuration import ROUTINGS, RouterKind, Routing, UBMoEConfig, encoder_limit
from ubmoe_st.experts import (
    LowRank,
    LowRankLinear,
    check_low_rank,
    find_ffns,
    is_ffn_key,
    low_rank_mismatch,
    merge_low_rank,
    replace_module,
    same_low_rank,
    with_ffns,
    with_low_rank,
)
from ubmoe_st.forking import held_over_fork
from ubmoe_st.generator import (
    build_generator,
    causal_config,
    converted,
    explained,
    generator_parameter,
    held_generation_config,
    keep_alignment,
    merged_state,
    meta_causal_lm,
    router_state,
    uni_ffns,
)
from ubmoe_st.padding import in_groups, rows_alike
from ubmoe_st.source import Source
from ubmoe_st.watch import Watch

_TEXT_ONLY: dict[str, Any] = {
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
# One lock for all models: a lock on the object could not be pickled for multi-process encoding.
_BUILD_LOCK = held_over_fork(threading.RLock())
# A fast tokenizer keeps padding and truncation as state: each call sets what it needs, then tokenises. Between the two
# another thread that needs something else must not come in. Of the module for the same reason.
_TOKENIZER_LOCK = held_over_fork(threading.RLock())


def _without_surrogates(text: str) -> str:
    """Lone surrogates, as broken JSON escapes give them, are no text a tokenizer takes."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


class UBMoETransformer(Transformer):
    """The encoder view as a sentence-transformers module: full attention through the `bi` experts.

    Reads a UBMoE checkpoint folder, or any base decoder by `from_base`. Keeps what the generator view needs beside the
    shared tensors, and loads it on first use. Saving writes the whole checkpoint; stock `Transformer` opens its root.

    Args:
        model_name_or_path: Checkpoint folder, or folder of a base model.
        **kwargs: As for `sentence_transformers.models.Transformer`.
    """

    forward_kwargs = {"task"}  # noqa: RUF012 - as the stock class declares it
    pass_tokens = 64
    """What one more pass of the encoder costs on a CPU, in tokens: it reads all weights again."""
    source_class: type[Source] = Source

    def __init__(self, model_name_or_path: str, **kwargs: Any) -> None:
        own = Path(model_name_or_path) if checkpoint.is_checkpoint(model_name_or_path) else None
        source = self.source_class(folder=own)
        super().__init__(str(model_name_or_path), **{**_TEXT_ONLY, **kwargs})
        # Read at every call by the stock mask functions; `is_causal` as a call argument is not thread-safe.
        self.model.config.is_causal = False
        self.source = source
        self.base: Base | None = None
        self.low_rank: LowRank | None = None
        self.fast = FastEncoder()
        self.classification: ClassificationHead | None = None
        self.ubmoe_config: UBMoEConfig | None = None
        self.notices: dict[str, bytes] = {}
        self._uni: dict[str, nn.Parameter] | None = None
        self._routers: dict[str, Tensor] | None = None
        self._generators: dict[str, PreTrainedModel] = {}
        self._kept_config: GenerationConfig | None = None
        self._routed: Watch | None = None
        if source.folder is not None:
            self.ubmoe_config = checkpoint.read_config(source.folder)
            self.notices = checkpoint.notices_in(source.folder)
            self.set_classification_head(checkpoint.classification_head(source.folder))
            source.check_unchanged()

    @classmethod
    def from_base(
        cls,
        base: str | os.PathLike[str] | Base,
        *,
        dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
        max_seq_length: int | None = None,
        **kwargs: Any,
    ) -> Self:
        """Make any dense decoder bidirectional; its `bi` experts start as copies of the originals.

        Args:
            base: Local folder, `.gguf` file, Hub id or short name, see `resolve_base`.
            dtype: Of the weights. None: as stored.
            attn_implementation: `eager`, `sdpa`, `flash_attention_2`, ... None: the default of transformers.
            max_seq_length: Longest input in tokens. None: what the base takes.
            **kwargs: As for `sentence_transformers.models.Transformer`.

        Raises:
            ValueError: If the base cannot be split into shared part and experts, or cannot attend in full.
        """
        found = base if isinstance(base, Base) else resolve_base(base)
        check_decoder(found)
        model_kwargs = dict(kwargs.pop("model_kwargs", None) or {})
        if dtype is not None:
            model_kwargs["dtype"] = dtype
        if attn_implementation is not None:
            model_kwargs["attn_implementation"] = attn_implementation
        module = cls(str(found.path), model_kwargs=model_kwargs, **kwargs)
        if (limit := encoder_limit(module.model.config, max_seq_length)) is not None:
            module.max_seq_length = limit
        find_ffns(module.model)
        check_bidirectional(module.probe())
        module.base = found
        module.source = cls.source_class(base=found.path, dtype=module.model.dtype)
        lm = meta_causal_lm(causal_config(module.model.config))
        refuse_own_head(found.path, lm)
        module.ubmoe_config = UBMoEConfig(
            base_model=found.name, base_architecture=type(lm).__name__, base_origin=found.origin
        )
        return module

    def probe(self) -> PreTrainedModel:
        """The model that shows whether the architecture attends in full: the encoder itself."""
        return self.model

    @property
    def folder(self) -> Path | None:
        """The checkpoint that the module was read from."""
        return self.source.folder

    @property
    def has_adapter(self) -> bool:
        """Whether a PEFT adapter is injected, as in training."""
        return bool(getattr(self.model, "peft_config", None))

    @property
    def is_low_memory(self) -> bool:
        """Whether the `bi` experts are held in low-rank form on the shared `uni` weights."""
        return any(isinstance(module, LowRankLinear) for module in self.model.modules())

    def preprocess(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Tokenise a batch; without a prompt, a text without any token gets one end token, so that it has a vector.

        Args:
            inputs: B texts.
            prompt: Put before each text.
            **kwargs: As for `Transformer.preprocess`.

        Returns:
            `input_ids` and `attention_mask`, (B, T), and what the stock module adds.
        """
        texts = list(inputs)
        if all(isinstance(text, str) for text in texts):
            texts = [_without_surrogates(text) for text in texts]
            if not (prompt or "").strip():
                filler = self.filler_token
                texts = [text if text and self._has_tokens(text) else filler for text in texts]
        with _TOKENIZER_LOCK:
            return super().preprocess(texts, prompt=prompt, **kwargs)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Token embeddings of a batch. On a CPU, rows of similar length are computed together, without their padding.

        A CPU pays in full for every padded position, and a batch of documents can be mostly padding. Vectors are those
        of one pass up to float rounding; what stands at padded positions has no meaning in either.

        Args:
            features: `input_ids` and `attention_mask`, (B, T), of `preprocess`.
            **kwargs: As for `Transformer.forward`; with any but `task`, the batch is computed as it is.

        Returns:
            `features` with `token_embeddings`, (B, T, D), and with `task="classification"` what the head adds, (B, K).

        Raises:
            ValueError: If the generator alone was converted to another dtype.
        """
        with explained(self.model):
            return self._embedded(features, **kwargs)

    def _embedded(self, features: dict[str, Any], task: str | None = None, **kwargs: Any) -> dict[str, Any]:
        if self.classification is not None and classification.is_training(self):
            classification.take_away(self, "this training")
        if self.fast.applies(self) and not torch.is_grad_enabled():
            return self.fast.module(self).forward(features, task=task, **kwargs)
        groups = [] if kwargs or self.model.config.output_hidden_states else rows_alike(features, self.pass_tokens)
        if len(groups) < 2:
            return self._one_pass(features, task, **kwargs)
        names = (self.module_output_name, classification.OUTPUT)
        return {**features, **in_groups(features, groups, lambda part: self._one_pass(part, task), names)}

    def _one_pass(self, features: dict[str, Any], task: str | None, **kwargs: Any) -> dict[str, Any]:
        if task != classification.TASK or self.classification is None:
            return super().forward(features, **kwargs)
        with self.classification.listening() as states:
            features = super().forward(features, **kwargs)
        features[classification.OUTPUT] = self.classification(states[-1], features)
        return features

    def compute_in(self, compute: str) -> None:
        """Choose in what numbers the encoder computes from now on, see `UBMoE`; the generator stays as it is.

        Raises:
            ValueError: If it is unknown, this machine cannot, or an adapter or a quantised base is in the way.
        """
        self.fast = FastEncoder(choose(compute, self.model.device), self)

    def _has_tokens(self, text: str) -> bool:
        # Letters tell without the tokenizer, and a few characters mostly tell with it: few texts are tokenised twice.
        beginning = text[:64]
        return any("a" <= letter <= "z" for letter in beginning.lower()) or any(
            self.token_ids(part) for part in (beginning, text)
        )

    def token_ids(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of one text, neither padded nor cut; safe while other threads encode.

        Args:
            text: The text.
            add_special_tokens: Put BOS and the like where the tokenizer wants them.
        """
        tokenizer: Any = self.tokenizer
        text = _without_surrogates(text)
        with _TOKENIZER_LOCK:
            ids = tokenizer(text, add_special_tokens=add_special_tokens, truncation=False, verbose=False)
            return ids["input_ids"]

    @staticmethod
    def rows_without_tokens(features: Mapping[str, Any]) -> set[int]:
        """Rows of a batch in which nothing follows the prompt.

        Args:
            features: `attention_mask`, (B, T), and `prompt_length` where there is a prompt, of `preprocess`.
        """
        mask, length = features.get("attention_mask"), features.get("prompt_length")
        if length is None or not isinstance(mask, Tensor) or mask.ndim != 2:
            return set()
        return set((mask.sum(1) <= length).nonzero()[:, 0].tolist())

    @property
    def filler_token(self) -> str:
        """What stands for a text that has no token of its own: the end token, where there is one."""
        tokenizer: Any = self.tokenizer
        return tokenizer.eos_token or tokenizer.pad_token or tokenizer.unk_token or tokenizer.decode([0])

    # --- experts ---------------------------------------------------------------------------------------------

    def set_low_rank_experts(self, low_rank: LowRank) -> None:
        """Make `uni + B @ A` the `bi` experts and merge them into the encoder.

        Args:
            low_rank: A (R, in) and B (out, R) by linear layer of the backbone.

        Raises:
            ValueError: If a layer does not exist or a shape does not fit.
        """
        self._before_exchange()
        uni = self.uni_tensors()
        linears = {name: module for name, module in self.model.named_modules() if isinstance(module, nn.Linear)}
        for name, pair in low_rank.items():
            if name not in linears or not is_ffn_key(f"{name}."):
                raise ValueError(f"{name} is not a linear FFN layer of {type(self.model).__name__}")
            check_low_rank(linears[name], *pair, name=name)
        for name, pair in low_rank.items():
            with torch.no_grad():
                linears[name].weight.copy_(uni[f"{name}.weight"])
            merge_low_rank(linears[name], *pair)
        self.low_rank = dict(low_rank)
        if self.ubmoe_config is not None:
            self.ubmoe_config.expert_rank = max(lora_a.shape[0] for lora_a, _ in low_rank.values())

    def set_dense_experts(self, ffn: Mapping[str, Tensor], low_rank: LowRank | None = None) -> None:
        """Take dense `bi` experts.

        Args:
            ffn: Every FFN tensor of the backbone by name.
            low_rank: The same in low-rank form, where they have one.

        Raises:
            ValueError: If one is missing, unknown, or of another shape.
        """
        self._before_exchange()
        own = {key: tensor for key, tensor in self.model.state_dict(keep_vars=True).items() if is_ffn_key(key)}
        if set(own) != set(ffn):
            odd = sorted(set(own) ^ set(ffn))[0]
            raise ValueError(f"dense experts and the base differ in their FFN tensors: {odd}")
        for key, tensor in own.items():
            if tensor.shape != ffn[key].shape:
                raise ValueError(f"{key}: expected shape {tuple(tensor.shape)}, got {tuple(ffn[key].shape)}")
            with torch.no_grad():
                tensor.copy_(ffn[key])
        self.low_rank = low_rank

    def _before_exchange(self) -> None:
        if self.is_low_memory:
            raise ValueError("experts are exchanged in one piece: load the checkpoint without low_memory")
        self._generators.pop("router", None)  # holds the old ones in low-rank form
        classification.take_away(self, "these experts")

    def set_classification_head(self, head: ClassificationHead | None) -> None:
        """Give `encode(..., task="classification")` its layer, or take it away; other experts have none.

        Raises:
            ValueError: If it does not fit the encoder.
        """
        self.classification = None if head is None else head.attached(self.model)
        self.fast.follow(self.model.device)

    def set_routers(self, state: dict[str, Tensor], kind: RouterKind) -> None:
        """Take trained token routers, as given by `router_state`.

        Args:
            state: Tensors `layers.N.router.*` of every layer.
            kind: How they mix.
        """
        if self.ubmoe_config is None:
            raise ValueError("routers belong to a checkpoint or a module made by `from_base`")
        probe = build_generator(self.model, self.uni_tensors(), routing="router", router=kind, router_state=state)
        self._routers = {key: tensor.cpu() for key, tensor in router_state(probe).items()}
        self.ubmoe_config.router = kind
        self._generators.pop("router", None)

    def use_low_memory(self, *, check: bool = True) -> None:
        """Hold the `bi` experts as low-rank deltas on the `uni` weights, instead of merged.

        Args:
            check: Whether to find out first if the experts were changed since they were read; needs all weights.

        Raises:
            ValueError: If the experts are dense.
        """
        low_rank = self._load_low_rank()
        if check and low_rank is not None:
            low_rank = self._current_low_rank(self.encoder_state(), self.uni_tensors())
        if low_rank is None:
            raise ValueError(
                "low_memory=True needs low-rank experts, but the bi experts of this checkpoint are dense; "
                "load it with low_memory=False"
            )
        uni = self.uni_tensors()
        with torch.inference_mode(False):
            for prefix, ffn in uni_ffns(self.model, uni).items():
                replace_module(self.model, prefix, with_low_rank(ffn, prefix, low_rank))
        self._uni = {key: generator_parameter(tensor) for key, tensor in uni.items() if not is_ffn_key(key)}
        self.forget_generators()
        self.model.eval()

    def _load_low_rank(self) -> LowRank | None:
        if self.low_rank is None:
            self.low_rank = self.source.low_rank()
        return self.low_rank

    def _current_low_rank(self, encoder: dict[str, Tensor], uni: dict[str, Tensor]) -> LowRank | None:
        """The low-rank form of the experts as they are now, None where they are dense.

        Args:
            encoder: What `encoder_state` gives.
            uni: What `uni_tensors` gives.
        """
        stored = self._load_low_rank()
        if self.is_low_memory:
            lows = ((n, m) for n, m in self.model.named_modules() if isinstance(m, LowRankLinear))
            held: LowRank = {name: (low.lora_A, low.lora_B) for name, low in lows}
            return stored if same_low_rank(held, stored or {}) else held
        if stored is None:
            return None
        bi = {key: tensor for key, tensor in encoder.items() if is_ffn_key(key)}
        original = {key: tensor for key, tensor in uni.items() if is_ffn_key(key)}
        if stored is self.source.low_rank() and not (self.source.changed(bi, bi=True) or self.source.changed(original)):
            return stored
        key = low_rank_mismatch(stored, uni, bi)
        if key is None:
            return stored
        warnings.warn(
            f"{key} is not its original plus the low-rank experts any more: it was trained, merged into or replaced. "
            "The bi experts are dense now, and low_memory is not possible",
            stacklevel=3,
        )
        return None

    def _load_routers(self) -> dict[str, Tensor] | None:
        if self._routers is None:
            self._routers = self.source.routers()
        return self._routers

    # --- the generator view ----------------------------------------------------------------------------------

    def uni_tensors(self) -> dict[str, Tensor]:
        """What the generator has beside the shared tensors: original FFNs and an untied head, by backbone name.

        In low-memory form the FFN tensors are the encoder's own.

        Raises:
            ValueError: If the module was loaded from a folder that has no generator.
        """
        with _BUILD_LOCK:
            if self._uni is None:
                with torch.inference_mode(False):
                    to = self.model.device, self.model.dtype
                    self._uni = {key: generator_parameter(t.to(*to)) for key, t in self.source.uni().items()}
        tensors: dict[str, Tensor] = dict(self._uni)
        for name, module in self.model.named_modules():
            if isinstance(module, LowRankLinear):
                tensors |= {f"{name}.{key}": parameter for key, parameter in module.base.named_parameters()}
        return tensors

    def generator(self, routing: Routing = "uni") -> PreTrainedModel:
        """The stock causal LM over the shared tensors, built on first use.

        Args:
            routing: `uni`: the base model; `bi`: the other experts; `router`: both, mixed for each token.

        Raises:
            ValueError: If routing is unknown, or `router` and there are no routers.
        """
        if routing not in ROUTINGS:
            raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}, got {routing!r}")
        with _BUILD_LOCK:
            if self.has_adapter and (routing != "uni" or (self.is_low_memory and routing not in self._generators)):
                raise ValueError(
                    "the encoder carries a PEFT adapter; export it with `upcycle(base, bi_experts=...)` first"
                )
            mixed = self._generators.get(routing) if routing == "router" else None
            if mixed is not None and self._routed is not None and not self._routed.unchanged(self.model):
                # It holds the low-rank experts of before; routers that were trained in it stay.
                self._routers = router_state(self._generators.pop(routing))
            if routing not in self._generators:
                # Tensors made in inference mode would be refused by autograd for ever.
                with torch.inference_mode(False):
                    self._generators[routing] = self._build(routing)
            return self._generators[routing]

    def _build(self, routing: Routing) -> PreTrainedModel:
        uni = self.uni_tensors()
        kind = self.ubmoe_config.router if self.ubmoe_config else None
        if routing == "router":
            if kind is None:
                raise ValueError("routing='router' needs trained routers, and this checkpoint has none; use 'uni'")
            # Low-rank experts let the mix share the large products, see RoutedFFN.
            return self._build_routed(uni, kind)
        return build_generator(self.model, uni, routing=routing, generation_config=self.generation_config)

    def _build_routed(self, uni: dict[str, Tensor], kind: RouterKind | None) -> PreTrainedModel:
        encoder = self.model
        low_rank = None if self.is_low_memory else self._current_low_rank(self.encoder_state(), uni)
        self._routed = None if low_rank is None else Watch(encoder, list(find_ffns(encoder).values()))
        if low_rank is not None:
            ffns = uni_ffns(encoder, uni)
            encoder = with_ffns(encoder, {p: with_low_rank(ffn, p, low_rank) for p, ffn in ffns.items()})
        return build_generator(
            encoder,
            uni,
            routing="router",
            router=kind,
            router_state=self._load_routers(),
            generation_config=self.generation_config,
        )

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The base model's defaults for `generate`, or what a caller has made of them in `generator`."""
        stored = self._kept_config or self.source.generation_config()
        return held_generation_config(self._generators.get("uni"), stored)

    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Self:
        before = [(parameter, parameter.data_ptr()) for parameter in self.parameters()]
        super()._apply(fn, *args, **kwargs)
        keep_alignment(before)
        after = [(parameter, parameter.data_ptr()) for parameter in self.parameters()]
        # Stock `encode` moves the model to the device where it is; .half(), share_memory() come here, too, and what is
        # not a parameter of this module follows. The encoder alone may have been converted before.
        alike = all(own.dtype == self.model.dtype for own in [*(self._uni or {}).values()][:1])
        if alike and [place for _, place in before] == [place for _, place in after]:
            return self
        if self._uni is not None:
            self._uni = converted(self._uni, fn)
        if any(old is not new for (old, _), (new, _) in zip(before, after, strict=True)):
            self.forget_generators()
        # Not built anew: a caller may hold one, or have put an adapter into it.
        for generator in self._generators.values():
            generator._apply(fn)
        self.fast.follow(self.model.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generators": {}, "_routed": None, "_kept_config": self._config_to_keep()}

    def forget_generators(self) -> None:
        """Build the generator view anew on its next use, after tensors of this module have been replaced.

        Its defaults for `generate` stay what a caller has made of them; an adapter in it does not, with a warning.
        """
        self._kept_config = self._config_to_keep()
        self._generators = {}

    def _config_to_keep(self) -> GenerationConfig | None:
        """The defaults for `generate` that a generator built anew is to have, where they are not the stored ones."""
        if any(getattr(lm, "_hf_peft_config_loaded", False) for lm in self._generators.values()):
            warnings.warn(
                "the generator carries a PEFT adapter, which a copy or a generator that is built anew has not: add it "
                "there again",
                stacklevel=3,
            )
        return self.generation_config if "uni" in self._generators else self._kept_config

    # --- saving ----------------------------------------------------------------------------------------------

    def encoder_state(self) -> dict[str, Tensor]:
        """Tensors of the encoder under their stock names, with low-rank experts merged."""
        return merged_state(self.model)

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write config, tokenizer and all weights in the checkpoint layout.

        With a PEFT adapter only the adapter is written, as stock sentence-transformers does in training.

        Args:
            output_path: An existing folder.
            *args: Not used.
            safe_serialization: Must be True: checkpoints hold nothing that can execute.
            **kwargs: Not used.

        Raises:
            CheckpointError: If a view holds what no checkpoint does, or what was written would not open again.
            ValueError: If `safe_serialization` is False, or there is no base model to take the generator from.
        """
        if not safe_serialization:
            raise ValueError("UBMoE checkpoints are safetensors only; leave safe_serialization=True")
        if self.has_adapter:
            super().save(output_path)
            return
        if self.ubmoe_config is None:
            raise ValueError("this module knows no base model; make it with `UBMoETransformer.from_base(...)`")
        checkpoint.plain_dtypes(self.model.state_dict())  # first: what others put into layers compares with nothing
        # Of the embeddings, which a caller may have resized through the generator's config.
        self.model.config.vocab_size = len(self.model.get_input_embeddings().state_dict()["weight"])
        encoder, uni = self.encoder_state(), self.uni_tensors()
        if "uni" in self._generators:
            uni = checkpoint.generator_tensors(self._generators["uni"], self.model, uni)
        low_rank = self._current_low_rank(encoder, uni)
        if self.is_low_memory:
            encoder |= self.source.bi(low_rank, uni, self.model.dtype)
        config = self.ubmoe_config.honest(self.base.sha256 if self.base else {}, self._changed(encoder, uni))
        checkpoint.write(
            Path(output_path),
            self.source.relabelled(config, encoder),
            self.model,
            encoder=encoder,
            uni=uni,
            low_rank=low_rank,
            routers=self._load_routers() if config.router else None,
            generation_config=self.generation_config,
            alignment=self.source.alignment(),
        )
        if self.classification is not None:
            save_head(self.classification, Path(output_path) / checkpoint.HEAD_FILE)
        checkpoint.check_checkpoint(output_path, modules=False)
        for name, content in self.notices.items():
            (Path(output_path) / name).write_bytes(content)
        save_tokenizer(self.processor, output_path)
        self.save_config(output_path)

    def _changed(self, encoder: Mapping[str, Tensor], uni: Mapping[str, Tensor]) -> str | None:
        """The first tensor of the generator that is not as it was read; None where all are."""
        return self.source.changed({**{key: t for key, t in encoder.items() if not is_ffn_key(key)}, **uni})
