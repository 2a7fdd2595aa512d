"""`UBMoE`: a SentenceTransformer with `generate()`, and `UBMoETransformer`, its first module."""

from __future__ import annotations

import importlib.metadata
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from typing_extensions import Self

from ubmoe_st import checkpoint
from ubmoe_st.bases import Base, resolve_base, save_tokenizer
from ubmoe_st.cards import model_card
from ubmoe_st.checkpoint import CheckpointError
from ubmoe_st.configuration import ROUTINGS, RouterKind, Routing, UBMoEConfig
from ubmoe_st.experts import (
    LowRank,
    LowRankLinear,
    check_low_rank,
    find_ffns,
    is_ffn_key,
    load_low_rank,
    merge_low_rank,
    replace_module,
    save_low_rank,
    with_low_rank,
)
from ubmoe_st.files import replacing_folder
from ubmoe_st.generator import build_generator, causal_config, meta_causal_lm, router_state, uni_ffns, uni_keys
from ubmoe_st.hub import download, push

Chat = list[dict[str, str]]

REQUIREMENTS = {
    "transformers": {
        "specifier": ">=5.2",
        "reason": "older versions ignore `is_causal: false` and attend causally without a word",
    },
    "sentence-transformers": ">=6",
}
_TEXT_ONLY: dict[str, Any] = {
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
_STOCK_TRANSFORMER = f"{Transformer.__module__}.{Transformer.__qualname__}"
# One lock for all models: a lock on the object could not be pickled for multi-process encoding.
_BUILD_LOCK = threading.RLock()
# A fast tokenizer keeps padding and truncation as state: each call sets what it needs, then tokenises. Between the two
# another thread that needs something else must not come in. Of the module for the same reason.
_TOKENIZER_LOCK = threading.RLock()
_PASS_TOKENS = 64
"""What one more pass of the encoder costs on a CPU, in tokens: it reads all weights again."""


def _without_surrogates(text: str) -> str:
    """Lone surrogates, as broken JSON escapes give them, are no text a tokenizer takes."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def group_by_length(lengths: Sequence[int], pass_tokens: int = _PASS_TOKENS) -> list[list[int]]:
    """The groups of rows in which a padded batch costs least, by dynamic programming.

    Args:
        lengths: Tokens of each of B rows.
        pass_tokens: What a further group costs, in tokens.

    Returns:
        Positions of the rows, longest first. The cost of a group is its rows times its longest one.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    longest = np.asarray(lengths, np.int64)[order]
    best = np.zeros(len(order) + 1)
    begins = np.zeros(len(order) + 1, np.int64)
    for end in range(1, len(order) + 1):
        costs = best[:end] + longest[:end] * (end - np.arange(end)) + pass_tokens
        begins[end] = costs.argmin()
        best[end] = costs[begins[end]]
    groups = []
    end = len(order)
    while end:
        groups.append(order[begins[end] : end].tolist())
        end = int(begins[end])
    return groups[::-1]


class UBMoETransformer(Transformer):
    """The encoder view as a sentence-transformers module: full attention through the `bi` experts.

    Reads a UBMoE checkpoint folder, or any base decoder by `from_base`. Keeps what the generator view needs
    beside the shared tensors, and loads it on first use. Saving writes the whole checkpoint layout, whose root
    stock `Transformer` opens.

    Args:
        model_name_or_path: Checkpoint folder, or folder of a base model.
        **kwargs: As for `sentence_transformers.models.Transformer`.
    """

    def __init__(self, model_name_or_path: str, **kwargs: Any) -> None:
        super().__init__(str(model_name_or_path), **{**_TEXT_ONLY, **kwargs})
        # Read at every call by the stock mask functions; `is_causal` as a call argument is not thread-safe.
        self.model.config.is_causal = False
        self.folder: Path | None = None
        self.base: Base | None = None
        self.low_rank: LowRank | None = None
        self.ubmoe_config: UBMoEConfig | None = None
        self._uni: dict[str, Tensor] | None = None
        self._routers: dict[str, Tensor] | None = None
        self._generators: dict[str, PreTrainedModel] = {}
        if checkpoint.is_checkpoint(model_name_or_path):
            self.folder = Path(model_name_or_path)
            self.ubmoe_config = checkpoint.read_config(self.folder)

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
        _check_decoder(found)
        model_kwargs = dict(kwargs.pop("model_kwargs", None) or {})
        if dtype is not None:
            model_kwargs["dtype"] = dtype
        if attn_implementation is not None:
            model_kwargs["attn_implementation"] = attn_implementation
        module = cls(str(found.path), model_kwargs=model_kwargs, **kwargs)
        if max_seq_length is not None:
            module.max_seq_length = max_seq_length
        find_ffns(module.model)
        _check_bidirectional(module.model)
        module.base = found
        module.ubmoe_config = UBMoEConfig(
            base_model=found.name,
            base_architecture=type(meta_causal_lm(causal_config(module.model.config))).__name__,
            base_origin=found.origin,
        )
        return module

    @property
    def has_adapter(self) -> bool:
        """Whether a PEFT adapter is injected, as in training."""
        return bool(getattr(self.model, "peft_config", None))

    @property
    def is_low_memory(self) -> bool:
        """Whether the `bi` experts are held in low-rank form on the shared `uni` weights."""
        return any(isinstance(module, LowRankLinear) for module in self.model.modules())

    def preprocess(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Tokenise a batch; a text without any token gets one end token, so that its vector is defined.

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
                filler = self._filler_token()
                texts = [text if text and self._has_tokens(text) else filler for text in texts]
        with _TOKENIZER_LOCK:
            return super().preprocess(texts, prompt=prompt, **kwargs)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Token embeddings of a batch. On a CPU, rows of similar length are computed together, without their padding.

        A CPU pays in full for every padded position, and a batch of documents can be mostly padding. Vectors are those
        of one pass up to float rounding; what stands at padded positions has no meaning in either.

        Args:
            features: `input_ids` and `attention_mask`, (B, T), of `preprocess`.
            **kwargs: As for `Transformer.forward`; with any, the batch is computed as it is.

        Returns:
            `features` with `token_embeddings`, (B, T, D).
        """
        groups = [] if kwargs else self._groups(features)
        if len(groups) < 2:
            return super().forward(features, **kwargs)
        name, mask = self.module_output_name, features["attention_mask"]
        whole: Tensor | None = None
        for rows in groups:
            used = mask[rows].any(0).nonzero()
            first, last = int(used[0]), int(used[-1]) + 1
            part = {k: v[rows, first:last] if isinstance(v, Tensor) else v for k, v in features.items()}
            tokens = super().forward(part)[name]
            if whole is None:
                whole = tokens.new_zeros(*mask.shape, tokens.shape[-1])
            whole[rows, first:last] = tokens
        features[name] = whole
        return features

    def _groups(self, features: dict[str, Any]) -> list[list[int]]:
        """Rows to compute together; none where the batch has to be computed as it is."""
        mask = features.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.device.type != "cpu" or torch.is_grad_enabled():
            return []
        if any(isinstance(value, Tensor) and value.shape != mask.shape for value in features.values()):
            return []
        if self.model.config.output_hidden_states or not bool(mask.any(1).all()):
            return []
        filled = mask.bool().int()
        # From the first to the last token of a row, on whichever side it is padded.
        spans = mask.shape[1] - filled.argmax(1) - filled.flip(1).argmax(1)
        return group_by_length(spans.tolist())

    def _has_tokens(self, text: str) -> bool:
        # Only short texts can be empty after tokenisation; longer ones are not tokenised twice.
        return len(text) > 8 or bool(self.token_ids(text))

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

    def _filler_token(self) -> str:
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

    def set_dense_experts(self, ffn: dict[str, Tensor]) -> None:
        """Take dense `bi` experts.

        Args:
            ffn: Every FFN tensor of the backbone by name.

        Raises:
            ValueError: If one is missing, unknown, or of another shape.
        """
        own = {key: tensor for key, tensor in self.model.state_dict(keep_vars=True).items() if is_ffn_key(key)}
        if set(own) != set(ffn):
            odd = sorted(set(own) ^ set(ffn))[0]
            raise ValueError(f"dense experts and the base differ in their FFN tensors: {odd}")
        for key, tensor in own.items():
            if tensor.shape != ffn[key].shape:
                raise ValueError(f"{key}: expected shape {tuple(tensor.shape)}, got {tuple(ffn[key].shape)}")
            with torch.no_grad():
                tensor.copy_(ffn[key])
        self.low_rank = None

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

    def use_low_memory(self) -> None:
        """Hold the `bi` experts as low-rank deltas on the `uni` weights, instead of merged.

        Raises:
            ValueError: If the experts are dense.
        """
        low_rank = self._load_low_rank()
        if low_rank is None:
            raise ValueError(
                "low_memory=True needs low-rank experts, but the bi experts of this checkpoint are dense; "
                "load it with low_memory=False"
            )
        uni = self.uni_tensors()
        for prefix, ffn in uni_ffns(self.model, uni).items():
            replace_module(self.model, prefix, with_low_rank(ffn, prefix, low_rank))
        self._uni = {key: tensor for key, tensor in uni.items() if not is_ffn_key(key)}
        self._generators = {}
        self.model.eval()

    def _load_low_rank(self) -> LowRank | None:
        if self.low_rank is None and self.folder is not None and (self.folder / checkpoint.DELTA_FILE).is_file():
            self.low_rank, _ = load_low_rank(self.folder / checkpoint.DELTA_FILE)
        return self.low_rank

    # --- the generator view ----------------------------------------------------------------------------------

    def uni_tensors(self) -> dict[str, Tensor]:
        """What the generator has beside the shared tensors: original FFNs and an untied head, by backbone name.

        In low-memory form the FFN tensors are the encoder's own.

        Raises:
            ValueError: If the module was loaded from a folder that has no generator.
        """
        with _BUILD_LOCK:
            if self._uni is None:
                self._uni = self._read_uni()
        tensors = dict(self._uni)
        for prefix, ffn in find_ffns(self.model).items():
            for name, module in ffn.named_modules():
                if isinstance(module, LowRankLinear):
                    for key, parameter in module.base.named_parameters():
                        tensors[f"{prefix}.{name}.{key}"] = parameter.detach()
        return tensors

    def _read_uni(self) -> dict[str, Tensor]:
        if self.folder is not None:
            stored = load_file(self.folder / checkpoint.UNI_FILE)
        elif self.base is not None:
            lm = AutoModelForCausalLM.from_pretrained(self.base.path, dtype=self.model.dtype)
            state = lm.state_dict()
            stored = {key: state[name] for key, name in uni_keys(lm).items()}
        else:
            raise ValueError(
                "this model has no generator: it was not loaded from a UBMoE checkpoint; make one with `upcycle`"
            )
        dtype, device = self.model.dtype, self.model.device
        return {key: tensor.to(device, dtype) for key, tensor in stored.items()}

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
            if routing not in self._generators:
                self._generators[routing] = self._build(routing)
            return self._generators[routing]

    def _build(self, routing: Routing) -> PreTrainedModel:
        if self.has_adapter:
            raise ValueError("the encoder carries a PEFT adapter; export it with `upcycle(base, bi_experts=...)` first")
        uni = self.uni_tensors()
        kind = self.ubmoe_config.router if self.ubmoe_config else None
        if routing == "router":
            if kind is None:
                raise ValueError("routing='router' needs trained routers, and this checkpoint has none; use 'uni'")
            if self._routers is None and self.folder is not None:
                self._routers = load_file(self.folder / checkpoint.ROUTER_FILE)
            # Low-rank experts let the mix share the large products, see RoutedFFN.
            return self._build_routed(uni, kind)
        return build_generator(self.model, uni, routing=routing, generation_config=self.generation_config)

    def _build_routed(self, uni: dict[str, Tensor], kind: RouterKind | None) -> PreTrainedModel:
        encoder = self.model
        low_rank = self._load_low_rank()
        if low_rank is not None and not self.is_low_memory:
            ffns = uni_ffns(encoder, uni)
            encoder = _with_ffns(encoder, {p: with_low_rank(ffn, p, low_rank) for p, ffn in ffns.items()})
        return build_generator(
            encoder,
            uni,
            routing="router",
            router=kind,
            router_state=self._routers,
            generation_config=self.generation_config,
        )

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The base model's defaults for `generate`."""
        folder = self.folder / checkpoint.GENERATOR_FOLDER if self.folder else self.base.path if self.base else None
        if folder is None or not (folder / "generation_config.json").is_file():
            return None
        return GenerationConfig.from_pretrained(folder)

    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Self:
        # Runs for .to(), .half(), share_memory(): what is not a parameter of this module follows.
        if self._uni is not None:
            self._uni = {key: fn(tensor) for key, tensor in self._uni.items()}
        self._generators = {}
        return super()._apply(fn, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generators": {}}

    # --- saving ----------------------------------------------------------------------------------------------

    def encoder_state(self) -> dict[str, Tensor]:
        """Tensors of the encoder under their stock names, with low-rank experts merged."""
        low = {name: module for name, module in self.model.named_modules() if isinstance(module, LowRankLinear)}
        state = {}
        for key, tensor in self.model.state_dict().items():
            name, _, leaf = key.rpartition(".")
            owner = name.removesuffix(".base")
            if owner not in low:
                state[key] = tensor
            elif name != owner:
                if leaf == "weight":
                    merged = nn.Linear(1, 1, bias=False)
                    merged.weight = nn.Parameter(tensor.clone(), requires_grad=False)
                    merge_low_rank(merged, low[owner].lora_A, low[owner].lora_B)
                    tensor = merged.weight
                state[f"{owner}.{leaf}"] = tensor
        return state

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write config, tokenizer and all weights in the checkpoint checkpoint.

        With a PEFT adapter only the adapter is written, as stock sentence-transformers does in training.

        Args:
            output_path: An existing folder.
            *args: Not used.
            safe_serialization: Must be True: checkpoints hold nothing that can execute.
            **kwargs: Not used.

        Raises:
            ValueError: If `safe_serialization` is False, or there is no base model to take the generator from.
        """
        if not safe_serialization:
            raise ValueError("UBMoE checkpoints are safetensors only; leave safe_serialization=True")
        if self.has_adapter:
            super().save(output_path)
            return
        if self.ubmoe_config is None:
            raise ValueError("this module knows no base model; make it with `UBMoETransformer.from_base(...)`")
        out = Path(output_path)
        (out / checkpoint.GENERATOR_FOLDER).mkdir(exist_ok=True)
        state = self.encoder_state()
        self._save_encoder(out, state)
        self._save_generator(out, state)
        save_tokenizer(self.processor, output_path)
        self.save_config(output_path)

    def _alignment(self) -> int:
        """Where the base's tensors start in their file, modulo 64 bytes."""
        if self.folder is not None:
            return checkpoint.data_start(self.folder / checkpoint.SHARED_FILE) % checkpoint.CACHE_LINE
        files = sorted(self.base.path.glob("*.safetensors")) if self.base is not None else []
        return checkpoint.data_start(files[0]) % checkpoint.CACHE_LINE if files else 0

    def _save_encoder(self, out: Path, state: dict[str, Tensor]) -> None:
        shards = {
            checkpoint.SHARED_FILE: {key: tensor for key, tensor in state.items() if not is_ffn_key(key)},
            checkpoint.BI_FILE: {key: tensor for key, tensor in state.items() if is_ffn_key(key)},
        }
        for file, tensors in shards.items():
            checkpoint.save_tensors(tensors, out / file, self._alignment())
        weight_map = {key: file for file, tensors in shards.items() for key in sorted(tensors)}
        _write_json(out / checkpoint.INDEX_FILE, _index(weight_map, state))
        config = self.model.config.to_dict() | {"is_causal": False, "architectures": [type(self.model).__name__]}
        _write_json(out / "config.json", {k: v for k, v in config.items() if k != "_name_or_path"})

    def _save_generator(self, out: Path, state: dict[str, Tensor]) -> None:
        config = self.ubmoe_config
        if config is None:
            raise ValueError("no configuration to save")
        if not config.base_sha256 and self.base is not None:
            config.base_sha256 = self.base.sha256
        config.versions = {
            name: importlib.metadata.version(name)
            for name in ("ubmoe-st", "sentence-transformers", "transformers", "torch")
        }
        uni = self.uni_tensors()
        checkpoint.save_tensors(uni, out / checkpoint.UNI_FILE, self._alignment())
        low_rank = self._load_low_rank()
        config.expert_rank = None
        if low_rank is not None:
            config.expert_rank = max(lora_a.shape[0] for lora_a, _ in low_rank.values())
            save_low_rank(low_rank, out / checkpoint.DELTA_FILE, {"base_sha256": config.base_sha256})
        if config.router is not None:
            if self._routers is None and self.folder is not None:
                self._routers = load_file(self.folder / checkpoint.ROUTER_FILE)
            checkpoint.save_tensors(self._routers or {}, out / checkpoint.ROUTER_FILE)
        if self.generation_config is not None:
            self.generation_config.save_pretrained(out / checkpoint.GENERATOR_FOLDER)
        stock = causal_config(self.model.config).to_dict() | {"architectures": [config.base_architecture]}
        stock.pop("_name_or_path", None)
        _write_json(out / checkpoint.GENERATOR_CONFIG, {**stock, checkpoint.CONFIG_KEY: config.to_dict()})
        # Stock transformers opens the local folder `generator` as the base model by this index.
        shared = {key: tensor for key, tensor in state.items() if not is_ffn_key(key)}
        own = Path(checkpoint.UNI_FILE).name
        weight_map = dict.fromkeys(sorted(shared), f"../{checkpoint.SHARED_FILE}") | dict.fromkeys(sorted(uni), own)
        _write_json(out / checkpoint.GENERATOR_FOLDER / checkpoint.INDEX_FILE, _index(weight_map, {**shared, **uni}))


class UBMoE(SentenceTransformer):
    """One model that embeds and generates: a `SentenceTransformer` with `generate()`.

    Encoding runs with full attention through the `bi` experts, generating is the base model itself. Both views
    share their tensors and have no modes, so threads may encode and generate at the same time.

    Args:
        model_name_or_path: A checkpoint folder or the Hub id of one.
        low_memory: Hold the `bi` experts in low-rank form on the shared `uni` weights: both views then need
            little more memory than the base model.
        verify: Check every byte against `SHA256SUMS` first.
        **kwargs: As for `SentenceTransformer`, e.g. `device`, `prompts`, `truncate_dim`, `model_kwargs`.

    Raises:
        CheckpointError: If the checkpoint is incomplete, truncated or tampered with; names the file.
        ValueError: If the path is not a UBMoE checkpoint, or `low_memory` meets dense experts.

    Example:
        >>> model = UBMoE("models/ubmoe-135m")
        >>> model.similarity(model.encode_query("a cat"), model.encode_document(["a kitten", "a train"]))
        >>> model.generate("The capital of France is", max_new_tokens=5)
    """

    def __init__(
        self,
        model_name_or_path: str | os.PathLike[str] | None = None,
        *,
        low_memory: bool = False,
        verify: bool = False,
        **kwargs: Any,
    ) -> None:
        path = None
        if model_name_or_path is not None:
            path = str(_local_checkpoint(model_name_or_path, kwargs))
            if verify:
                checkpoint.verify_sums(path)
            checkpoint.check_checkpoint(path)
        super().__init__(path, **kwargs)
        if len(self) and not isinstance(self[0], UBMoETransformer):
            raise ValueError(f"the first module must be a UBMoETransformer, got {type(self[0]).__name__}")
        if low_memory:
            self._views.use_low_memory()

    @property
    def _views(self) -> UBMoETransformer:
        return cast("UBMoETransformer", self[0])

    def _load_module_class_from_ref(self, class_ref: str, *args: Any, **kwargs: Any) -> type:
        found = super()._load_module_class_from_ref(class_ref, *args, **kwargs)
        return UBMoETransformer if found is Transformer else found

    if not TYPE_CHECKING:  # the overloads of the stock method stay in force for type checkers

        @wraps(SentenceTransformer.encode)
        def encode(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - the stock docstring
            _check_texts(args[0] if args else kwargs.get("inputs", kwargs.get("sentences")))
            return super().encode(*args, **kwargs)

    # --- generating ------------------------------------------------------------------------------------------

    @property
    def generator(self) -> PreTrainedModel:
        """The base model as a stock causal LM that shares the encoder's tensors."""
        return self._views.generator("uni")

    def generator_for(self, routing: Routing) -> PreTrainedModel:
        """The generator view with a routing: `uni`, `bi` or `router`."""
        return self._views.generator(routing)

    def generate(
        self,
        prompts: str | Chat | Sequence[str | Chat],
        *,
        routing: Routing | None = None,
        max_new_tokens: int = 256,
        stream: bool = False,
        **generation_kwargs: Any,
    ) -> str | list[str] | Iterator[str]:
        """Continue texts, or answer chats.

        Args:
            prompts: A text, a chat (list of messages with `role` and `content`), or a list of either.
            routing: `uni`: exactly the base model. `bi`, `router`: see `generator_for`. None: the checkpoint's
                own choice, which is `uni` unless it says otherwise.
            max_new_tokens: At most so many tokens are generated for each prompt.
            stream: Return an iterator over pieces of text; for one prompt.
            **generation_kwargs: As for `transformers` `generate`, e.g. `do_sample`, `temperature`, `num_beams`.

        Returns:
            The new text; a list of texts for a list of prompts; an iterator if `stream`.

        Raises:
            TypeError: If a prompt is neither a text nor a chat.
            ValueError: If a keyword argument is not known, or several prompts are to be streamed.
        """
        single = isinstance(prompts, str) or _is_chat(prompts)
        if not single and (isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Iterable)):
            raise TypeError(
                "prompts must be a text, a list of messages with 'role' and 'content', or a list of either, got "
                f"{type(prompts).__name__}"
            )
        batch: list[str | Chat] = [prompts] if single else list(prompts)  # type: ignore[list-item,arg-type]
        if stream and len(batch) != 1:
            raise ValueError(f"stream=True takes one prompt, got {len(batch)}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if not batch:
            return []
        config = self._views.ubmoe_config
        lm: Any = self._views.generator(routing or (config.routing if config else "uni"))
        inputs = self._generation_inputs(batch, lm.device)
        arguments = {**inputs, "max_new_tokens": max_new_tokens, **generation_kwargs}
        if self.tokenizer.pad_token_id is not None:
            arguments.setdefault("pad_token_id", self.tokenizer.pad_token_id)
        if stream:
            return _stream(lm, self.tokenizer, arguments)
        with torch.inference_mode():
            sequences = lm.generate(**arguments)
        if not isinstance(sequences, Tensor):
            sequences = sequences.sequences
        texts = self.tokenizer.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return texts[0] if single and len(texts) == 1 else texts

    def token_ids(self, text: str) -> list[int]:
        """Token ids of one text, neither padded nor cut; safe while other threads encode or generate."""
        return self._views.token_ids(text)

    def _generation_inputs(self, batch: list[str | Chat], device: torch.device) -> dict[str, Tensor]:
        rows = []
        for position, prompt in enumerate(batch):
            if isinstance(prompt, str):
                ids = self._views.token_ids(prompt)
            elif _is_chat(prompt):
                if self.tokenizer.chat_template is None:
                    raise ValueError("this checkpoint has no chat template; give the prompt as a text")
                text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
                ids = self._views.token_ids(text, add_special_tokens=False)
            else:
                raise TypeError(
                    f"the prompt at position {position} must be a text or a list of messages with 'role' and "
                    f"'content', got {type(prompt).__name__}"
                )
            if not ids:
                raise ValueError(f"the prompt at position {position} is empty: there is nothing to continue")
            rows.append(ids)
        length = max(map(len, rows))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        # On the left, whatever side the encoder pads on: new tokens follow the prompt.
        input_ids = torch.tensor([[pad] * (length - len(ids)) + ids for ids in rows], device=device)
        mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in rows], device=device)
        return {"input_ids": input_ids, "attention_mask": mask}

    # --- facts -----------------------------------------------------------------------------------------------

    @property
    def ubmoe_config(self) -> UBMoEConfig | None:
        """What the checkpoint says of its base and its experts."""
        return self._views.ubmoe_config

    def memory_report(self) -> dict[str, float]:
        """Bytes in memory of both views together; builds the generator view if there is none yet.

        Returns:
            `shared`, `uni`, `bi`, `router` and `total` in bytes, `base` (what the base model alone needs) and
            `ratio` (total / base).
        """
        routed = bool(self.ubmoe_config and self.ubmoe_config.router)
        views = [self.generator, *([self._views.generator("router")] if routed else [])]
        parts = {"shared": 0, "uni": 0, "bi": 0, "router": 0}
        seen: set[int] = set()

        def count(part: str, parameters: Iterator[tuple[str, nn.Parameter]], pick: Callable[[str], bool]) -> None:
            for name, parameter in parameters:
                if pick(name) and parameter.data_ptr() not in seen:
                    seen.add(parameter.data_ptr())
                    parts[part] += parameter.numel() * parameter.element_size()

        encoder = self._views.model
        count("shared", encoder.named_parameters(), lambda name: not is_ffn_key(name))
        count("uni", views[0].named_parameters(), lambda name: True)
        for view in views[1:]:
            count("router", view.named_parameters(), lambda name: ".router." in name)
            count("bi", view.named_parameters(), lambda name: True)
        count("bi", self.named_parameters(), lambda name: True)
        base = parts["shared"] + parts["uni"]
        total = sum(parts.values())
        return {**parts, "total": total, "base": base, "ratio": total / base}

    # --- saving ----------------------------------------------------------------------------------------------

    def save(
        self,
        path: str,
        model_name: str | None = None,
        create_model_card: bool = True,
        train_datasets: list[str] | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write the checkpoint, all or nothing; stock sentence-transformers opens it.

        Args:
            path: The folder. An old checkpoint in it is replaced when the new one is complete.
            model_name: Name for the model card.
            create_model_card: Whether to write README.md.
            train_datasets: For the model card.
            safe_serialization: Must be True.
        """
        checkpoint.refuse_foreign_weights(path)
        with replacing_folder(path, keep=checkpoint.is_of_others) as temporary:
            super().save(
                str(temporary),
                model_name=model_name,
                create_model_card=False,
                train_datasets=train_datasets,
                safe_serialization=safe_serialization,
            )
            modules = json.loads((temporary / "modules.json").read_text(encoding="utf-8"))
            modules[0]["type"] = _STOCK_TRANSFORMER
            _write_json(temporary / "modules.json", modules)
            if create_model_card:
                name = model_name or Path(path).resolve().name
                (temporary / "README.md").write_text(
                    self._model_card_text or model_card(self.ubmoe_config, name), encoding="utf-8"
                )
            if not self._views.has_adapter:
                checkpoint.write_sums(temporary)

    def push_to_hub(
        self,
        repo_id: str,
        token: str | None = None,
        private: bool | None = None,
        safe_serialization: bool = True,
        commit_message: str | None = None,
        local_model_path: str | None = None,
        exist_ok: bool = False,
        replace_model_card: bool = False,
        train_datasets: list[str] | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Publish this model, or a saved checkpoint, in one commit; see `ubmoe_st.hub.push`.

        Args:
            repo_id: `owner/name`, or `name` for the owner of the token. Created if it does not exist.
            token: With the right to write. None: of `HF_TOKEN`, or of the last `hf auth login`.
            private: Whether a new repository is private.
            safe_serialization: Must be True.
            commit_message: None: one is made.
            local_model_path: Publish this checkpoint folder as it is, instead of the model in memory.
            exist_ok: Whether a repository that has files already may be changed.
            replace_model_card: Replace a card that the repository has. A folder's own card always does.
            train_datasets: For the model card.
            revision: Branch, created if it does not exist.
            create_pr: Open a pull request instead of committing.

        Returns:
            Address of the pull request or of the commit.

        Raises:
            CheckpointError: If the folder does not match its checksums.
            OSError: If the Hub cannot be reached or refuses; says whether anything was committed.
        """
        if local_model_path is None and self._views.has_adapter:
            raise ValueError("the encoder carries a PEFT adapter; export it with `upcycle(base, bi_experts=...)` first")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(local_model_path or Path(temporary) / repo_id.rpartition("/")[2])
            if local_model_path is None:
                self.save(
                    str(folder),
                    model_name=repo_id,
                    train_datasets=train_datasets,
                    safe_serialization=safe_serialization,
                )
            commit = push(
                folder,
                repo_id,
                token=token,
                private=private,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
                exist_ok=exist_ok,
                keep_card=local_model_path is None and not replace_model_card,
            )
        return commit.pr_url or commit.commit_url

    def _get_model_config(self) -> dict[str, Any]:
        return {**super()._get_model_config(), "requirements": REQUIREMENTS}


def _check_texts(inputs: object) -> None:
    if isinstance(inputs, str):
        return
    if not hasattr(inputs, "__iter__") or isinstance(inputs, bytes):
        raise TypeError(f"encode takes a text or a list of texts, got {type(inputs).__name__}")
    if isinstance(inputs, Sequence):
        for position, text in enumerate(inputs):
            if not isinstance(text, str):
                raise TypeError(
                    f"encode takes texts, but the entry at position {position} is of type {type(text).__name__}"
                )


def _local_checkpoint(name: str | os.PathLike[str], kwargs: dict[str, Any]) -> Path:
    path = Path(name).expanduser()
    if not path.is_dir():
        path = download(
            str(name),
            wanted="a checkpoint folder or the Hub id of one",
            revision=kwargs.get("revision"),
            cache_dir=kwargs.get("cache_folder"),
            token=kwargs.get("token"),
            local_files_only=kwargs.get("local_files_only", False),
            whole=checkpoint.is_checkpoint,
        )
    if not checkpoint.is_checkpoint(path):
        raise CheckpointError(
            f"{checkpoint.GENERATOR_CONFIG} is missing from {path}: not a UBMoE checkpoint. "
            f"Make one with `upcycle({str(name)!r}, out=...)`, or open it with SentenceTransformer"
        )
    return path


def _check_decoder(base: Base) -> None:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = AutoConfig.from_pretrained(base.path)
    what = f"{base.name} ({config.model_type})"
    if getattr(config, "vision_config", None) is not None or getattr(config, "audio_config", None) is not None:
        raise ValueError(f"{what} reads images or sound; expected a text decoder: give its language model alone")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{what} is an encoder-decoder; expected a decoder-only language model")
    declared = [name for name in config.architectures or [] if "CausalLM" not in name and "LMHead" not in name]
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or declared:
        found = declared[0] if declared else config.model_type
        raise ValueError(f"{what} is not a decoder language model ({found}): it has no causal LM head to generate with")
    experts = next((k for k in ("num_local_experts", "num_experts", "n_routed_experts") if getattr(config, k, 0)), None)
    if experts:
        raise ValueError(
            f"{what} is a mixture of experts already ({experts}={getattr(config, experts)}); expected a dense decoder"
        )


def _check_bidirectional(encoder: PreTrainedModel) -> None:
    """Refuse an architecture whose first token does not see later ones."""
    vocabulary = encoder.config.vocab_size
    ids = torch.arange(8, device=encoder.device)[None] % vocabulary
    other = ids.clone()
    other[0, 3] = (ids[0, 3] + vocabulary // 2 + 1) % vocabulary
    with torch.inference_mode():
        first, second = (encoder(input_ids=x, use_cache=False).last_hidden_state[0, 0] for x in (ids, other))
    if torch.equal(first, second):
        raise ValueError(
            f"{type(encoder).__name__} stays causal: its first token does not see later ones although the config "
            "says is_causal=false, so it cannot be made bidirectional with this version of transformers"
        )


def _with_ffns(encoder: PreTrainedModel, ffns: dict[str, nn.Module]) -> PreTrainedModel:
    from ubmoe_st.experts import share_copy

    memo: dict[int, object] = {id(encoder.get_submodule(prefix)): ffn for prefix, ffn in ffns.items()}
    copied = share_copy(encoder, memo)
    if not isinstance(copied, PreTrainedModel):
        raise TypeError(f"expected a transformers model, got {type(copied).__name__}")
    return copied


def _is_chat(prompt: object) -> bool:
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and all(isinstance(message, dict) and "role" in message and "content" in message for message in prompt)
    )


def _stream(lm: Any, tokenizer: Any, arguments: dict[str, Any]) -> Iterator[str]:
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    stopped = threading.Event()

    class Abandoned(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            return torch.full((input_ids.shape[0],), stopped.is_set(), device=input_ids.device)

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=0.1, skip_special_tokens=True)
    given = arguments.pop("stopping_criteria", None) or []
    criteria = StoppingCriteriaList([*given, Abandoned()])
    failure: list[BaseException] = []

    def work() -> None:
        try:
            with torch.inference_mode():
                lm.generate(**arguments, streamer=streamer, stopping_criteria=criteria)
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)

    def pieces() -> Iterator[str]:
        thread.start()
        try:
            while True:
                try:
                    piece = next(streamer)
                except Empty:
                    continue
                except StopIteration:
                    break
                if piece:
                    yield piece
            thread.join()
            if failure:
                raise failure[0]
        finally:
            stopped.set()

    return pieces()


def _index(weight_map: dict[str, str], tensors: dict[str, Tensor]) -> dict[str, Any]:
    size = sum(tensors[key].numel() * tensors[key].element_size() for key in weight_map)
    return {"metadata": {"total_size": size}, "weight_map": weight_map}


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=isinstance(content, dict)) + "\n", encoding="utf-8")
