"""The student: the base made bidirectional, what of it trains, and what it becomes afterwards."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from training.recipe import ContrastiveRecipe, Trained
from ubmoe_st import UBMoETransformer
from ubmoe_st.bases import Base, resolve_base
from ubmoe_st.experts import find_ffns, is_ffn_key

HEAD = "head_embedding"
"""Key of the head's output in the features, where the head is used in training only."""


def build_model(recipe: ContrastiveRecipe, base: Base | None = None, device: str | None = None) -> SentenceTransformer:
    """The base made bidirectional, with pooling and head, in which only the recipe's modules take gradients.

    Args:
        recipe: What to train.
        base: The base model, if it is resolved already.
        device: None: the best one there is.
    """
    module = UBMoETransformer.from_base(
        base or resolve_base(recipe.base), dtype=torch.float32, max_seq_length=recipe.max_seq_length
    )
    module.model.config.use_cache = False
    set_noise(module.model, attention_dropout=recipe.attention_dropout, ffn_dropout=recipe.ffn_dropout)
    set_trained(module, recipe)
    width = module.get_embedding_dimension()
    modules: list[Any] = [module, Pooling(width, recipe.pooling, include_prompt=recipe.pool_prompt)]
    if recipe.head is not None:
        size = recipe.teacher.dimension if recipe.teacher else width
        name = HEAD if recipe.head == "training" else None
        modules.append(Dense(width, size, activation_function=nn.Identity(), module_output_name=name))
    prompts = {"default": recipe.prompt} if recipe.prompt else None
    return SentenceTransformer(
        modules=[*modules, Normalize()],
        prompts=prompts,
        default_prompt_name="default" if prompts else None,
        device=device,
    )


def encoder_of(model: SentenceTransformer) -> UBMoETransformer:
    """The first module of what `build_model` gave."""
    module = model[0]
    if not isinstance(module, UBMoETransformer):
        raise TypeError(f"expected a UBMoETransformer as first module, got {type(module).__name__}")
    return module


def set_trained(module: UBMoETransformer, recipe: ContrastiveRecipe) -> None:
    """Freeze everything but what the recipe trains; low-rank adapters by PEFT where it has a rank."""
    module.model.requires_grad_(False)
    names = trained_linears(module.model, recipe.train)
    if recipe.rank is None:
        for name in names:
            module.model.get_submodule(name).requires_grad_(True)
        return
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("training low-rank experts needs peft: pip install 'ubmoe-st[train]'") from error
    module.model.add_adapter(
        LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha if recipe.alpha is not None else recipe.rank,  # type: ignore[arg-type]
            use_rslora=True,
            lora_dropout=recipe.lora_dropout,
            target_modules=sorted({name.rpartition(".")[2] for name in names}),
        )
    )


def trained_linears(model: PreTrainedModel, train: Trained) -> list[str]:
    """Names of the layers with weights that `train` stands for; norms never train."""
    parts = {"ffn", "attention", "embeddings"} if train == "all" else set(train.split("+"))
    embedding = model.get_input_embeddings()
    names = []
    for name, layer in model.named_modules():
        if layer is embedding:
            kind = "embeddings"
        elif isinstance(layer, nn.Linear):
            kind = "ffn" if is_ffn_key(f"{name}.") else "attention"
        else:
            continue
        if kind in parts:
            names.append(name)
    return names


def set_noise(model: PreTrainedModel, *, attention_dropout: float, ffn_dropout: float) -> None:
    """Give a decoder the dropout it does not have; it acts in training mode only.

    Args:
        model: The backbone, before an adapter is injected.
        attention_dropout: Rate on the attention weights.
        ffn_dropout: Rate on the output of every FFN.

    Raises:
        ValueError: If the architecture's attention takes no dropout rate.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "attention_dropout")]
    if attention_dropout and not layers:
        raise ValueError(f"{type(model).__name__} takes no attention dropout; use ffn_dropout or lora_dropout")
    for layer in layers:
        layer.attention_dropout = attention_dropout
    if ffn_dropout:
        for ffn in find_ffns(model).values():
            ffn.register_forward_hook(lambda ffn, _, out: F.dropout(out, ffn_dropout, ffn.training))


def trained_state(module: UBMoETransformer) -> dict[str, Tensor]:
    """The backbone's tensors under their stock names, with a PEFT adapter merged; the module stays as it is."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {n: layer for n, layer in module.model.named_modules() if isinstance(layer, BaseTunerLayer)}
    state = {}
    for key, tensor in module.model.state_dict().items():
        if ".lora_" in key:
            continue
        owner, _, leaf = key.replace(".base_layer.", ".").rpartition(".")
        if owner in adapted and leaf == "weight":
            layer: Any = adapted[owner]
            delta = sum(layer.get_delta_weight(name) for name in layer.active_adapters)
            tensor = tensor + delta.to(tensor.dtype)
        state[f"{owner}.{leaf}"] = tensor.detach().clone()
    return state


def causal_model(module: UBMoETransformer, base: Base) -> PreTrainedModel:
    """The base's causal LM with the trained backbone in it: what generation becomes if the weights are shared."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    getattr(lm, lm.base_model_prefix).load_state_dict(trained_state(module))
    return lm.eval()


def modules_behind(model: SentenceTransformer, recipe: ContrastiveRecipe) -> list[Any]:
    """Modules of the released model behind the encoder."""
    return [m for m in list(model)[1:] if not isinstance(m, Dense) or recipe.head == "output"]
