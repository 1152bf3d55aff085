"""From probabilities to decisions by thresholds, and how thresholds are chosen.

This module needs NumPy alone, because the command line must start quickly.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

Thresholds = Sequence[float | None] | None  # (C,); None or NaN for a class without one

# What a threshold maximises. Each rule takes (K,) true positives, (K,) false positives, and the numbers of
# positives and negatives. Each result is one whole number or a quotient of two, so that ties are exact.
THRESHOLD_RULES: dict[str, Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]] = {
    # Youden 1950, Cancer 3:32: sensitivity + specificity - 1, here times positives times negatives.
    "youden": lambda hits, alarms, positives, negatives: hits * negatives - alarms * positives,
    "f1": lambda hits, alarms, positives, negatives: 2 * hits / (hits + alarms + positives),
    "accuracy": lambda hits, alarms, positives, negatives: hits - alarms,
}


def decide(probabilities: np.ndarray, thresholds: Thresholds = None, *, multilabel: bool = False) -> np.ndarray:
    """Return the predictions: (N,) class indices, or (N, C) bool for several labels.

    One class for each image: without thresholds, it is the most probable class. Thresholds need two classes: the class
    with a threshold is predicted if its probability reaches the threshold, else the other class. If both classes have a
    threshold, that of class 1 counts.

    Several labels: a label is predicted if its probability is at least its threshold, or 0.5 without thresholds. A
    label is never predicted if it has no probability, or if it has no threshold while others have one.

    Args:
        probabilities: (N, C); NaN in the whole column of a label that the network could not learn.
        thresholds: (C,); None or NaN for a class without one.
        multilabel: whether an image may have several labels, or none.

    Raises:
        ValueError: thresholds do not fit the classes, or are given for three or more classes without `multilabel`.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if thresholds is None:
        return probabilities >= 0.5 if multilabel else probabilities.argmax(axis=1)
    thresholds = np.asarray(thresholds, dtype=np.float64)  # None becomes NaN
    with_threshold = np.flatnonzero(~np.isnan(thresholds))
    if thresholds.shape != probabilities.shape[1:] or not (multilabel or len(with_threshold)):
        raise ValueError(f"thresholds {thresholds.tolist()} for {probabilities.shape[1]} classes: pass one each")
    if multilabel:
        return probabilities >= thresholds
    if len(thresholds) != 2:
        raise ValueError(f"thresholds for {len(thresholds)} classes: pass none for more than two classes")
    # The other class is not compared: by rounding, the two probabilities may not sum to exactly 1.
    positive = with_threshold[-1]
    return np.where(probabilities[:, positive] >= thresholds[positive], positive, 1 - positive)


def best_threshold(positive: np.ndarray, scores: np.ndarray, rule: str) -> float:
    """Return the threshold t for which "score >= t" is best by a rule of `THRESHOLD_RULES`.

    t lies midway between two neighbouring scores, or between a score and 0 or 1. If several gaps are equally good, the
    widest is taken, then the lowest. In a wide gap, t depends less on these particular images. t is just above 1 if
    the rule prefers to call even a score of 1 negative.

    Args:
        positive: (N,) bool, the truth.
        scores: (N,), 0 to 1.
        rule: a key of `THRESHOLD_RULES`.

    Returns:
        t, or NaN where all or none of the images are positive, or where a score is NaN.
    """
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives or np.isnan(scores).any():
        return math.nan
    levels, level = np.unique(scores, return_inverse=True)
    # Gap k lies below levels[k], the last gap above all. hits[k] and alarms[k] count positives and negatives above it.
    hits, alarms = (
        np.r_[np.cumsum(np.bincount(level[chosen], minlength=len(levels))[::-1])[::-1], 0]
        for chosen in (positive, ~positive)
    )
    quality = THRESHOLD_RULES[rule](hits, alarms, positives, negatives)
    edges = np.r_[min(0.0, levels[0]), levels, max(1.0, levels[-1])]
    widths = np.where(quality == quality.max(), np.diff(edges), -1)
    best = int(widths.argmax())
    below, above = edges[best], edges[best + 1]
    # The midpoint of two neighbouring floats may round to the lower one. The threshold must be above that one.
    least = below if best == 0 else np.nextafter(below, np.inf)
    return float(max((below + above) / 2, least))
