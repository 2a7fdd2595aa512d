"""Stage 1: training of the `bi` experts.

    python -m training.contrastive training/recipes/X.yaml [--set key=value ...]

The folder `out` of the recipe gets checkpoints (the command goes on from the last one), `experts/` (what `upcycle`
takes), `model/` (the assembled checkpoint) and `training.json` (wall time, tokens/s, the development curve).
"""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.modules import Dense
from transformers import set_seed

from training.batches import (
    PROMPT_CHARACTERS,
    EpochCallback,
    GroupBudget,
    LengthBuckets,
    RoughCollator,
    TokenBudget,
    as_begun,
)
from training.command import (
    RECIPE_FILE,
    arguments_of,
    check_same_base,
    check_same_recipe,
    check_same_texts,
    one_line_errors,
    read_recipe,
    recipe_of_command,
)
from training.data import DOLLY_DEV, data_folder, dolly_dev, read_rows, stream_rows, sts_pairs, texts_sha256
from training.groups import group_numbers, kept_groups
from training.labels import taught
from training.losses import build_loss
from training.recipe import ContrastiveRecipe
from training.resume import (
    TRAINED_FILE,
    SaveByTime,
    SaveWhenEvaluated,
    StopEarly,
    TrainedOnly,
    check_finite,
    checkpoint_to_resume,
    keep_steps,
    load_trained,
    save_trained,
)
from training.student import (
    HEAD,
    build_model,
    causal_model,
    encoder_of,
    modules_behind,
    released_layer,
    start_from,
    start_layers,
    turn_to_components,
    uncompiled,
)
from training.targets import targets
from training.texts import Corpus, read_corpus
from ubmoe_st import upcycle
from ubmoe_st.bases import Base, resolve_base
from ubmoe_st.files import sha256_of, write_json
from ubmoe_st.upcycling import export_experts

logger = logging.getLogger(__name__)

EXPERTS_FOLDER = "experts"
MODEL_FOLDER = "model"
SUMMARY_FILE = "training.json"
SPENT_FILE = "spent.json"
_CURVE = ("_spearman_cosine", "_cosine_ndcg@10")
_MEAN_ROWS = 3000
"""Texts whose mean a projection starts from where `ridge` is 0."""
_TOKENISED = 8192
"""Texts tokenised at once to know their lengths."""


class ContrastiveTrainer(TrainedOnly, SentenceTransformerTrainer):
    """The stock trainer; checkpoints hold trained parameters only, and tokens are counted."""

    tokens = 0
    """Read by this process, also before an interruption."""
    seconds = 0.0
    """Spent before an interruption."""
    batch_tokens: int | None = None
    groups: list[list[int]] | None = None
    sampler: Any = None
    drop_last = False
    """As the recipe says; of several processes sentence-transformers makes it true."""

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The stock one; what it has cost so far goes on from the checkpoint."""
        if resume_from_checkpoint:
            spent = json.loads((Path(resume_from_checkpoint) / SPENT_FILE).read_text(encoding="utf-8"))
            self.tokens, self.seconds = spent["tokens"], spent["seconds"]
            # Of one process of then: now it stands for the work of several.
            self.tokens = self.tokens * spent.get("processes", self.args.world_size) // self.args.world_size
        self._start = time.perf_counter()
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self.seconds += time.perf_counter() - self._start
        return result

    def write(self, folder: Path) -> None:
        """Also what it has cost so far."""
        super().write(folder)
        seconds = self.seconds + time.perf_counter() - self._start
        spent = {"tokens": self.tokens, "seconds": seconds, "processes": self.args.world_size}
        (folder / SPENT_FILE).write_text(json.dumps(spent) + "\n", encoding="utf-8")

    def get_batch_sampler(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """The recipe's one, kept so that a resumed run can tell it its epoch."""
        if self.batch_tokens is None:
            self.sampler = super().get_batch_sampler(dataset, *args, **kwargs)
        else:
            lengths = self._lengths(dataset[dataset.column_names[0]])
            if self.groups is None:
                self.sampler = TokenBudget(dataset, lengths, self.batch_tokens, seed=self.args.seed)
            else:
                self.sampler = GroupBudget(dataset, lengths, self.groups, self.batch_tokens, seed=self.args.seed)
        if self.begun is not None and self.sampler is not None:
            self.sampler = as_begun(
                self.sampler, len(dataset), self.begun, self.args.world_size, drop_last=self.drop_last
            )
        return self.sampler

    def _lengths(self, texts: Any) -> list[int]:
        """Tokens of each text, as far as it is read."""
        module: Any = encoder_of(self.model)
        lengths: list[int] = []
        for start in range(0, len(texts), _TOKENISED):
            block = texts[start : start + _TOKENISED]
            ids = module.tokenizer(block, truncation=True, max_length=module.max_seq_length)["input_ids"]
            lengths += map(len, ids)
        return lengths

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """The stock one, without compiling the layers once more for passes without gradients."""
        with uncompiled():
            return super().evaluate(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The stock loss; tokens are counted by the way."""
        self.tokens += sum(int(v.sum()) for k, v in inputs.items() if k.endswith("attention_mask"))
        return super().compute_loss(model, inputs, *args, **kwargs)


@dataclass
class Run:
    """A finished training.

    Attributes:
        model: With the best parameters.
        trainer: Its state holds the log.
        experts: Folder of the exported experts; None if the generator shares what was trained.
        checkpoint: The assembled checkpoint.
    """

    model: SentenceTransformer
    trainer: ContrastiveTrainer
    experts: Path | None = None
    checkpoint: Path | None = None


def training_arguments(recipe: ContrastiveRecipe) -> SentenceTransformerTrainingArguments:
    """The recipe's `trainer` section over our defaults.

    Raises:
        ValueError: If the collator of `rough` would never hear of a new epoch.
    """
    if recipe.rough and recipe.trainer.get("dataloader_persistent_workers"):
        raise ValueError(
            "rough reads other texts as fragments each epoch, and workers that stay do not hear of epochs; leave "
            "trainer.dataloader_persistent_workers out"
        )
    values: dict[str, Any] = {
        "output_dir": str(Path(recipe.out) / "checkpoints"),
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Said outright: without a GPU, processes started by torchrun would otherwise train one by one, unconnected.
        "use_cpu": not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "remove_unused_columns": False,
        "save_total_limit": 2,
        "ddp_find_unused_parameters": False,
        "restore_callback_states_from_checkpoint": True,  # the patience of early stopping
    }
    values |= recipe.trainer
    own = values.get("accelerator_config") or {}
    if recipe.batch_tokens is not None:
        # Batches differ in size, and the sampler sees to it that all processes get as many.
        values["accelerator_config"] = {**own, "even_batches": False}
    elif recipe.shuffle_buffer is not None:
        # Each process reads all rows and keeps its own: the same batches on any number of processes that fits.
        values["accelerator_config"] = {**own, "dispatch_batches": False}
    elif recipe.length_buckets:
        values.setdefault("batch_sampler", LengthBuckets)
    if recipe.prompt:
        values["prompts"] = recipe.prompt
    if values.get("gradient_checkpointing"):
        # The re-entrant form loses the gradient where the input of a layer takes none.
        values.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": False})
    if recipe.evaluate and values.get("eval_strategy", "no") != "no":
        first = next(iter(recipe.evaluate))
        metric = "cosine_ndcg@10" if first == DOLLY_DEV else "spearman_cosine"
        values.setdefault("metric_for_best_model", f"eval_{first}_{metric}")
        values.setdefault("load_best_model_at_end", True)
    return arguments_of(SentenceTransformerTrainingArguments, values)


def build_dataset(recipe: ContrastiveRecipe, corpus: Corpus | None, seed: int = 0) -> Any:
    """The columns the loss reads: one text per view, the row number for distillation; what `RoughCollator` takes out.

    Args:
        recipe: What to read.
        corpus: The texts, without `pairs`.
        seed: Of the order of a stream.
    """
    from datasets import Dataset

    if recipe.pairs is not None and recipe.shuffle_buffer is not None:
        return stream_rows(recipe.pairs, recipe.columns, recipe.shuffle_buffer, seed)
    if recipe.pairs is not None:
        return Dataset.from_dict(read_rows(recipe.pairs, recipe.columns))
    texts = student_texts(recipe, corpus) if corpus is not None else []
    columns: dict[str, list[Any]] = {"anchor": texts}
    if recipe.views == 2:
        columns["positive"] = texts
    if recipe.teachers:
        columns["label"] = list(range(len(texts)))
    if recipe.rough and recipe.prompts and corpus is not None:
        columns[PROMPT_CHARACTERS] = [len(recipe.prompts.get(kind, "")) for kind in corpus.kinds]
    return Dataset.from_dict(columns)


def student_texts(recipe: ContrastiveRecipe, corpus: Corpus) -> list[str]:
    """The texts as the student reads them: with the prompt of their kind."""
    return [recipe.prompts.get(kind, "") + text for kind, text in zip(corpus.kinds, corpus.texts)]


def build_evaluators(recipe: ContrastiveRecipe) -> list[Any]:
    """One `EmbeddingSimilarityEvaluator` for each STS development set, an `InformationRetrievalEvaluator` for Dolly."""
    from sentence_transformers.sentence_transformer.evaluation import (
        EmbeddingSimilarityEvaluator,
        InformationRetrievalEvaluator,
    )

    evaluators: list[Any] = []
    for name, sample in recipe.evaluate.items():
        if name == DOLLY_DEV:
            found = dolly_dev(data_folder(), sample)
            queries: Any = found.queries
            documents: Any = found.documents
            relevant = {query: set(grades) for query, grades in found.relevance.items()}
            evaluators.append(
                InformationRetrievalEvaluator(queries, documents, relevant, name=name, ndcg_at_k=[10], write_csv=False)
            )
        else:
            evaluators.append(
                EmbeddingSimilarityEvaluator(
                    *sts_pairs(name, data_folder(), sample), name=name, main_similarity="cosine", write_csv=False
                )
            )
    return evaluators


def train(recipe: ContrastiveRecipe, *, export: bool = True) -> Run:
    """Train, or go on from the last checkpoint in the recipe's folder, and export.

    Args:
        recipe: What and how.
        export: Write experts and checkpoint afterwards, where FFNs alone were trained.

    Raises:
        ValueError: If the folder holds a run of another recipe, over other weights or with other texts.
    """
    out = Path(recipe.out)
    args = training_arguments(recipe)
    evaluators = build_evaluators(recipe) if args.eval_strategy != "no" else None
    base = resolve_base(recipe.base)
    with args.main_process_first(local=False):
        check_same_recipe(recipe, out)
        check_same_base(base, out)
    last = checkpoint_to_resume(args)
    begun = keep_steps(args, last, streamed=recipe.shuffle_buffer is not None)
    corpus, found, groups = _read(recipe, base, args)
    dataset = build_dataset(recipe, corpus, args.seed)
    kinds = corpus.kinds if corpus is not None else ()
    label = check_same_texts(_texts_sha256(recipe, corpus, dataset), out, lambda: taught(recipe, base, kinds))
    set_seed(args.seed)
    model = build_model(recipe, base, device=str(args.device), head_size=found[0].shape[1] if found else None)
    if recipe.components and corpus is not None:
        _check_components(recipe, model, corpus)
    if last is None:
        with uncompiled(), torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            start(recipe, model, corpus, found)
    collator = None
    if recipe.rough:
        collator = RoughCollator(
            preprocess_fn=model.preprocess, prompts=args.prompts, share=recipe.rough, seed=args.seed
        )
    trainer = ContrastiveTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        loss=build_loss(
            recipe,
            model,
            found,
            group_numbers(groups, len(found[0])) if groups else None,
            torch.tensor(corpus.passages()) if corpus is not None else None,
            kinds,
        ),
        evaluator=evaluators or None,
        data_collator=collator,
    )
    trainer.batch_tokens, trainer.groups, trainer.begun = recipe.batch_tokens, groups, begun
    trainer.drop_last = bool(recipe.trainer.get("dataloader_drop_last", False))
    trainer.add_callback(EpochCallback(trainer))
    if recipe.early_stopping_patience is not None:
        trainer.add_callback(StopEarly(recipe.early_stopping_patience))
    if recipe.save_minutes is not None:
        trainer.add_callback(SaveByTime(recipe.save_minutes))
    if args.load_best_model_at_end:
        trainer.add_callback(SaveWhenEvaluated())
    if last is not None:
        logger.info("going on from %s", last)
    trainer.train(resume_from_checkpoint=last)
    run = Run(model, trainer)
    if trainer.is_world_process_zero():
        with uncompiled():
            label = label if label is not None else taught(recipe, base, kinds)
            _finish(recipe, run, base, corpus, label, export=export)
    return run


def _read(
    recipe: ContrastiveRecipe, base: Base, args: SentenceTransformerTrainingArguments
) -> tuple[Corpus | None, list[Any], list[list[int]] | None]:
    """The texts, the teachers' vectors of them and the groups of neighbours, as far as the recipe has them."""
    corpus = read_corpus(recipe)
    found: list[Any] = []
    groups = None
    if recipe.teachers and corpus is not None:
        # Hours of work must not run while other processes wait at a barrier that times out.
        found = targets(recipe, base, corpus, compute=args.world_size == 1, device=str(args.device))
    if recipe.groups is not None and corpus is not None:
        with args.main_process_first(local=False):
            first = recipe.teachers[0]
            groups = kept_groups(Path(first.folder), found[0], corpus, recipe.groups, first.target_settings)
    return corpus, found, groups


def _texts_sha256(recipe: ContrastiveRecipe, corpus: Corpus | None, dataset: Any) -> str | None:
    """SHA-256 of what is trained on; None of a stream that is no local file."""
    if corpus is not None:
        return texts_sha256([*corpus.texts, *corpus.kinds])
    if recipe.shuffle_buffer is not None:
        file = Path(recipe.pairs or "")
        return sha256_of(file) if file.is_file() else None
    return texts_sha256(text for column in dataset.column_names for text in dataset[column])


def _finish(
    recipe: ContrastiveRecipe, run: Run, base: Base, corpus: Corpus | None, label: dict[str, Any], *, export: bool
) -> None:
    """What a finished training leaves behind: its parameters and summary, and the experts and checkpoint of FFNs."""
    out = Path(recipe.out)
    check_finite(run.model)
    if recipe.components and corpus is not None:
        args = run.trainer.args
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            shares = turn_to_components(run.model, _sample(recipe, corpus)[1], recipe.prompt)
        logger.info("the first 128 dimensions hold %.1f %% of the vectors", 100 * shares[:128].sum())
    save_trained(run.model, out)
    _write_summary(recipe, run.trainer, out / SUMMARY_FILE)
    if export and recipe.train != "ffn":
        logger.info("train=%s changes what the generator shares: no checkpoint is assembled", recipe.train)
    elif export:
        run.experts = export_run(recipe, run.model, base, label)
        shutil.copyfile(out / SUMMARY_FILE, run.experts / SUMMARY_FILE)
        run.checkpoint = upcycle(
            recipe.base,
            run.experts,
            out=out / MODEL_FOLDER,
            modules=None if recipe.rank else modules_behind(run.model),
            max_seq_length=recipe.encode_max_seq_length,
            prompts=recipe.released_prompts or None,
            default_prompt_name="default" if recipe.prompt else None,
            overwrite=True,
        )


def start(recipe: ContrastiveRecipe, model: SentenceTransformer, corpus: Corpus | None, found: Sequence[Any]) -> None:
    """Give a new model its first parameters: those of `init_from`, a head and a projection by `start_layers`."""
    layers = [module for module in model if isinstance(module, Dense)]
    if recipe.init_from is not None:
        layers = start_from(model, Path(recipe.init_from))
    if recipe.loss != "similarity" or not recipe.ridge:  # the head starts at random
        layers = [layer for layer in layers if recipe.project and layer.module_output_name != HEAD]
    if not layers or corpus is None:
        return
    rows, texts = _sample(recipe, corpus)
    start_layers(recipe, model, layers, texts, found[0][rows] if found else None)


def _check_components(recipe: ContrastiveRecipe, model: SentenceTransformer, corpus: Corpus) -> None:
    """Find out before the training what would end it without a result.

    Raises:
        ValueError: If the recipe asks for more components than the vectors have dimensions, or has fewer texts.
    """
    released_projection(recipe, model)
    width, count = model.get_embedding_dimension() or 0, len(_sample(recipe, corpus)[1])
    if count < width:
        raise ValueError(
            f"components: {width} principal components need as many texts, got {count}; raise ridge "
            f"({recipe.ridge}), give more texts, or leave components out"
        )


def _sample(recipe: ContrastiveRecipe, corpus: Corpus) -> tuple[list[int], list[str]]:
    """The texts that linear layers are fitted on: their rows, and as the student reads them."""
    count = min(recipe.ridge or _MEAN_ROWS, len(corpus.texts))
    rows = random.Random(1).sample(range(len(corpus.texts)), count)
    texts = student_texts(recipe, corpus)
    return rows, [texts[row] for row in rows]


def load_run(folder: str | Path) -> tuple[ContrastiveRecipe, SentenceTransformer]:
    """The recipe and the model of a finished training.

    Args:
        folder: Its `out`.

    Raises:
        FileNotFoundError: If there is no finished training.
    """
    folder = Path(folder)
    if not (folder / TRAINED_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no finished training; run `python -m training.contrastive` first")
    recipe = read_recipe(ContrastiveRecipe, folder / RECIPE_FILE, finished=True)
    stored = load_file(folder / TRAINED_FILE)
    head = next((t.shape[0] for name, t in sorted(stored.items()) if name.endswith("linear.weight")), None)
    model = build_model(recipe, device="cpu", head_size=head)
    load_trained(model, folder)
    return recipe, model.eval()


def export_run(recipe: ContrastiveRecipe, model: SentenceTransformer, base: Base, label: dict[str, Any]) -> Path:
    """Write the trained experts as a folder that `upcycle` takes.

    Low-rank: `export_experts`. Dense: a causal model folder in which the FFNs alone differ from the base.

    Args:
        recipe: Of the run.
        model: As it was trained.
        base: The base model.
        label: From `taught`.
    """
    out = Path(recipe.out) / EXPERTS_FOLDER
    module = encoder_of(model)
    if recipe.rank is not None:
        prompts: dict[str, Any] = {}
        if recipe.released_prompts:
            name = "default" if recipe.prompt else None
            prompts = {"prompts": recipe.released_prompts, "default_prompt_name": name}
        return export_experts(
            module,
            out,
            projection=released_projection(recipe, model),
            recipe={
                "pooling": {"mode": recipe.pooling, "include_prompt": recipe.pool_prompt},
                "max_seq_length": recipe.encode_max_seq_length,
                **label,
                **prompts,
            },
        )
    causal_model(module, base).save_pretrained(out)
    write_json(out / RECIPE_FILE, label)
    return out


def released_projection(recipe: ContrastiveRecipe, model: SentenceTransformer) -> Dense | None:
    """The layer behind the pooling with the outputs that the recipe releases. None where there is none.

    Raises:
        ValueError: If the recipe asks for more components than there are outputs.
    """
    trained = released_layer(model)
    if trained is None or isinstance(recipe.components, bool):
        return trained
    width, kept = trained.linear.out_features, recipe.components
    if kept > width:
        raise ValueError(f"components: {kept} is more than the {width} dimensions of the vectors")
    released = Dense(trained.linear.in_features, kept, activation_function=trained.activation_function)
    state = trained.linear.state_dict()
    released.linear.load_state_dict({key: tensor[:kept] for key, tensor in state.items()})
    return released


def _write_summary(recipe: ContrastiveRecipe, trainer: ContrastiveTrainer, file: Path) -> None:
    from importlib.metadata import version

    log = trainer.state.log_history
    names = ("ubmoe-st", "torch", "transformers", "sentence-transformers", "peft")
    summary = {
        "recipe": asdict(recipe),
        "versions": {name: version(name) for name in names},
        "seconds": round(trainer.seconds, 1),
        "tokens": trainer.tokens,
        "tokens_per_second_and_process": round(trainer.tokens / max(trainer.seconds, 1e-9), 1),
        "processes": trainer.args.world_size,
        "threads": torch.get_num_threads(),
        "steps": trainer.state.global_step,
        "best": trainer.state.best_metric,
        "best_step": trainer.state.best_global_step,
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "curve": [
            {"step": entry["step"], **{k: v for k, v in entry.items() if k.endswith(_CURVE)}}
            for entry in log
            if any(key.endswith(_CURVE) for key in entry)
        ],
        "loss": [[e["step"], e["loss"]] for e in log if "loss" in e and math.isfinite(e["loss"])],
    }
    write_json(file, summary, indent=1)


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Train `bi` experts by a recipe; run it again to go on."""
    recipe = recipe_of_command(ContrastiveRecipe, "python -m training.contrastive", main.__doc__, arguments)
    for noisy in ("httpx", "datasets", "sentence_transformers.base.model"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    run = train(recipe)
    if run.checkpoint is not None:
        logger.info("experts: %s, checkpoint: %s", run.experts, run.checkpoint)


if __name__ == "__main__":
    main()
