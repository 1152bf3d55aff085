"""What a study asks a network to learn from its images, and what a network knows that has learnt nothing."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from datasets import SPLITS, XrayTable
from studies.settings import Training
from training.objectives import MULTI_LABEL, SINGLE_LABEL, Objective, macro_auc, uninformed_loss
from utils import class_weights, label_weights


@dataclass(frozen=True)
class LearningTask:
    """What a network is trained for.

    Attributes:
        outputs: the number of outputs that the network needs.
        objective: the loss and the score.
        loss_weights: weights of the training loss, (C,) or (2, C) as the objective takes them, or None.
        uninformed_loss: the validation loss of a network that gives every image the same answer: how frequent the
            classes are.
    """

    outputs: int
    objective: Objective
    loss_weights: Tensor | None
    uninformed_loss: float


def learning_task(training: Training, table: XrayTable) -> LearningTask:
    """Return what a network is trained for with these settings and images.

    Raises:
        ValueError: the settings do not fit the classes, or a class has no training image.
    """
    _refuse_unfit_settings(training, table)
    _refuse_absent_classes(table)
    targets, weights = table.targets("train"), None
    if training.balance == "loss":
        weights = label_weights(targets) if table.multilabel else class_weights(targets, len(table.classes))
    outputs = len(table.classes) if table.multilabel or training.head == "softmax" else 1
    objective = _objective(table)
    return LearningTask(outputs, objective, weights, _uninformed_loss(training, table, objective, weights))


def _refuse_unfit_settings(training: Training, table: XrayTable) -> None:
    number, unfit = len(table.classes), None
    if table.multilabel and training.balance == "oversample":
        unfit = 'balance = "oversample" needs one class an image: use "loss" for several labels'
    elif training.select == "auc" and not table.multilabel:
        unfit = 'select = "auc" is the mean over several labels: use "loss" for one class an image'
    elif training.threshold != "none" and number > 2 and not table.multilabel:
        unfit = f'threshold = "{training.threshold}" decides between two classes, not {number}'
    elif training.head == "sigmoid" and number != 2 and not table.multilabel:
        unfit = f'head = "sigmoid" tells two classes apart, not {number}: use "softmax"'
    if unfit:
        raise ValueError(unfit)


def _refuse_absent_classes(table: XrayTable) -> None:
    """Raise ValueError for a class without a training image; print a warning for one without a validation image.

    Of several findings only the lack of all is refused: `XrayTable.one_sided` names the others.
    """
    if table.multilabel:
        if len(table.one_sided("train")) == len(table.classes):
            raise ValueError(
                f"no training image has any of {', '.join(table.classes)}, or all have all: take more images"
            )
        return
    counts = table.counts().reindex(columns=SPLITS, fill_value=0)
    absent = {split: list(counts.index[counts[split] == 0]) for split in SPLITS}
    if absent["train"]:
        others = ", ".join(f'"{name}"' for name in table.classes if name not in absent["train"])
        raise ValueError(
            f"no training image of {', '.join(absent['train'])}: add some, hold out fewer (val and test in [split]), "
            f"or leave the class out (classes = [{others}] in [data])"
        )
    if absent["val"]:
        print(f"WARNING: no validation image of {', '.join(absent['val'])}: nothing is chosen by that class")


def _objective(table: XrayTable) -> Objective:
    """Return the objective for a table. A finding that all or no training images have has no score."""
    if not table.multilabel:
        return SINGLE_LABEL
    one_sided = table.one_sided("train")
    unlearnt = torch.tensor([name in one_sided for name in table.classes])
    return replace(
        MULTI_LABEL, score=lambda outputs, targets: macro_auc(outputs.masked_fill(unlearnt, torch.nan), targets)
    )


def _uninformed_loss(training: Training, table: XrayTable, objective: Objective, weights: Tensor | None) -> float:
    """Return the loss of the classes' frequencies as an answer. Balancing makes all classes equally frequent."""
    train, val = (torch.tensor(table.targets(split)) for split in ("train", "val"))
    number = len(table.classes)
    if training.balance == "none":
        shares = (train if table.multilabel else functional.one_hot(train, number)).double().mean(dim=0)
    else:
        shares = torch.full((number,), 0.5 if table.multilabel else 1 / number, dtype=torch.double)
    return uninformed_loss(objective, shares, val, weights)
