"""From predictions to numbers, with intervals.

Arrays in, tables and `Interval`s out; nothing here knows of torch or of a figure. Throughout: N images, C
classes, `targets` (N,) class indices 0..C-1, `probabilities` (N, C) whose rows sum to 1, `patients` (N,) ids
of any type; the predicted class is the most probable.

Scores are computed one class against the rest from four weighted counts and one weighted rank statistic, with
a weight per image and resample: the estimate is the case "every weight 1", a bootstrap resample is the case
"how often was this image's patient drawn".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, special
from sklearn.metrics import auc, roc_curve

METRICS = ("accuracy", "precision", "recall", "specificity", "f1", "roc_auc")
MACRO = "macro"
UNDEFINED_SHARE = 0.05  # with more undefined resamples than this, the interval is withheld
TEMPERATURES = (0.05, 20.0)  # where fit_temperature looks
CHUNK = 2**20  # weights held at once (8 MiB as float64), whatever the number of resamples


class Interval(NamedTuple):
    """An estimate with the ends of its interval; NaN ends where no interval can be given."""

    estimate: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """Return `0.912 (0.880–0.941)`; the format (default `.3f`) applies to each number."""
        estimate, low, high = (format(value, spec or ".3f") for value in self)
        if math.isnan(self.low) or math.isnan(self.high):
            return f"{estimate} (no interval)"
        # A dash before a minus sign would be misread, and differences do go below zero.
        return f"{estimate} ({low}{' to ' if self.low < 0 else '–'}{high})"

    def __str__(self) -> str:
        return format(self)


class RocCurve(NamedTuple):
    """One class against the rest: (K,) false and true positive rates from 0 to 1, and the area under them."""

    false_positive_rate: np.ndarray
    true_positive_rate: np.ndarray
    auc: float


class Predictions(NamedTuple):
    """What a network said of a split: (N,) target indices, (N, C) probabilities, (N,) patient ids and (N,)
    paths below the data root.
    """

    targets: np.ndarray
    probabilities: np.ndarray
    patients: np.ndarray
    paths: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """(N,) the index of the most probable class."""
        return self.probabilities.argmax(axis=1)


def read_predictions(path: Path, classes: Sequence[str]) -> Predictions:
    """Read a `predictions_<split>.csv` of a run folder: path, patient, target, a probability a class.

    Raises FileNotFoundError where there is none and ValueError where its classes are others.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run notebook 2 or finetune.py first")
    frame = pd.read_csv(path, dtype={"path": str, "patient": str, "target": str}, keep_default_na=False)
    missing = [name for name in classes if name not in frame.columns]
    if missing or not frame["target"].isin(classes).all():
        raise ValueError(f"{path} is not about the classes {', '.join(classes)}")
    targets = pd.Categorical(frame["target"], categories=list(classes)).codes.astype(np.int64)
    probabilities = frame[list(classes)].to_numpy(float)
    return Predictions(targets, probabilities, frame["patient"].to_numpy(), frame["path"].to_numpy())


def confusion_counts(targets: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Return (C, C) counts; row = true class, column = predicted class."""
    targets = _labels(targets, num_classes, name="targets")
    predictions = _labels(predictions, num_classes, name="predictions")
    if len(targets) != len(predictions):
        raise ValueError(
            f"{len(targets)} targets but {len(predictions)} predictions: pass one of each per image"
        )
    cells = np.bincount(targets * num_classes + predictions, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def classification_scores(
    targets: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]
) -> pd.DataFrame:
    """Return one row a class and a last row "macro"; columns are `METRICS` and `support`.

    In a class's row everything is that class against the rest, `accuracy` too: (TP + TN) / N. In the macro
    row `accuracy` is the OVERALL accuracy (share of images whose most probable class is the true one), the
    others are unweighted means over the classes, `support` is N. Equal to scikit-learn's
    precision_recall_fscore_support(zero_division=0) and roc_auc_score(multi_class="ovr").

    A class without a test image has NaN for precision, recall, f1 and roc_auc (0 would be the value whatever
    the network does, which says nothing about it), and the macro means leave that class out. Specificity and
    roc_auc are NaN where every image is of the class.
    """
    targets, probabilities = _checked(targets, probabilities, len(classes))
    support = np.bincount(targets, minlength=len(classes))
    scores = _scores(targets, probabilities, np.ones((1, len(targets))))[0]
    table = pd.DataFrame(scores, index=[*classes, MACRO], columns=list(METRICS))
    table["support"] = [*support, len(targets)]
    return table


def patient_weights(patients: Sequence, *, resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield (r, N) weights, `resamples` rows in all: how often each image's patient was drawn.

    Patients are drawn with replacement, each with all of their images (cluster bootstrap: Efron & Tibshirani
    1993, An Introduction to the Bootstrap; Field & Welsh 2007, J. R. Stat. Soc. B 69:369), because images of
    one patient do not err independently.
    """
    _, patient = np.unique(np.asarray(patients), return_inverse=True)
    count = patient.max() + 1
    rows = max(1, CHUNK // len(patient))
    for start in range(0, resamples, rows):
        r = min(rows, resamples - start)
        drawn = rng.integers(count, size=(r, count)) + count * np.arange(r)[:, None]
        times = np.bincount(drawn.ravel(), minlength=r * count).reshape(r, count)
        yield times[:, patient].astype(np.float64)


def bootstrap_scores(
    targets: np.ndarray,
    probabilities: np.ndarray,
    patients: Sequence,
    classes: Sequence[str],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Return the scores of `classification_scores` with percentile intervals over patients.

    Long table: class (each class, then "macro"), metric, estimate, low, high. See `patient_weights` for the
    resampling.

    A resample in which a figure is undefined (it happened to draw no patient with that class) is left out of
    that figure's interval. If more than 5 % are, low and high are NaN: what is left is then a sample of the
    luckier resamples, and the class has too few patients (under three or so) for any percentile to mean what
    it says. A macro mean is undefined in a resample that lost one of the test set's classes: a mean over
    fewer classes would be another figure.
    """
    targets, probabilities = _checked(targets, probabilities, len(classes), patients)
    estimate = _scores(targets, probabilities, np.ones((1, len(targets))))[0]
    chunks = patient_weights(patients, resamples=resamples, rng=rng)
    resampled = np.concatenate([_scores(targets, probabilities, weights) for weights in chunks])
    rows = [
        (name, metric, *_percentile_interval(estimate[i, j], resampled[:, i, j], confidence))
        for i, name in enumerate([*classes, MACRO])
        for j, metric in enumerate(METRICS)
    ]
    return pd.DataFrame(rows, columns=["class", "metric", *Interval._fields])


def paired_difference(
    targets: np.ndarray,
    probabilities_a: np.ndarray,
    probabilities_b: np.ndarray,
    patients: Sequence,
    classes: Sequence[str],
    *,
    metric: str = "accuracy",
    resamples: int = 1000,
    confidence: float = 0.95,
    rng: np.random.Generator,
) -> Interval:
    """Return macro metric(a) - metric(b) of two networks on the same images, both scored on the same
    resamples of patients.

    Much narrower than the two intervals side by side suggest, since images that are hard are hard for both.
    """
    if metric not in METRICS:
        raise ValueError(f"No metric {metric!r}: choose one of {', '.join(METRICS)}")
    targets, probabilities_a = _checked(targets, probabilities_a, len(classes), patients)
    _, probabilities_b = _checked(targets, probabilities_b, len(classes), patients)
    column = METRICS.index(metric)

    def difference(weights: np.ndarray) -> np.ndarray:
        a, b = (_scores(targets, p, weights)[:, -1, column] for p in (probabilities_a, probabilities_b))
        return a - b

    chunks = patient_weights(patients, resamples=resamples, rng=rng)
    resampled = np.concatenate([difference(weights) for weights in chunks])
    return _percentile_interval(difference(np.ones((1, len(targets))))[0], resampled, confidence)


def bootstrap_mean(
    values: np.ndarray,
    patients: Sequence,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    rng: np.random.Generator,
) -> Interval:
    """Return the mean over images of `values` (N,), NaNs left out, with its percentile interval over
    patients.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) != len(patients) or not len(values):
        raise ValueError(
            f"values of shape {values.shape} for {len(patients)} patients: pass one of each per image"
        )
    known = ~np.isnan(values)
    if not known.any():
        return Interval(math.nan, math.nan, math.nan)
    # Patients without a value are not part of the sample that the mean is over.
    values, patients = values[known], np.asarray(patients)[known]
    chunks = patient_weights(patients, resamples=resamples, rng=rng)
    resampled = np.concatenate([weights @ values / weights.sum(axis=1) for weights in chunks])
    return _percentile_interval(values.mean(), resampled, confidence)


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return (N, C) probabilities exp(z/T) / sum exp(z/T) of (N, C) logits, without overflow."""
    return special.softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=-1)


def negative_log_likelihood(targets: np.ndarray, probabilities: np.ndarray) -> float:
    """Return -mean log p(true class) in nats; probabilities below 2.2e-16 count as that, as in scikit-learn's
    log_loss.
    """
    targets, probabilities = _checked(targets, probabilities, np.shape(probabilities)[-1])
    chosen = probabilities[np.arange(len(targets)), targets]
    return float(-np.log(np.maximum(chosen, np.finfo(np.float64).eps)).mean())


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the T > 0 for which softmax(logits / T) has the least negative log likelihood (Guo et al. 2017,
    ICML, section 4.2).

    Fit on validation data. T > 1: the network was over-confident. Where every image is classified correctly
    the likelihood has no maximum (T -> 0 is ever better): what a small validation set cannot tell is left as
    it is, T = 1. So it is wherever the best T leaves 0.05..20.
    """
    logits = np.asarray(logits, dtype=np.float64)
    if logits.ndim != 2 or not np.isfinite(logits).all():
        raise ValueError(
            f"logits of shape {logits.shape} must be a finite (N, C) array: see what the network returned"
        )
    targets = _labels(targets, logits.shape[1], name="targets")
    if len(targets) != len(logits):
        raise ValueError(
            f"{len(targets)} targets but {len(logits)} rows of logits: pass one of each per image"
        )
    rows = np.arange(len(targets))

    def loss(log_temperature: float) -> float:
        return -special.log_softmax(logits / math.exp(log_temperature), axis=1)[rows, targets].mean()

    # The loss is convex in 1/T, hence has a single valley in log T: a bounded search cannot be caught
    # elsewhere.
    bounds = tuple(math.log(end) for end in TEMPERATURES)
    found = optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x
    inside = bounds[0] + 0.01 < found < bounds[1] - 0.01
    separable = (logits.argmax(axis=1) == targets).all()
    return math.exp(found) if inside and not separable else 1.0


def reliability_table(targets: np.ndarray, probabilities: np.ndarray, *, bins: int = 15) -> pd.DataFrame:
    """Return one row a bin of equal width over (0, 1]: low, high, confidence, accuracy, count.

    `confidence` = mean probability of the predicted class, `accuracy` = share predicted correctly; both NaN
    in an empty bin.
    """
    targets, probabilities = _checked(targets, probabilities, np.shape(probabilities)[-1])
    top = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == targets
    edges = np.linspace(0, 1, bins + 1)
    index = np.clip(np.searchsorted(edges, top, side="left") - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(index, weights=top, minlength=bins) / count
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


def roc_points(targets: np.ndarray, probabilities: np.ndarray, class_index: int) -> RocCurve:
    """Return the ROC curve of one class against the rest; no points and a NaN area where there is nothing to
    tell apart.
    """
    targets, probabilities = _checked(targets, probabilities, np.shape(probabilities)[-1])
    if not 0 <= class_index < probabilities.shape[1]:
        raise ValueError(f"No class {class_index}: choose 0 to {probabilities.shape[1] - 1}")
    positive = targets == class_index
    if positive.all() or not positive.any():
        return RocCurve(np.empty(0), np.empty(0), math.nan)
    false_positive_rate, true_positive_rate, _ = roc_curve(positive, probabilities[:, class_index])
    return RocCurve(
        false_positive_rate, true_positive_rate, float(auc(false_positive_rate, true_positive_rate))
    )


def _scores(targets: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return (R, C + 1, M) scores, classes then macro by METRICS, of (R, N) image weights; NaN where
    undefined.
    """
    classes = np.arange(probabilities.shape[1])
    truth = targets[:, None] == classes
    predicted = probabilities.argmax(axis=1)[:, None] == classes
    # From here on only (N, C) of 0/1 for truth and prediction: a multi-label task will come in by two other
    # such arrays.
    true_positive = weights @ (truth & predicted).astype(np.float64)
    false_positive = weights @ (~truth & predicted).astype(np.float64)
    positive = weights @ truth.astype(np.float64)
    total = weights.sum(axis=1, keepdims=True)
    negative = total - positive
    with np.errstate(divide="ignore", invalid="ignore"):
        recall = true_positive / positive
        specificity = 1 - false_positive / negative
        called = true_positive + false_positive
        # zero_division=0 for a class that was there but never predicted; undefined for a class that was not
        # there.
        precision = np.where(positive > 0, true_positive / np.where(called > 0, called, 1), np.nan)
        f1 = np.where(positive > 0, 2 * true_positive / (positive + called), np.nan)
    accuracy = (true_positive + negative - false_positive) / total
    areas = np.stack([_weighted_auc(truth[:, c], probabilities[:, c], weights) for c in classes], axis=1)
    by_class = np.stack([accuracy, precision, recall, specificity, f1, areas], axis=2)
    there = truth.any(axis=0)
    macro = by_class[:, there].mean(axis=1)
    # Undefined as a whole where the resample lost a class, also for the scores that such a class still has.
    macro[(positive[:, there] == 0).any(axis=1)] = np.nan
    macro[:, METRICS.index("accuracy")] = true_positive.sum(axis=1) / total[:, 0]
    return np.concatenate([by_class, macro[:, None]], axis=1)


def _weighted_auc(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return (R,) areas under the ROC curve: P(score of a positive > of a negative) + P(equal) / 2
    (Mann-Whitney U), weighted.
    """
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    # The first image of each run of equal scores: ties count half, whatever order the sort left them in.
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    weights = weights[:, order]
    # All are whole numbers held exactly in float64, so the differences lose nothing.
    everyone = np.add.reduceat(weights, starts, axis=1)
    positives = np.add.reduceat(weights * positive[order], starts, axis=1)
    negatives = everyone - positives
    below = np.cumsum(negatives, axis=1) - negatives / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return (positives * below).sum(axis=1) / (positives.sum(axis=1) * negatives.sum(axis=1))


def _percentile_interval(estimate: float, resampled: np.ndarray, confidence: float) -> Interval:
    """Return the estimate with the central `confidence` share of its (R,) resampled values."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1: for 95 % pass 0.95")
    undefined = np.isnan(resampled)
    if not resampled.size or undefined.mean() > UNDEFINED_SHARE:
        return Interval(float(estimate), math.nan, math.nan)
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled[~undefined], [tail, 1 - tail])
    return Interval(float(estimate), float(low), float(high))


def _labels(labels: np.ndarray, num_classes: int, *, name: str) -> np.ndarray:
    """Return (N,) int64 class indices, or say which are none."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"{name} must be one class index an image, not of shape {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{name} must be whole numbers, not {labels.dtype}: pass class indices, not names or scores"
        )
    outside = np.unique(labels[(labels < 0) | (labels >= num_classes)])
    if outside.size:
        raise ValueError(
            f"{name} contain {outside[:5].tolist()}, outside 0..{num_classes - 1}: check the list of classes"
        )
    return labels.astype(np.int64)


def _checked(
    targets: np.ndarray, probabilities: np.ndarray, num_classes: int, patients: Sequence | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (N,) int64 targets and (N, C) float64 probabilities that belong together, or say what does not
    fit.
    """
    targets = _labels(targets, num_classes, name="targets")
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if probabilities.shape != (len(targets), num_classes) or num_classes < 2:
        raise ValueError(
            f"probabilities {probabilities.shape} for {len(targets)} images of {num_classes} classes: "
            "pass one column a class, two or more (for yes/no, both columns)"
        )
    # 1e-3: room for float16 and for files with rounded decimals, none for logits. NaN fails too.
    if not (np.abs(probabilities.sum(axis=1) - 1) < 1e-3).all() or (probabilities < 0).any():
        raise ValueError(
            "rows of probabilities must be non-negative and sum to 1: apply metrics.softmax to logits first"
        )
    if patients is not None and len(patients) != len(targets):
        raise ValueError(f"{len(patients)} patients for {len(targets)} images: pass one id an image")
    return targets, probabilities
