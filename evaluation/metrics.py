"""Scores of predictions, the curves behind them, and pictures of embeddings; `intervals` adds the intervals.

N images, C classes, and one of two tasks, which the shape of `targets` tells apart:

- one class an image: `targets` (N,) class indices 0 to C-1, `probabilities` (N, C) whose rows sum to 1;
- several labels: `targets` (N, C) of 0/1, `probabilities` (N, C) in 0 to 1, each label on its own.

Every score is computed one class against the rest, with a weight for each image. With all weights 1 it is the
estimate; with "how often was this image's patient drawn" as weights it is a bootstrap resample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.manifold import TSNE
from sklearn.metrics import (
    auc,
    average_precision_score,
    classification_report,
    confusion_matrix,
    precision_recall_curve,
    roc_curve,
    silhouette_score,
)
from sklearn.preprocessing import StandardScaler

from evaluation.predictions import checked
from inference.decisions import Thresholds, decide

METRICS = ("accuracy", "precision", "recall", "specificity", "f1", "roc_auc")
MACRO = "macro"


class OneVsRest(NamedTuple):
    """Each of C classes against the rest, for N images.

    Attributes:
        truth: (N, C) bool, whether the image is of the class.
        predicted: (N, C) bool, whether the class is predicted.
        probabilities: (N, C), NaN in the whole column of a class that is not reported.
        decided: (C,) bool, whether the class is decided on at all, see `decide`.
        multilabel: whether an image may have several labels.
    """

    truth: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray
    decided: np.ndarray
    multilabel: bool


class RocCurve(NamedTuple):
    """One class against the rest: (K,) false and true positive rates from 0 to 1, and the area under them."""

    false_positive_rate: np.ndarray = np.empty(0)
    true_positive_rate: np.ndarray = np.empty(0)
    auc: float = math.nan


class PrecisionRecallCurve(NamedTuple):
    """One class against the rest: (K,) ascending thresholds, and what "probability >= threshold" gives at each."""

    thresholds: np.ndarray = np.empty(0)
    precision: np.ndarray = np.empty(0)
    recall: np.ndarray = np.empty(0)
    average_precision: float = math.nan


def confusion_counts(targets: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Return (C, C) counts of (N,) class indices; row = true class, column = predicted class."""
    return confusion_matrix(targets, predictions, labels=range(num_classes))


def classification_scores(
    targets: np.ndarray, probabilities: np.ndarray, classes: Sequence[str], *, thresholds: Thresholds = None
) -> pd.DataFrame:
    """Return the scores of every class and their macro means.

    Equal to scikit-learn's precision_recall_fscore_support(zero_division=0) and roc_auc_score(multi_class="ovr").

    Args:
        targets: (N,) or (N, C), see the module.
        probabilities: (N, C), see the module.
        classes: names of the classes.
        thresholds: (C,) decision thresholds, see `decide`. They do not change roc_auc.

    Returns:
        A frame with the columns `METRICS` and `support`, one row for each class and a last row "macro".

        - A class's row is this class against the rest; its accuracy, too, is (TP + TN) / N.
        - The macro row holds unweighted means over the classes, and N as support. With one class an image, its
          accuracy is the overall accuracy: the share of images whose predicted class is the true one.

        NaN stands where a score is undefined, and the macro means leave that class out:

        - a class without images: precision, recall, f1, roc_auc (0 would say nothing about the network);
        - a class of all images: specificity, roc_auc; with several labels the macro means leave out all its scores;
        - a label without probability: all scores;
        - a label without threshold beside others that have one: all scores but roc_auc.
    """
    one_vs_rest = each_class(targets, probabilities, len(classes), thresholds)
    truth = one_vs_rest.truth
    scores = weighted_scores(one_vs_rest, np.ones((1, len(truth))))[0]
    table = pd.DataFrame(scores, index=[*classes, MACRO], columns=list(METRICS))
    return table.assign(support=[*truth.sum(axis=0), len(truth)])


def classification_report_table(
    targets: np.ndarray, probabilities: np.ndarray, classes: Sequence[str], *, thresholds: Thresholds = None
) -> pd.DataFrame:
    """Return scikit-learn's classification_report(zero_division=0) as a frame, to compare with published reports.

    Unlike in `classification_scores`, a class without images counts as 0 in the means. Arguments as there.

    Returns:
        A frame with the columns precision, recall, f1 and support; one row for each class, then "accuracy" (in the
        column f1, as scikit-learn prints it), "macro avg" and "weighted avg". With several labels, "micro avg"
        takes the place of "accuracy", "samples avg" is the last row, and undecided labels have no row.
    """
    decided = np.flatnonzero(each_class(targets, probabilities, len(classes), thresholds).decided)
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


def auc_summary(scores: pd.DataFrame) -> pd.Series:
    """Return min, max, mean and median over the classes of the areas in a table of `intervals.bootstrap_scores`.

    Classes without an area are left out.
    """
    areas = scores[(scores["metric"] == "roc_auc") & (scores["class"] != MACRO)]["estimate"]
    return areas.agg(["min", "max", "mean", "median"]).rename("roc_auc")


def roc_points(targets: np.ndarray, probabilities: np.ndarray, class_index: int) -> RocCurve:
    """Return the ROC curve of one class against the rest.

    It has no points and a NaN area where all or none of the images are of the class, or it has no probability.
    """
    curve_data = _curve_data(targets, probabilities, class_index)
    if curve_data is None:
        return RocCurve()
    false_positive_rate, true_positive_rate, _ = roc_curve(*curve_data)
    area = float(auc(false_positive_rate, true_positive_rate))
    return RocCurve(false_positive_rate, true_positive_rate, area)


def precision_recall_points(targets: np.ndarray, probabilities: np.ndarray, class_index: int) -> PrecisionRecallCurve:
    """Return precision and recall of one class against the rest at every threshold, and the average precision.

    There are no points and a NaN average where all or none of the images are of the class, or it has no probability.
    """
    curve_data = _curve_data(targets, probabilities, class_index)
    if curve_data is None:
        return PrecisionRecallCurve()
    precision, recall, thresholds = precision_recall_curve(*curve_data)
    # scikit-learn appends the end of the curve, (1, 0), which belongs to no threshold.
    average = float(average_precision_score(*curve_data))
    return PrecisionRecallCurve(thresholds, precision[:-1], recall[:-1], average)


def _curve_data(
    targets: np.ndarray, probabilities: np.ndarray, class_index: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return (N,) bool "is of the class" and its (N,) probabilities; None where there is no curve."""
    one_vs_rest = each_class(targets, probabilities, np.shape(probabilities)[-1])
    positive, scores = one_vs_rest.truth[:, class_index], one_vs_rest.probabilities[:, class_index]
    return None if positive.all() or not positive.any() or np.isnan(scores).any() else (positive, scores)


def each_class(
    targets: np.ndarray, probabilities: np.ndarray, num_classes: int, thresholds: Thresholds = None
) -> OneVsRest:
    """Return each class against the rest, decided by (C,) thresholds; see the module and `decide`.

    Raises:
        ValueError: targets, probabilities and thresholds do not fit each other, or are none.
    """
    targets, probabilities = checked(targets, probabilities, num_classes)
    multilabel = targets.ndim == 2
    predicted = decide(probabilities, thresholds, multilabel=multilabel)
    if multilabel:
        limits = np.full(num_classes, 0.5) if thresholds is None else np.asarray(thresholds, dtype=np.float64)
        decided = ~(np.isnan(limits) | np.isnan(probabilities).any(axis=0))
        return OneVsRest(targets == 1, predicted, probabilities, decided, multilabel)
    truth, predicted = (indices[:, None] == np.arange(num_classes) for indices in (targets, predicted))
    return OneVsRest(truth, predicted, probabilities, np.ones(num_classes, bool), multilabel)


def macro_classes(one_vs_rest: OneVsRest) -> np.ndarray:
    """Return (C, M) bool: over which classes the macro mean of each of `METRICS` is."""
    truth, _, probabilities, decided, multilabel = one_vs_rest
    # A label that every image has cannot be told from anything. A class that every image is of stays.
    present = truth.any(axis=0) & ~(truth.all(axis=0) & multilabel)
    reported = ~np.isnan(probabilities).any(axis=0)
    usable = np.stack([reported if name == "roc_auc" else decided for name in METRICS], axis=1)
    return present[:, None] & usable


def weighted_scores(one_vs_rest: OneVsRest, weights: np.ndarray, in_macro: np.ndarray | None = None) -> np.ndarray:
    """Return the scores of R sets of image weights.

    Args:
        one_vs_rest: each class against the rest.
        weights: (R, N) weights of the images.
        in_macro: (C, M) bool, the classes in the macro means; by default `macro_classes`.

    Returns:
        (R, C + 1, M) scores, M by `METRICS`: the classes, then the macro row. NaN where undefined. A macro mean is
        undefined where the weights lost one of its classes: a mean over fewer classes would be another score.
    """
    truth, predicted, probabilities, _, multilabel = one_vs_rest
    in_macro = macro_classes(one_vs_rest) if in_macro is None else in_macro
    decisions = _decision_scores(one_vs_rest, weights)
    areas = [weighted_auc(truth[:, c], probabilities[:, c], weights) for c in range(truth.shape[1])]
    by_class = np.concatenate([decisions, np.stack(areas, axis=1)[:, :, None]], axis=2)
    with np.errstate(invalid="ignore"):
        macro = np.where(in_macro, by_class, 0).sum(axis=1) / in_macro.sum(axis=0)
    total, positive = weights.sum(axis=1, keepdims=True), weights @ truth.astype(np.float64)
    if multilabel:
        accuracy = macro[:, METRICS.index("accuracy")].copy()
    else:
        accuracy = (weights @ (truth & predicted).astype(np.float64)).sum(axis=1) / total[:, 0]
    lost = (positive == 0) | ((positive == total) & multilabel)
    macro[(lost[:, :, None] & in_macro).any(axis=1)] = np.nan
    macro[:, METRICS.index("accuracy")] = accuracy
    return np.concatenate([by_class, macro[:, None]], axis=1)


def _decision_scores(one_vs_rest: OneVsRest, weights: np.ndarray) -> np.ndarray:
    """Return (R, C, M - 1) scores of the decisions by (R, N) image weights, in the order of `METRICS`."""
    truth, predicted = one_vs_rest.truth, one_vs_rest.predicted
    true_positive = weights @ (truth & predicted).astype(np.float64)
    false_positive = weights @ (~truth & predicted).astype(np.float64)
    positive = weights @ truth.astype(np.float64)
    total = weights.sum(axis=1, keepdims=True)
    negative, called = total - positive, true_positive + false_positive
    with np.errstate(divide="ignore", invalid="ignore"):
        recall = true_positive / positive
        specificity = 1 - false_positive / negative
        # 0 for a class that has images but is never predicted; undefined for a class without images.
        precision = np.where(positive > 0, true_positive / np.where(called > 0, called, 1), np.nan)
        f1 = np.where(positive > 0, 2 * true_positive / (positive + called), np.nan)
    accuracy = (true_positive + negative - false_positive) / total
    scores = np.stack([accuracy, precision, recall, specificity, f1], axis=2)
    scores[:, ~one_vs_rest.decided] = np.nan
    return scores


def weighted_auc(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return (R,) areas under the ROC curve for (R, N) image weights; NaN where undefined.

    The area is P(score of a positive > score of a negative) + P(equal) / 2, the Mann-Whitney U statistic.

    Args:
        positive: (N,) bool.
        scores: (N,).
        weights: (R, N) whole numbers.
    """
    if np.isnan(scores).any():
        return np.full(len(weights), np.nan)
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    # The first image of each run of equal scores: ties count half, whatever their order after the sort.
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    weights = weights[:, order]
    # All sums are whole numbers, which float64 holds exactly, so the differences lose nothing.
    everyone = np.add.reduceat(weights, starts, axis=1)
    positives = np.add.reduceat(weights * positive[order], starts, axis=1)
    negatives = everyone - positives
    below = np.cumsum(negatives, axis=1) - negatives / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return (positives * below).sum(axis=1) / (positives.sum(axis=1) * negatives.sum(axis=1))


def silhouette(embeddings: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean silhouette of (N, D) embeddings by (N,) labels: 1 = classes lie apart, 0 = they overlap.

    Rousseeuw 1987, J. Comput. Appl. Math. 20:53; each dimension is standardised. NaN with fewer than two classes, or
    where every image is a class of its own.
    """
    count = len(np.unique(labels))
    if not 2 <= count < len(embeddings):
        return math.nan
    return float(silhouette_score(StandardScaler().fit_transform(embeddings), labels))


def tsne(embeddings: np.ndarray, *, seed: int) -> np.ndarray:
    """Return (N, 2) points that are near one another where the (N, D) embeddings are.

    t-SNE: van der Maaten & Hinton 2008, JMLR 9:2579; each dimension is standardised. Only neighbourhood has a meaning
    in the points: distance, direction and density have none. Embeddings that are all equal give points at 0.

    Raises:
        ValueError: fewer than 4 images.
    """
    if len(embeddings) < 4:
        raise ValueError(f"{len(embeddings)} images are too few to arrange: pass 4 or more")
    perplexity = min(30.0, (len(embeddings) - 1) / 3)
    standardised = StandardScaler().fit_transform(embeddings)
    # The embeddings of a collapsed network are all equal: their principal components would be NaN, and scikit-learn's
    # t-SNE would crash. A dimension that varies has a standard deviation of 1 here, so its range is above 1.
    if np.ptp(standardised, axis=0).max() < 1:
        return np.zeros((len(embeddings), 2), dtype=np.float32)
    return TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(standardised)
