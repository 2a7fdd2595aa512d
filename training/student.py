"""The student: the base made bidirectional, what of it trains, and what it becomes afterwards."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from training.command import BASE_FILE, RECIPE_FILE
from training.recipe import ContrastiveRecipe, Trained
from training.resume import TRAINED_FILE, load_trained
from training.teacher_settings import PromptedTeacher
from ubmoe_st import UBMoETransformer
from ubmoe_st.bases import Base, resolve_base
from ubmoe_st.experts import find_ffns, is_ffn_key, load_low_rank
from ubmoe_st.padding import group_by_length
from ubmoe_st.upcycling import DELTA_NAME, PROJECTION_NAME

logger = logging.getLogger(__name__)

_PASS_TOKENS = {"cpu": UBMoETransformer.pass_tokens}
"""What one more pass of the encoder costs, in tokens: on a CPU it reads all weights again."""
_PASS_TOKENS_BF16 = 256
"""The same of a CPU under autocast, which converts all weights as well, and computes a token in less time."""
_PASS_TOKENS_ELSEWHERE = 8192
"""A GPU computes at least so many while the processor is still starting the kernels of a pass."""

HEAD = "head_embedding"
"""Key of the head's output in the features, where the head is used in training only."""


def build_model(
    recipe: ContrastiveRecipe, base: Base | None = None, device: str | None = None, head_size: int | None = None
) -> SentenceTransformer:
    """The base made bidirectional, with pooling and head, in which only the recipe's modules take gradients.

    Args:
        recipe: What to train.
        base: The base model, if it is resolved already.
        device: None: the best one there is.
        head_size: Dimension of the first teacher's vectors. None: that of a prompted teacher, else the base's.
    """
    module = UBMoETransformer.from_base(
        base or resolve_base(recipe.base),
        dtype=torch.float32,
        attn_implementation=recipe.attention,
        max_seq_length=recipe.max_seq_length,
    )
    module.model.config.use_cache = False
    set_noise(module.model, attention_dropout=recipe.attention_dropout, ffn_dropout=recipe.ffn_dropout)
    set_trained(module, recipe)
    if recipe.compile:
        compile_layers(module.model)
    width = module.get_embedding_dimension()
    if head_size is None and recipe.teachers and isinstance(recipe.teachers[0], PromptedTeacher):
        head_size = recipe.teachers[0].dimension
    modules: list[Any] = [module, Pooling(width, recipe.pooling, include_prompt=recipe.pool_prompt)]
    if recipe.head is not None:
        name = HEAD if recipe.head == "training" else None
        size = head_size if head_size is not None else width
        modules.append(Dense(width, size, activation_function=nn.Identity(), module_output_name=name))
    if recipe.project:
        modules.append(Dense(width, width, activation_function=nn.Identity()))
    return SentenceTransformer(
        modules=[*modules, Normalize()],
        prompts=recipe.released_prompts,
        default_prompt_name="default" if recipe.prompt else None,
        device=device,
    )


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each decoder layer in place: they share their code, so one of them is compiled and serves all.

    Args:
        model: The backbone. Names of parameters and results stay, but for the rounding of fused operations.
    """
    for name in find_ffns(model):
        model.get_submodule(name.rpartition(".")[0]).compile(dynamic=True)


def uncompiled() -> AbstractContextManager[Any]:
    """Within it compiled layers run as they are written (from torch 2.6 on; earlier ones compile once more)."""
    stance: Any = getattr(torch.compiler, "set_stance", None)
    return stance("force_eager") if stance is not None else nullcontext()


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


# --- where it starts --------------------------------------------------------------------------------------------


def start_from(model: SentenceTransformer, folder: Path) -> list[Dense]:
    """Put the parameters of a finished run, or a folder of experts, into a model.

    Args:
        model: From `build_model`.
        folder: With `trained.safetensors`, else with `bi_delta.safetensors` and, where the vectors are projected,
            `projection.safetensors`.

    Returns:
        The linear layers behind the pooling that the folder holds nothing for.

    Raises:
        FileNotFoundError: If the folder holds neither.
        ValueError: If what it holds does not fit.
    """
    layers = {f"{n}.linear.": module for n, module in enumerate(model) if isinstance(module, Dense)}
    if (folder / TRAINED_FILE).is_file() or not (folder / DELTA_NAME).is_file():
        before = _file_of_run(folder, RECIPE_FILE)
        _warn_of_other_base(encoder_of(model), _file_of_run(folder, BASE_FILE).get("sha256"), folder)
        loaded = load_trained(model, folder, optional=r"\d+\.linear\.", renamed=_by_role(layers, before))
        if before.get("rank") is not None:
            _keep_products(encoder_of(model), before)
        return [module for prefix, module in layers.items() if not any(name.startswith(prefix) for name in loaded)]
    _load_experts(encoder_of(model), folder / DELTA_NAME)
    kept = next((module for module in layers.values() if module.module_output_name != HEAD), None)
    if not (folder / PROJECTION_NAME).is_file():
        return list(layers.values())
    if kept is None:
        raise ValueError(f"{folder} has a {PROJECTION_NAME}, and the recipe no layer for it; set project: true")
    _load_projection(kept, folder / PROJECTION_NAME)
    return [module for module in layers.values() if module is not kept]


def _warn_of_other_base(module: UBMoETransformer, trained_on: Any, what: Path) -> None:
    """Say where parameters were trained on other weights than they are put on; nothing where it is not known."""
    if module.base is not None and trained_on and not module.base.has_weights(trained_on):
        logger.warning("%s was trained on other weights than %s: it may not fit them", what, module.base.name)


def _file_of_run(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of a finished run, or of the run that a checkpoint is of. Empty where there is none."""
    for file in (folder / name, folder.parent.parent / name):
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
    return {}


def _by_role(layers: Mapping[str, Dense], before: Mapping[str, Any]) -> dict[str, str]:
    """Beginnings of the names of a run's linear layers, as the layers of the same role are named now.

    What has no layer of its role now has a name that no parameter has.
    """
    if "head" not in before:
        return {}
    roles = (["head"] if before["head"] is not None else []) + (["project"] if before.get("project") else [])
    now = {"head" if m.module_output_name == HEAD else "either": prefix for prefix, m in layers.items()}
    single = "head" if before["head"] == "output" else "project"  # of a layer that is part of the model
    now = {single if role == "either" else role: prefix for role, prefix in now.items()}
    return {f"{n}.linear.": now.get(role, f"{1000 + n}.linear.") for n, role in enumerate(roles, 2)}


def _keep_products(module: UBMoETransformer, before: Mapping[str, Any]) -> None:
    """Scale adapters that were trained with another `alpha`, so that what they add stays what it was."""
    from peft.tuners.lora import LoraLayer

    alpha = before["rank"] if before.get("alpha") is None else before["alpha"]
    layers: list[Any] = [layer for layer in module.model.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        for name, lora in layer.lora_B.items():
            lora.weight.data *= alpha / before["rank"] ** 0.5 / layer.scaling[name]


def _load_projection(layer: Dense, file: Path) -> None:
    """Put a released projection into the layer that trains.

    Outputs that the release left out are 0, have no gradient at 0, and so stay it. The vectors are normalised: size is
    free, and rows of length 1, as a new layer has, let a step of the optimizer move them as far.

    Raises:
        ValueError: If it reads other vectors, or gives more dimensions than the layer.
    """
    state = {key: tensor.float() for key, tensor in load_file(file).items()}
    wanted, found = layer.linear.weight.shape, state["weight"].shape
    if found[1] != wanted[1] or found[0] > wanted[0]:
        raise ValueError(
            f"{file} has shape {tuple(found)}, and the recipe's layer {tuple(wanted)}; change head or project"
        )
    size = state["weight"].square().sum(1).mean().sqrt()
    with torch.no_grad():
        for key, tensor in layer.linear.state_dict().items():
            tensor.zero_()
            tensor[: found[0]] = state[key] / size


def _load_experts(module: UBMoETransformer, file: Path) -> None:
    """Put stored low-rank experts into the adapter, whose scaling is not part of them.

    An adapter of a higher rank computes the same at first: what it has beyond starts as in a new one.

    Raises:
        ValueError: If the adapter is of other layers, of other widths or of a lower rank.
    """
    from peft.tuners.lora import LoraLayer

    low_rank, metadata = load_low_rank(file)
    _warn_of_other_base(module, metadata.get("base_sha256"), file)
    adapted: dict[str, Any] = {n: layer for n, layer in module.model.named_modules() if isinstance(layer, LoraLayer)}
    if set(adapted) != set(low_rank):
        odd = sorted(set(adapted) ^ set(low_rank))[:1] or ["nothing"]
        raise ValueError(f"{file} and the recipe differ in what they train: {odd[0]}; give the base it belongs to")
    with torch.no_grad():
        for name, (a, b) in low_rank.items():
            (adapter,) = adapted[name].lora_A
            own_a, own_b = adapted[name].lora_A[adapter].weight, adapted[name].lora_B[adapter].weight
            rank = len(a)
            if rank > len(own_a) or own_a[:rank].shape != a.shape or own_b[:, :rank].shape != b.shape:
                raise ValueError(
                    f"{file}: {name} has shapes {tuple(a.shape)} and {tuple(b.shape)}, the recipe's "
                    f"{tuple(own_a.shape)} and {tuple(own_b.shape)}; train with the same rank or a higher one"
                )
            own_a[:rank] = a
            own_b.zero_()
            own_b[:, :rank] = b.float() / adapted[name].scaling[adapter]


def start_layers(
    recipe: ContrastiveRecipe,
    model: SentenceTransformer,
    layers: Sequence[Dense],
    texts: Sequence[str],
    target: Tensor | None,
) -> None:
    """Start linear layers behind the pooling: the head by ridge regression, the projection by subtracting the mean.

    The head starts where the closed form from the pooled vectors to the teacher's leads, times the size of the pooled
    vectors: only its direction counts, and so a step of the optimizer moves it as far as if they had size 1.

    Args:
        recipe: Says which layer is the head.
        model: From `build_model`.
        layers: Those to start.
        texts: n texts.
        target: The first teacher's vectors of them, (n, K). None: there is no teacher.
    """
    pooled = SentenceTransformer(modules=list(model)[:2], device=str(model.device))
    found = pooled.encode(
        list(texts), prompt=recipe.prompt, batch_size=32, convert_to_tensor=True, show_progress_bar=False
    )
    vectors = found.double().cpu()  # (n, D)
    mean = vectors.mean(0)
    for layer in layers:
        if target is not None and (recipe.head == "output" or layer.module_output_name == HEAD):
            wanted = F.normalize(target.double(), dim=-1)
            weight, bias = ridge(vectors, wanted)
            cosine = F.cosine_similarity(vectors @ weight.T + bias, wanted).mean()
            logger.info("the head starts at cosine %.3f with the teacher", cosine)
        else:
            weight, bias = torch.eye(len(mean), dtype=torch.float64), -mean
        with torch.no_grad():
            layer.linear.weight.copy_(weight)
            layer.linear.bias.copy_(bias)


def ridge(x: Tensor, y: Tensor, strength: float = 0.03) -> tuple[Tensor, Tensor]:
    """Weight (K, D) and bias (K,) of the ridge regression from x to y, both times the size of x.

    Args:
        x: (n, D).
        y: (n, K).
        strength: Of the penalty, relative to the mean variance of a column of x.
    """
    mean_x, mean_y = x.mean(0), y.mean(0)
    size = (x - mean_x).square().mean().sqrt()
    scaled = (x - mean_x) / size
    penalty = strength * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(scaled.T @ scaled + penalty, scaled.T @ (y - mean_y)).T
    return weight, size * mean_y - weight @ mean_x


def forward_in_parts(model: Any, features: dict[str, Any]) -> dict[str, Tensor]:
    """The model's vectors of a padded batch, read in parts of similar length, so that little is padded.

    Args:
        model: What takes features; it may be wrapped.
        features: `input_ids` and `attention_mask`, (B, T), and what else the model takes.

    Returns:
        `sentence_embedding` and, where the model has it, the head's output, in the order of the batch.
    """
    device = features["attention_mask"].device
    mask = features["attention_mask"].cpu()  # once: else the processor waits for a GPU before each part
    pass_tokens = _PASS_TOKENS.get(device.type, _PASS_TOKENS_ELSEWHERE)
    if device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        pass_tokens = _PASS_TOKENS_BF16
    parts = group_by_length(mask.sum(1).tolist(), pass_tokens)
    outputs = []
    for part in parts:
        rows, columns = torch.tensor(part, device=device), mask[part].any(0).nonzero()[:, 0].to(device)
        cut = {
            key: value[rows][:, columns] if isinstance(value, Tensor) and value.shape == mask.shape else value
            for key, value in features.items()
        }
        outputs.append(model(cut))
    back = torch.tensor([row for part in parts for row in part]).argsort()
    keys = [key for key in ("sentence_embedding", HEAD) if key in outputs[0]]
    return {key: torch.cat([output[key] for output in outputs])[back] for key in keys}


# --- what it becomes --------------------------------------------------------------------------------------------


def causal_model(module: UBMoETransformer, base: Base) -> PreTrainedModel:
    """The base's causal LM with the trained backbone in it: what generation becomes if the weights are shared."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    getattr(lm, lm.base_model_prefix).load_state_dict(trained_state(module))
    return lm.eval()


def modules_behind(model: SentenceTransformer) -> list[Any]:
    """Modules of the released model behind the encoder: all but a head that only training uses."""
    return [m for m in list(model)[1:] if not isinstance(m, Dense) or m.module_output_name != HEAD]


def released_layer(model: SentenceTransformer) -> Dense | None:
    """The linear layer behind the pooling that the released model has. None where it has none."""
    return next((module for module in modules_behind(model) if isinstance(module, Dense)), None)


def turn_to_components(model: SentenceTransformer, texts: Sequence[str], prompt: str | None = None) -> Tensor:
    """Turn the projection so that its outputs are principal components of the vectors, the largest first.

    A rotation leaves every cosine as it is. Of all of them, this one keeps most of the inner products of unit vectors
    in the leading dimensions, so `truncate_dim` costs least.

    Args:
        model: From `build_model`, with a projection.
        texts: A sample, n texts.
        prompt: Put before them.

    Returns:
        The share of the squared length of the sample's vectors in each dimension, (D,), falling.

    Raises:
        ValueError: If there are fewer texts than dimensions, or no projection.
    """
    projection = released_layer(model)
    if projection is None:
        raise ValueError("the model has no linear layer behind its pooling to turn; set project: true")
    width = projection.linear.out_features
    if len(texts) < width:
        raise ValueError(f"{width} principal components need as many texts, got {len(texts)}; give more texts")
    released = SentenceTransformer(modules=[model[0], *modules_behind(model)], device=str(model.device))
    found = released.encode(list(texts), prompt=prompt, batch_size=32, convert_to_tensor=True, show_progress_bar=False)
    vectors = F.normalize(found.double().cpu(), dim=-1)
    values, turn = principal_components(vectors)
    with torch.no_grad():
        for tensor in (projection.linear.weight, projection.linear.bias):
            tensor.copy_(turn @ tensor.double().cpu())
    return values


def principal_components(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squares along the principal components of rows, (D,), falling, and the components, (D, D), one a row.

    Args:
        rows: (n, D); their mean is not taken off.
    """
    values, components = torch.linalg.eigh(rows.T @ rows / len(rows))
    turn = components.flip(1).T
    # The sign of a component is arbitrary; fixed, so that the same texts give the same model.
    return values.flip(0), turn * turn.gather(1, turn.abs().argmax(1, keepdim=True)).sign()
