"""What a network is trained for: losses, and the scores that are shown beside them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from metrics import mean_auc
from networks import class_logits


def single_label_loss(outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of (N, C) logits, or of one logit z a row, for (N,) class indices; `weights`
    (C,) weigh the classes.

    For one logit it is the binary cross-entropy of sigmoid(z), as a softmax of (-z/2, z/2).
    """
    return functional.cross_entropy(class_logits(outputs), targets, weight=weights)


def multi_label_loss(outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean binary cross-entropy of (N, C) logits for (N, C) of 0 and 1; `weights` (2, C) weigh each
    label's negatives (row 0) and positives (row 1), see `utils.label_weights`.
    """
    weight = None if weights is None else torch.where(targets > 0.5, weights[1], weights[0])
    return functional.binary_cross_entropy_with_logits(outputs, targets, weight=weight)


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Return the share of rows whose highest logit is that of the true class."""
    return float((class_logits(outputs).argmax(dim=1) == targets).double().mean())


def macro_auc(outputs: Tensor, targets: Tensor) -> float:
    """Return the mean over labels of the area under the ROC curve."""
    return mean_auc(targets.numpy(), outputs.numpy())


def single_label_size(targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return what the cross-entropy of a batch is divided by: the sum of its images' weights."""
    return weights[targets].sum() if weights is not None else torch.tensor(float(len(targets)))


def multi_label_size(targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return what the loss of several labels is divided by, apart from their number: the images."""
    return torch.tensor(float(len(targets)))


def uninformed_loss(objective: "Objective", shares: Tensor, targets: Tensor, weights: Tensor | None) -> float:
    """Return the validation loss of giving each of the images with these `targets` one and the same answer: the
    (C,) `shares` as probabilities. A network that knows how frequent the classes are, and nothing else, has it.
    """
    likely = shares.double().clamp(1e-6, 1 - 1e-6)
    several = targets.ndim == 2
    logits = likely.logit() if several else likely.log()
    outputs = logits.float().expand(len(targets), -1)
    used = weights if objective.weighted_validation else None
    return float(objective.loss(outputs, targets.float() if several else targets, used))


@dataclass(frozen=True)
class Objective:
    """What a network is trained for: a loss of (outputs, targets, weights) and the score shown beside it.

    `size` of (targets, weights): what the loss, a mean, is divided by, so that the means of parts of a batch make
    the mean of the whole.

    `weighted_validation`: whether the validation loss has the weights too. Without them the loss of several rare
    labels is another quantity, several times as large; of one class an image it is the usual cross-entropy.
    """

    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    size: Callable[[Tensor, Tensor | None], Tensor]
    score: Callable[[Tensor, Tensor], float]
    score_name: str
    weighted_validation: bool


SINGLE_LABEL = Objective(
    single_label_loss, single_label_size, accuracy, "accuracy", weighted_validation=False
)
MULTI_LABEL = Objective(multi_label_loss, multi_label_size, macro_auc, "auc", weighted_validation=True)
