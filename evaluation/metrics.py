"""Scores of predictions, ROC and precision-recall curves, and t-SNE of embeddings; `intervals` adds the intervals.

N images, C classes. `predictions` describes the shapes of targets and probabilities for its two tasks.

Every score compares one class with all others and weights the images. For the estimate, all weights are 1. For a
bootstrap resample, the weight of an image is the number of times that its patient was drawn.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn import metrics as sk
from sklearn.manifold import TSNE
from sklearn.preprocessing import StandardScaler

from evaluation.predictions import Predictions, checked

METRICS = ("accuracy", "precision", "recall", "specificity", "f1", "roc_auc")
MACRO = "macro"


class OneVsRest(NamedTuple):
    """Each of C classes against the rest, for N images.

    Attributes:
        truth: (N, C) bool, whether the image is of the class.
        predicted: (N, C) bool, whether the class is predicted.
        probabilities: (N, C), NaN in the whole column of a class that is not reported.
        decided: (C,) bool, whether the network decides for or against the class, see `decide`.
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
    """One class against the rest: (K,) ascending thresholds, and precision and recall of "probability >= threshold"."""

    thresholds: np.ndarray = np.empty(0)
    precision: np.ndarray = np.empty(0)
    recall: np.ndarray = np.empty(0)


def confusion_counts(targets: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Return (C, C) counts of (N,) class indices; row = true class, column = predicted class."""
    return sk.confusion_matrix(targets, predictions, labels=range(num_classes))


def classification_scores(predictions: Predictions, classes: Sequence[str]) -> pd.DataFrame:
    """Return the scores of every class and their macro means.

    Equal to scikit-learn's precision_recall_fscore_support(zero_division=0) and roc_auc_score(multi_class="ovr").

    Args:
        predictions: for N images. Their thresholds do not change roc_auc.
        classes: names of the C classes.

    Returns:
        A frame with the columns `METRICS` and `support`, one row for each class and a last row "macro".

        - The row of a class compares this class with all others. Its accuracy, too, is (TP + TN) / N.
        - The macro row holds unweighted means over the classes, and N as support. With one class an image, its
          accuracy is the overall accuracy: the share of images whose predicted class is the true one.

        Undefined scores are NaN, and the macro means leave that class out:

        - a class without images: precision, recall, f1, roc_auc (0 would say nothing about the network);
        - a class that all images have: specificity, roc_auc. With several labels, the macro means leave out all its
          scores;
        - a label without probability: all scores;
        - a label without threshold beside others that have one: all scores but roc_auc.
    """
    one_vs_rest = each_class(predictions)
    truth = one_vs_rest.truth
    scores = weighted_scores(one_vs_rest, np.ones((1, len(truth))))[0]
    table = pd.DataFrame(scores, index=[*classes, MACRO], columns=list(METRICS))
    return table.assign(support=[*truth.sum(axis=0), len(truth)])


def classification_report_table(predictions: Predictions, classes: Sequence[str]) -> pd.DataFrame:
    """Return scikit-learn's classification_report(zero_division=0) as a frame, to compare with published reports.

    Unlike in `classification_scores`, a class without images counts as 0 in the means.

    Args:
        predictions: for N images of one class each.
        classes: names of the C classes.

    Returns:
        A frame with the columns precision, recall, f1 and support; one row for each class, then "accuracy" (in the
        column f1, as scikit-learn prints it), "macro avg" and "weighted avg".
    """
    answers = predictions.targets, predictions.predicted
    names = {"labels": range(len(classes)), "target_names": classes}
    report = sk.classification_report(*answers, **names, output_dict=True, zero_division=0)
    report["accuracy"] = {"f1-score": report["accuracy"], "support": len(predictions.targets)}
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

    If the class has all images, no image or no probability, the curve has no points and its area is NaN.
    """
    positive, scores = _class_scores(targets, probabilities, class_index)
    if not scores.size:
        return RocCurve()
    false_positive_rate, true_positive_rate, _ = sk.roc_curve(positive, scores)
    return RocCurve(false_positive_rate, true_positive_rate, float(sk.auc(false_positive_rate, true_positive_rate)))


def precision_recall_points(targets: np.ndarray, probabilities: np.ndarray, class_index: int) -> PrecisionRecallCurve:
    """Return precision and recall of one class against the rest at every threshold.

    If the class has all images, no image or no probability, the curve has no points.
    """
    positive, scores = _class_scores(targets, probabilities, class_index)
    if not scores.size:
        return PrecisionRecallCurve()
    precision, recall, thresholds = sk.precision_recall_curve(positive, scores)
    # scikit-learn appends the end of the curve, (1, 0), which belongs to no threshold.
    return PrecisionRecallCurve(thresholds, precision[:-1], recall[:-1])


def _class_scores(targets: np.ndarray, probabilities: np.ndarray, class_index: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (N,) bool "the image is of the class" and its (N,) probabilities; both empty if there is no curve."""
    targets, probabilities = checked(targets, probabilities)
    positive = targets[:, class_index] == 1 if targets.ndim == 2 else targets == class_index
    scores = probabilities[:, class_index]
    undefined = positive.all() or not positive.any() or np.isnan(scores).any()
    return (positive[:0], scores[:0]) if undefined else (positive, scores)


def each_class(predictions: Predictions) -> OneVsRest:
    """Return each class against the rest.

    Raises:
        ValueError: targets, probabilities and thresholds do not fit each other, or are not valid.
    """
    targets, probabilities = checked(predictions.targets, predictions.probabilities)
    predicted, thresholds = predictions.predicted, predictions.thresholds
    if predictions.multilabel:
        decided = predictions.reported & (True if thresholds is None else ~np.isnan(thresholds))
        return OneVsRest(targets == 1, predicted, probabilities, decided, True)
    classes = np.arange(probabilities.shape[1])
    truth, predicted = (indices[:, None] == classes for indices in (targets, predicted))
    return OneVsRest(truth, predicted, probabilities, np.full(len(classes), True), False)


def macro_classes(one_vs_rest: OneVsRest) -> np.ndarray:
    """Return (C, M) bool: whether the macro mean of each of `METRICS` includes the class."""
    truth, _, probabilities, decided, multilabel = one_vs_rest
    # With several labels, a label that every image has is left out. With one class an image, such a class stays.
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
        (R, C + 1, M) scores, M by `METRICS`: the classes, then the macro row. NaN where undefined. A macro mean,
        except accuracy, is undefined if all images of one of its classes have weight 0 (with several labels: or all
        other images). A mean over fewer classes would be another score.
    """
    truth, predicted, probabilities, decided, multilabel = one_vs_rest
    in_macro = macro_classes(one_vs_rest) if in_macro is None else in_macro
    total = weights.sum(axis=1, keepdims=True)
    counted = truth, predicted, truth & predicted
    positive, called, true_positive = (weights @ images.astype(np.float64) for images in counted)
    negative, false_positive = total - positive, called - true_positive
    accuracy = (true_positive + negative - false_positive) / total
    with np.errstate(divide="ignore", invalid="ignore"):
        recall = true_positive / positive
        specificity = 1 - false_positive / negative
        # 0 for a class that has images but is never predicted; undefined for a class without images.
        precision = np.where(positive > 0, true_positive / np.maximum(called, 1), np.nan)
        f1 = np.where(positive > 0, 2 * true_positive / (positive + called), np.nan)
        areas = [weighted_auc(truth[:, c], probabilities[:, c], weights) for c in range(truth.shape[1])]
        by_class = np.stack([accuracy, precision, recall, specificity, f1, np.stack(areas, axis=1)], axis=2)
        by_class[:, ~decided, : METRICS.index("roc_auc")] = np.nan
        macro = np.where(in_macro, by_class, 0).sum(axis=1) / in_macro.sum(axis=0)
    lost = (positive == 0) | ((positive == total) & multilabel)
    undefined = (lost[:, :, None] & in_macro).any(axis=1)
    undefined[:, METRICS.index("accuracy")] = False
    macro[undefined] = np.nan
    if not multilabel:
        macro[:, METRICS.index("accuracy")] = true_positive.sum(axis=1) / total[:, 0]
    return np.concatenate([by_class, macro[:, None]], axis=1)


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
    # The first image of each run of equal scores. Ties count half, so their order after the sort does not matter.
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    weights = weights[:, order]
    # All sums are whole numbers, which float64 holds exactly, so the differences are exact.
    everyone = np.add.reduceat(weights, starts, axis=1)
    positives = np.add.reduceat(weights * positive[order], starts, axis=1)
    negatives = everyone - positives
    below = np.cumsum(negatives, axis=1) - negatives / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return (positives * below).sum(axis=1) / (positives.sum(axis=1) * negatives.sum(axis=1))


def silhouette(embeddings: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean silhouette of (N, D) embeddings by (N,) labels: 1 = classes lie apart, 0 = they overlap.

    Rousseeuw 1987, J. Comput. Appl. Math. 20:53; each dimension is standardised. NaN with fewer than two classes, or if
    every image has its own class.
    """
    count = len(np.unique(labels))
    if not 2 <= count < len(embeddings):
        return math.nan
    return float(sk.silhouette_score(StandardScaler().fit_transform(embeddings), labels))


def tsne(embeddings: np.ndarray, *, seed: int) -> np.ndarray:
    """Return (N, 2) points for (N, D) embeddings. Similar embeddings have points that lie near one another.

    t-SNE: van der Maaten & Hinton 2008, JMLR 9:2579; each dimension is standardised. Only neighbourhoods mean
    something; distance, direction and density do not. If all embeddings are equal, all points are 0.

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
