"""The files around the weights of an export, under the names that most readers know, and plain safetensors."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from torch import Tensor

from ubmoe_st import checkpoint
from ubmoe_st.bases import save_tokenizer
from ubmoe_st.generator import tied_keys
from ubmoe_st.model import REQUIREMENTS, UBMoE
from ubmoe_st.multi_vector import token_modules
from ubmoe_st.ranking import answer_tokens, pair_template
from ubmoe_st.streaming import StreamedTransformer

# The names that every reader of sentence-transformers folders knows.
_MODULE_NAMES = {Pooling: "Pooling", Dense: "Dense", Normalize: "Normalize"}
_POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


def write_encoder_files(model: UBMoE, folder: Path, *, baked: bool) -> None:
    """Config, tokenizer and sentence-transformers modules.

    Args:
        model: The checkpoint.
        folder: Where to.
        baked: Whether full attention is part of a graph, and not something that transformers has to honour.
    """
    _write_encoder_config(model, folder, batches=baked)
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
    _write_settings(model, folder, "SentenceTransformer", model.similarity_fn_name, requirements=not baked)


def write_multi_vector_files(model: UBMoE, folder: Path) -> None:
    """The encoder as a `MultiVectorEncoder`: the modules of `multi_vector_encoder`."""
    _write_encoder_config(model, folder, batches=False)
    modules = [{"idx": 0, "name": "0", "path": "", "type": f"{Transformer.__module__}.{Transformer.__qualname__}"}]
    behind: list[Any] = token_modules(model)
    for index, module in enumerate(behind, 1):
        kind = type(module)
        path = folder / f"{index}_{kind.__name__}"
        path.mkdir()
        module.save(str(path))
        modules.append(
            {"idx": index, "name": str(index), "path": path.name, "type": f"{kind.__module__}.{kind.__qualname__}"}
        )
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    _write_settings(model, folder, "MultiVectorEncoder", "maxsim", requirements=True)


def _write_encoder_config(model: UBMoE, folder: Path, *, batches: bool) -> None:
    """Config and tokenizer of the encoder, and how long its texts are."""
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
    _write_tokenizer(model, folder, batches=batches)
    _write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": model[0].max_seq_length, "do_lower_case": False}
    )


def _write_settings(model: UBMoE, folder: Path, kind: str, similarity: str | None, *, requirements: bool) -> None:
    settings: dict[str, Any] = {
        "model_type": kind,
        "prompts": dict(model.prompts),
        "default_prompt_name": model.default_prompt_name,
        "similarity_fn_name": similarity,
    }
    if kind == "SentenceTransformer" and model.truncate_dim is not None:
        settings["truncate_dim"] = model.truncate_dim
    if requirements:
        settings["requirements"] = REQUIREMENTS
    _write_json(folder / "config_sentence_transformers.json", settings)


def _pooling_config(pooling: Pooling) -> dict[str, Any]:
    modes = [pooling.pooling_mode] if isinstance(pooling.pooling_mode, str) else list(pooling.pooling_mode)
    if modes != [mode for mode in _POOLING_KEYS if mode in modes]:
        return pooling.get_config_dict()  # the older keys have one order
    return {
        "word_embedding_dimension": pooling.embedding_dimension,
        **{key: mode in modes for mode, key in _POOLING_KEYS.items()},
        "include_prompt": pooling.include_prompt,
    }


def write_generator_files(model: UBMoE, folder: Path) -> None:
    """Config, generation config and tokenizer of the base model."""
    lm = model.generator
    config = lm.config.to_dict() | {"architectures": [type(lm).__name__]}
    _write_json(
        folder / "config.json", {k: v for k, v in config.items() if k not in ("_name_or_path", checkpoint.CONFIG_KEY)}
    )
    if lm.generation_config is not None:
        lm.generation_config.save_pretrained(folder)
    _write_tokenizer(model, folder, batches=False, longest=getattr(lm.config, "max_position_embeddings", None))


def write_cross_encoder_files(model: UBMoE, folder: Path) -> None:
    """The generator as a `CrossEncoder` whose scores are those of `UBMoE.rank` with `yes_no`."""
    views: Any = model[0]
    template = pair_template(views)
    if "strftime_now" in str(model.tokenizer.chat_template):
        warnings.warn(
            "the chat template of this checkpoint may name the date: the export keeps that of today, `UBMoE.rank` does "
            "not",
            stacklevel=3,
        )
    yes, no = answer_tokens(views)
    write_generator_files(model, folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    output = {"method": "forward", "method_output_name": "logits"}
    _write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "text-generation",
            "modality_config": {"text": output, "message": {**output, "format": "flat"}},
            "module_output_name": "causal_logits",
        },
    )
    score = folder / "1_LogitScore"
    score.mkdir()
    LogitScore(true_token_id=yes, false_token_id=no).save(str(score))
    kinds = {"": Transformer, score.name: LogitScore}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"{kind.__module__}.{kind.__qualname__}"}
        for index, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    _write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "CrossEncoder",
            "activation_fn": "torch.nn.modules.linear.Identity",
            "prompts": {},
            "default_prompt_name": None,
        },
    )


def _write_tokenizer(model: UBMoE, folder: Path, *, batches: bool, longest: int | None = None) -> None:
    """The tokenizer as transformers 4 and 5 read it.

    Args:
        model: The checkpoint.
        folder: Where to.
        batches: Whether `tokenizer.json` itself pads and truncates, for readers without transformers.
        longest: Tokens of the longest text. None: as the checkpoint says, whose limit is that of the encoder.
    """
    tokenizer: Any = model.tokenizer
    save_tokenizer(tokenizer, folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if longest is not None:
        config["model_max_length"] = longest
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
            "direction": tokenizer.truncation_side.capitalize(),
            "max_length": int(length),
            "strategy": "LongestFirst",
            "stride": 0,
        }
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_safetensors(model: UBMoE, folder: Path, view: str) -> None:
    """The tensors of a view as `model.safetensors`, aligned like those of the checkpoint."""
    views: Any = model[0]
    checkpoint.save_tensors(tensors_of(model, view), folder / "model.safetensors", views.source.alignment())


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def tensors_of(model: UBMoE, view: str) -> Mapping[str, Tensor]:
    """Tensors of a view under their stock names, each once."""
    views: Any = model[0]
    if view == "encoder":
        return views.encoder_state()
    if isinstance(views, StreamedTransformer):
        return views.generator_state()
    lm: Any = model.generator
    tied = tied_keys(lm)
    return {key: tensor for key, tensor in lm.state_dict().items() if key not in tied}
