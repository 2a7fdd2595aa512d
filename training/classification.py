"""Fit a checkpoint's classification head: `python -m training.classification RECIPE MODEL --out EXPERTS`.

The head reads the last token's state behind an inner layer (`ubmoe_st.classification`). It is the ridge regression from
these states to the vectors of the recipe's teachers, turned to principal components. It needs no label and no gradient,
and a thousand texts take a minute or two.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.command import has_bf16, one_line_errors, read_recipe, recipe_parser
from training.recipe import ContrastiveRecipe
from training.student import principal_components, ridge
from training.targets import targets
from training.texts import read_corpus
from ubmoe_st import UBMoE, UBMoETransformer
from ubmoe_st.bases import resolve_base
from ubmoe_st.classification import ClassificationHead, last_states, save_head
from ubmoe_st.experts import load_low_rank, same_low_rank
from ubmoe_st.files import sha256_of
from ubmoe_st.upcycling import DELTA_NAME, HEAD_NAME

logger = logging.getLogger(__name__)

SHARE = 0.8
"""Length of the added part beside the text's own vector; chosen for the released models, see docs/experiments.md."""
LENGTH = 4.0
"""Of the joined vectors; chosen likewise."""
STRENGTH = 0.1
"""Of the ridge penalty, relative to the mean variance of a state's numbers."""


def inner_states(
    module: UBMoETransformer, texts: Sequence[str], layer: int, batch_size: int = 32, prompt: str | None = None
) -> Tensor:
    """The last token's state behind a layer, (N, D), fp32; bf16 products where the processor has them.

    Args:
        module: The encoder.
        texts: N texts.
        layer: How many layers are computed before.
        batch_size: Texts computed together.
        prompt: Before each text.
    """
    width = module.model.config.hidden_size
    head = ClassificationHead(layer, 1.0, nn.Linear(width, 1))
    head.attach(module.model)
    device = module.model.device
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    found = torch.zeros(len(texts), width)
    fast = has_bf16(on_cpu=device.type == "cpu")
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=fast):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            features = module.preprocess([texts[row] for row in rows], prompt=prompt)
            features = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in features.items()}
            with head.listening() as states:
                # With a keyword the batch is computed as one, so its states are in one piece.
                module.forward(features, use_cache=False)
            found[rows] = last_states(states[-1], features).float().cpu()
    return found


def fit_head(
    states: Tensor, targets: Sequence[Tensor], layer: int, dimension: int, share: float, length: float = LENGTH
) -> ClassificationHead:
    """The regression from states to all teachers at once, in its leading principal components.

    Args:
        states: (N, D).
        targets: Unit vectors of each teacher, (N, K).
        layer: Where the states are from.
        dimension: How many components are kept.
        share: Length of the added part.
        length: Of the joined vectors.

    Raises:
        ValueError: If there are fewer texts than dimensions, or fewer dimensions of the teachers than are to be kept.
    """
    wanted = torch.cat([F.normalize(one.double(), dim=-1) for one in targets], -1)
    most = min(len(states) - 1, states.shape[1], wanted.shape[1])
    if not 1 <= dimension <= most:
        raise ValueError(
            f"{len(states)} texts with states of {states.shape[1]} and targets of {wanted.shape[1]} dimensions give up "
            f"to {most} components, got {dimension}; give more texts, or keep fewer"
        )
    x = states.double()
    weight, _ = ridge(x, wanted, STRENGTH)
    values, components = principal_components((x - x.mean(0)) @ weight.T)
    explained = values[:dimension].clamp(min=0).sum() / values.clamp(min=0).sum()
    logger.info("%d components hold %.1f %% of what the states tell of the teachers", dimension, 100 * explained)
    linear = nn.Linear(x.shape[1], dimension)
    kept = components[:dimension] @ weight
    with torch.no_grad():
        linear.weight.copy_(kept)
        linear.bias.copy_(-kept @ x.mean(0))
    return ClassificationHead(layer, share, linear, length)


def check_experts(module: UBMoETransformer, delta: Path, name: str) -> None:
    """Refuse a model of other experts than those that get the head; it may hold them in fewer bits.

    Args:
        module: The model's encoder.
        delta: File of low-rank experts.
        name: Of the model.

    Raises:
        ValueError: Then.
    """
    held = module.low_rank or module.source.low_rank() or {}
    if not same_low_rank(held, load_low_rank(delta)[0]):
        raise ValueError(f"{name} does not hold the experts of {delta.parent}: build it with them first")


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Fit a classification head on the texts and teachers of a recipe and lay it beside the experts of a model."""
    parser = recipe_parser("python -m training.classification", main.__doc__)
    parser.add_argument("model", help="checkpoint with these experts")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the experts, which gets classification.safetensors"
    )
    parser.add_argument("--layer", type=int, help="layers before the states; two thirds of all if not given")
    parser.add_argument("--dimension", type=int, default=128)
    parser.add_argument("--share", type=float, default=SHARE, help="length of the added part")
    parser.add_argument("--length", type=float, default=LENGTH, help="of the joined vectors")
    parser.add_argument("--texts", type=int, default=8000)
    parser.add_argument("--words", type=int, default=45, help="of the longest text that is taken")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not (options.out / DELTA_NAME).is_file():
        raise FileNotFoundError(
            f"expected a folder of experts, got {options.out}; give the one the model was built with"
        )
    recipe = read_recipe(ContrastiveRecipe, options.recipe, options.set)
    corpus = read_corpus(recipe)
    if not recipe.teachers or corpus is None:
        raise ValueError(f"{options.recipe} has no `teacher` with a loss that uses it; give a recipe that has")
    short = [row for row, text in enumerate(corpus.texts) if len(text.split()) <= options.words]
    rows = sorted(random.Random(0).sample(short, min(options.texts, len(short))))
    model = UBMoE(options.model, device=options.device)
    module = cast("UBMoETransformer", model[0])
    check_experts(module, options.out / DELTA_NAME, options.model)
    layers = module.model.config.num_hidden_layers
    layer = max(1, round(layers * 2 / 3)) if options.layer is None else options.layer
    if not 1 <= layer <= layers:
        raise ValueError(f"--layer must be 1 to {layers}, got {layer}")
    found = targets(recipe, resolve_base(recipe.base), corpus, device=options.device, of_all_kinds=True)
    prompt = model.prompts.get(model.default_prompt_name or "")  # as plain `encode` puts it
    states = inner_states(module, [corpus.texts[row] for row in rows], layer, prompt=prompt)
    head = fit_head(states, [one[rows] for one in found], layer, options.dimension, options.share, options.length)
    head.fitted_to = sha256_of(options.out / DELTA_NAME)
    save_head(head, options.out / HEAD_NAME, torch.float16)
    logger.info("a head on layer %d, of %d texts, in %s", layer, len(rows), options.out)


if __name__ == "__main__":
    main()
