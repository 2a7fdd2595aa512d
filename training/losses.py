"""Losses of stage 1: sentence-transformers' own ones, and distillation from a teacher's vectors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from torch.nn import functional as F

from training.recipe import ContrastiveRecipe, DistillationWeights
from training.student import HEAD


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
