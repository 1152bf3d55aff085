"""A network's predictions on one split: read them, check them, choose thresholds, and average networks.

N images, C classes, and one of two tasks:

- one class an image: `targets` (N,) class indices 0 to C-1, `probabilities` (N, C) whose rows sum to 1;
- several labels: `targets` (N, C) of 0/1, `probabilities` (N, C) in 0 to 1, whose rows need not sum to 1. A label that
  the network could not learn is not reported: its whole column is NaN.
"""

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
        paths: (N,) paths below the data root; empty if the images have no files.
        thresholds: (C,) decision thresholds, see `decide`; None for the default decisions.
    """

    targets: np.ndarray
    probabilities: np.ndarray
    patients: np.ndarray
    paths: np.ndarray = np.empty(0, dtype=object)
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
        ValueError: the file has other classes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run notebook 2 or finetune.py first")
    texts = {"path": str, "patient": str, "target": str}
    frame = pd.read_csv(path, dtype=texts, keep_default_na=False, na_values={name: "" for name in classes})
    labels = frame["target"].str.get_dummies(sep="|") if multilabel else pd.get_dummies(frame["target"])
    possible = {*classes, NO_FINDING} if multilabel else set(classes)
    if not set(classes) <= set(frame.columns) or not set(labels.columns) <= possible:
        raise ValueError(f"{path} does not have the classes {', '.join(classes)}")
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

    Images are matched by path and come in the order of the first network. Thresholds are the means of the networks'
    thresholds; None if a network has none.

    Raises:
        ValueError: the networks' images, targets or classes differ.
    """
    first, matched = predictions[0], []
    for other in predictions:
        paths = pd.Index(other.paths)
        if len(paths) != len(first.paths) or not paths.is_unique or not paths.isin(first.paths).all():
            raise ValueError("predictions differ in their images: average networks of one study and split")
        order = paths.get_indexer(first.paths)
        if other.probabilities.shape != first.probabilities.shape or (other.targets[order] != first.targets).any():
            raise ValueError("predictions differ in their classes or targets: average networks of one study")
        matched.append(other.probabilities[order])
    thresholds = [member.thresholds for member in predictions]
    mean = None if any(values is None for values in thresholds) else np.mean(thresholds, axis=0)
    return first._replace(probabilities=np.mean(matched, axis=0), thresholds=mean)


def choose_thresholds(targets: np.ndarray, probabilities: np.ndarray, rule: str, *, positive: int | None) -> np.ndarray:
    """Return (C,) thresholds for `decide` that are best by a rule. Choose them on validation data.

    Args:
        targets: (N,) indices of two classes, or (N, C) of 0/1 for several labels.
        probabilities: (N, C), 0 to 1.
        rule: "youden" (the largest sensitivity + specificity), "f1" or "accuracy" (the largest value). Class
            frequencies change the last two, but not "youden". See `best_threshold`.
        positive: index of the positive one of two classes; None for several labels.

    Returns:
        With two classes: the threshold of the positive class, and NaN for the other. With several labels: a threshold
        for each label; NaN if all or none of the images have the label.
    """
    targets, probabilities = checked(targets, probabilities)
    if targets.ndim == 2:
        columns = zip(targets.T, probabilities.T, strict=True)
        return np.array([best_threshold(truth == 1, scores, rule) for truth, scores in columns])
    thresholds = np.full(2, np.nan)
    chosen = best_threshold(targets == positive, probabilities[:, positive], rule)
    thresholds[positive] = 0.5 if np.isnan(chosen) else chosen
    return thresholds


def checked(targets: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return int64 targets, (N,) or (N, C), and (N, C) float64 probabilities that belong together.

    Raises:
        ValueError: they do not fit each other, or the probabilities are not valid.
    """
    targets, probabilities = np.asarray(targets), np.asarray(probabilities, dtype=np.float64)
    multilabel = targets.ndim == 2
    if targets.shape != (probabilities.shape if multilabel else probabilities.shape[:1]):
        raise ValueError(
            f"targets {targets.shape} do not fit probabilities {probabilities.shape}: pass one row for each image, and "
            "one column of probabilities for each class"
        )
    classes = 2 if multilabel else probabilities.shape[1]
    if not np.isin(targets, np.arange(classes)).all():
        raise ValueError(f"targets lie outside 0..{classes - 1}: pass class indices, or 0 or 1 for each label")
    unreported = np.isnan(probabilities).all(axis=0) & multilabel
    inside = (probabilities >= 0) & (probabilities <= 1)
    # 1e-3 allows for float16 and for rounded decimals in files, but not for logits.
    sums_to_one = np.abs(probabilities.sum(axis=1) - 1) < 1e-3
    if not (inside | unreported).all() or unreported.all() or not (multilabel or sums_to_one.all()):
        wanted = "lie in 0..1: apply the sigmoid" if multilabel else "lie in 0..1 and sum to 1: apply the softmax"
        raise ValueError(f"probabilities must {wanted} to logits first")
    return targets.astype(np.int64), probabilities
