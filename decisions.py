"""From probabilities to decisions, and the thresholds that they are made with.

NumPy alone: the command line, which must start quickly, decides by the same lines as the evaluation does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

# What a threshold is chosen for, from the (K,) true and false positives that it leaves and the numbers of
# positives and negatives. Whole numbers, or one quotient of two: equal figures compare equal.
THRESHOLD_RULES: dict[str, Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]] = {
    # Youden 1950, Cancer 3:32: sensitivity + specificity - 1, here times both numbers and without the -1.
    "youden": lambda hits, alarms, positives, negatives: hits * negatives - alarms * positives,
    "f1": lambda hits, alarms, positives, negatives: 2 * hits / (hits + alarms + positives),
    "accuracy": lambda hits, alarms, positives, negatives: hits - alarms,
}


def decide(
    probabilities: np.ndarray, thresholds: Sequence[float | None] | None = None, *, multilabel: bool = False
) -> np.ndarray:
    """Return what is predicted from (N, C) probabilities with (C,) thresholds; None or NaN: a class without one.

    Single-label: (N,) class indices, without thresholds the most probable class. With them, of two classes the one
    that has a threshold where its probability reaches it, else the other; where both have one, that of class 1
    counts.
    Multi-label: (N, C) bool, probability >= threshold, without thresholds 0.5. A finding that has no threshold
    beside others that have one, or has no probability (NaN), is not decided on: False.

    Raises ValueError for thresholds that do not fit the classes, or of more than two that exclude one another.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if thresholds is None:
        return probabilities >= 0.5 if multilabel else probabilities.argmax(axis=1)
    thresholds = np.asarray(thresholds, dtype=np.float64)  # None becomes NaN
    classes = np.flatnonzero(~np.isnan(thresholds))
    if thresholds.shape != probabilities.shape[1:] or not (multilabel or len(classes)):
        raise ValueError(
            f"thresholds {thresholds.tolist()} for {probabilities.shape[1]} classes: pass one each"
        )
    if multilabel:
        return probabilities >= thresholds
    if len(thresholds) != 2:
        raise ValueError(f"thresholds for {len(thresholds)} classes: of more than two, pass none")
    # One probability against one threshold: no rounding of a sum stands between them.
    positive = classes[-1]
    return np.where(probabilities[:, positive] >= thresholds[positive], positive, 1 - positive)


def best_threshold(positive: np.ndarray, scores: np.ndarray, rule: str) -> float:
    """Return the t for which "score >= t" is best by a rule of `THRESHOLD_RULES`, for (N,) bool truth and (N,) scores
    in 0..1; NaN where all or none are positive, or a score is NaN.

    t lies midway between two neighbouring scores, or a score and 0 or 1. Of several gaps between scores that are
    equally good it is the widest, and of those the lowest: the farther the nearest scores, the less depends
    on just these images. t is just above 1 where even a score of 1 is better not called positive.
    """
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives or np.isnan(scores).any():
        return math.nan
    levels, level = np.unique(scores, return_inverse=True)
    # hits[k] and alarms[k]: what is above the gap k, which lies below levels[k]; the last is above them all.
    hits, alarms = (
        np.r_[np.cumsum(np.bincount(level[chosen], minlength=len(levels))[::-1])[::-1], 0]
        for chosen in (positive, ~positive)
    )
    figures = THRESHOLD_RULES[rule](hits, alarms, positives, negatives)
    edges = np.r_[min(0.0, levels[0]), levels, max(1.0, levels[-1])]
    widths = np.where(figures == figures.max(), np.diff(edges), -1)
    best = int(widths.argmax())
    below, above = edges[best], edges[best + 1]
    if best == 0:
        return float((below + above) / 2)
    # Of two neighbouring floats the midpoint may be the lower one, which must stay below the threshold.
    return float(max((below + above) / 2, np.nextafter(below, np.inf)))
