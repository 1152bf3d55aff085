"""Objectives of a training: losses, and the scores that are shown beside them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor
from torch.nn import functional

from networks import class_logits


def single_label_loss(outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean cross-entropy, for one class per image.

    Args:
        outputs: (N, C) logits; or (N, 1) logits z, used as (-z/2, z/2), which gives the binary cross-entropy.
        targets: (N,) class indices.
        weights: (C,) weights of the classes.
    """
    return functional.cross_entropy(class_logits(outputs), targets, weight=weights)


def multi_label_loss(outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean binary cross-entropy, for several labels per image.

    Args:
        outputs: (N, C) logits.
        targets: (N, C) of 0 and 1.
        weights: (2, C) weights of each label's negatives (row 0) and positives (row 1), see `utils.label_weights`.
    """
    weight = None if weights is None else torch.where(targets > 0.5, weights[1], weights[0])
    return functional.binary_cross_entropy_with_logits(outputs, targets, weight=weight)


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Return the share of images whose highest logit is that of the true class."""
    return float((class_logits(outputs).argmax(dim=1) == targets).double().mean())


def macro_auc(outputs: Tensor, targets: Tensor) -> float:
    """Return the area under the ROC curve, averaged over the labels; NaN where no label has one.

    A label has no area if all or none of the images have the label, or if one of its outputs is NaN.

    Args:
        outputs: (N, C) logits or probabilities, on the CPU.
        targets: (N, C) of 0 and 1.
    """
    truth = targets.numpy() == 1
    positives = truth.sum(axis=0)
    # The Mann-Whitney U of the positives, from their ranks; ties get their mean rank.
    ranks = np.where(truth, rankdata(outputs.double().numpy(), axis=0), 0).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        areas = (ranks - positives * (positives + 1) / 2) / (positives * (len(truth) - positives))
        defined = np.isfinite(areas)
        return float(areas[defined].sum() / defined.sum())


def single_label_size(targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the divisor of the mean cross-entropy: the sum of the images' weights."""
    return weights[targets].sum() if weights is not None else image_count(targets)


def image_count(targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the divisor of the mean loss over images: their number."""
    return torch.tensor(float(len(targets)))


@dataclass(frozen=True)
class Objective:
    """What a network is trained for.

    Attributes:
        loss: the mean loss of (outputs, targets, weights).
        size: the divisor of that mean, from (targets, weights). It weighs the loss of each process's share of a batch.
        score: the score of (outputs, targets), shown beside the loss.
        score_name: its name in the history.
        weighted_validation: whether the validation loss is weighted too. Several labels need it: without weights, the
            loss of rare labels is several times as large. One class per image uses the usual, unweighted cross-entropy.
    """

    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    size: Callable[[Tensor, Tensor | None], Tensor]
    score: Callable[[Tensor, Tensor], float]
    score_name: str
    weighted_validation: bool


SINGLE_LABEL = Objective(single_label_loss, single_label_size, accuracy, "accuracy", weighted_validation=False)
MULTI_LABEL = Objective(multi_label_loss, image_count, macro_auc, "auc", weighted_validation=True)


def uninformed_loss(objective: Objective, shares: Tensor, targets: Tensor, weights: Tensor | None) -> float:
    """Return the validation loss of a network that answers every image with the frequencies of the classes.

    Args:
        objective: what the network is trained for.
        shares: (C,) frequencies of the classes.
        targets: (N,) class indices or (N, C) of 0 and 1.
        weights: the loss weights; used where the objective weighs the validation loss.
    """
    shares = shares.double().clamp(1e-6, 1 - 1e-6)
    logits, targets = (shares.logit(), targets.float()) if targets.ndim == 2 else (shares.log(), targets)
    weights = weights if objective.weighted_validation else None
    return float(objective.loss(logits.float().expand(len(targets), -1), targets, weights))
