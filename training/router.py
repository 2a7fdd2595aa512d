"""Stage 2: training of the token routers.

    python -m training.router training/recipes/router.yaml [--set key=value ...]

Everything but the routers is frozen. They learn next-token prediction on the answers of instruction data and start
at the base model exactly. The folder `out` gets checkpoints, `routers.safetensors` (what `upcycle` takes), `model/`
(the checkpoint with the routers in it) and `router.json`.
"""

from __future__ import annotations

import json
import logging
import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from training.command import arguments_of, check_same_base, check_same_recipe, one_line_errors, recipe_of_command
from training.data import read_instructions
from training.prompted import special_start
from training.recipe import RouterRecipe
from training.resume import TrainedOnly, checkpoint_to_resume
from training.student import encoder_of
from ubmoe_st import UBMoE
from ubmoe_st.bases import Base
from ubmoe_st.configuration import RouterKind
from ubmoe_st.experts import Routers, TokenRouter, expert_norms, save_routers
from ubmoe_st.files import write_json
from ubmoe_st.generator import build_generator, router_state
from ubmoe_st.upcycling import ROUTERS_FILE

logger = logging.getLogger(__name__)

IGNORED = -100
MODEL_FOLDER = "model"
SUMMARY_FILE = "router.json"
PLAIN_FORMAT = "Question: {question}\nAnswer: {answer}"
"""What a message proposes for a checkpoint without chat template."""


def build_routed(model: UBMoE, kind: RouterKind) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The generator with new routers, in which they alone take gradients; the base model.

    Low-rank experts are held on the base weights, so the mix costs one FFN and two small products.

    Args:
        model: A UBMoE checkpoint in fp32; its encoder is of no use afterwards.
        kind: Of the routers.
    """
    views = encoder_of(model)
    if model.ubmoe_config is not None and model.ubmoe_config.expert_rank is not None:
        views.use_low_memory()
    lm = build_generator(views.model, views.uni_tensors(), routing="router", router=kind)
    base = views.generator("uni")
    for part in (lm, base):
        part.requires_grad_(False)
        part.config.use_cache = False
    for module in lm.modules():
        if isinstance(module, TokenRouter):
            module.requires_grad_(True)
    return lm, base


def encode_answer(
    tokenizer: Any, question: str, answer: str, max_tokens: int, plain: str | None = None
) -> dict[str, list[int]] | None:
    """One question with its answer as token ids, with labels on the answer alone.

    Args:
        tokenizer: With a chat template, unless there is a plain format.
        question: Of the user.
        answer: Of the assistant.
        max_tokens: Cut behind so many.
        plain: Instead of the chat template, see `RouterRecipe.plain_format`.

    Returns:
        `input_ids` and `labels`; None if no token of the answer is left.

    Raises:
        ValueError: If there is neither a plain format nor a chat template, or this does not put the answer last.
    """
    start: list[int] = []
    if plain is not None:
        before, after = plain.split("{answer}")
        before = before.replace("{question}", question)
        # A space belongs to the word behind it, as it does where a prompt without it is continued.
        asked = before.rstrip(" ")
        answer = before[len(asked) :] + answer + after + (tokenizer.eos_token or "")
        start = special_start(tokenizer)
    else:
        if tokenizer.chat_template is None:
            raise ValueError(
                "routers are trained on chats, and this checkpoint has no chat template; give the recipe a plain "
                f"format: --set 'plain_format={json.dumps(PLAIN_FORMAT)}'"
            )
        chat = [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": answer}], tokenize=False)
        if not whole.startswith(asked):
            raise ValueError("the chat template changes the question when an answer follows; its loss cannot be masked")
        answer = whole[len(asked) :]
    # In two parts, so that no token reaches over the border.
    head = start + tokenizer(asked, add_special_tokens=False)["input_ids"]
    tail = tokenizer(answer, add_special_tokens=False)["input_ids"]
    input_ids = (head + tail)[:max_tokens]
    if len(input_ids) <= len(head):
        return None
    return {"input_ids": input_ids, "labels": ([IGNORED] * len(head) + tail)[:max_tokens]}


def pad_answers(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A batch, padded on the right: `input_ids`, `attention_mask`, `labels`, (B, T)."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(values: Sequence[Sequence[int]], filler: int) -> Tensor:
        return torch.tensor([[*v, *[filler] * (length - len(v))] for v in values])

    return {
        "input_ids": padded([row["input_ids"] for row in rows], 0),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": padded([row["labels"] for row in rows], IGNORED),
    }


class RouterTrainer(TrainedOnly, Trainer):
    """The stock trainer with the loss of stage 2; checkpoints hold the routers only.

    Args:
        base: The base model, for the KL term.
        recipe: Weights of the terms.
        **kwargs: As for `Trainer`.
    """

    def __init__(self, base: PreTrainedModel, recipe: RouterRecipe, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.base = base
        self.recipe = recipe
        self.model_accepts_loss_kwargs = False
        self.weights: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._tokens = 0
        for module in self.model.modules():
            if isinstance(module, TokenRouter):
                module.register_forward_hook(lambda router, _, weight: self.weights.append(weight))

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Next-token loss on the answers, plus `kl` and `balance` where they have a weight."""
        real = inputs["attention_mask"].bool()
        self.weights.clear()
        read = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        logits = model(**read).logits[:, :-1]
        labels = inputs["labels"][:, 1:]
        answer = labels != IGNORED
        chosen = logits[answer].float()  # (tokens, V)
        loss = F.cross_entropy(chosen, labels[answer])
        if self.recipe.kl:
            with torch.no_grad():
                wanted = self.base.to(logits.device)(**read).logits[:, :-1][answer].float().log_softmax(-1)
            divergence = F.kl_div(chosen.log_softmax(-1), wanted, log_target=True, reduction="batchmean")
            loss = loss + self.recipe.kl * divergence
        if self.recipe.balance:
            shares = torch.stack([weight[..., 0][real].mean() for weight in self.weights])
            loss = loss + self.recipe.balance * (shares - self.recipe.balance_target).square().mean()
        if not model.training:
            sums = [weight[..., 0][real].double().sum().cpu() for weight in self.weights]
            self._sums = [a + b for a, b in zip(self._sums, sums)] if self._sums else sums
            self._tokens += int(real.sum())
        return (loss, {"logits": logits}) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """The stock one; the weights of the `bi` experts are counted by the way."""
        self._sums, self._tokens = [], 0
        return super().evaluate(*args, **kwargs)

    def bi_weights(self) -> list[float] | None:
        """By layer, the mean weight of the `bi` expert over the tokens of the last evaluation. None: there was none."""
        return [float(total) / self._tokens for total in self._sums] if self._tokens else None


def train(recipe: RouterRecipe) -> Path:
    """Train the routers, or go on from the last checkpoint, and write the checkpoint with them.

    Args:
        recipe: What and how.

    Returns:
        The checkpoint folder.

    Raises:
        ValueError: If there are several processes, the folder holds a run of another recipe or over other weights,
            or there are too few answers.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise ValueError(
            f"routers train in one process, got {processes}; start it without torchrun: python -m training.router "
            "RECIPE, and raise trainer.gradient_accumulation_steps for larger steps"
        )
    out = Path(recipe.out)
    values: dict[str, Any] = {
        "output_dir": str(out / "checkpoints"),
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "save_total_limit": 2,
    }
    args = arguments_of(TrainingArguments, values | recipe.trainer)
    check_same_recipe(recipe, out)
    set_seed(args.seed)
    model = UBMoE(recipe.checkpoint, model_kwargs={"dtype": torch.float32})
    source = encoder_of(model).source
    folder = source.folder or Path(recipe.checkpoint)
    check_same_base(Base(folder, recipe.checkpoint, "folder", tuple(sorted(folder.rglob("model-*.safetensors")))), out)
    mixed = expert_norms(source.low_rank() or {})
    lm, base = build_routed(model, recipe.kind)
    pairs = read_instructions(recipe.instructions)
    random.Random(recipe.seed).shuffle(pairs)
    count = None if recipe.count is None else recipe.count + recipe.held_out
    found = (encode_answer(model.tokenizer, *pair, recipe.max_tokens, recipe.plain_format) for pair in pairs)
    rows = list(islice((row for row in found if row is not None), count))
    if len(rows) <= recipe.held_out:
        raise ValueError(f"{len(rows)} answers do not go beyond the {recipe.held_out} held out; lower held_out")
    trainer = RouterTrainer(
        base,
        recipe,
        model=lm,
        args=args,
        train_dataset=rows[recipe.held_out :],
        eval_dataset=rows[: recipe.held_out] or None,
        data_collator=pad_answers,
    )
    before = trainer.evaluate() if recipe.held_out else {}
    last = checkpoint_to_resume(args)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=last)
    seconds = time.perf_counter() - start
    after = trainer.evaluate() if recipe.held_out else {}
    weights = trainer.bi_weights() if recipe.held_out else None
    state = router_state(lm)
    save_routers(Routers(state, recipe.kind, mixed), out / ROUTERS_FILE)
    summary = {
        "recipe": asdict(recipe),
        "seconds": round(seconds, 1),
        "held_out_loss": {"routers_at_start": before.get("eval_loss"), "trained": after.get("eval_loss")},
        "bi_weight_by_layer": weights and [round(weight, 4) for weight in weights],
        "log": trainer.state.log_history,
    }
    write_json(out / SUMMARY_FILE, summary, indent=1)
    return write_routers(recipe.checkpoint, state, recipe.kind, out / MODEL_FOLDER)


def write_routers(checkpoint: str, state: dict[str, Tensor], kind: RouterKind, out: Path) -> Path:
    """Copy a checkpoint with trained routers in it."""
    model = UBMoE(checkpoint)
    encoder_of(model).set_routers(state, kind)
    model.save(str(out))
    return out


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Train token routers by a recipe; run it again to go on."""
    recipe = recipe_of_command(RouterRecipe, "python -m training.router", main.__doc__, arguments)
    logger.info("checkpoint with routers: %s", train(recipe))


if __name__ == "__main__":
    main()
