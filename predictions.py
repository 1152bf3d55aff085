"""What networks said of a split: read from disk, decided, averaged, and checked before anything is computed.

N images, C classes. Single-label: `targets` (N,) class indices 0..C-1, `probabilities` (N, C) whose rows sum to 1.
Multi-label: `targets` (N, C) of 0/1, `probabilities` (N, C) in 0..1, each label on its own; NaN in the whole column of
a finding that the network could not learn, of which nothing is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from datasets.table import NO_FINDING
from decisions import THRESHOLD_RULES, best_threshold, decide


class Predictions(NamedTuple):
    """What a network said of a split: targets and (N, C) probabilities (see the module), (N,) patient ids,
    (N,) paths below the data root, and the (C,) thresholds of its decisions (see `decide`), None for the usual ones.
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
        """(N,) class indices, or (N, C) bool for multi-label; see `decide`."""
        return decide(self.probabilities, self.thresholds, multilabel=self.multilabel)

    @property
    def reported(self) -> np.ndarray:
        """(C,) bool: whether the network could learn the class, so that its probability says something."""
        return ~np.isnan(self.probabilities).any(axis=0)


def read_predictions(
    path: Path,
    classes: Sequence[str],
    *,
    multilabel: bool = False,
    thresholds: Sequence[float | None] | None = None,
) -> Predictions:
    """Read a `predictions_<split>.csv` of a run folder: path, patient, target, a probability a class, empty where
    nothing is reported.

    The target is a class, for multi-label the findings joined by "|" or "No Finding". `thresholds` are the
    run's own. Raises FileNotFoundError where there is no file and ValueError where its classes are others.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run notebook 2 or finetune.py first")
    texts = {"path": str, "patient": str, "target": str}
    frame = pd.read_csv(path, dtype=texts, keep_default_na=False, na_values={name: "" for name in classes})
    found = frame["target"].str.get_dummies(sep="|") if multilabel else pd.get_dummies(frame["target"])
    known = {*classes, NO_FINDING} if multilabel else set(classes)
    if not set(classes) <= set(frame.columns) or not set(found.columns) <= known:
        raise ValueError(f"{path} is not about the classes {', '.join(classes)}")
    found = found.reindex(columns=list(classes), fill_value=0).to_numpy(np.int64)
    targets = found if multilabel else found.argmax(axis=1)
    probabilities = frame[list(classes)].to_numpy(float)
    thresholds = None if thresholds is None else np.asarray(thresholds, dtype=np.float64)
    return Predictions(
        targets, probabilities, frame["patient"].to_numpy(), frame["path"].to_numpy(), thresholds
    )


def ensemble(predictions: Sequence[Predictions]) -> Predictions:
    """Return the mean of the probabilities that several networks gave to the same images, in the order of the
    first; images are matched by path.

    Thresholds are the mean of the members', None unless all have some. Raises ValueError where images,
    targets or classes differ.
    """
    first = predictions[0]
    matched = [_matched(first, other, number) for number, other in enumerate(predictions, start=1)]
    thresholds = [member.thresholds for member in predictions]
    mean = None if any(t is None for t in thresholds) else np.mean(thresholds, axis=0)
    return first._replace(probabilities=np.mean(matched, axis=0), thresholds=mean)


def choose_thresholds(
    targets: np.ndarray, probabilities: np.ndarray, rule: str, *, positive: int | None = None
) -> np.ndarray:
    """Return (C,) thresholds for `decide` that are best by a rule of `THRESHOLD_RULES` (see `best_threshold`); choose
    them on validation data.

    "youden": the largest sensitivity + specificity, whatever the shares of the classes. "f1", "accuracy":
    the largest one, at these shares. Of two classes, `positive` is the index of the positive one; it alone has a
    threshold, the other has NaN. Of labels each has its own, or NaN where all or none of the images have it, so
    that there is nothing to choose by.
    """
    if rule not in THRESHOLD_RULES:
        raise ValueError(f"No rule {rule!r}: choose one of {', '.join(THRESHOLD_RULES)}")
    targets, probabilities = checked(targets, probabilities, np.shape(probabilities)[-1])
    if targets.ndim == 2:
        columns = zip(targets.T, probabilities.T, strict=True)
        return np.array([best_threshold(truth == 1, scores, rule) for truth, scores in columns])
    if probabilities.shape[1] > 2:
        raise ValueError(
            "thresholds are chosen for two classes or for labels: for more classes leave the rule out"
        )
    if positive not in (0, 1):
        raise ValueError(f"positive = {positive}: say which of the two classes is the positive one, 0 or 1")
    thresholds = np.full(2, np.nan)
    chosen = best_threshold(targets == positive, probabilities[:, positive], rule)
    thresholds[positive] = 0.5 if np.isnan(chosen) else chosen
    return thresholds


def _matched(first: Predictions, other: Predictions, number: int) -> np.ndarray:
    """Return the probabilities of `other`, the `number`-th member, in the order of the first member's
    images.
    """
    theirs = pd.Index(other.paths)
    index = theirs.get_indexer(first.paths) if theirs.is_unique else np.full(len(first.paths), -1)
    if len(first.paths) != len(theirs) or (index < 0).any():
        only = sorted(set(first.paths) ^ set(other.paths)) or ["an image that occurs twice"]
        raise ValueError(
            f"predictions 1 ({len(first.paths)} images) and {number} ({len(theirs)}) differ in {only[0]}: "
            "average networks of one study and split"
        )
    if first.probabilities.shape != other.probabilities.shape:
        raise ValueError(
            f"predictions 1 and {number} have {first.probabilities.shape[1]} and "
            f"{other.probabilities.shape[1]} classes: average networks of one study"
        )
    if not np.array_equal(first.targets, other.targets[index]):
        raise ValueError(
            f"predictions 1 and {number} have different targets for the same images: "
            "average networks that were trained on the same labels"
        )
    return other.probabilities[index]


def class_indices(labels: np.ndarray, num_classes: int, *, name: str) -> np.ndarray:
    """Return (N,) int64 class indices, or say which are none."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"{name} must be one class index an image, not of shape {labels.shape}")
    if not (np.issubdtype(labels.dtype, np.integer) or labels.dtype == bool):
        raise ValueError(
            f"{name} must be whole numbers, not {labels.dtype}: pass class indices, not names or scores"
        )
    outside = np.unique(labels[(labels < 0) | (labels >= num_classes)])
    if outside.size:
        raise ValueError(
            f"{name} contain {outside[:5].tolist()}, outside 0..{num_classes - 1}: check the list of classes"
        )
    return labels.astype(np.int64)


def label_matrix(targets: np.ndarray, num_labels: int) -> np.ndarray:
    """Return (N, C) int64 multi-label targets of 0/1, or say why they are none."""
    targets = np.asarray(targets)
    if targets.ndim != 2 or targets.shape[1] != num_labels or not len(targets):
        raise ValueError(
            f"multi-label targets of shape {targets.shape}: pass one column for each of {num_labels} labels"
        )
    if not np.isin(targets, (0, 1)).all():
        raise ValueError("multi-label targets must be 0 or 1: pass whether the image has the label")
    return targets.astype(np.int64)


def checked(
    targets: np.ndarray, probabilities: np.ndarray, num_classes: int, patients: Sequence | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return int64 targets, (N,) or (N, C), and (N, C) float64 probabilities that belong together, or say
    what does not fit.
    """
    multilabel = np.ndim(targets) == 2
    probabilities = np.asarray(probabilities, dtype=np.float64)
    check = label_matrix if multilabel else partial(class_indices, name="targets")
    targets = check(targets, num_classes)
    if probabilities.shape != (len(targets), num_classes) or num_classes < 2 - multilabel:
        raise ValueError(
            f"probabilities {probabilities.shape} for {len(targets)} images of {num_classes} classes: "
            "pass one column a class, two or more (for yes/no, both columns)"
        )
    inside = (probabilities >= 0) & (probabilities <= 1)
    unreported = np.isnan(probabilities).all(axis=0)
    if multilabel and (not (inside | unreported).all() or unreported.all()):
        raise ValueError("probabilities must lie in 0..1: apply the sigmoid to logits first")
    # 1e-3: room for float16 and for files with rounded decimals, none for logits. NaN fails too.
    rows_sum_to_one = (np.abs(probabilities.sum(axis=1) - 1) < 1e-3).all()
    if not multilabel and (not rows_sum_to_one or (probabilities < 0).any()):
        raise ValueError(
            "rows of probabilities must be non-negative and sum to 1: apply metrics.softmax to logits first"
        )
    if patients is not None and len(patients) != len(targets):
        raise ValueError(f"{len(patients)} patients for {len(targets)} images: pass one id an image")
    return targets, probabilities
