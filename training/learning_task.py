"""What a study asks a network to learn from its images, and the loss of a network that has learnt nothing."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from datasets import XrayTable
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
        uninformed_loss: the validation loss of a network that answers every image with the class frequencies.
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
    _refuse_unfit(training, table)
    multilabel, number = table.multilabel, len(table.classes)
    targets, objective, weights = table.targets("train"), SINGLE_LABEL, None
    if multilabel:
        # If all or none of the training images have a finding, its outputs become NaN. The score then omits it.
        unlearnt = torch.from_numpy(np.isin(table.classes, table.one_sided("train")))
        objective = replace(
            MULTI_LABEL, score=lambda outputs, targets: macro_auc(outputs.masked_fill(unlearnt, torch.nan), targets)
        )
    if training.balance == "loss":
        weights = label_weights(targets) if multilabel else class_weights(targets, number)
    # Balanced classes are equally frequent.
    shares = torch.full((number,), 0.5 if multilabel else 1 / number, dtype=torch.double)
    if training.balance == "none":
        shares = torch.tensor(targets if multilabel else np.eye(number)[targets]).double().mean(dim=0)
    uninformed = uninformed_loss(objective, shares, torch.tensor(table.targets("val")), weights)
    return LearningTask(number if multilabel or training.head == "softmax" else 1, objective, weights, uninformed)


def _refuse_unfit(training: Training, table: XrayTable) -> None:
    """Raise ValueError for unfit settings or a class without training images; warn of one without validation images.

    With several labels, a table is refused only if no finding can be learnt. `XrayTable.one_sided` lists the findings
    that cannot be learnt.
    """
    number, unfit = len(table.classes), None
    if table.multilabel:
        if training.balance == "oversample":
            unfit = 'balance = "oversample" needs one class an image: use "loss" for several labels'
        elif len(table.one_sided("train")) == number:
            unfit = f"no training image has any of {', '.join(table.classes)}, or all have all: take more images"
    else:
        absent = {split: np.delete(table.classes, table.targets(split)).tolist() for split in ("train", "val")}
        if training.select == "auc":
            unfit = 'select = "auc" is the mean over several labels: use "loss" for one class an image'
        elif training.threshold != "none" and number > 2:
            unfit = f'threshold = "{training.threshold}" decides between two classes, not {number}'
        elif training.head == "sigmoid" and number != 2:
            unfit = f'head = "sigmoid" tells two classes apart, not {number}: use "softmax"'
        elif absent["train"]:
            others = ", ".join(f'"{name}"' for name in table.classes if name not in absent["train"])
            unfit = (
                f"no training image of {', '.join(absent['train'])}: add some, hold out fewer (val and test in "
                f"[split]), or leave the class out (classes = [{others}] in [data])"
            )
        elif absent["val"]:
            print(f"WARNING: no validation image of {', '.join(absent['val'])}: nothing is chosen by that class")
    if unfit:
        raise ValueError(unfit)
