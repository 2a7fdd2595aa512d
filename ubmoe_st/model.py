"""`UBMoE`: a SentenceTransformer with `generate()`."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.util import import_from_string
from torch import nn
from transformers import PreTrainedModel
from typing_extensions import Self

from ubmoe_st import checkpoint, classification, generation, ranking
from ubmoe_st.adapters import ADAPTER_CONFIG, is_adapter
from ubmoe_st.cards import CARD, card_with_datasets, model_card, renamed_card
from ubmoe_st.checkpoint import CheckpointError
from ubmoe_st.compute import Compute, ComputeReport
from ubmoe_st.configuration import Routing, UBMoEConfig, check_count, check_texts
from ubmoe_st.experts import LowRankLinear, is_ffn_key, norms, same_norms
from ubmoe_st.files import read_json, replacing_folder
from ubmoe_st.generation import Chat, ChatOptions, Tool
from ubmoe_st.hub import checkpoint_folder, push
from ubmoe_st.lossless import LosslessReport, check_lossless
from ubmoe_st.quantization import inner_tensors, quantize_base
from ubmoe_st.ranking import Method
from ubmoe_st.shards import TensorFiles
from ubmoe_st.transformer import UBMoETransformer
from ubmoe_st.watch import all_modules, own_tensors

__all__ = ["REQUIREMENTS", "UBMoE", "UBMoETransformer"]

REQUIREMENTS = {
    "transformers": {
        "specifier": ">=5.2",
        "reason": "older versions ignore `is_causal: false` and attend causally without a word",
    },
    "sentence-transformers": ">=6",
}
_TRUNCATE_DIM = list(inspect.signature(SentenceTransformer.encode).parameters).index("truncate_dim") - 1
"""Place of `truncate_dim` in a call of `encode` without keywords."""
_OWN_TRANSFORMER = f"{UBMoETransformer.__module__}.{UBMoETransformer.__qualname__}"
_STOCK_TRANSFORMER = f"{Transformer.__module__}.{Transformer.__qualname__}"


class UBMoE(SentenceTransformer):
    """One model that embeds and generates: a `SentenceTransformer` with `generate()`.

    Encoding runs with full attention through the `bi` experts, generating is the base model itself. Both views
    share their tensors and have no modes, so threads may encode and generate at the same time.

    Args:
        model_name_or_path: A checkpoint folder or the Hub id of one.
        low_memory: Hold the `bi` experts in low-rank form on the shared `uni` weights: both views then need
            little more memory than the base model.
        verify: Check every byte against `SHA256SUMS` first.
        compute: In what numbers the encoder multiplies, on a processor; the generator always is the base, in the
            dtype of the weights. `stored`: in that dtype, too. `bf16`, `int8`: faster where the processor has
            instructions for them, and close. `auto`: bf16 where it has, else as stored; `compute` says which and why.
        **kwargs: As for `SentenceTransformer`, e.g. `device`, `prompts`, `truncate_dim`, `model_kwargs`.

    Raises:
        CheckpointError: If the checkpoint is incomplete, truncated or tampered with; names the file.
        ValueError: If the path is not a UBMoE checkpoint, `low_memory` meets dense experts, or this machine cannot
            compute so.

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
        compute: Compute = "stored",
        **kwargs: Any,
    ) -> None:
        if kwargs.get("backend", "torch") != "torch":
            raise ValueError(
                f"both views are torch models, and backend={kwargs['backend']!r} is not: export the encoder by "
                f"`ubmoe export CHECKPOINT OUT --format {kwargs['backend']}` and open that with SentenceTransformer"
            )
        _check_dimensions(kwargs.get("truncate_dim"))
        path = None
        if model_name_or_path is not None:
            path = str(_local_checkpoint(model_name_or_path, kwargs))
            if verify:
                checkpoint.verify_sums(path)
            checkpoint.check_checkpoint(path)
        super().__init__(path, **kwargs)
        if len(self) and not isinstance(self[0], UBMoETransformer):
            raise ValueError(f"the first module must be a UBMoETransformer, got {type(self[0]).__name__}")
        self._card_claims = _claims(self.ubmoe_config) if len(self) else None
        self._card_behind = _behind(self)
        if low_memory:
            self._views.use_low_memory(check=False)
        if compute != "stored":
            self._views.compute_in(compute)

    @property
    def compute(self) -> ComputeReport:
        """In what numbers the encoder computes, why, and which layers are left out."""
        return self._views.fast.report_of(self._views)

    @property
    def _views(self) -> UBMoETransformer:
        return cast("UBMoETransformer", self[0])

    def _load_module_class_from_ref(self, class_ref: str, *args: Any, **kwargs: Any) -> type:
        if class_ref == _OWN_TRANSFORMER:  # as a plain SentenceTransformer around the module has saved it
            return UBMoETransformer
        found = super()._load_module_class_from_ref(class_ref, *args, **kwargs)
        return UBMoETransformer if found is Transformer else found

    @classmethod
    def _load_with_module_classes(
        cls, model_name_or_path: str, module_classes: Mapping[str, type[nn.Module]], **kwargs: Any
    ) -> Self:
        """As the stock trainer opens its checkpoints; that of an adapter goes on what the adapter was trained on."""
        folder = Path(model_name_or_path)
        if checkpoint.is_checkpoint(folder) or not is_adapter(folder):
            return super()._load_with_module_classes(model_name_or_path, module_classes, **kwargs)
        trained_on = read_json(folder / ADAPTER_CONFIG)["base_model_name_or_path"]
        model = super()._load_with_module_classes(trained_on, module_classes, **kwargs)
        model.load_adapter(model_name_or_path)
        return cls(modules=[model[0], *modules_behind(folder, module_classes)])

    if not TYPE_CHECKING:  # the overloads of the stock method stay in force for type checkers

        @wraps(SentenceTransformer.encode)
        def encode(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - the stock docstring
            check_texts(args[0] if args else kwargs.get("inputs", kwargs.get("sentences")))
            truncate_dim = kwargs.get("truncate_dim", args[_TRUNCATE_DIM] if len(args) > _TRUNCATE_DIM else None)
            _check_dimensions(truncate_dim)
            self._check_task(kwargs.get("task"), truncate_dim)
            return super().encode(*args, **kwargs)

        def forward(self, input: Any, **kwargs: Any) -> Any:  # noqa: D102 - the stock docstring
            features = super().forward(input, **kwargs)
            added = features.pop(classification.OUTPUT, None)
            if added is not None and "sentence_embedding" in features:
                features["sentence_embedding"] = self._views.classification.join(features["sentence_embedding"], added)
            return features

        @wraps(SentenceTransformer.preprocess)
        def preprocess(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> Any:  # noqa: D102 - the stock docstring
            features = super().preprocess(inputs, prompt=prompt, **kwargs)
            if not any(isinstance(module, Pooling) and not module.include_prompt for module in self):
                return features
            # Else the pooling would have no token to pool: of "", or of a text that is one token with the prompt's end.
            bare = self._views.rows_without_tokens(features)
            if not bare:
                return features
            end = self._views.filler_token
            texts = [f"{text}{end}" if row in bare else text for row, text in enumerate(inputs)]
            return super().preprocess(texts, prompt=prompt, **kwargs)

        def train(self, mode: bool = True) -> Any:  # noqa: D102 - the stock docstring
            # Every call of `encode` asks for evaluation mode, and the stock way sets it through every module.
            if not mode and not any(module.training for module in all_modules(self)):
                return self
            return super().train(mode)

        def _resolve_inference_device(self, device: Any) -> Any:
            # Every call of `encode` asks where each tensor is, which the stock way does with names and twice filtered.
            if device is None and not getattr(self, "_placement_is_delegated", True):
                here = self.device
                tensors = (tensor for module in all_modules(self) for tensor in own_tensors(module))
                if all(tensor.device == here for tensor in tensors):
                    return here
            return super()._resolve_inference_device(device)

        @wraps(SentenceTransformer.add_adapter)
        def add_adapter(self, *args: Any, **kwargs: Any) -> None:  # noqa: D102 - the stock docstring
            with _low_memory_explained(self._views):
                super().add_adapter(*args, **kwargs)
            classification.take_away(self._views, "this adapter")

        @wraps(SentenceTransformer.load_adapter)
        def load_adapter(self, *args: Any, **kwargs: Any) -> None:  # noqa: D102 - the stock docstring
            with _low_memory_explained(self._views):
                super().load_adapter(*args, **kwargs)
            classification.take_away(self._views, "this adapter")

    def _check_task(self, task: str | None, truncate_dim: int | None) -> None:
        if task in (None, "query", "document"):
            return
        if task != classification.TASK:
            modules = list(self)[1:]
            if any(isinstance(m, Router) or "task" in getattr(m, "forward_kwargs", ()) for m in modules):
                return
            raise ValueError(
                f"there are no vectors for task {task!r}: expected None, 'query', 'document' or {classification.TASK!r}"
            )
        if self._views.classification is None:
            raise ValueError(
                'task="classification" needs a classification head, and this model has none: leave the task out, or '
                "fit one by `python -m training.classification` and build the checkpoint again"
            )
        if (truncate_dim or self.truncate_dim) is not None:
            raise ValueError(
                f"vectors for classifiers cannot be cut to {truncate_dim or self.truncate_dim} dimensions, which would "
                'leave only what plain vectors have: take truncate_dim away, or leave task="classification" out'
            )

    # --- generating ------------------------------------------------------------------------------------------

    @property
    def generator(self) -> PreTrainedModel:
        """The base model as a stock causal LM that shares the encoder's tensors."""
        return self._views.generator("uni")

    @property
    def routing(self) -> Routing:
        """Which experts `generate` runs where the call does not say: `uni` unless the checkpoint names others."""
        config = self._views.ubmoe_config
        return config.routing if config else "uni"

    def generator_for(self, routing: Routing) -> PreTrainedModel:
        """The generator view with a routing: `uni`, `bi` or `router`."""
        return self._views.generator(routing)

    def generate(
        self,
        prompts: str | Chat | Sequence[str | Chat],
        *,
        routing: Routing | None = None,
        max_new_tokens: int | None = None,
        stream: bool = False,
        continue_final_message: bool | None = None,
        tools: Sequence[Tool] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **generation_kwargs: Any,
    ) -> str | list[str] | Iterator[str]:
        """Continue texts, or answer chats.

        Args:
            prompts: A text, a chat (list of messages with `role` and `content`; a content is a text or a list of
                `{"type": "text", "text": ...}`), or a list of either.
            routing: `uni`: exactly the base model. `bi`, `router`: see `generator_for`. None: the checkpoint's
                own choice, which is `uni` unless it says otherwise.
            max_new_tokens: At most so many tokens are generated for each prompt. None: `max_length` of this call, else
                the limit of `generation_config`, else that of `generator.generation_config`, else 256.
            stream: Return an iterator over pieces of text; for one prompt. Closing it ends the generation.
            continue_final_message: Whether the last message of a chat is continued, instead of answered. None: it is if
                it is the assistant's.
            tools: Functions, or their JSON schemas, that the chat template is told of.
            chat_template_kwargs: Further variables of the chat template, e.g. `enable_thinking`.
            **generation_kwargs: As for `transformers` `generate`, e.g. `do_sample`, `temperature`, `num_beams`,
                `stop_strings`, `generation_config`.

        Returns:
            The new text; a list of texts for a list of prompts; an iterator if `stream`.

        Raises:
            TypeError: If a prompt is neither a text nor a chat, or the limit is no whole number.
            ValueError: If a keyword argument is not known, or made of the prompts here, several prompts are to be
                streamed, or the chat template does not take a chat.
        """
        return generation.generate(
            self._views,
            prompts,
            routing=routing or self.routing,
            max_new_tokens=max_new_tokens,
            stream=stream,
            chat=ChatOptions(continue_final_message, tools, chat_template_kwargs),
            **generation_kwargs,
        )

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        method: Method = "likelihood",
        batch_size: int = 32,
    ) -> list[dict[str, Any]]:
        """Order documents by their relevance for a query, by the base model: as `CrossEncoder.rank`.

        Args:
            query: One text.
            documents: At least one. What does not fit into the model with the query is cut at its end; one warning
                counts them.
            top_k: How many to return. None: all.
            return_documents: Also return the `text` of each.
            method: `likelihood`: mean log-probability of a token of the query after the document. `yes_no`: the base
                model is asked in its chat template whether the document answers the query; logit of yes minus no.
            batch_size: Documents computed together; scores do not depend on it, up to float rounding.

        Returns:
            `corpus_id` (position in `documents`) and `score` of each, best first.

        Raises:
            TypeError: If query or documents are no texts.
            ValueError: If one of them is empty, the query leaves no room for a document, or `yes_no` meets a base
                without chat template.
        """
        return ranking.rank(
            self._views, query, documents, top_k, return_documents, method=method, batch_size=batch_size
        )

    def token_ids(self, text: str) -> list[int]:
        """Token ids of one text, neither padded nor cut; safe while other threads encode or generate."""
        return self._views.token_ids(text)

    # --- facts -----------------------------------------------------------------------------------------------

    @property
    def ubmoe_config(self) -> UBMoEConfig | None:
        """What the checkpoint says of its base and its experts."""
        return self._views.ubmoe_config

    def memory_report(self) -> dict[str, float]:
        """Bytes in memory of both views together; builds the generator view if there is none yet.

        Returns:
            `shared`, `uni`, `bi`, `router`, `compute` (copies for `bf16` or `int8`) and `total` in bytes, `base` (what
            the base model alone needs) and `ratio` (total / base).
        """
        routed = bool(self.ubmoe_config and self.ubmoe_config.router)
        views = [self.generator, *([self._views.generator("router")] if routed else [])]
        parts = {"shared": 0, "uni": 0, "bi": 0, "router": 0}
        seen: set[int] = set()

        def count(part: str, parameters: Iterator[tuple[str, nn.Parameter]], pick: Callable[[str], bool]) -> None:
            for name, parameter in parameters:
                for tensor in inner_tensors(parameter) if pick(name) else ():
                    if tensor.data_ptr() not in seen:
                        seen.add(tensor.data_ptr())
                        parts[part] += tensor.numel() * tensor.element_size()

        encoder = self._views.model
        count("shared", encoder.named_parameters(), lambda name: not is_ffn_key(name))
        count("uni", views[0].named_parameters(), lambda name: True)
        for view in views[1:]:
            count("router", view.named_parameters(), lambda name: ".router." in name)
            count("bi", view.named_parameters(), lambda name: True)
        count("bi", self.named_parameters(), lambda name: True)
        parts["compute"] = self._views.fast.memory()
        base = parts["shared"] + parts["uni"]
        total = sum(parts.values())
        return {**parts, "total": total, "base": base, "ratio": total / base}

    def quantize_base(self, config: Any = None) -> None:
        """Hold the base in few bits, by torchao, with the low-rank `bi` experts as they are beside it.

        Both views then are those of the equally quantised base. For use, not for saving.

        Args:
            config: Of torchao, e.g. `Int4WeightOnlyConfig()` on a GPU; for 4 bits on a CPU see docs/serving.md. None:
                8-bit weights.

        Raises:
            ImportError: If torchao is absent.
            ValueError: If the model was not loaded with `low_memory=True`.
        """
        quantize_base(self._views, config)

    def check_lossless(self, base: str | os.PathLike[str] | None = None) -> LosslessReport:
        """Whether the generator is the base, to the last bit: logits, tokens and weights of both are compared.

        Also tokenizer, chat template and default routing; and whether attention is causal in the generator and full in
        the encoder, by what they compute.

        Args:
            base: Folder, `.gguf` file, Hub id or short name of the base. None: what the checkpoint names.

        Returns:
            The report: `ok`, and by name of each check what differs.

        Raises:
            ValueError: If no base is given, and that of the checkpoint is not named or not found.

        Example:
            >>> report = UBMoE("models/ubmoe-135m").check_lossless("smollm2-135m")
            >>> report.ok or report.checks
        """
        return check_lossless(self._views, base)

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
            model_name: By which the model card opens the model. None: the folder's, or as in the card that was loaded.
            create_model_card: Whether to write README.md. The card that was loaded is kept where it is right for the
                model, experts included. False: that of the folder stays, unless it speaks of another base or rank.
            train_datasets: Hub ids for the model card.
            safe_serialization: Must be True.

        Raises:
            CheckpointError: If what was written would not open, as of a compiled or quantised model; an old checkpoint
                stays as it was.
        """
        checkpoint.refuse_foreign_weights(path, adapter=self._views.has_adapter)
        with replacing_folder(path, keep=checkpoint.is_of_others) as temporary:
            try:
                super().save(
                    str(temporary),
                    model_name=model_name,
                    create_model_card=False,
                    train_datasets=train_datasets,
                    safe_serialization=safe_serialization,
                )
            except CheckpointError as error:
                raise CheckpointError(
                    f"nothing was written to {path}, because it would not open again: {error}. Save a model before it "
                    "is compiled, quantised or given an adapter in its generator, or after the adapter is merged"
                ) from error
            config = self.ubmoe_config if self._views.has_adapter else checkpoint.read_config(temporary)
            checkpoint.name_first_module(temporary, _STOCK_TRANSFORMER)
            if create_model_card:
                kept = self._model_card_text if self._has_card_of(temporary, config) else None
                card = kept or model_card(config, Path(path).resolve().name)
                card = renamed_card(card, model_name) if model_name else card
                card = card_with_datasets(card, train_datasets) if train_datasets else card
                (temporary / CARD).write_text(card, encoding="utf-8")
            elif _is_card_of(Path(path), config):
                shutil.copyfile(Path(path) / CARD, temporary / CARD)
            if not self._views.has_adapter:
                checkpoint.write_sums(temporary)

    def _has_card_of(self, written: Path, config: UBMoEConfig | None) -> bool:
        """Whether the card that was read with this model, scores included, is right for what was written."""
        if not self._model_card_text or self._views.has_adapter or self._card_claims != _claims(config):
            return False
        (kinds, sizes), (kinds_then, sizes_then) = _behind(self), self._card_behind
        if kinds != kinds_then or not same_norms(sizes, sizes_then):
            return False
        return self._views.source.changed(TensorFiles([written / checkpoint.BI_FILE]), bi=True) is None

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


@contextlib.contextmanager
def _low_memory_explained(views: UBMoETransformer) -> Iterator[None]:
    """Says of an adapter that PEFT cannot put on low-rank experts what to do."""
    try:
        yield
    except ValueError as error:
        if not views.is_low_memory or LowRankLinear.__name__ not in str(error):
            raise
        raise ValueError(
            "an adapter on the FFN needs the bi experts in one piece, and with low_memory=True they stand as low-rank "
            "deltas beside the original ones; load the checkpoint again, without low_memory"
        ) from error


def modules_behind(folder: Path, known: Mapping[str, type[nn.Module]] | None = None) -> list[Any]:
    """What a saved model has behind its first module.

    Args:
        folder: The model, with its `modules.json`.
        known: Classes by the type that it names; others are imported.
    """
    entries = json.loads((folder / checkpoint.MODULES_FILE).read_text(encoding="utf-8"))[1:]
    kinds: list[Any] = [(known or {}).get(entry["type"]) or import_from_string(entry["type"]) for entry in entries]
    return [kind.load(str(folder), subfolder=entry["path"]) for kind, entry in zip(kinds, entries)]


def _behind(model: SentenceTransformer) -> tuple[list[Any], dict[str, float]]:
    """What decides on vectors behind the encoder: modules, their settings, and norms of their tensors."""
    modules = list(model)[1:]
    kinds: list[Any] = [(type(module).__name__, getattr(module, "get_config_dict", dict)()) for module in modules]
    return kinds, norms({f"{n}.{key}": t for n, m in enumerate(modules) for key, t in m.state_dict().items()})


def _claims(config: UBMoEConfig | None) -> tuple[Any, ...] | None:
    """What a card says of a checkpoint, beside its scores."""
    return (config.base_model, config.expert_rank, config.routing, config.training) if config else None


def _is_card_of(folder: Path, config: UBMoEConfig | None) -> bool:
    """Whether a folder is a checkpoint with a card that is right for another one, beside its scores."""
    with contextlib.suppress(CheckpointError):
        if checkpoint.is_checkpoint(folder) and (folder / CARD).is_file():
            return _claims(checkpoint.read_config(folder)) == _claims(config)
    return False


def _check_dimensions(truncate_dim: object) -> None:
    """Of 0 and below, slices would make vectors without dimensions, or without the last ones."""
    if truncate_dim is not None:
        check_count("truncate_dim", truncate_dim, wanted="a whole number or None")


def _local_checkpoint(name: str | os.PathLike[str], kwargs: dict[str, Any]) -> Path:
    path = checkpoint_folder(
        name,
        revision=kwargs.get("revision"),
        cache_dir=kwargs.get("cache_folder"),
        token=kwargs.get("token"),
        local_files_only=kwargs.get("local_files_only", False),
    )
    if is_adapter(path) and not checkpoint.is_checkpoint(path):
        raise CheckpointError(
            f"{path} is a PEFT adapter, not a UBMoE checkpoint: open the checkpoint that it was trained on and call "
            f"`load_adapter({str(name)!r})`, or make a checkpoint with `upcycle(base, {str(name)!r}, out=...)`"
        )
    if not checkpoint.is_checkpoint(path):
        raise CheckpointError(
            f"{checkpoint.GENERATOR_CONFIG} is missing from {path}: not a UBMoE checkpoint. "
            f"Make one with `upcycle({str(name)!r}, out=...)`, or open it with SentenceTransformer"
        )
    return path
