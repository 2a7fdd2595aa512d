"""Losses of stage 1: sentence-transformers' own ones, and distillation from a teacher's vectors."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    EmbedDistillLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from torch.nn import functional as F

from training.recipe import ContrastiveRecipe, DistillationWeights, SimilarityWeights
from training.student import HEAD, encoder_of, forward_in_parts, released_layer

logger = logging.getLogger(__name__)


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


class SimilarityLoss(nn.Module):
    r"""Loss between the similarities of a student's vectors and those of one or several teachers.

    With the vectors e and the head's outputs h of a batch, the teachers' vectors t_k of the same texts and the
    teachers' weights s_k of the texts, all vectors of length 1:

        W           sum_k r_k r_k^T t_k t_k^T / sum_k r_k r_k^T  what the teachers find together: with r_k = sqrt(s_k)
                                                                 it is their mean where all texts have the same
        similarity  mean((e e^T - W)^2) off the diagonal; `within` of it over pairs of one group; a common shift of all
                    differences costs `shift` times as much
        kl          KL(softmax(W / T) || softmax(e e^T / T)) of the rows without the diagonal
        cosine      mean(1 - h t_1), sentence-transformers' `EmbedDistillLoss`
        contrastive mean(CE(e e^T / T, own passage)) of the rows that have one, among the passages of the batch, but for
                    those that the teachers find at least as close as the own one (false negatives, as in
                    sentence-transformers' `GISTEmbedLoss`, whose guide would embed the texts again)

    Each is multiplied with its weight; the trainer adds them and logs them one by one. `DistillKLDivLoss` is the same
    KL (times T^2) for columns of candidates; in a batch where each text is a candidate of each other it would copy the
    vectors B - 1 times.

    Args:
        model: Transformer, `Pooling`, `Dense` layers, `Normalize`.
        targets: By teacher, unit vectors by row of the data, (N, K).
        shares: Weights of the teachers, (teachers,), or of each one for each text, (teachers, N).
        weights: Of the terms.
        groups: Number of each row's group, (N,). None: there are no groups.
        passages: Row of the passage that each row is the title or the question of, its own row for a passage, else -1,
            (N,). Read with a weight of `contrastive`.
        dimensions: Leading dimensions of e that are trained too. None: all of them alone.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        targets: Sequence[Tensor],
        shares: Sequence[float] | Tensor,
        weights: SimilarityWeights,
        groups: Tensor | None = None,
        dimensions: Sequence[int] | None = None,
        passages: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.weights = weights
        self._passages = passages
        self.dimensions = list(dimensions or [])
        weights_of = torch.as_tensor(shares, dtype=torch.float32)
        self._roots = weights_of.sqrt().reshape(len(weights_of), -1).expand(-1, len(targets[0]))  # (teachers, N)
        self.embedding = EmbedDistillLoss(model, distance_metric="cosine")
        self._targets = list(targets)
        self._groups = groups

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> dict[str, Tensor]:
        """The weighted terms.

        Args:
            sentence_features: The texts, one view.
            labels: Their rows in the targets, (B,).
        """
        (features,) = sentence_features
        output = forward_in_parts(self.model, features)
        vectors, rows = output["sentence_embedding"].float(), labels.cpu()
        found = [F.normalize(target[rows].to(vectors), dim=-1) for target in self._targets]
        roots = self._roots[:, rows].to(vectors)  # (teachers, B)
        each = roots[:, :, None] * roots[:, None, :]
        wanted = (each * torch.stack([t @ t.T for t in found])).sum(0) / each.sum(0)
        groups = None if self._groups is None else self._groups[rows].to(vectors.device)
        loss = self.terms(vectors, wanted, groups)
        if self.weights.cosine:
            head = output.get(HEAD, output["sentence_embedding"]).float()
            cosine = self.embedding.compute_loss_from_embeddings([head], [found[0]])
            loss["cosine"] = self.weights.cosine * cosine
        if self.weights.contrastive and self._passages is not None:
            loss["contrastive"] = self.contrastive(vectors, wanted, rows, self._passages[rows])
        return loss

    def contrastive(self, vectors: Tensor, wanted: Tensor, rows: Tensor, own: Tensor) -> Tensor:
        """The weighted `contrastive`; 0 where no row of the batch has its passage there beside another one.

        Args:
            vectors: (B, D).
            wanted: The teachers' similarities, (B, B).
            rows: Of the batch, (B,).
            own: Row of each one's passage, (B,).
        """
        candidates = (own == rows).nonzero()[:, 0]  # the passages, (P,)
        places = {int(rows[place]): number for number, place in enumerate(candidates.tolist())}
        asking = [place for place in range(len(rows)) if own[place] != rows[place] and int(own[place]) in places]
        if not asking or len(candidates) < 2:
            return vectors.sum() * 0
        labels = torch.tensor([places[int(own[place])] for place in asking], device=vectors.device)[:, None]
        unit, passages = F.normalize(vectors, dim=-1), candidates.to(vectors.device)
        close = wanted[asking][:, passages]  # (A, P)
        false = (close >= close.gather(1, labels)).scatter(1, labels, False)
        scores = unit[asking] @ unit[passages].T / self.weights.temperature
        scores = scores.masked_fill(false, torch.finfo(scores.dtype).min)
        return self.weights.contrastive * F.cross_entropy(scores, labels[:, 0])

    def terms(self, vectors: Tensor, wanted: Tensor, groups: Tensor | None) -> dict[str, Tensor]:
        """`similarity` and `kl`, the mean over the leading dimensions that are trained.

        Args:
            vectors: (B, D).
            wanted: The teachers' similarities, (B, B).
            groups: (B,).
        """
        count, width = vectors.shape
        if count < 2:
            return {"similarity": vectors.sum() * 0, "kl": vectors.sum() * 0}
        own = torch.eye(count, dtype=torch.bool, device=vectors.device)
        inside = None if groups is None else (groups[:, None] == groups[None]) & ~own
        weights, found = self.weights, []
        for dimension in self.dimensions or [width]:
            unit = F.normalize(vectors[:, :dimension], dim=-1)
            similarities = unit @ unit.T  # (B, B)
            error = similarities - wanted
            squared = (error - (1 - weights.shift**0.5) * error[~own].mean()).square()
            similarity = squared[~own].mean()
            if weights.within and inside is not None and inside.any():
                similarity = (1 - weights.within) * similarity + weights.within * squared[inside].mean()
            logs, probabilities = (
                (matrix / weights.temperature).masked_fill(own, torch.finfo(matrix.dtype).min)
                for matrix in (similarities, wanted)
            )
            kl = F.kl_div(logs.log_softmax(1), probabilities.softmax(1), reduction="batchmean")
            found.append(torch.stack([weights.similarity * similarity, weights.kl * kl]))
        similarity, kl = torch.stack(found).mean(0)
        return {"similarity": similarity, "kl": kl}


def build_loss(
    recipe: ContrastiveRecipe,
    model: SentenceTransformer,
    targets: Sequence[Tensor] = (),
    groups: Tensor | None = None,
    passages: Tensor | None = None,
    kinds: Sequence[str] = (),
) -> nn.Module:
    """The recipe's loss.

    Args:
        recipe: Names it.
        model: From `build_model`.
        targets: By teacher, for distillation.
        groups: Number of each row's group, (N,), where the recipe has groups.
        passages: Row of each row's passage, (N,), see `SimilarityLoss`.
        kinds: Of the texts, N, where a teacher's weight depends on them.
    """
    if recipe.loss in ("distillation", "similarity") and not targets:
        raise ValueError(f"loss: {recipe.loss} needs the teacher's targets")
    if recipe.loss == "distillation":
        return DistillationLoss(model, targets[0], recipe.distillation, recipe.scale)
    layer = released_layer(model)
    width = encoder_of(model).get_embedding_dimension() if layer is None else layer.linear.out_features
    if recipe.matryoshka_dims and max(recipe.matryoshka_dims) > width:
        raise ValueError(f"matryoshka_dims: {max(recipe.matryoshka_dims)} is more than the {width} dimensions trained")
    if recipe.loss == "similarity":
        if recipe.matryoshka_dims and width not in recipe.matryoshka_dims:
            logger.warning(
                "matryoshka_dims %s leaves the dimensions beyond untrained; add the whole vector: %s",
                recipe.matryoshka_dims,
                [width, *recipe.matryoshka_dims],
            )
        shares = torch.tensor([[t.weight_of(kind) for kind in kinds or ["sentences"]] for t in recipe.teachers])
        return SimilarityLoss(model, targets, shares, recipe.similarity, groups, recipe.matryoshka_dims, passages)
    loss: nn.Module
    if recipe.loss == "CachedMultipleNegativesRankingLoss":
        loss = CachedMultipleNegativesRankingLoss(model, scale=recipe.scale, mini_batch_size=recipe.mini_batch_size)
    else:
        loss = MultipleNegativesRankingLoss(model, scale=recipe.scale)
    return MatryoshkaLoss(model, loss, recipe.matryoshka_dims) if recipe.matryoshka_dims else loss
