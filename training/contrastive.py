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
import string
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EarlyStoppingCallback, PreTrainedModel, set_seed

from training.data import Mixture, data_folder, read_rows, read_sentences, sts_pairs
from training.teacher import Teacher, teacher_targets, teacher_vectors
from training.trainers import (
    RECIPE_FILE,
    TRAINED_FILE,
    EpochCallback,
    LengthBuckets,
    TokenBudget,
    TrainedOnly,
    arguments_of,
    check_same_recipe,
    checkpoint_to_resume,
    load_trained,
    one_line_errors,
    read_recipe,
    recipe_of_command,
    trained_parameters,
)
from ubmoe_st import UBMoETransformer, upcycle
from ubmoe_st.bases import Base, resolve_base
from ubmoe_st.experts import find_ffns, is_ffn_key
from ubmoe_st.upcycling import export_experts

logger = logging.getLogger(__name__)

Trained = Literal["ffn", "attention", "ffn+attention", "embeddings", "ffn+embeddings", "attention+embeddings", "all"]
LossName = Literal["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss", "distillation"]

HEAD = "head_embedding"
"""Key of the head's output in the features, where the head is used in training only."""

EXPERTS_FOLDER = "experts"
MODEL_FOLDER = "model"
SUMMARY_FILE = "training.json"
SPENT_FILE = "spent.json"


@dataclass
class DistillationWeights:
    """Weights of the terms of `DistillationLoss`."""

    cosine: float = 1.0
    info_nce: float = 1.0
    similarity: float = 20.0
    contrastive: float = 0.0
    """Of the in-batch contrastive loss on two noisy views of a sentence; above 0 each sentence is read twice."""


@dataclass
class ContrastiveRecipe:
    """What stage 1 trains, on what and how; the rest is `SentenceTransformerTrainingArguments`."""

    base: str
    """Local folder, `.gguf` file, Hub id or short name, see `resolve_base`."""

    out: str
    """Folder of checkpoints and results."""

    init_from: str | None = None
    """Folder of a finished run that trained the same modules: start from its parameters."""

    sentences: Mixture | None = None
    """Unlabelled sentences: each is its own positive."""

    rough: float = 0.0
    """Share of the sentences that the student reads as fragments, see `roughen`; a teacher reads all clean."""

    pairs: str | None = None
    """Supervised pairs or triplets instead, see `read_rows`."""

    columns: list[str] = field(default_factory=lambda: ["anchor", "positive"])
    """Columns of `pairs`: anchor, positive, then hard negatives."""

    train: Trained = "ffn"
    """What trains. Only `ffn` can be released: everything else is shared with the generator."""

    rank: int | None = 16
    """Rank of the low-rank experts (rsLoRA). None: dense."""

    alpha: float | None = None
    """LoRA alpha; the deltas are scaled by alpha / sqrt(rank). None: the rank."""

    lora_dropout: float = 0.0
    """Noise: dropout rate on the input of every low-rank expert."""

    attention_dropout: float = 0.0
    """Noise: dropout rate on the attention weights."""

    ffn_dropout: float = 0.0
    """Noise: dropout rate on the output of every FFN."""

    loss: LossName = "MultipleNegativesRankingLoss"
    scale: float = 20.0
    """1 / temperature of every softmax over similarities."""

    mini_batch_size: int = 32
    """Sentences per forward pass of `CachedMultipleNegativesRankingLoss`."""

    matryoshka_dims: list[int] | None = None
    """Also train these leading dimensions of the vectors, by `MatryoshkaLoss`."""

    teacher: Teacher | None = None
    """For `distillation`."""

    distillation: DistillationWeights = field(default_factory=DistillationWeights)

    head: Literal["training", "output"] | None = None
    """Linear layer behind the pooling, to the teacher's dimension. `training`: dropped afterwards, the vectors are
    the pooled ones. `output`: part of the model."""

    pooling: Literal["mean", "lasttoken"] = "mean"
    prompt: str | None = None
    """Put before every text, in training and by `encode`."""

    pool_prompt: bool = False
    """Whether mean pooling takes the prompt's tokens too."""

    max_seq_length: int = 64
    """Longest text in training, tokens."""

    encode_max_seq_length: int = 512
    """Longest text of the released model, tokens."""

    length_buckets: bool = True
    """Batches of texts of similar length. False: by the trainer's `batch_sampler`."""

    batch_tokens: int | None = None
    """Tokens of a batch in each process, padding included, instead of the trainer's `per_device_train_batch_size`."""

    evaluate: dict[str, int | None] = field(default_factory=lambda: {"STSB-dev": None})
    """Development sets, and how many of their pairs (None: all). The first one chooses the best checkpoint."""

    early_stopping_patience: int | None = None
    """Stop after so many evaluations without a gain."""

    trainer: dict[str, Any] = field(default_factory=dict)
    """`SentenceTransformerTrainingArguments`."""

    def __post_init__(self) -> None:
        if self.train not in get_args(Trained):
            raise ValueError(f"train must be one of {', '.join(get_args(Trained))}, got {self.train!r}")
        if self.loss not in get_args(LossName):
            raise ValueError(f"loss must be one of {', '.join(get_args(LossName))}, got {self.loss!r}")
        if (self.sentences is None) == (self.pairs is None):
            raise ValueError("a recipe needs either `sentences` or `pairs`")
        if self.loss == "distillation":
            if self.teacher is None or self.sentences is None or self.head is None:
                raise ValueError("loss: distillation needs `teacher`, `sentences` and `head` (training or output)")
            if self.matryoshka_dims:
                raise ValueError("matryoshka_dims go with the contrastive losses, not with distillation")
        elif self.head == "training":
            raise ValueError("head: training is for distillation; a contrastive loss trains the vectors themselves")
        two_views = self.loss != "distillation" or self.distillation.contrastive > 0
        if two_views and self.sentences is not None and not self.has_noise:
            raise ValueError(
                "without noise both views of a sentence are equal and there is nothing to learn; set lora_dropout, "
                "attention_dropout or ffn_dropout"
            )
        if self.batch_tokens is not None and self.pairs is not None:
            raise ValueError("batch_tokens counts one sentence per row; with `pairs` use per_device_train_batch_size")
        if not 0 <= self.rough <= 1:
            raise ValueError(f"rough is a share from 0 to 1, got {self.rough}")
        if self.rank is None and self.lora_dropout:
            raise ValueError("lora_dropout needs low-rank experts; set rank, or use ffn_dropout")

    @property
    def supervision(self) -> str:
        """How the tables call this kind of training."""
        if self.pairs is not None:
            return "supervised"
        return "self-distilled" if self.loss == "distillation" else "unsupervised"

    @property
    def has_noise(self) -> bool:
        """Whether two passes over a sentence differ in training."""
        # PEFT drops nothing in front of an embedding.
        lora = self.lora_dropout if set(self.train.split("+")) - {"embeddings"} else 0.0
        return max(lora, self.attention_dropout, self.ffn_dropout) > 0


# --- the model --------------------------------------------------------------------------------------------------


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


# --- losses -----------------------------------------------------------------------------------------------------


class DistillationLoss(nn.Module):
    r"""Loss between a student's vectors and the teacher's targets of the same sentences.

    With the targets t, the head's outputs h and the pooled vectors e of a batch, all of length 1 and (B, .):

        cosine      mean(1 - h t)
        info_nce    (CE(scale * h t^T, i) + CE(scale * t h^T, i)) / 2    each row must find its own target
        similarity  mean((h h^T - t t^T)^2) + mean((e e^T - t t^T)^2)   all pairs of the batch
        contrastive MultipleNegativesRankingLoss on two noisy views of each sentence

    Each is multiplied with its weight; the trainer adds them and logs them one by one. Over two views the first
    three are averaged.

    Args:
        model: Transformer, `Pooling`, `Dense` (the head), `Normalize`.
        targets: Unit vectors by row of the data, (N, K).
        weights: Of the terms.
        scale: 1 / temperature.
    """

    def __init__(
        self, model: SentenceTransformer, targets: Tensor, weights: DistillationWeights, scale: float = 20.0
    ) -> None:
        super().__init__()
        self.model = model
        # By name, not by position in `model`, which the trainer may wrap. Pooling has no parameters.
        self.pooling = next(module for module in model if isinstance(module, Pooling))
        self.weights = weights
        self.scale = scale
        self.contrastive = MultipleNegativesRankingLoss(model, scale=scale)
        self._targets = targets

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> dict[str, Tensor]:
        """The weighted terms.

        Args:
            sentence_features: One view of the sentences, or two.
            labels: Their rows in `targets`, (B,).
        """
        outputs = [self.model(dict(features)) for features in sentence_features]
        target = self._targets[labels.cpu()].to(outputs[0]["sentence_embedding"])
        terms = [self.terms(output, target) for output in outputs]
        loss = {name: torch.stack([term[name] for term in terms]).mean() for name in terms[0]}
        if self.weights.contrastive and len(outputs) > 1:
            views = [output["sentence_embedding"] for output in outputs]
            contrastive = self.contrastive.compute_loss_from_embeddings(views, labels)
            loss["contrastive"] = self.weights.contrastive * contrastive
        return loss

    def terms(self, output: dict[str, Tensor], target: Tensor) -> dict[str, Tensor]:
        """`cosine`, `info_nce` and `similarity` of one view.

        Args:
            output: What the model gave.
            target: (B, K).
        """
        head = output[HEAD] if HEAD in output else output["sentence_embedding"]
        head = F.normalize(head, dim=-1)  # (B, K)
        pooled = self.pooling(dict(output))["sentence_embedding"]
        pooled = F.normalize(pooled, dim=-1)  # (B, D)
        logits = self.scale * head @ target.T
        own = torch.arange(len(target), device=target.device)
        wanted = target @ target.T
        similarity = (head @ head.T - wanted).square().mean() + (pooled @ pooled.T - wanted).square().mean()
        return {
            "cosine": self.weights.cosine * (1 - (head * target).sum(-1)).mean(),
            "info_nce": self.weights.info_nce * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2,
            "similarity": self.weights.similarity * similarity,
        }


def build_loss(recipe: ContrastiveRecipe, model: SentenceTransformer, targets: Tensor | None = None) -> nn.Module:
    """The recipe's loss.

    Args:
        recipe: Names it.
        model: From `build_model`.
        targets: Teacher's targets, for distillation.
    """
    if recipe.loss == "distillation":
        if targets is None:
            raise ValueError("distillation needs the teacher's targets")
        return DistillationLoss(model, targets, recipe.distillation, recipe.scale)
    loss: nn.Module
    if recipe.loss == "CachedMultipleNegativesRankingLoss":
        loss = CachedMultipleNegativesRankingLoss(model, scale=recipe.scale, mini_batch_size=recipe.mini_batch_size)
    else:
        loss = MultipleNegativesRankingLoss(model, scale=recipe.scale)
    return MatryoshkaLoss(model, loss, recipe.matryoshka_dims) if recipe.matryoshka_dims else loss


# --- the run ----------------------------------------------------------------------------------------------------


class ContrastiveTrainer(TrainedOnly, SentenceTransformerTrainer):
    """The stock trainer; checkpoints hold trained parameters only, and tokens are counted."""

    tokens = 0
    """Read by this process, also before an interruption."""
    seconds = 0.0
    """Spent before an interruption."""
    batch_tokens: int | None = None
    sampler: Any = None

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The stock one; what it has cost so far goes on from the checkpoint."""
        if resume_from_checkpoint:
            spent = json.loads((Path(resume_from_checkpoint) / SPENT_FILE).read_text(encoding="utf-8"))
            self.tokens, self.seconds = spent["tokens"], spent["seconds"]
        self._start = time.perf_counter()
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self.seconds += time.perf_counter() - self._start
        return result

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        spent = {"tokens": self.tokens, "seconds": self.seconds + time.perf_counter() - self._start}
        file = Path(output_dir or str(self.args.output_dir)) / SPENT_FILE
        file.write_text(json.dumps(spent) + "\n", encoding="utf-8")

    def get_batch_sampler(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """The recipe's one, kept so that a resumed run can tell it its epoch."""
        if self.batch_tokens is None:
            self.sampler = super().get_batch_sampler(dataset, *args, **kwargs)
        else:
            module: Any = encoder_of(self.model)
            texts = dataset[dataset.column_names[0]][:]
            ids = module.tokenizer(texts, truncation=True, max_length=module.max_seq_length)["input_ids"]
            self.sampler = TokenBudget(dataset, [len(row) for row in ids], self.batch_tokens, seed=self.args.seed)
        return self.sampler

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
    """The recipe's `trainer` section over our defaults."""
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
    }
    values |= recipe.trainer
    if recipe.batch_tokens is not None:
        # Batches differ in size, and the sampler sees to it that all processes get as many.
        values["accelerator_config"] = {"even_batches": False}
    elif recipe.length_buckets:
        values["batch_sampler"] = LengthBuckets
    if recipe.prompt:
        values["prompts"] = recipe.prompt
    if values.get("gradient_checkpointing"):
        # The re-entrant form loses the gradient where the input of a layer takes none.
        values.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": False})
    if recipe.evaluate and values.get("eval_strategy", "no") != "no":
        values.setdefault("metric_for_best_model", f"eval_{next(iter(recipe.evaluate))}_spearman_cosine")
        values.setdefault("load_best_model_at_end", True)
    return arguments_of(SentenceTransformerTrainingArguments, values)


def build_dataset(recipe: ContrastiveRecipe, sentences: Sequence[str] | None) -> Any:
    """The columns the loss reads: one text per view, the row number for distillation."""
    from datasets import Dataset

    if recipe.pairs is not None:
        return Dataset.from_dict(read_rows(recipe.pairs, recipe.columns))
    texts = list(sentences or ())
    columns: dict[str, list[Any]] = {"anchor": texts}
    if recipe.loss != "distillation" or recipe.distillation.contrastive:
        columns["positive"] = texts
    if recipe.loss == "distillation":
        columns["label"] = list(range(len(texts)))
    return Dataset.from_dict(columns)


@dataclass
class RoughCollator(SentenceTransformerDataCollator):
    """The stock collator, before which some of the anchors become fragments: others in every epoch.

    Attributes:
        share: Of the anchors that are changed, see `roughen`.
        seed: Of the choice, which depends on seed, epoch and text alone.
    """

    share: float = 0.0
    seed: int = 0
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose anew."""
        self.epoch = epoch

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch, some anchors changed."""
        rows = []
        for row in features:
            rng = random.Random(f"{self.seed}-{self.epoch}-{row['anchor']}")
            changed, lower = rng.random() < self.share, rng.random() < 0.5
            rows.append({**row, "anchor": roughen(row["anchor"], lower)} if changed else row)
        return super().__call__(rows)


def roughen(text: str, lower: bool) -> str:
    """A text without final punctuation and with a small first letter, or all in small letters.

    Queries and titles look like that, running text does not: an encoder that never read any maps them all together.

    Args:
        text: A sentence; one of punctuation alone stays as it is.
        lower: Small letters throughout.
    """
    bare = text.rstrip(string.punctuation + " ")
    if not bare:
        return text
    return bare.lower() if lower else bare[0].lower() + bare[1:]


def build_evaluators(recipe: ContrastiveRecipe) -> list[Any]:
    """One `EmbeddingSimilarityEvaluator` for each development set."""
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    return [
        EmbeddingSimilarityEvaluator(
            *sts_pairs(name, data_folder(), sample), name=name, main_similarity="cosine", write_csv=False
        )
        for name, sample in recipe.evaluate.items()
    ]


def train(recipe: ContrastiveRecipe, *, export: bool = True) -> Run:
    """Train, or go on from the last checkpoint in the recipe's folder, and export.

    Args:
        recipe: What and how.
        export: Write experts and checkpoint afterwards, where FFNs alone were trained.

    Raises:
        ValueError: If the folder holds a run of another recipe.
    """
    out = Path(recipe.out)
    args = training_arguments(recipe)
    evaluators = build_evaluators(recipe) if args.eval_strategy != "no" else None
    base = resolve_base(recipe.base)
    with args.main_process_first(local=False):
        check_same_recipe(recipe, out)
    set_seed(args.seed)
    model = build_model(recipe, base, device=str(args.device))
    if recipe.init_from is not None:
        load_trained(model, Path(recipe.init_from))
    sentences = read_sentences(recipe.sentences) if recipe.sentences else None
    targets = None
    if recipe.teacher is not None and recipe.loss == "distillation" and sentences is not None:
        # Hours of work must not run while other processes wait at a barrier that times out.
        vectors = teacher_vectors(
            base, recipe.teacher, sentences, compute=args.world_size == 1, device=str(args.device)
        )
        targets = teacher_targets(vectors, recipe.teacher)
    collator = None
    if recipe.rough:
        collator = RoughCollator(
            preprocess_fn=model.preprocess, prompts=args.prompts, share=recipe.rough, seed=args.seed
        )
    trainer = ContrastiveTrainer(
        model=model,
        args=args,
        train_dataset=build_dataset(recipe, sentences),
        loss=build_loss(recipe, model, targets),
        evaluator=evaluators or None,
        data_collator=collator,
    )
    trainer.batch_tokens = recipe.batch_tokens
    trainer.add_callback(EpochCallback(trainer))
    if recipe.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.early_stopping_patience))
    last = checkpoint_to_resume(args)
    if last is not None:
        logger.info("going on from %s", last)
    trainer.train(resume_from_checkpoint=last)
    run = Run(model, trainer)
    if trainer.is_world_process_zero():
        save_file(trained_parameters(model), out / TRAINED_FILE)
        _write_summary(recipe, trainer, out / SUMMARY_FILE)
        if export and recipe.train == "ffn":
            run.experts = export_run(recipe, model, base)
            run.checkpoint = upcycle(
                recipe.base,
                run.experts,
                out=out / MODEL_FOLDER,
                modules=None if recipe.rank else _modules_behind(model, recipe),
                max_seq_length=recipe.encode_max_seq_length,
                prompts={"default": recipe.prompt} if recipe.prompt else None,
                default_prompt_name="default" if recipe.prompt else None,
                overwrite=True,
            )
        elif export:
            logger.info("train=%s changes what the generator shares: no checkpoint is assembled", recipe.train)
    return run


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
    recipe = read_recipe(ContrastiveRecipe, folder / RECIPE_FILE)
    model = build_model(recipe, device="cpu")
    load_trained(model, folder)
    return recipe, model.eval()


def export_run(recipe: ContrastiveRecipe, model: SentenceTransformer, base: Base) -> Path:
    """Write the trained experts as a folder that `upcycle` takes.

    Low-rank: `export_experts`. Dense: a causal model folder in which the FFNs alone differ from the base.
    """
    out = Path(recipe.out) / EXPERTS_FOLDER
    module = encoder_of(model)
    if recipe.rank is not None:
        prompts: dict[str, Any] = {}
        if recipe.prompt:
            prompts = {"prompts": {"default": recipe.prompt}, "default_prompt_name": "default"}
        return export_experts(
            module,
            out,
            projection=next((m for m in model if isinstance(m, Dense)), None) if recipe.head == "output" else None,
            recipe={
                "pooling": {"mode": recipe.pooling, "include_prompt": recipe.pool_prompt},
                "max_seq_length": recipe.encode_max_seq_length,
                "training": recipe.supervision,
                **prompts,
            },
        )
    causal_model(module, base).save_pretrained(out)
    return out


def causal_model(module: UBMoETransformer, base: Base) -> PreTrainedModel:
    """The base's causal LM with the trained backbone in it: what generation becomes if the weights are shared."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    getattr(lm, lm.base_model_prefix).load_state_dict(trained_state(module))
    return lm.eval()


def _modules_behind(model: SentenceTransformer, recipe: ContrastiveRecipe) -> list[Any]:
    """Modules of the released model behind the encoder."""
    return [m for m in list(model)[1:] if not isinstance(m, Dense) or recipe.head == "output"]


def _write_summary(recipe: ContrastiveRecipe, trainer: ContrastiveTrainer, file: Path) -> None:
    from importlib.metadata import version

    log = trainer.state.log_history
    names = ("ubmoe-st", "torch", "transformers", "sentence-transformers", "peft")
    summary = {
        "recipe": asdict(recipe),
        "versions": {name: version(name) for name in names},
        "seconds": round(trainer.seconds, 1),
        "tokens_per_second_and_process": round(trainer.tokens / max(trainer.seconds, 1e-9), 1),
        "processes": trainer.args.world_size,
        "threads": torch.get_num_threads(),
        "steps": trainer.state.global_step,
        "best": trainer.state.best_metric,
        "best_step": trainer.state.best_global_step,
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "curve": [
            {"step": entry["step"], **{k: v for k, v in entry.items() if k.endswith("_spearman_cosine")}}
            for entry in log
            if any(key.endswith("_spearman_cosine") for key in entry)
        ],
        "loss": [[e["step"], e["loss"]] for e in log if "loss" in e and math.isfinite(e["loss"])],
    }
    file.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


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
