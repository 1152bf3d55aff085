"""A network's predictions on one split: read from disk, decided, averaged, and checked before they are scored.

N images, C classes, and one of two tasks:

- one class an image: `targets` (N,) class indices 0 to C-1, `probabilities` (N, C) whose rows sum to 1;
- several labels: `targets` (N, C) of 0/1, `probabilities` (N, C) in 0 to 1, each label on its own. The whole column
  is NaN for a label that the network could not learn; such a label is not reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from datasets.table import NO_FINDING
from inference.decisions import Thresholds, best_threshold, decide


class Predictions(NamedTuple):
    """A network's predictions on one split.

    Attributes:
        targets: (N,) or (N, C), see the module.
        probabilities: (N, C), see the module.
        patients: (N,) patient ids.
        paths: (N,) paths below the data root.
        thresholds: (C,) decision thresholds, see `decide`; None for the usual decisions.
    """

    targets: np.ndarray
    probabilities: np.ndarray
    patients: np.ndarray
    paths: np.ndarray
    thresholds: np.ndarray | None = None

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.targets.ndim == 2

    @property
    def predicted(self) -> np.ndarray:
        """(N,) class indices, or (N, C) bool for several labels; see `decide`."""
        return decide(self.probabilities, self.thresholds, multilabel=self.multilabel)

    @property
    def reported(self) -> np.ndarray:
        """(C,) bool: whether the network could learn the class, so that its probability says something."""
        return ~np.isnan(self.probabilities).any(axis=0)


def read_predictions(
    path: Path, classes: Sequence[str], *, multilabel: bool = False, thresholds: Thresholds = None
) -> Predictions:
    """Return the predictions in a `predictions_<split>.csv` of a run folder.

    Args:
        path: the file, with the columns path, patient, target and one for each class. The target is a class; for
            several labels the findings joined by "|", or "No Finding". Probabilities are empty where not reported.
        classes: the run's classes, in order.
        multilabel: whether an image may have several labels.
        thresholds: (C,) the run's decision thresholds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is about other classes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run notebook 2 or finetune.py first")
    texts = {"path": str, "patient": str, "target": str}
    frame = pd.read_csv(path, dtype=texts, keep_default_na=False, na_values={name: "" for name in classes})
    labels = frame["target"].str.get_dummies(sep="|") if multilabel else pd.get_dummies(frame["target"])
    possible = {*classes, NO_FINDING} if multilabel else set(classes)
    if not set(classes) <= set(frame.columns) or not set(labels.columns) <= possible:
        raise ValueError(f"{path} is not about the classes {', '.join(classes)}")
    labels = labels.reindex(columns=list(classes), fill_value=0).to_numpy(np.int64)
    return Predictions(
        labels if multilabel else labels.argmax(axis=1),
        frame[list(classes)].to_numpy(float),
        frame["patient"].to_numpy(),
        frame["path"].to_numpy(),
        None if thresholds is None else np.asarray(thresholds, dtype=np.float64),
    )


def ensemble(predictions: Sequence[Predictions]) -> Predictions:
    """Return the mean of the probabilities that several networks gave to the same images.

    Images are matched by path and come in the order of the first network. Thresholds are the mean of the networks'
    thresholds, None unless all networks have some.

    Raises:
        ValueError: the networks' images, targets or classes differ.
    """
    first = predictions[0]
    matched = [_matched(first, other, number) for number, other in enumerate(predictions, start=1)]
    thresholds = [member.thresholds for member in predictions]
    mean = None if any(values is None for values in thresholds) else np.mean(thresholds, axis=0)
    return first._replace(probabilities=np.mean(matched, axis=0), thresholds=mean)


def _matched(first: Predictions, other: Predictions, number: int) -> np.ndarray:
    """Return the probabilities of the `number`-th network in the order of the first network's images."""
    paths = pd.Index(other.paths)
    index = paths.get_indexer(first.paths) if paths.is_unique else np.full(len(first.paths), -1)
    if len(first.paths) != len(paths) or (index < 0).any():
        only = sorted(set(first.paths) ^ set(other.paths)) or ["an image that occurs twice"]
        raise ValueError(
            f"predictions 1 ({len(first.paths)} images) and {number} ({len(paths)}) differ in {only[0]}: "
            "average networks of one study and split"
        )
    sizes = first.probabilities.shape[1], other.probabilities.shape[1]
    if sizes[0] != sizes[1] or not np.array_equal(first.targets, other.targets[index]):
        raise ValueError(
            f"predictions 1 and {number} have {sizes[0]} and {sizes[1]} classes, or different targets for the same "
            "images: average networks of one study that were trained on the same labels"
        )
    return other.probabilities[index]


def choose_thresholds(
    targets: np.ndarray, probabilities: np.ndarray, rule: str, *, positive: int | None = None
) -> np.ndarray:
    """Return (C,) thresholds for `decide` that are best by a rule. Choose them on validation data.

    Args:
        targets: (N,) indices of two classes, or (N, C) of 0/1 for several labels.
        probabilities: (N, C), 0 to 1.
        rule: "youden", the largest sensitivity + specificity, whatever the shares of the classes; "f1" or
            "accuracy", the largest one at these shares. See `best_threshold`.
        positive: index of the positive one of two classes.

    Returns:
        Of two classes, the positive one has a threshold and the other has NaN. Of several labels, each has its
        own, or NaN where there is nothing to choose by: all or none of the images have the label.
    """
    targets, probabilities = checked(targets, probabilities, np.shape(probabilities)[-1])
    if targets.ndim == 2:
        columns = zip(targets.T, probabilities.T, strict=True)
        return np.array([best_threshold(truth == 1, scores, rule) for truth, scores in columns])
    thresholds = np.full(2, np.nan)
    chosen = best_threshold(targets == positive, probabilities[:, positive], rule)
    thresholds[positive] = 0.5 if np.isnan(chosen) else chosen
    return thresholds


def checked(targets: np.ndarray, probabilities: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return int64 targets, (N,) or (N, C), and (N, C) float64 probabilities that belong together.

    Raises:
        ValueError: they do not fit each other or the number of classes, or are no probabilities.
    """
    targets, probabilities = np.asarray(targets), np.asarray(probabilities, dtype=np.float64)
    multilabel = targets.ndim == 2
    shape = (len(targets), num_classes)
    if probabilities.shape != shape or targets.shape != (shape if multilabel else shape[:1]):
        raise ValueError(
            f"targets {targets.shape} and probabilities {probabilities.shape} for {num_classes} classes: pass one "
            "row for each image, and one column of probabilities for each class"
        )
    outside = np.setdiff1d(targets, [0, 1] if multilabel else np.arange(num_classes))
    if outside.size:
        remedy = "pass 0 or 1 for each label" if multilabel else "check the list of classes"
        raise ValueError(
            f"targets contain {outside[:5].tolist()}, outside 0..{1 if multilabel else num_classes - 1}: {remedy}"
        )
    unreported = np.isnan(probabilities).all(axis=0) & multilabel
    inside = (probabilities >= 0) & (probabilities <= 1)
    # 1e-3 allows for float16 and for rounded decimals in files, but not for logits.
    sums_to_one = np.abs(probabilities.sum(axis=1) - 1) < 1e-3
    if not (inside | unreported).all() or unreported.all() or not (multilabel or sums_to_one.all()):
        function = "sigmoid" if multilabel else "softmax"
        raise ValueError(
            f"probabilities must lie in 0..1{'' if multilabel else ', each row with a sum of 1'}: apply the {function} "
            "to logits first"
        )
    return targets.astype(np.int64), probabilities
