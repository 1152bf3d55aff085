"""How far probabilities mean what they say, and the temperature that makes them.

Arrays in, numbers and tables out. Tasks and shapes are those of `metrics`: single-label `targets` (N,) with
`logits` and `probabilities` (N, C) of a softmax, or multi-label `targets` (N, C) of 0/1 with those of C
sigmoids. A single-sigmoid network of two classes comes as its two tied logits, like any two classes.

Calibration is about the probabilities alone: decision thresholds play no part in it.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy import optimize, special

from predictions import checked, class_indices, label_matrix

TEMPERATURES = (0.05, 20.0)  # where fit_temperature looks


def negative_log_likelihood(targets: np.ndarray, probabilities: np.ndarray) -> float:
    """Return -mean log p(true class) in nats, for multi-label the mean over images and the labels that have a
    probability; probabilities below 2.2e-16 count as that, as in scikit-learn's log_loss.
    """
    targets, probabilities = checked(targets, probabilities, np.shape(probabilities)[-1])
    if targets.ndim == 2:
        chosen = np.where(targets == 1, probabilities, 1 - probabilities)
    else:
        chosen = probabilities[np.arange(len(targets)), targets]
    chosen = chosen[~np.isnan(chosen)]
    return float(-np.log(np.maximum(chosen, np.finfo(np.float64).eps)).mean())


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the T > 0 for which softmax(logits / T), for multi-label sigmoid(logits / T), has the least
    negative log likelihood (Guo et al. 2017, ICML, section 4.2).

    Fit on validation data. T > 1: the network was over-confident. Where every image is classified correctly
    the likelihood has no maximum (T -> 0 is ever better): what a small validation set cannot tell is left as
    it is, T = 1. So it is wherever the best T leaves 0.05..20.
    """
    logits = np.asarray(logits, dtype=np.float64)
    if logits.ndim != 2 or not np.isfinite(logits).all():
        raise ValueError(
            f"logits of shape {logits.shape} must be a finite (N, C) array: see what the network returned"
        )
    multilabel = np.ndim(targets) == 2
    targets = (
        label_matrix(targets, logits.shape[1])
        if multilabel
        else class_indices(targets, logits.shape[1], name="targets")
    )
    if len(targets) != len(logits):
        raise ValueError(
            f"{len(targets)} targets but {len(logits)} rows of logits: pass one of each per image"
        )
    # How far each decision is on the right side: the logit of a label is that of "yes" against "no".
    signed = np.where(targets == 1, logits, -logits) if multilabel else None
    rows = np.arange(len(targets))

    def loss(log_temperature: float) -> float:
        temperature = math.exp(log_temperature)
        if multilabel:
            return -special.log_expit(signed / temperature).mean()
        return -special.log_softmax(logits / temperature, axis=1)[rows, targets].mean()

    # The loss is convex in 1/T, hence has a single valley in log T: a bounded search cannot be caught
    # elsewhere.
    bounds = tuple(math.log(end) for end in TEMPERATURES)
    found = optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x
    inside = bounds[0] + 0.01 < found < bounds[1] - 0.01
    separable = (signed > 0).all() if multilabel else (logits.argmax(axis=1) == targets).all()
    return math.exp(found) if inside and not separable else 1.0


def reliability_table(targets: np.ndarray, probabilities: np.ndarray, *, bins: int = 15) -> pd.DataFrame:
    """Return one row a bin of equal width over (0, 1]: low, high, confidence, accuracy, count.

    `confidence` = mean probability of the most probable class, `accuracy` = share of images that are of it;
    both NaN in an empty bin. For multi-label every image counts once for each label: `confidence` = mean
    probability of a label, `accuracy` = share that have it, so that both go down to 0.
    """
    targets, probabilities = checked(targets, probabilities, np.shape(probabilities)[-1])
    if targets.ndim == 2:
        known = ~np.isnan(probabilities)
        said, correct = probabilities[known], targets[known] == 1
    else:
        said, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets
    edges = np.linspace(0, 1, bins + 1)
    index = np.clip(np.searchsorted(edges, said, side="left") - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(index, weights=said, minlength=bins) / count
        accuracy = np.bincount(index, weights=correct, minlength=bins) / count
    return pd.DataFrame(
        {"low": edges[:-1], "high": edges[1:], "confidence": confidence, "accuracy": accuracy, "count": count}
    )


def expected_calibration_error(targets: np.ndarray, probabilities: np.ndarray, *, bins: int = 15) -> float:
    """Return sum over bins of count/N |accuracy - confidence|, in 0..1 (Naeini et al. 2015; Guo et al. 2017,
    eq. 3).
    """
    table = reliability_table(targets, probabilities, bins=bins)
    gap = (table["accuracy"] - table["confidence"]).abs()
    return float((gap * table["count"]).sum() / table["count"].sum())
