"""Upcycling: a base decoder, and trained `bi` experts, become one UBMoE checkpoint."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sentence_transformers.base.modules import Module
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from torch import Tensor
from transformers import AutoModelForCausalLM

from ubmoe_st import checkpoint
from ubmoe_st.adapters import adapter_experts, is_adapter, read_adapter
from ubmoe_st.bases import Base, resolve_base
from ubmoe_st.classification import ClassificationHead, read_head, save_head
from ubmoe_st.configuration import RouterKind, check_count, encoder_limit, trained_further
from ubmoe_st.experts import Routers, expert_norms, is_ffn_key, load_low_rank, load_routers, same_norms, save_low_rank
from ubmoe_st.files import read_json, replacing_folder, sha256_of
from ubmoe_st.generator import uni_keys
from ubmoe_st.model import UBMoE, UBMoETransformer, modules_behind
from ubmoe_st.streaming import StreamedTransformer, StreamedUBMoE, can_stream, check_same_config, dense_experts

DELTA_NAME = Path(checkpoint.DELTA_FILE).name
"""The low-rank experts in a folder of their own."""
_NO_LIMIT = 10**9
"""Tokenizers without a limit say a number beyond it."""
PROJECTION_NAME = "projection.safetensors"
"""A linear layer behind the pooling, beside them."""
ROUTERS_FILE = "routers.safetensors"
"""Trained token routers beside low-rank experts."""
HEAD_NAME = Path(checkpoint.HEAD_FILE).name
"""A classification head beside them."""


def upcycle(
    base: str | os.PathLike[str] | Base,
    bi_experts: str | os.PathLike[str] | None = None,
    *,
    out: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    modules: Sequence[Module] | None = None,
    prompts: Mapping[str, str] | None = None,
    default_prompt_name: str | None = None,
    max_seq_length: int | None = None,
    routers: str | os.PathLike[str] | None = None,
    router_kind: RouterKind | None = None,
    allow_base_mismatch: bool = False,
    overwrite: bool = False,
) -> Path:
    """Turn a decoder into a UBMoE checkpoint.

    Args:
        base: A local folder, a `.gguf` file, a Hub id, or the short name `smollm2-135m`.
        bi_experts: One of: a folder or file of low-rank experts (`save_low_rank`); a PEFT LoRA adapter on the FFN
            projections, trained on the base or on a checkpoint of it, whose experts it then goes on from; a checkpoint
            of the same base; a folder of the same base with a fine-tuned FFN and nothing else changed; or None, for
            copies of the originals, the starting point of training.
        out: Folder to write, all or nothing.
        dtype: Of all weights. None: as the base has them.
        modules: sentence-transformers modules behind the encoder. None: what comes with the experts, else mean
            pooling and normalisation.
        prompts: Prompts by name, e.g. `{"query": "..."}`. None: what comes with the experts.
        default_prompt_name: Prompt of plain `encode`.
        max_seq_length: Longest input of `encode` in tokens. None: what comes with the experts, else the base's.
        routers: File of trained token routers. None: what comes with the experts.
        router_kind: How they mix. None: as the file says, else `soft`.
        allow_base_mismatch: Take experts that were trained on other weights of the same shape.
        overwrite: Replace a folder that is not empty.

    Returns:
        The folder.

    Raises:
        FileExistsError: If `out` is not empty and `overwrite` is False.
        FileNotFoundError: If the base or the experts are not found.
        ValueError: If the base cannot be split, or the experts do not belong to it.
    """
    target = Path(out).expanduser()
    bi_experts = Path(bi_experts).expanduser() if bi_experts is not None else None
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty; choose another folder, or pass overwrite=True")
    if max_seq_length is not None:
        check_count("max_seq_length", max_seq_length, unit=" token")
    for name, prompt in (prompts or {}).items():
        if not isinstance(name, str) or not isinstance(prompt, str):
            raise TypeError(f"prompts must be texts by name, got {prompt!r} for {name!r}")
    if isinstance(dtype, str) and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype must be the name of a torch type such as bfloat16, got {dtype!r}")
    checkpoint.refuse_foreign_weights(target)
    found = base if isinstance(base, Base) else resolve_base(base)
    streamed = can_stream(found.path) and (bi_experts is None or _can_stream_experts(Path(bi_experts)))
    module = (StreamedTransformer if streamed else UBMoETransformer).from_base(found, dtype=dtype)
    recipe: dict[str, Any] = {}
    beside = Path() if bi_experts is None else bi_experts.parent if bi_experts.is_file() else bi_experts
    if bi_experts is not None:
        recipe = _set_experts(module, found, Path(bi_experts), allow_base_mismatch)
        module.notices = checkpoint.notices_in(beside)
    if module.ubmoe_config is not None:
        module.ubmoe_config.training = recipe.get("training")
    length = recipe.get("max_seq_length") if max_seq_length is None else max_seq_length
    if length is not None:
        module.max_seq_length = encoder_limit(module.model.config, int(length))
    if routers is None and bi_experts is not None:
        file = beside / (checkpoint.ROUTER_FILE if checkpoint.is_checkpoint(beside) else ROUTERS_FILE)
        routers = file if file.is_file() else None
    if routers is not None:
        found_routers = load_routers(Path(routers))
        _check_routers(found_routers, module, Path(routers))
        module.set_routers(found_routers.state, router_kind or found_routers.kind)
    head = recipe.get("classification")
    if head is None and bi_experts is not None:
        head = _head_beside(bi_experts if bi_experts.is_file() else beside / DELTA_NAME)
    module.set_classification_head(head)
    if modules is None:
        modules = recipe.get("modules") or _default_modules(module, recipe)
    model = UBMoE(
        modules=[module, *modules],
        prompts=dict(prompts if prompts is not None else recipe.get("prompts") or {}),
        default_prompt_name=default_prompt_name or recipe.get("default_prompt_name"),
        truncate_dim=recipe.get("truncate_dim"),
        similarity_fn_name=recipe.get("similarity_fn_name"),
        device="cpu",
    )
    model.save(str(target))
    return target


def export_experts(
    model: UBMoETransformer,
    out: str | os.PathLike[str],
    *,
    projection: Dense | None = None,
    recipe: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write the low-rank `bi` experts of a trained module as a small folder that `upcycle` takes.

    A classification head goes with them, but not with a PEFT adapter: it was fitted to the experts of before.

    Args:
        model: A module with a PEFT LoRA adapter on its FFN, or with low-rank experts.
        out: The folder.
        projection: A trained linear layer behind the pooling.
        recipe: What encoding needs beside the experts (`pooling`, `prompts`, `max_seq_length`), and `training`, a
            word on how they were made.
        dtype: Of the stored experts.
    """
    low_rank = adapter_experts(model) if model.has_adapter else model.low_rank or model.source.low_rank()
    if not low_rank:
        raise ValueError("the module has neither a PEFT adapter nor low-rank experts")
    sha256 = model.base.sha256 if model.base else {}
    with replacing_folder(out, keep=checkpoint.is_of_others) as temporary:
        halves = {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in low_rank.items()}
        broken = next((name for name, pair in halves.items() if not all(bool(t.isfinite().all()) for t in pair)), None)
        if broken is not None:
            raise ValueError(f"the experts of {broken} are NaN or infinite in {dtype}; train with a lower rate")
        delta = temporary / DELTA_NAME
        save_low_rank(halves, delta, {"base_sha256": sha256})
        if model.classification is not None and not model.has_adapter:
            head = copy.deepcopy(model.classification)
            head.fitted_to = sha256_of(delta)
            save_head(head, temporary / HEAD_NAME, dtype)
        if projection is not None:
            state = {key: tensor.to(dtype) for key, tensor in projection.linear.state_dict().items()}
            checkpoint.save_tensors(state, temporary / PROJECTION_NAME)
        (temporary / "recipe.json").write_text(json.dumps(dict(recipe or {}), indent=2) + "\n", encoding="utf-8")
    return Path(out)


def _can_stream_experts(path: Path) -> bool:
    """Whether experts need no loaded model: PEFT merges an adapter on one, dense ones may need renaming."""
    if is_adapter(path):
        return False
    if checkpoint.is_checkpoint(path):
        return checkpoint.check_checkpoint(path).expert_rank is not None
    dense = (path / "config.json").is_file()
    return not dense or can_stream(path)


def _set_experts(module: UBMoETransformer, base: Base, path: Path, allow_mismatch: bool) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"bi experts {path} do not exist; expected a folder or a .safetensors file")
    inside = path.parent if path.is_file() else path
    if inside.name == checkpoint.GENERATOR_FOLDER and checkpoint.is_checkpoint(inside.parent):
        raise ValueError(
            f"{path} is a part of a checkpoint, without its pooling, prompts and head; give the whole: {inside.parent}"
        )
    if is_adapter(path):
        found = read_adapter(module, base, path, allow_mismatch=allow_mismatch)
        module.set_dense_experts(found.ffn, found.low_rank)
        before = {} if found.trained_on is None else _recipe_of(found.trained_on)
        # A head was fitted to the experts of before, and nobody knows who taught the adapter.
        label = trained_further(before.get("training"))
        return {**before, **_saved_around(path), "classification": None, "training": label}
    file = path if path.is_file() else path / DELTA_NAME
    whole = checkpoint.is_checkpoint(path)
    if whole and checkpoint.check_checkpoint(path).expert_rank is not None:
        file = path / checkpoint.DELTA_FILE
    if file.is_file():
        low_rank, metadata = load_low_rank(file)
        _check_base(base, metadata.get("base_sha256"), file.name, allow_mismatch)
        module.set_low_rank_experts(low_rank)
        if whole:
            return _recipe_of(path)
        recipe_file = file.with_name("recipe.json")
        recipe = json.loads(recipe_file.read_text(encoding="utf-8")) if recipe_file.is_file() else {}
        return {**recipe, "folder": file.parent}
    if whole:
        module.set_dense_experts(_read_checkpoint(base, path, module))
        return _recipe_of(path)
    if (path / "config.json").is_file():
        streamed = isinstance(module, StreamedTransformer)
        read = dense_experts(base, path, module.model) if streamed else _read_dense(base, path, module)
        module.set_dense_experts(read)
        told = path / "recipe.json"  # of a run of `training`
        return {"training": read_json(told).get("training")} if told.is_file() else {}
    raise ValueError(
        f"{path} holds no bi experts: expected {DELTA_NAME}, a PEFT adapter (adapter_config.json) or a model folder "
        "(config.json)"
    )


def _head_beside(delta: Path) -> ClassificationHead | None:
    """The classification head beside a file of experts, which have to be those that it was fitted to."""
    file = delta.with_name(HEAD_NAME)
    if not file.is_file():
        return None
    head = read_head(file)
    if head.fitted_to is not None and delta.is_file() and sha256_of(delta) != head.fitted_to:
        raise ValueError(
            f"{HEAD_NAME} was fitted to other experts than {delta.name} beside it: fit one to them by `python -m "
            "training.classification`, or take the file away"
        )
    return head


def _check_routers(routers: Routers, module: UBMoETransformer, file: Path) -> None:
    """Refuse routers that were trained to mix other experts; dense ones are not compared."""
    held = expert_norms(module.low_rank or {})
    if routers.trained_beside and held and not same_norms(held, routers.trained_beside):
        raise ValueError(
            f"{file.name} was trained to mix other experts than these: train routers for them by `python -m "
            "training.router`, or take the file away"
        )


def _saved_around(adapter: Path) -> dict[str, Any]:
    """What `UBMoE.save` wrote around an adapter: modules behind the encoder, prompts, length, dimensions.

    Nothing for an adapter that was saved alone.
    """
    if not (adapter / checkpoint.MODULES_FILE).is_file():
        return {}
    entries = json.loads((adapter / checkpoint.MODULES_FILE).read_text(encoding="utf-8"))
    settings = read_json(adapter / "config_sentence_transformers.json")
    tokenizer = read_json(adapter / entries[0]["path"] / "tokenizer_config.json")
    foreign = next((e["type"] for e in entries[1:] if not e["type"].startswith("sentence_transformers.")), None)
    if foreign is not None:
        raise ValueError(
            f"{adapter} has a module {foreign}, which is none of sentence-transformers; give modules=[...]"
        )
    names = ("prompts", "default_prompt_name", "truncate_dim", "similarity_fn_name")
    length = tokenizer.get("model_max_length")  # where `max_seq_length` of a model is kept
    return {
        "modules": modules_behind(adapter),
        "max_seq_length": length if length is not None and length < _NO_LIMIT else None,
        **{name: settings.get(name) for name in names},
    }


def _recipe_of(path: Path) -> dict[str, Any]:
    """What a checkpoint has beside its experts: modules behind the encoder, prompts, length, dimensions."""
    model = StreamedUBMoE(str(path), device="cpu")
    config = model.ubmoe_config
    return {
        "modules": list(model)[1:],
        "prompts": model.prompts,
        "default_prompt_name": model.default_prompt_name,
        "max_seq_length": model.max_seq_length,
        "truncate_dim": model.truncate_dim,
        "similarity_fn_name": model.similarity_fn_name,
        "training": config.training if config else None,
        "classification": model[0].classification,
    }


def _check_base(base: Base, recorded: object, file: str, allow_mismatch: bool) -> None:
    if not isinstance(recorded, Mapping) or not recorded or allow_mismatch:
        return
    if not base.has_weights(recorded):
        raise ValueError(
            f"{file} was trained on other base weights: expected sha256 {sorted(recorded.values())[0][:16]}..., "
            f"got {sorted(base.sha256.values())[0][:16]}... from {base.name}; give that base, or pass "
            "allow_base_mismatch=True and measure what it does"
        )


def _read_checkpoint(base: Base, path: Path, module: UBMoETransformer) -> dict[str, Tensor]:
    views = UBMoETransformer(str(path), model_kwargs={"dtype": module.model.dtype})
    state = views.encoder_state()
    changed = module.source.changed({k: t for k, t in state.items() if not is_ffn_key(k)} | views.uni_tensors())
    if changed is not None:
        raise ValueError(f"{path} is not a checkpoint of {base.name}: {changed} differs")
    return {key: tensor for key, tensor in state.items() if is_ffn_key(key)}


def _read_dense(base: Base, path: Path, module: UBMoETransformer) -> Mapping[str, Tensor]:
    check_same_config(base, path)
    tuned = AutoModelForCausalLM.from_pretrained(path, dtype=module.model.dtype)
    original = AutoModelForCausalLM.from_pretrained(base.path, dtype=module.model.dtype)
    keys = uni_keys(tuned)
    ffn_names = {name for key, name in keys.items() if is_ffn_key(key)}
    state, reference = tuned.state_dict(), original.state_dict()
    if set(state) != set(reference):
        raise ValueError(f"{path} is not the same model as {base.name}: {sorted(set(state) ^ set(reference))[0]}")
    for name, tensor in reference.items():
        if name not in ffn_names and not torch.equal(tensor, state[name]):
            raise ValueError(
                f"{path}: {name} differs from the base {base.name}; only FFN weights may be trained, since all "
                "others are shared with the generator"
            )
    return {key: state[name] for key, name in keys.items() if is_ffn_key(key)}


def _default_modules(module: UBMoETransformer, recipe: Mapping[str, Any]) -> list[Module]:
    dimension = module.get_embedding_dimension()
    pooling = recipe.get("pooling") or {}
    modules: list[Module] = [
        Pooling(dimension, pooling.get("mode", "mean"), include_prompt=pooling.get("include_prompt", True))
    ]
    folder = recipe.get("folder")
    if folder is not None and (folder / PROJECTION_NAME).is_file():
        state = load_file(folder / PROJECTION_NAME)
        out_features, in_features = state["weight"].shape
        dense = Dense(in_features, out_features, bias="bias" in state, activation_function=torch.nn.Identity())
        dense.linear.load_state_dict(state)
        modules.append(dense.to(module.model.dtype))
    return [*modules, Normalize()]
