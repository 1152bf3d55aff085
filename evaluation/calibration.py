"""Calibration: how well probabilities match observed shares, and the temperature that corrects them.

Tasks and shapes are those of `predictions`. Decision thresholds are not used here.
"""

import math

import numpy as np
import pandas as pd
from scipy import optimize, special

from evaluation.predictions import checked

TEMPERATURES = (0.05, 20.0)  # the range that fit_temperature searches


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the temperature T > 0 for which softmax(logits / T) has the least negative log likelihood.

    Guo et al. 2017, "On calibration of modern neural networks", ICML, section 4.2. Fit it on validation data. T > 1
    means that the network was over-confident. T is 1 in two cases:

    - all images are classified correctly: the likelihood then keeps growing as T falls to 0;
    - the best T lies outside `TEMPERATURES`.

    Args:
        logits: (N, C) finite logits; for a network with one output z, they are (-z/2, z/2).
        targets: (N,) class indices.
    """
    logits = np.asarray(logits, dtype=np.float64)
    rows = np.arange(len(targets))

    def loss(log_temperature: float) -> float:
        return -special.log_softmax(logits / math.exp(log_temperature), axis=1)[rows, targets].mean()

    # The loss is convex in 1/T, so it has one minimum in log T and a bounded search finds it.
    lowest, highest = (math.log(end) for end in TEMPERATURES)
    best = optimize.minimize_scalar(loss, bounds=(lowest, highest), method="bounded", options={"xatol": 1e-6}).x
    all_correct = (logits.argmax(axis=1) == targets).all()
    return 1.0 if all_correct or not lowest + 0.01 < best < highest - 0.01 else math.exp(best)


def reliability_table(targets: np.ndarray, probabilities: np.ndarray, *, bins: int = 15) -> pd.DataFrame:
    """Return confidence and accuracy for each bin of probabilities; the bins divide (0, 1] equally.

    Args:
        targets: (N,) class indices, or (N, C) of 0/1 for several labels.
        probabilities: (N, C), 0 to 1.
        bins: number of bins.

    Returns:
        A frame with the columns

        - low, high: the ends of the bin;
        - confidence: mean probability of the most probable class; NaN in an empty bin;
        - accuracy: share of images whose most probable class is correct; NaN in an empty bin;
        - count: number of images.

        With several labels, an image counts once for each label. Confidence is the mean probability of a label;
        accuracy is the share of images that have it.
    """
    targets, probabilities = checked(targets, probabilities)
    if targets.ndim == 2:
        reported = ~np.isnan(probabilities)
        confidences, correct = probabilities[reported], targets[reported] == 1
    else:
        confidences, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets
    edges = np.linspace(0, 1, bins + 1)
    index = np.clip(np.searchsorted(edges, confidences, side="left") - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    sums = [np.bincount(index, weights=values, minlength=bins) for values in (confidences, correct)]
    with np.errstate(invalid="ignore"):
        confidence, accuracy = sums / count
    ends = {"low": edges[:-1], "high": edges[1:]}
    return pd.DataFrame(ends | {"confidence": confidence, "accuracy": accuracy, "count": count})


def expected_calibration_error(targets: np.ndarray, probabilities: np.ndarray, *, bins: int = 15) -> float:
    """Return the sum over bins of count / N · |accuracy - confidence|, 0 to 1.

    Naeini et al. 2015, AAAI; Guo et al. 2017, ICML, eq. 3. Arguments as in `reliability_table`.
    """
    table = reliability_table(targets, probabilities, bins=bins)
    gap = (table["accuracy"] - table["confidence"]).abs()
    return float((gap * table["count"]).sum() / table["count"].sum())
