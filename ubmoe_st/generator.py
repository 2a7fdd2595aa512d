"""The generator view: the stock causal LM, made of the encoder's own tensors.

Embedding, attention and norm parameters are the encoder's `Parameter` objects. Configs, buffers and module
objects are separate, so nothing is switched between encoding and generating.
"""

from __future__ import annotations

import contextlib
import copy
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from ubmoe_st.configuration import RouterKind, Routing
from ubmoe_st.experts import (
    LowRankLinear,
    RoutedFFN,
    TokenRouter,
    find_ffns,
    is_ffn_key,
    merged,
    share_copy,
    without_low_rank,
)


def causal_config(encoder_config: PretrainedConfig) -> PretrainedConfig:
    """The base model's config from the encoder's: causal attention, with a KV cache."""
    config = copy.deepcopy(encoder_config)
    config.__dict__.pop("is_causal", None)
    config.use_cache = True
    return config


def meta_causal_lm(config: PretrainedConfig) -> PreTrainedModel:
    """The stock causal LM of a config, without memory for its parameters.

    Raises:
        ValueError: If transformers has no causal LM for this config.
    """
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation)


def tied_keys(lm: PreTrainedModel) -> set[str]:
    """Names in the state of a stock causal LM of what is the embeddings under another name, and stored once."""
    return set(getattr(lm, "_tied_weights_keys", None) or ()) if lm.config.tie_word_embeddings else set()


def uni_keys(lm: PreTrainedModel) -> dict[str, str]:
    """Tensors that the generator has beside the shared ones.

    Args:
        lm: The stock causal LM.

    Returns:
        From the name in the uni file (`layers.0.mlp.up_proj.weight`, `lm_head.weight`) to the name in `lm`.
    """
    prefix = f"{lm.base_model_prefix}."
    tied = tied_keys(lm)
    keys = {}
    for name in lm.state_dict():
        short = name.removeprefix(prefix)
        if (short != name and is_ffn_key(short)) or (short == name and name not in tied):
            keys[short] = name
    return keys


def uni_ffns(
    encoder: PreTrainedModel, uni: Mapping[str, Tensor], lm: PreTrainedModel | None = None
) -> dict[str, nn.Module]:
    """The original FFN of each layer.

    They are the modules of the stock class, not copies of the encoder's: whatever a library did to those (quantised,
    compiled, hooked), no part of the `bi` experts gets into the generator.

    Args:
        encoder: The encoder view. Low-rank experts already stand on the uni weights, which are shared then.
        uni: The original FFN tensors by backbone name; not read for low-rank experts.
        lm: A stock causal LM without memory, whose FFNs are taken. None: one is made.

    Raises:
        ValueError: If a tensor is missing or of another shape.
    """
    lm = lm if lm is not None else meta_causal_lm(causal_config(encoder.config))
    ffns = {}
    for prefix, stock in find_ffns(getattr(lm, lm.base_model_prefix)).items():
        expert = encoder.get_submodule(prefix)
        if any(isinstance(module, LowRankLinear) for module in expert.modules()):
            ffns[prefix] = without_low_rank(expert)
            continue
        for name, parameter in list(stock.named_parameters()):
            tensor = uni.get(f"{prefix}.{name}")
            if tensor is None or tensor.shape != parameter.shape:
                found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
                raise ValueError(
                    f"original FFN tensor {prefix}.{name} {found}, expected shape {tuple(parameter.shape)}"
                )
            _put(stock, name, tensor)
        ffns[prefix] = stock
    return ffns


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, generator_parameter(tensor))


def generator_parameter(tensor: Tensor) -> nn.Parameter:
    """A tensor as a parameter with the flag that `from_pretrained` leaves: torch folds products by it.

    One that is a parameter stays the same object: who replaces its data replaces it wherever it is.
    """
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=tensor.is_floating_point())


def converted(parameters: Mapping[str, nn.Parameter], fn: Callable[..., Any]) -> dict[str, nn.Parameter]:
    """Parameters after `fn`, by the rules of `Module._apply`: the same objects with other data, where that can be."""
    holder = nn.Module()
    holder._parameters = dict(parameters)
    places = [parameter.data_ptr() for parameter in parameters.values()]
    holder._apply(fn)
    found = {name: parameter for name, parameter in holder._parameters.items() if parameter is not None}
    keep_alignment(zip(found.values(), places, strict=True))
    return found


def keep_alignment(places: Iterable[tuple[nn.Parameter, int]]) -> None:
    """Let tensors that went into shared memory start where they did before in a page.

    Kernels choose their way by it, and so the last bits of products.

    Args:
        places: Parameters, and the addresses that they had.
    """
    for parameter, place in places:
        tensor, step = parameter.data, parameter.element_size()
        moved = (parameter.data_ptr() - place) % mmap.PAGESIZE
        if moved and place % step == 0 and tensor.is_cpu and tensor.is_shared():
            skipped = place % mmap.PAGESIZE // step
            # Stock `encode` moves them in inference mode, and tensors of its own kind are multiplied in another way.
            with torch.inference_mode(False):
                whole = torch.empty(skipped + tensor.numel(), dtype=tensor.dtype).share_memory_()  # starts a page
                parameter.data = whole[skipped:].view(tensor.shape).copy_(tensor)


@contextlib.contextmanager
def explained(view: PreTrainedModel) -> Iterator[None]:
    """Says what to do where a view cannot compute because something was done to the model by halves.

    The other view alone was converted to another dtype: both share tensors, so `generator.half()` leaves the encoder
    with half of them in each, and the other way. Or the tokenizer got tokens that the embeddings do not have.

    Args:
        view: What computes inside: the encoder or a generator.

    Raises:
        ValueError: Instead of torch's own error, which names two dtypes, or an index, and nothing else.
    """
    try:
        yield
    except IndexError as error:
        if "index out of range in self" not in str(error):
            raise
        raise ValueError(
            f"a token is beyond the {view.config.vocab_size} that the embeddings have: tokens were added to the "
            "tokenizer. Call `model.generator.resize_token_embeddings(len(model.tokenizer))`, which takes both views "
            "along, and train them"
        ) from error
    except RuntimeError as error:
        found = sorted({str(tensor.dtype) for tensor in view.parameters() if tensor.is_floating_point()})
        if len(found) < 2 or "dtype" not in str(error):
            raise
        raise ValueError(
            f"{type(view).__name__} has tensors in {' and '.join(found)}: one view alone was converted, as by "
            f"`model.generator.half()`, and both share tensors. Convert the whole model, `model.to({found[0]})` or "
            f"`model.to({found[-1]})`, which takes both views along"
        ) from error


def plain_name(name: str) -> str:
    """A tensor's name without the layers that PEFT put around others and leaves there when an adapter is deleted."""
    return name.replace(".base_layer.", ".")


def merged_state(encoder: PreTrainedModel) -> dict[str, Tensor]:
    """Tensors of an encoder under their stock names, with low-rank experts merged."""
    low = {name: module for name, module in encoder.named_modules() if isinstance(module, LowRankLinear)}
    state = {}
    for key, tensor in ((plain_name(full), tensor) for full, tensor in encoder.state_dict().items()):
        name, _, leaf = key.rpartition(".")
        owner = name.removesuffix(".base")
        if owner not in low:
            state[key] = tensor
        elif name != owner:
            pair = low[owner].lora_A, low[owner].lora_B
            state[f"{owner}.{leaf}"] = merged(tensor, *pair) if leaf == "weight" else tensor
    return state


def build_generator(
    encoder: PreTrainedModel,
    uni: Mapping[str, Tensor],
    *,
    routing: Routing = "uni",
    router: RouterKind | None = None,
    router_state: Mapping[str, Tensor] | None = None,
    generation_config: GenerationConfig | None = None,
) -> PreTrainedModel:
    """The stock causal LM over the encoder's shared tensors.

    Args:
        encoder: The encoder view.
        uni: Original FFN tensors and, where it is not tied, the head; by the names of `uni_keys`.
        routing: Which expert each layer runs: `uni` (the base model), `bi`, or both mixed by the `router`.
        router: Kind of the routers, for routing `router`.
        router_state: Trained routers, `layers.N.router.*`. None: newly initialised.
        generation_config: The base model's defaults for `generate`.

    Raises:
        ValueError: If the head needs a tensor that nothing provides.
    """
    encoder = getattr(encoder, "_orig_mod", encoder)  # of torch.compile
    encoder, memo = _without_adapter(encoder)
    lm = meta_causal_lm(causal_config(encoder.config))
    memo |= {id(encoder.config): lm.config}
    if routing == "bi":
        memo |= {id(ffn): ffn for ffn in find_ffns(encoder).values()}
    else:
        for prefix, ffn in uni_ffns(encoder, uni, lm).items():
            bi = encoder.get_submodule(prefix)
            memo[id(bi)] = _routed(encoder, prefix, ffn, bi, router, router_state) if routing == "router" else ffn
    setattr(lm, lm.base_model_prefix, share_copy(encoder, memo))
    _set_head(lm, uni)
    if lm.config.tie_word_embeddings:
        low_memory = any(isinstance(module, LowRankLinear) for module in encoder.modules())
        own = (tensor for key, tensor in uni.items() if is_ffn_key(key) and isinstance(tensor, nn.Parameter))
        lm.get_output_embeddings().register_forward_pre_hook(_AsUnfrozen(None if low_memory else next(own, None)))
    if hasattr(encoder, "peft_config"):
        backbone = getattr(lm, lm.base_model_prefix)
        del backbone.peft_config
        backbone._hf_peft_config_loaded = False
    if generation_config is not None:
        lm.generation_config = copy.deepcopy(generation_config)
    left = [name for name, tensor in lm.named_parameters() if tensor.is_meta]
    left += [name for name, tensor in lm.named_buffers() if tensor.is_meta]
    if left:
        raise ValueError(f"{type(lm).__name__} needs {left[0]}, which is neither shared nor in the uni weights")
    odd = next((name for name, module in lm.named_modules() if is_parametrized(module)), None)
    if odd is not None:
        raise ValueError(
            f"{odd} is shared by both views and was parametrised in the encoder, so that this would not be the base: "
            "call `torch.nn.utils.parametrize.remove_parametrizations` first"
        )
    return lm.eval()


def held_generation_config(lm: PreTrainedModel | None, stored: GenerationConfig | None) -> GenerationConfig | None:
    """The defaults for `generate` that a generator has now.

    Args:
        lm: The generator, where it was built; its config is there for callers to change.
        stored: What it was built with. None: the base has no file of them, and transformers made some of its config.
    """
    if lm is None or lm.generation_config is None:
        return stored
    fresh = GenerationConfig.from_model_config(lm.config) if stored is None else stored
    return stored if lm.generation_config.to_diff_dict() == fresh.to_diff_dict() else lm.generation_config


class _AsUnfrozen:
    """Lets a tied head multiply as that of a loaded base, where the encoder whose embeddings it is was frozen.

    torch folds a product with the last tokens of a padded batch into one where the weight asks for a gradient, and adds
    up in another order where it does not. A contiguous input is folded in any case.

    Args:
        own: A parameter that only the generator has: it is frozen where the generator was, as a base may be.
    """

    def __init__(self, own: nn.Parameter | None) -> None:
        self.own = own

    def __call__(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        weight: Any = head.weight
        if weight.requires_grad or (self.own is not None and not self.own.requires_grad):
            return args
        return (args[0].contiguous(), *args[1:])


def _without_adapter(encoder: Any) -> tuple[Any, dict[int, object]]:
    """The encoder inside what PEFT puts around it, and a memo for `share_copy` that leaves PEFT's layers out."""
    if not hasattr(encoder, "peft_config"):
        return encoder, {}
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(encoder, PeftModel):
        encoder = encoder.get_base_model()
    memo: dict[int, object] = {id(m): m.get_base_layer() for m in encoder.modules() if isinstance(m, BaseTunerLayer)}
    for module in encoder.modules():
        if isinstance(module, ModulesToSaveWrapper):
            memo[id(module)] = module.original_module
    return encoder, memo


def _routed(
    encoder: PreTrainedModel,
    prefix: str,
    uni: nn.Module,
    bi: nn.Module,
    kind: RouterKind | None,
    state: Mapping[str, Tensor] | None,
) -> RoutedFFN:
    if kind is None:
        raise ValueError("routing 'router' needs the kind of the routers: 'soft' or 'top1'")
    router = TokenRouter(encoder.config.hidden_size, kind).to(encoder.device, encoder.dtype)
    if state is not None:
        own = f"{prefix.rpartition('.')[0]}.router."
        router.load_state_dict({k.removeprefix(own): v for k, v in state.items() if k.startswith(own)})
    return RoutedFFN(uni, bi, router)


def _set_head(lm: PreTrainedModel, uni: Mapping[str, Tensor]) -> None:
    head = lm.get_output_embeddings()
    if lm.config.tie_word_embeddings:
        head.weight = lm.get_input_embeddings().weight
    for key, name in uni_keys(lm).items():
        if not is_ffn_key(key) and key in uni:
            if uni[key].shape != lm.get_parameter(name).shape:
                raise ValueError(
                    f"{key} has shape {tuple(uni[key].shape)}, and the embeddings were resized to "
                    f"{lm.config.vocab_size} tokens: resize by `model.generator`, which takes the encoder along"
                )
            _put(lm, name, uni[key])


def router_state(lm: PreTrainedModel) -> dict[str, Tensor]:
    """Tensors of all token routers of a generator, `layers.N.router.*`."""
    state: dict[str, Tensor] = {}
    backbone: Any = getattr(lm, lm.base_model_prefix)
    for prefix, module in backbone.named_modules():
        if isinstance(module, RoutedFFN):
            layer = prefix.rpartition(".")[0]
            for name, tensor in module.router.state_dict().items():
                state[f"{layer}.router.{name}"] = tensor.detach()
    return state
