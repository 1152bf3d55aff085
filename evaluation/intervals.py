"""Scores, differences and means with their intervals: percentiles of a bootstrap over patients.

`patients` are (N,) ids of any type. If a proportion is 0 or 1, all resamples give the same value, so a bootstrap
interval would have no width. Such proportions have an exact interval, see `exact_interval`. One patient alone has no
interval.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from evaluation.metrics import MACRO, METRICS, OneVsRest, each_class, macro_classes, weighted_scores
from evaluation.predictions import Predictions

CONFIDENCE = 0.95
RESAMPLES = 1000
UNDEFINED_SHARE = 0.05  # if more resamples than this have no score, there is no interval
CHUNK = 2**20  # weights in memory at once (8 MiB as float64), for any number of resamples


class Interval(NamedTuple):
    """An estimate with the ends of its interval.

    Without an interval, the ends are NaN. Without an estimate, all three are NaN.

    `format` gives `0.912 (0.880–0.941)`, or `–` for NaN. Its specification (default `.3f`) applies to each number.
    """

    estimate: float
    low: float = math.nan
    high: float = math.nan

    def __format__(self, spec: str) -> str:
        estimate, low, high = (format(value, spec or ".3f") for value in self)
        if math.isnan(self.estimate):
            return "–"
        if math.isnan(self.low) or math.isnan(self.high):
            return f"{estimate} (no interval)"
        # "to" because a dash before a minus sign would be misread, and differences can be negative.
        return f"{estimate} ({low}{' to ' if self.low < 0 else '–'}{high})"

    def __str__(self) -> str:
        return format(self)


def patient_weights(patients: Sequence, *, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield (r, N) weights, `RESAMPLES` rows in all: how often each image's patient was drawn.

    Patients are drawn with replacement, each with all of their images, because the errors on images of one patient
    are not independent. Cluster bootstrap: Efron & Tibshirani 1993, An Introduction to the Bootstrap; Field & Welsh
    2007, J. R. Stat. Soc. B 69:369. One patient alone gives no rows.
    """
    _, patient = np.unique(np.asarray(patients), return_inverse=True)
    count = patient.max() + 1
    if count < 2:
        yield np.empty((0, len(patient)))
        return
    rows = max(1, CHUNK // len(patient))
    for start in range(0, RESAMPLES, rows):
        r = min(rows, RESAMPLES - start)
        drawn = rng.integers(count, size=(r, count)) + count * np.arange(r)[:, None]
        times = np.bincount(drawn.ravel(), minlength=r * count).reshape(r, count)
        yield times[:, patient].astype(np.float64)


def _resampled(score: Callable[[np.ndarray], np.ndarray], patients: Sequence, rng: np.random.Generator) -> np.ndarray:
    """Return (R, ...) scores of the resamples; `score` takes (r, N) weights and returns r scores."""
    return np.concatenate([score(weights) for weights in patient_weights(patients, rng=rng)])


def percentile_interval(estimate: float, resampled: np.ndarray) -> Interval:
    """Return the estimate with the central `CONFIDENCE` share of its (R,) resampled values.

    A resample without a patient of the class has no score and is left out. If the share of such resamples is above
    `UNDEFINED_SHARE`, there is no interval: the class has too few patients (about three).
    """
    undefined = np.isnan(resampled)
    if not resampled.size or undefined.mean() > UNDEFINED_SHARE:
        return Interval(float(estimate))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled[~undefined], [tail, 1 - tail])
    return Interval(float(estimate), float(low), float(high))


def exact_interval(estimate: float, patients: int) -> Interval:
    """Return a proportion of 0 or 1 with its interval by Clopper & Pearson (1934, Biometrika 26:404).

    The interval is (0, 1 - a) or (a, 1) with a = ((1 - CONFIDENCE) / 2) ** (1 / patients). The trials
    are patients, not images, so the interval holds even if all images of a patient are alike. It needs two patients.
    """
    if patients < 2:
        return Interval(estimate)
    least = ((1 - CONFIDENCE) / 2) ** (1 / patients)
    return Interval(estimate, least, 1.0) if estimate == 1 else Interval(estimate, 0.0, 1 - least)


def bootstrap_mean(
    values: np.ndarray, patients: Sequence, *, proportion: bool = False, rng: np.random.Generator
) -> Interval:
    """Return the mean over images with its interval over patients.

    Args:
        values: (N,) numbers. NaNs are left out, as are patients who have only NaNs.
        patients: (N,) patient ids.
        proportion: the values are 0 or 1, and a mean of 0 or 1 has the exact interval.
        rng: draws the resamples.
    """
    values = np.asarray(values, dtype=np.float64)
    defined = ~np.isnan(values)
    if not defined.any():
        return Interval(math.nan)
    values, patients = values[defined], np.asarray(patients)[defined]
    if proportion and values.mean() in (0, 1):
        return exact_interval(values.mean(), len(np.unique(patients)))
    means = _resampled(lambda weights: weights @ values / weights.sum(axis=1), patients, rng)
    return percentile_interval(values.mean(), means)


def bootstrap_scores(predictions: Predictions, classes: Sequence[str], *, rng: np.random.Generator) -> pd.DataFrame:
    """Return the scores of `metrics.classification_scores` with intervals over patients.

    Args:
        predictions: for N images.
        classes: names of the C classes.
        rng: draws the resamples.

    Returns:
        One row for each class, then "macro", and each metric. Columns: class, metric, estimate, low, high, and figure:
        the estimate and its interval as text. Scores of 0 and 1 have the intervals of `_exact_intervals`, all others
        those of `percentile_interval`.
    """
    one_vs_rest, patients = each_class(predictions), predictions.patients
    estimate = weighted_scores(one_vs_rest, np.ones((1, len(patients))))[0]
    resampled = _resampled(lambda weights: weighted_scores(one_vs_rest, weights), patients, rng)
    exact = _exact_intervals(one_vs_rest, estimate, patients)
    cells = np.ndindex(estimate.shape)
    rows = [exact.get(cell) or percentile_interval(estimate[cell], resampled[:, *cell]) for cell in cells]
    names = pd.MultiIndex.from_product([[*classes, MACRO], METRICS], names=["class", "metric"])
    return pd.DataFrame(rows, names).assign(figure=[str(interval) for interval in rows]).reset_index()


def _exact_intervals(
    one_vs_rest: OneVsRest, estimate: np.ndarray, patients: Sequence
) -> dict[tuple[int, int], Interval]:
    """Return the intervals of all (C + 1, M) scores that are 0 or 1, by row and column.

    The score of a class has the exact interval over the patients of `_trials`. F1 = 2 J / (1 + J) has the interval of
    the Jaccard index J = TP / (TP + FP + FN). The ends of a macro mean's interval are the means of its classes' ends,
    so this interval is wide.
    """
    trials, in_macro = _trials(one_vs_rest, patients), macro_classes(one_vs_rest)
    exact = {}
    for i, j in np.argwhere(np.isin(estimate[:-1], (0, 1))):
        exact[i, j] = exact_interval(estimate[i, j], trials[METRICS[j]][i])
        if METRICS[j] == "f1":
            exact[i, j] = Interval(*(2 * end / (1 + end) for end in exact[i, j]))
    macro = len(estimate) - 1
    for j in np.flatnonzero(np.isin(estimate[macro], (0, 1))):
        if METRICS[j] == "accuracy" and not one_vs_rest.multilabel:
            exact[macro, j] = exact_interval(estimate[macro, j], len(np.unique(patients)))
        else:  # If the mean is 0 or 1, all classes are 0 or all are 1.
            ends = [exact[i, j] for i in np.flatnonzero(in_macro[:, j])]
            exact[macro, j] = Interval(*np.mean(ends, axis=0))
    return exact


def _trials(one_vs_rest: OneVsRest, patients: Sequence) -> dict[str, np.ndarray]:
    """Return, by metric, (C,) numbers of patients: the trials of the exact intervals.

    - accuracy: all patients;
    - recall: patients with an image of the class;
    - specificity: patients with an image of another class;
    - precision: patients with an image that is predicted as the class;
    - f1: patients with an image that is of the class or is predicted as the class;
    - roc_auc: the smaller of the numbers of positive and of negative patients. This is the largest number of pairs (one
      positive and one negative patient) in which nobody occurs twice. Each pair is a trial: its ranking is correct with
      probability roc_auc. Other pairs are left out, so the interval is rather wide.
    """
    truth, called = one_vs_rest.truth, one_vs_rest.predicted

    def patients_with(images: np.ndarray) -> np.ndarray:
        return pd.DataFrame(images).groupby(np.asarray(patients)).any().sum().to_numpy()

    return {
        "accuracy": patients_with(np.ones_like(truth)),
        "precision": patients_with(called),
        "recall": patients_with(truth),
        "specificity": patients_with(~truth),
        "f1": patients_with(truth | called),
        "roc_auc": np.minimum(patients_with(truth), patients_with(~truth)),
    }


def paired_difference(
    a: Predictions, b: Predictions, classes: Sequence[str], *, metric: str, of: str, rng: np.random.Generator
) -> Interval:
    """Return metric(a) - metric(b) of two networks on the same images and the same resamples of patients.

    This interval is much narrower than the two networks' own intervals suggest, because images that are hard for one
    network are hard for the other. If all resamples give the same difference (for example, if both networks decide
    alike), there is no interval.

    Args:
        a: predictions of the first network.
        b: predictions of the second network for the same images in the same order.
        classes: names of the C classes.
        metric: one of `METRICS`.
        of: a class, which is compared with all others, or `MACRO`. The macro mean is over the classes that count in
            both networks: a label that one of them does not report, or has no threshold for, counts in neither.
        rng: draws the resamples.
    """
    networks = [each_class(predictions) for predictions in (a, b)]
    row, column = [*classes, MACRO].index(of), METRICS.index(metric)
    in_macro = np.logical_and(*map(macro_classes, networks))

    def difference(weights: np.ndarray) -> np.ndarray:
        return np.subtract(*(weighted_scores(network, weights, in_macro)[:, row, column] for network in networks))

    estimate = difference(np.ones((1, len(a.patients))))[0]
    interval = percentile_interval(estimate, _resampled(difference, a.patients, rng))
    return interval if interval.low < interval.high else Interval(interval.estimate)
