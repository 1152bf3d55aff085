"""From predictions to numbers, with intervals.

Arrays in, tables and `Interval`s out; nothing here knows of torch or of a figure. Throughout: N images, C
classes, `patients` (N,) ids of any type, and one of two tasks, told apart by the shape of `targets`:

- single-label: `targets` (N,) class indices 0..C-1, `probabilities` (N, C) whose rows sum to 1;
- multi-label: `targets` (N, C) of 0/1, `probabilities` (N, C) in 0..1, each label on its own.

Intervals are percentiles of a bootstrap over patients (see `patient_weights`). It knows nothing of what it never saw:
of a proportion that is 0 or 1, all resamples say the same. There the interval is exact (see `exact_interval`). Of a
single patient there is none.

Scores are computed one class against the rest from four weighted counts and one weighted rank statistic, with
a weight per image and resample: the estimate is the case "every weight 1", a bootstrap resample is the case
"how often was this image's patient drawn".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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

from predictions import checked, class_indices, decide

METRICS = ("accuracy", "precision", "recall", "specificity", "f1", "roc_auc")
MACRO = "macro"
UNDEFINED_SHARE = 0.05  # with more undefined resamples than this, the interval is withheld
CHUNK = 2**20  # weights held at once (8 MiB as float64), whatever the number of resamples


class Interval(NamedTuple):
    """An estimate with the ends of its interval; NaN ends where no interval can be given."""

    estimate: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """Return `0.912 (0.880–0.941)`, `–` for NaN; the format (default `.3f`) applies to each number."""
        estimate, low, high = (format(value, spec or ".3f") for value in self)
        if math.isnan(self.estimate):
            return "–"
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
    thresholds: Sequence[float | None] | None = None,
) -> pd.DataFrame:
    """Return one row a class and a last row "macro"; columns are `METRICS` and `support`.

    In a class's row everything is that class against the rest, `accuracy` too: (TP + TN) / N. In the macro
    row all are unweighted means over the classes, and `support` is N; but single-label `accuracy` is the
    OVERALL accuracy (share of images whose predicted class is the true one). Equal to scikit-learn's
    precision_recall_fscore_support(zero_division=0) and roc_auc_score(multi_class="ovr"). For `thresholds`
    see `decide`; roc_auc does not depend on them.

    A class without a test image has NaN for precision, recall, f1 and roc_auc (0 would be the value whatever
    the network does, which says nothing about it), and the macro means leave that class out. Specificity and
    roc_auc are NaN where every image is of the class; the macro means leave such a label out, too. So they do with
    all scores of a finding without a probability, and with all but roc_auc of one that is not decided on, having no
    threshold beside others that have one (see `decide`): both are NaN.
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
    thresholds: Sequence[float | None] | None = None,
) -> pd.DataFrame:
    """Return scikit-learn's classification_report(zero_division=0) as a frame: columns precision, recall, f1
    and support, a row a class, then "accuracy" (as printed there: under f1), "macro avg" and "weighted avg".

    Unlike in `classification_scores`, a class without an image counts as 0 in the means: it is the field's
    report, to be set beside published ones. Multi-label has "micro avg" in place of "accuracy", and a last
    row "samples avg"; findings that are not decided on have no row.
    """
    decided = np.flatnonzero(_judged(targets, probabilities, len(classes), thresholds=thresholds).decided)
    report = classification_report(
        targets,
        decide(probabilities, thresholds, multilabel=np.ndim(targets) == 2),
        labels=decided,
        target_names=[classes[i] for i in decided],
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
    one patient do not err independently. One patient alone says nothing of others: no rows.
    """
    _, patient = np.unique(np.asarray(patients), return_inverse=True)
    count = patient.max() + 1
    if count < 2:
        yield np.empty((0, len(patient)))
        return
    rows = max(1, CHUNK // len(patient))
    for start in range(0, resamples, rows):
        r = min(rows, resamples - start)
        drawn = rng.integers(count, size=(r, count)) + count * np.arange(r)[:, None]
        times = np.bincount(drawn.ravel(), minlength=r * count).reshape(r, count)
        yield times[:, patient].astype(np.float64)


def exact_interval(estimate: float, patients: int, *, confidence: float = 0.95) -> Interval:
    """Return a proportion of 0 or 1 with its interval by Clopper & Pearson (1934, Biometrika 26:404), which is
    (0, 1 - a) or (a, 1) with a = (alpha / 2) ** (1 / patients); without one below two patients.

    Patients, not images, are the trials: it holds however alike the images of a patient are.
    """
    if patients < 2:
        return Interval(estimate, math.nan, math.nan)
    least = ((1 - confidence) / 2) ** (1 / patients)
    return Interval(estimate, least, 1.0) if estimate == 1 else Interval(estimate, 0.0, 1 - least)


def bootstrap_scores(
    targets: np.ndarray,
    probabilities: np.ndarray,
    patients: Sequence,
    classes: Sequence[str],
    *,
    thresholds: Sequence[float | None] | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Return the scores of `classification_scores` with intervals over patients.

    Long table: class (each class, then "macro"), metric, estimate, low, high. See `patient_weights` for the
    resampling, and `_edge_intervals` for scores of 0 and 1.

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
    at_the_edge = _edge_intervals(judged, estimate, patients, confidence)
    rows = [
        (
            name,
            metric,
            *(
                at_the_edge.get((i, j))
                or _percentile_interval(estimate[i, j], resampled[:, i, j], confidence)
            ),
        )
        for i, name in enumerate([*classes, MACRO])
        for j, metric in enumerate(METRICS)
    ]
    return pd.DataFrame(rows, columns=["class", "metric", *Interval._fields])


def _edge_intervals(
    judged: _Judged, estimate: np.ndarray, patients: Sequence, confidence: float
) -> dict[tuple[int, int], Interval]:
    """Return the intervals of those of the (C + 1, M) scores that are 0 or 1, by row and column.

    Proportions have the exact interval over the patients that they are about: accuracy all of them, recall those
    with an image of the class, specificity those with another one, precision those with an image that was called
    the class. F1 = 2 J / (1 + J) has that of J, the share that was both among the images that were of the class or
    called it. roc_auc has that of the smaller side's patients: of as many pairs of a positive and a negative that
    have no patient in common, each is ranked rightly with a probability of roc_auc, and all of them (or none) were.
    That leaves pairs out, so it is rather wide. A macro mean has the means of its classes' ends, which is wide, too.
    """
    _, patient = np.unique(np.asarray(patients), return_inverse=True)

    def counts(images: np.ndarray) -> list[int]:
        return [len(np.unique(patient[of_class])) for of_class in images.T]

    truth, called = judged.truth, judged.predicted
    number = {
        "accuracy": counts(np.ones_like(truth)),
        "precision": counts(called),
        "recall": counts(truth),
        "specificity": counts(~truth),
        "f1": counts(truth | called),
        "roc_auc": np.minimum(counts(truth), counts(~truth)),
    }
    counted, found = _counted(judged), {}
    for j, metric in enumerate(METRICS):
        for i in np.flatnonzero(np.isin(estimate[:-1, j], (0, 1))):
            found[i, j] = exact_interval(estimate[i, j], number[metric][i], confidence=confidence)
            if metric == "f1":
                found[i, j] = Interval(*(2 * end / (1 + end) for end in found[i, j]))
        macro = (len(truth.T), j)
        if metric == "accuracy" and not judged.multilabel and estimate[macro] in (0, 1):
            found[macro] = exact_interval(estimate[macro], patient.max() + 1, confidence=confidence)
        elif estimate[macro] in (0, 1):  # so are all the classes that it is the mean of
            ends = [found[i, j] for i in np.flatnonzero(counted[:, j])]
            found[macro] = Interval(*np.mean(ends, axis=0))
    return found


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
    thresholds_a: Sequence[float | None] | None = None,
    thresholds_b: Sequence[float | None] | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    rng: np.random.Generator,
) -> Interval:
    """Return metric(a) - metric(b) of two networks on the same images, both scored on the same resamples of
    patients, each by its own thresholds; `of` is a class, against the rest, or the macro row. The macro row is over
    the classes that count for this metric in both: a finding that one of the two does not report, or has no
    threshold for, counts in neither.

    Much narrower than the two intervals side by side suggest, since images that are hard are hard for both. Where
    all resamples agree, as those of two networks that decide alike, there is no interval.
    """
    if metric not in METRICS:
        raise ValueError(f"No metric {metric!r}: choose one of {', '.join(METRICS)}")
    networks = ((probabilities_a, thresholds_a), (probabilities_b, thresholds_b))
    a, b = (_judged(targets, p, len(classes), thresholds=t, patients=patients) for p, t in networks)
    row, column = [*classes, MACRO].index(of), METRICS.index(metric)
    counted = _counted(a) & _counted(b)

    def difference(weights: np.ndarray) -> np.ndarray:
        of_a, of_b = (_scores(judged, weights, counted)[:, row, column] for judged in (a, b))
        return of_a - of_b

    chunks = patient_weights(patients, resamples=resamples, rng=rng)
    resampled = np.concatenate([difference(weights) for weights in chunks])
    interval = _percentile_interval(difference(np.ones((1, len(a.truth))))[0], resampled, confidence)
    return interval if interval.low < interval.high else Interval(interval.estimate, math.nan, math.nan)


def bootstrap_mean(
    values: np.ndarray,
    patients: Sequence,
    *,
    proportion: bool = False,
    resamples: int = 1000,
    confidence: float = 0.95,
    rng: np.random.Generator,
) -> Interval:
    """Return the mean over images of `values` (N,), NaNs left out, with its percentile interval over patients.

    `proportion`: the values are 0 or 1, and a mean of 0 or 1 has the exact interval over the patients.
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
    if proportion and values.mean() in (0, 1):
        return exact_interval(values.mean(), len(np.unique(patients)), confidence=confidence)
    chunks = patient_weights(patients, resamples=resamples, rng=rng)
    resampled = np.concatenate([weights @ values / weights.sum(axis=1) for weights in chunks])
    return _percentile_interval(values.mean(), resampled, confidence)


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return (N, C) probabilities exp(z/T) / sum exp(z/T) of (N, C) logits, without overflow."""
    return special.softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=-1)


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
    tell apart, or no probability.
    """
    positive, scores = _one_class(targets, probabilities, class_index)
    if positive.all() or not positive.any() or np.isnan(scores).any():
        return RocCurve(np.empty(0), np.empty(0), math.nan)
    false_positive_rate, true_positive_rate, _ = roc_curve(positive, scores)
    return RocCurve(
        false_positive_rate, true_positive_rate, float(auc(false_positive_rate, true_positive_rate))
    )


def precision_recall_points(
    targets: np.ndarray, probabilities: np.ndarray, class_index: int
) -> PrecisionRecallCurve:
    """Return precision and recall of one class against the rest at every threshold, and the average
    precision; no points and NaN where there is nothing to tell apart, or no probability.
    """
    positive, scores = _one_class(targets, probabilities, class_index)
    if positive.all() or not positive.any() or np.isnan(scores).any():
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
    """Of N images and C classes: (N, C) bool, is of the class and is said to be; (N, C) probabilities; (C,) bool, is
    decided on at all.
    """

    truth: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray
    decided: np.ndarray
    multilabel: bool


def _judged(
    targets: np.ndarray,
    probabilities: np.ndarray,
    num_classes: int,
    *,
    thresholds: Sequence[float | None] | None = None,
    patients: Sequence | None = None,
) -> _Judged:
    targets, probabilities = checked(targets, probabilities, num_classes, patients)
    multilabel = targets.ndim == 2
    predicted = decide(probabilities, thresholds, multilabel=multilabel)
    if multilabel:
        limits = np.full(num_classes, 0.5) if thresholds is None else np.asarray(thresholds, dtype=np.float64)
        decided = ~(np.isnan(limits) | np.isnan(probabilities).any(axis=0))
        return _Judged(targets == 1, predicted, probabilities, decided, multilabel)
    classes = np.arange(num_classes)
    truth, predicted = targets[:, None] == classes, predicted[:, None] == classes
    return _Judged(truth, predicted, probabilities, np.ones(num_classes, bool), multilabel)


def _counted(judged: _Judged) -> np.ndarray:
    """Return (C, M) bool: which classes a macro mean of METRICS is over."""
    truth, _, probabilities, decided, multilabel = judged
    # A label that every image has cannot be told from anything; a class that every image is of stays.
    there = truth.any(axis=0) & ~(truth.all(axis=0) & multilabel)
    ranked = ~np.isnan(probabilities).any(axis=0)
    return there[:, None] & np.stack([ranked if name == "roc_auc" else decided for name in METRICS], axis=1)


def _scores(judged: _Judged, weights: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Return (R, C + 1, M) scores, classes then macro by METRICS, of (R, N) image weights; NaN where
    undefined. `counted`: which classes the macro means are over, by default as `_counted` says.
    """
    truth, predicted, probabilities, decided, multilabel = judged
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
    decisions = np.stack([accuracy, precision, recall, specificity, f1], axis=2)
    decisions[:, ~decided] = np.nan
    areas = [_weighted_auc(truth[:, c], probabilities[:, c], weights) for c in range(truth.shape[1])]
    by_class = np.concatenate([decisions, np.stack(areas, axis=1)[:, :, None]], axis=2)
    counted = _counted(judged) if counted is None else counted
    lost = (positive == 0) | ((negative == 0) & multilabel)
    with np.errstate(invalid="ignore"):
        macro = np.where(counted, by_class, 0).sum(axis=1) / counted.sum(axis=0)
    overall = true_positive.sum(axis=1) / total[:, 0]
    macro_accuracy = macro[:, METRICS.index("accuracy")].copy() if multilabel else overall
    # Undefined as a whole where the resample lost a class, also for the scores that such a class still has.
    macro[(lost[:, :, None] & counted).any(axis=1)] = np.nan
    macro[:, METRICS.index("accuracy")] = macro_accuracy
    return np.concatenate([by_class, macro[:, None]], axis=1)


def _weighted_auc(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return (R,) areas under the ROC curve: P(score of a positive > of a negative) + P(equal) / 2
    (Mann-Whitney U), weighted; NaN where there are no scores.
    """
    if np.isnan(scores).any():
        return np.full(len(weights), np.nan)
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


def _one_class(
    targets: np.ndarray, probabilities: np.ndarray, class_index: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (N,) bool "is of the class" and its (N,) probabilities."""
    judged = _judged(targets, probabilities, np.shape(probabilities)[-1])
    if not 0 <= class_index < judged.truth.shape[1]:
        raise ValueError(f"No class {class_index}: choose 0 to {judged.truth.shape[1] - 1}")
    return judged.truth[:, class_index], judged.probabilities[:, class_index]
