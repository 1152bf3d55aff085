"""From predictions to numbers, with intervals.

Arrays in, tables and `Interval`s out; nothing here knows of torch or of a figure. Throughout: N images, C
classes, `patients` (N,) ids of any type, and one of two tasks, told apart by the shape of `targets`:

- single-label: `targets` (N,) class indices 0..C-1, `probabilities` (N, C) whose rows sum to 1;
- multi-label: `targets` (N, C) of 0/1, `probabilities` (N, C) in 0..1, each label on its own.

Scores are computed one class against the rest from four weighted counts and one weighted rank statistic, with
a weight per image and resample: the estimate is the case "every weight 1", a bootstrap resample is the case
"how often was this image's patient drawn".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import special, stats
from sklearn.manifold import TSNE
from sklearn.metrics import (
    auc,
    average_precision_score,
    classification_report,
    precision_recall_curve,
    roc_curve,
    silhouette_score,
)
from sklearn.preprocessing import StandardScaler

from datasets.table import NO_FINDING

METRICS = ("accuracy", "precision", "recall", "specificity", "f1", "roc_auc")
MACRO = "macro"
UNDEFINED_SHARE = 0.05  # with more undefined resamples than this, the interval is withheld
NEAREST = 1e-6  # how near to 0 and 1 a chosen threshold may lie: at 0 or 1 it would divide by zero
CHUNK = 2**20  # weights held at once (8 MiB as float64), whatever the number of resamples

# What a threshold is chosen for, from the (K,) true and false positives that it leaves and the numbers of
# positives and negatives. Whole numbers, or one quotient of two: equal figures compare equal.
THRESHOLD_RULES: dict[str, Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]] = {
    # Youden 1950, Cancer 3:32: sensitivity + specificity - 1, here times both numbers and without the -1.
    "youden": lambda hits, alarms, positives, negatives: hits * negatives - alarms * positives,
    "f1": lambda hits, alarms, positives, negatives: 2 * hits / (hits + alarms + positives),
    "accuracy": lambda hits, alarms, positives, negatives: hits - alarms,
}


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


class PrecisionRecallCurve(NamedTuple):
    """One class against the rest: (K,) ascending thresholds, what "probability >= threshold" gives at each,
    and the average precision.
    """

    thresholds: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    average_precision: float


class Predictions(NamedTuple):
    """What a network said of a split: targets and (N, C) probabilities (see the module), (N,) patient ids,
    (N,) paths below the data root, and the (C,) thresholds of its decisions, None for the usual ones.
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


def decide(
    probabilities: np.ndarray, thresholds: Sequence[float] | None = None, *, multilabel: bool = False
) -> np.ndarray:
    """Return what is predicted from (N, C) probabilities with (C,) thresholds.

    Single-label: (N,) the class with the largest probability / threshold, without thresholds the most
    probable; of two classes with thresholds (1 - t, t), class 1 where its probability is above t.
    Multi-label: (N, C) bool, probability >= threshold, without thresholds 0.5.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if thresholds is None:
        return probabilities >= 0.5 if multilabel else probabilities.argmax(axis=1)
    thresholds = np.asarray(thresholds, dtype=np.float64)
    if thresholds.shape != probabilities.shape[1:] or not (thresholds > 0).all():
        raise ValueError(f"thresholds {thresholds.tolist()}: pass one above 0 for each class")
    return probabilities >= thresholds if multilabel else (probabilities / thresholds).argmax(axis=1)


def read_predictions(
    path: Path,
    classes: Sequence[str],
    *,
    multilabel: bool = False,
    thresholds: Sequence[float] | None = None,
) -> Predictions:
    """Read a `predictions_<split>.csv` of a run folder: path, patient, target, a probability a class.

    The target is a class, for multi-label the findings joined by "|" or "No Finding". `thresholds` are the
    run's own. Raises FileNotFoundError where there is no file and ValueError where its classes are others.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run notebook 2 or finetune.py first")
    frame = pd.read_csv(path, dtype={"path": str, "patient": str, "target": str}, keep_default_na=False)
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


def confusion_counts(targets: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Return (C, C) counts; row = true class, column = predicted class."""
    targets = class_indices(targets, num_classes, name="targets")
    predictions = class_indices(predictions, num_classes, name="predictions")
    if len(targets) != len(predictions):
        raise ValueError(
            f"{len(targets)} targets but {len(predictions)} predictions: pass one of each per image"
        )
    cells = np.bincount(targets * num_classes + predictions, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def classification_scores(
    targets: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    *,
    thresholds: Sequence[float] | None = None,
) -> pd.DataFrame:
    """Return one row a class and a last row "macro"; columns are `METRICS` and `support`.

    In a class's row everything is that class against the rest, `accuracy` too: (TP + TN) / N. In the macro
    row all are unweighted means over the classes, and `support` is N; but single-label `accuracy` is the
    OVERALL accuracy (share of images whose predicted class is the true one). Equal to scikit-learn's
    precision_recall_fscore_support(zero_division=0) and roc_auc_score(multi_class="ovr"). For `thresholds`
    see `decide`; roc_auc does not depend on them.

    A class without a test image has NaN for precision, recall, f1 and roc_auc (0 would be the value whatever
    the network does, which says nothing about it), and the macro means leave that class out. Specificity and
    roc_auc are NaN where every image is of the class; the macro means leave such a label out, too.
    """
    judged = _judged(targets, probabilities, len(classes), thresholds=thresholds)
    scores = _scores(judged, np.ones((1, len(judged.truth))))[0]
    table = pd.DataFrame(scores, index=[*classes, MACRO], columns=list(METRICS))
    table["support"] = [*judged.truth.sum(axis=0), len(judged.truth)]
    return table


def classification_report_table(
    targets: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    *,
    thresholds: Sequence[float] | None = None,
) -> pd.DataFrame:
    """Return scikit-learn's classification_report(zero_division=0) as a frame: columns precision, recall, f1
    and support, a row a class, then "accuracy" (as printed there: under f1), "macro avg" and "weighted avg".

    Unlike in `classification_scores`, a class without an image counts as 0 in the means: it is the field's
    report, to be set beside published ones. Multi-label has "micro avg" in place of "accuracy", and a last
    row "samples avg".
    """
    targets, probabilities = checked(targets, probabilities, len(classes))
    report = classification_report(
        targets,
        decide(probabilities, thresholds, multilabel=targets.ndim == 2),
        labels=range(len(classes)),
        target_names=list(classes),
        output_dict=True,
        zero_division=0,
    )
    if "accuracy" in report:
        report["accuracy"] = {"f1-score": report["accuracy"], "support": len(targets)}
    table = pd.DataFrame(report).T.rename(columns={"f1-score": "f1"})
    return table[["precision", "recall", "f1", "support"]].astype({"support": int})


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
    thresholds: Sequence[float] | None = None,
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
    judged = _judged(targets, probabilities, len(classes), thresholds=thresholds, patients=patients)
    estimate = _scores(judged, np.ones((1, len(judged.truth))))[0]
    chunks = patient_weights(patients, resamples=resamples, rng=rng)
    resampled = np.concatenate([_scores(judged, weights) for weights in chunks])
    rows = [
        (name, metric, *_percentile_interval(estimate[i, j], resampled[:, i, j], confidence))
        for i, name in enumerate([*classes, MACRO])
        for j, metric in enumerate(METRICS)
    ]
    return pd.DataFrame(rows, columns=["class", "metric", *Interval._fields])


def auc_summary(scores: pd.DataFrame) -> pd.Series:
    """Return min, max, mean and median over the classes of the areas under the ROC curve in a table of
    `bootstrap_scores`, classes without an area left out.
    """
    areas = scores[(scores["metric"] == "roc_auc") & (scores["class"] != MACRO)]["estimate"]
    return areas.agg(["min", "max", "mean", "median"]).rename("roc_auc")


def paired_difference(
    targets: np.ndarray,
    probabilities_a: np.ndarray,
    probabilities_b: np.ndarray,
    patients: Sequence,
    classes: Sequence[str],
    *,
    metric: str = "accuracy",
    of: str = MACRO,
    thresholds_a: Sequence[float] | None = None,
    thresholds_b: Sequence[float] | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    rng: np.random.Generator,
) -> Interval:
    """Return metric(a) - metric(b) of two networks on the same images, both scored on the same resamples of
    patients, each by its own thresholds; `of` is a class, against the rest, or the macro row.

    Much narrower than the two intervals side by side suggest, since images that are hard are hard for both.
    """
    if metric not in METRICS:
        raise ValueError(f"No metric {metric!r}: choose one of {', '.join(METRICS)}")
    networks = ((probabilities_a, thresholds_a), (probabilities_b, thresholds_b))
    a, b = (_judged(targets, p, len(classes), thresholds=t, patients=patients) for p, t in networks)
    row, column = [*classes, MACRO].index(of), METRICS.index(metric)

    def difference(weights: np.ndarray) -> np.ndarray:
        return _scores(a, weights)[:, row, column] - _scores(b, weights)[:, row, column]

    chunks = patient_weights(patients, resamples=resamples, rng=rng)
    resampled = np.concatenate([difference(weights) for weights in chunks])
    return _percentile_interval(difference(np.ones((1, len(a.truth))))[0], resampled, confidence)


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


def choose_thresholds(targets: np.ndarray, probabilities: np.ndarray, rule: str) -> np.ndarray:
    """Return (C,) thresholds for `decide` that are best by a rule of `THRESHOLD_RULES`; choose them on
    validation data.

    "youden": the largest sensitivity + specificity, whatever the shares of the classes. "f1", "accuracy":
    the largest one, at these shares. Of two classes, 1 is the positive one, and the thresholds are
    (1 - t, t); of labels each has its own t, 0.5 where all or none of the images have it.

    t lies midway between two neighbouring scores (or 0, or 1). Of several gaps between scores that are
    equally good it is the widest, and of those the lowest: the farther the nearest scores, the less depends
    on just these images.
    """
    if rule not in THRESHOLD_RULES:
        raise ValueError(f"No rule {rule!r}: choose one of {', '.join(THRESHOLD_RULES)}")
    targets, probabilities = checked(targets, probabilities, np.shape(probabilities)[-1])
    if targets.ndim == 2:
        columns = zip(targets.T, probabilities.T, strict=True)
        return np.array([_threshold(positive == 1, scores, rule) for positive, scores in columns])
    if probabilities.shape[1] > 2:
        raise ValueError(
            "thresholds are chosen for two classes or for labels: for more classes leave the rule out"
        )
    threshold = _threshold(targets == 1, probabilities[:, 1], rule)
    return np.array([1 - threshold, threshold])


def mean_auc(targets: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean over classes of the area under the ROC curve, each class against the rest; classes of
    which all or none of the images are, and those with a NaN probability, are left out; NaN if all are.

    The macro roc_auc of `classification_scores` without its checks, fast enough for every epoch.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    targets = np.asarray(targets)
    truth = targets == 1 if targets.ndim == 2 else targets[:, None] == np.arange(probabilities.shape[1])
    positives = truth.sum(axis=0)
    # Mann-Whitney U of the positives from their ranks, ties at their mean rank.
    ranks = np.where(truth, stats.rankdata(probabilities, axis=0), 0).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        areas = (ranks - positives * (positives + 1) / 2) / (positives * (len(truth) - positives))
        known = np.isfinite(areas)
        return float(areas[known].sum() / known.sum())


def roc_points(targets: np.ndarray, probabilities: np.ndarray, class_index: int) -> RocCurve:
    """Return the ROC curve of one class against the rest; no points and a NaN area where there is nothing to
    tell apart.
    """
    positive, scores = _one_class(targets, probabilities, class_index)
    if positive.all() or not positive.any():
        return RocCurve(np.empty(0), np.empty(0), math.nan)
    false_positive_rate, true_positive_rate, _ = roc_curve(positive, scores)
    return RocCurve(
        false_positive_rate, true_positive_rate, float(auc(false_positive_rate, true_positive_rate))
    )


def precision_recall_points(
    targets: np.ndarray, probabilities: np.ndarray, class_index: int
) -> PrecisionRecallCurve:
    """Return precision and recall of one class against the rest at every threshold, and the average
    precision; no points and NaN where there is nothing to tell apart.
    """
    positive, scores = _one_class(targets, probabilities, class_index)
    if positive.all() or not positive.any():
        return PrecisionRecallCurve(np.empty(0), np.empty(0), np.empty(0), math.nan)
    precision, recall, thresholds = precision_recall_curve(positive, scores)
    # scikit-learn appends the end of the curve, (1, 0), which no threshold has.
    average = float(average_precision_score(positive, scores))
    return PrecisionRecallCurve(thresholds, precision[:-1], recall[:-1], average)


def silhouette(embeddings: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean silhouette (Rousseeuw 1987, J. Comput. Appl. Math. 20:53) of (N, D) embeddings, each
    dimension standardised, by (N,) labels: 1 = classes lie apart, 0 = they overlap.

    NaN with fewer than two classes, or where every image is a class of its own.
    """
    count = len(np.unique(labels))
    if not 2 <= count < len(embeddings):
        return math.nan
    return float(silhouette_score(StandardScaler().fit_transform(embeddings), labels))


def tsne(embeddings: np.ndarray, *, seed: int) -> np.ndarray:
    """Return (N, 2) points, near one another where the (N, D) embeddings are, each dimension standardised
    (t-SNE: van der Maaten & Hinton 2008, JMLR 9:2579); N of 4 or more.

    Only neighbourhood means something in them, not distance, direction or density. Embeddings that are all
    equal are all at 0.
    """
    if len(embeddings) < 4:
        raise ValueError(f"{len(embeddings)} images are too few to arrange: pass 4 or more")
    perplexity = min(30.0, (len(embeddings) - 1) / 3)
    standardised = StandardScaler().fit_transform(embeddings)
    # A collapsed network: the principal components would be NaN, on which scikit-learn's t-SNE crashes.
    # A dimension that varies has a standard deviation of 1 now, hence a range above it.
    if np.ptp(standardised, axis=0).max() < 1:
        return np.zeros((len(embeddings), 2), dtype=np.float32)
    return TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(standardised)


class _Judged(NamedTuple):
    """Of N images and C classes: (N, C) bool, is of the class and is said to be; (N, C) probabilities."""

    truth: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray
    multilabel: bool


def _judged(
    targets: np.ndarray,
    probabilities: np.ndarray,
    num_classes: int,
    *,
    thresholds: Sequence[float] | None = None,
    patients: Sequence | None = None,
) -> _Judged:
    targets, probabilities = checked(targets, probabilities, num_classes, patients)
    multilabel = targets.ndim == 2
    predicted = decide(probabilities, thresholds, multilabel=multilabel)
    if multilabel:
        return _Judged(targets == 1, predicted, probabilities, multilabel)
    classes = np.arange(num_classes)
    return _Judged(targets[:, None] == classes, predicted[:, None] == classes, probabilities, multilabel)


def _scores(judged: _Judged, weights: np.ndarray) -> np.ndarray:
    """Return (R, C + 1, M) scores, classes then macro by METRICS, of (R, N) image weights; NaN where
    undefined.
    """
    truth, predicted, probabilities, multilabel = judged
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
    areas = [_weighted_auc(truth[:, c], probabilities[:, c], weights) for c in range(truth.shape[1])]
    by_class = np.stack([accuracy, precision, recall, specificity, f1, np.stack(areas, axis=1)], axis=2)
    # A label that every image has cannot be told from anything; a class that every image is of stays.
    there = truth.any(axis=0) & ~(truth.all(axis=0) & multilabel)
    lost = (positive == 0) | ((negative == 0) & multilabel)
    with np.errstate(invalid="ignore"):
        macro = by_class[:, there].sum(axis=1) / there.sum()
    overall = true_positive.sum(axis=1) / total[:, 0]
    macro_accuracy = macro[:, METRICS.index("accuracy")].copy() if multilabel else overall
    # Undefined as a whole where the resample lost a class, also for the scores that such a class still has.
    macro[lost[:, there].any(axis=1)] = np.nan
    macro[:, METRICS.index("accuracy")] = macro_accuracy
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


def _threshold(positive: np.ndarray, scores: np.ndarray, rule: str) -> float:
    """Return the best threshold for (N,) bool truth and (N,) scores in 0..1; see `choose_thresholds`."""
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return 0.5
    levels, level = np.unique(scores, return_inverse=True)
    # hits[k] and alarms[k]: what is above the gap k, which lies below levels[k]; the last is above them all.
    hits, alarms = (
        np.r_[np.cumsum(np.bincount(level[chosen], minlength=len(levels))[::-1])[::-1], 0]
        for chosen in (positive, ~positive)
    )
    figures = THRESHOLD_RULES[rule](hits, alarms, positives, negatives)
    edges = np.r_[0.0, levels, 1.0]
    widths = np.where(figures == figures.max(), np.diff(edges), -1)
    best = int(widths.argmax())
    return float(np.clip((edges[best] + edges[best + 1]) / 2, NEAREST, 1 - NEAREST))


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


def _one_class(
    targets: np.ndarray, probabilities: np.ndarray, class_index: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (N,) bool "is of the class" and its (N,) probabilities."""
    judged = _judged(targets, probabilities, np.shape(probabilities)[-1])
    if not 0 <= class_index < judged.truth.shape[1]:
        raise ValueError(f"No class {class_index}: choose 0 to {judged.truth.shape[1] - 1}")
    return judged.truth[:, class_index], judged.probabilities[:, class_index]


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
    if multilabel and not ((probabilities >= 0) & (probabilities <= 1)).all():
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
