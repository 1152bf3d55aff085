"""Scores, intervals, decisions and predictions against scikit-learn, SciPy, closed forms and plain loops."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import special, stats
from sklearn import metrics as sk
from sklearn.datasets import make_blobs
from sklearn.manifold import trustworthiness
from sklearn.preprocessing import StandardScaler

from evaluation import intervals, metrics, predictions
from inference.decisions import THRESHOLD_RULES

CLASSES = ["COVID-19", "Lung Opacity", "Normal", "Viral Pneumonia"]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 50)


def predictions_of(targets, probabilities, patients=None, *, thresholds=None):
    """Return predictions for images of one patient each, or of `patients`."""
    patients = np.arange(len(targets)) if patients is None else patients
    paths = np.array([f"{i:03}.png" for i in range(len(targets))])
    thresholds = None if thresholds is None else np.array(thresholds, dtype=float)
    return predictions.Predictions(targets, probabilities, patients, paths, thresholds)


def score_table(answers, classes=CLASSES, *, seed=0):
    return intervals.bootstrap_scores(answers, classes, rng=np.random.default_rng(seed)).drop(columns="figure")


def difference_of(a, b, classes=CLASSES, *, metric="accuracy", of=metrics.MACRO, seed=0):
    return intervals.paired_difference(a, b, classes, metric=metric, of=of, rng=np.random.default_rng(seed))


def softmax(logits):
    return special.softmax(logits, axis=-1)


def skewed(n=300, num_classes=4, seed=0, decimals=1):
    """Return targets of unequal frequency, and probabilities that are better than chance and often equal."""
    rng = np.random.default_rng(seed)
    share = np.arange(1, num_classes + 1) ** 2.0
    targets = rng.choice(num_classes, size=n, p=share / share.sum())
    logits = rng.normal(size=(n, num_classes)).round(decimals)
    logits[np.arange(n), targets] += 1
    return targets, softmax(logits)


def sklearn_scores(targets, probabilities, weights=None):
    """Return (C + 1, 6) scores in the order of metrics.METRICS by scikit-learn alone."""
    num_classes = probabilities.shape[1]
    predictions = probabilities.argmax(axis=1)
    labels = range(num_classes)
    precision, recall, f1, _ = sk.precision_recall_fscore_support(
        targets, predictions, labels=labels, zero_division=0, sample_weight=weights
    )
    rows = []
    for c in labels:
        truth, called = targets == c, predictions == c
        specificity = sk.recall_score(truth, called, pos_label=False, sample_weight=weights)
        accuracy = sk.accuracy_score(truth, called, sample_weight=weights)
        area = sk.roc_auc_score(truth, probabilities[:, c], sample_weight=weights)
        rows.append([accuracy, precision[c], recall[c], specificity, f1[c], area])
    macro = np.mean(rows, axis=0)
    macro[0] = sk.accuracy_score(targets, predictions, sample_weight=weights)
    return np.array([*rows, macro])


def certain(labels, num_classes):
    """Return probabilities that put almost everything on `labels`."""
    return softmax(4.0 * np.eye(num_classes)[labels])


# Confusion counts and scores


def test_confusion_counts_match_sklearn_and_have_true_classes_as_rows():
    targets, probabilities = skewed()
    predictions = probabilities.argmax(axis=1)
    counts = metrics.confusion_counts(targets, predictions, 4)
    assert np.array_equal(counts, sk.confusion_matrix(targets, predictions, labels=range(4)))
    assert np.array_equal(counts.sum(axis=1), np.bincount(targets))
    assert np.issubdtype(counts.dtype, np.integer)


def test_confusion_counts_keep_a_row_and_column_for_classes_that_never_occur():
    counts = metrics.confusion_counts(np.array([0, 0]), np.array([2, 0]), 3)
    assert counts.tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    "counts",
    [
        # Row = true, column = predicted.
        [[2, 8], [1, 89]],
        [[5, 3, 2], [0, 40, 10], [6, 4, 30]],
    ],
)
def test_precision_and_recall_are_not_swapped(counts):
    """Precision and recall differ by a lot on skewed classes."""
    counts = np.array(counts)
    num_classes = len(counts)
    cells = np.repeat(np.arange(num_classes**2), counts.ravel())
    targets, predictions = cells // num_classes, cells % num_classes
    table = metrics.classification_scores(
        predictions_of(targets, certain(predictions, num_classes)), CLASSES[:num_classes]
    )
    by_hand = {2: ([2 / 3, 89 / 97], [2 / 10, 89 / 90]), 3: ([5 / 11, 40 / 47, 30 / 42], [5 / 10, 40 / 50, 30 / 40])}
    precision, recall = by_hand[num_classes]
    assert table["precision"][:-1].to_list() == pytest.approx(precision, abs=1e-12)
    assert table["recall"][:-1].to_list() == pytest.approx(recall, abs=1e-12)
    sk_precision, sk_recall, _, _ = sk.precision_recall_fscore_support(targets, predictions)
    assert table["precision"][:-1].to_list() == pytest.approx(sk_precision, abs=1e-9)
    assert table["recall"][:-1].to_list() == pytest.approx(sk_recall, abs=1e-9)
    assert np.array_equal(metrics.confusion_counts(targets, predictions, num_classes), counts)


@pytest.mark.parametrize("num_classes", [2, 3, 4])
def test_scores_match_sklearn_on_skewed_classes_with_ties(num_classes):
    targets, probabilities = skewed(num_classes=num_classes)
    table = metrics.classification_scores(predictions_of(targets, probabilities), CLASSES[:num_classes])
    ours = table[list(metrics.METRICS)].to_numpy()
    np.testing.assert_allclose(ours, sklearn_scores(targets, probabilities), rtol=0, atol=1e-9)
    assert table["support"].to_list() == [*np.bincount(targets), len(targets)]
    assert table.index.to_list() == [*CLASSES[:num_classes], "macro"]
    if num_classes > 2:
        macro_auc = sk.roc_auc_score(targets, probabilities, multi_class="ovr", average="macro")
        assert table.loc["macro", "roc_auc"] == pytest.approx(macro_auc, abs=1e-9)


def test_a_class_that_is_never_predicted_has_zero_precision_and_recall():
    targets = np.array([0, 0, 1, 2])
    table = metrics.classification_scores(predictions_of(targets, certain([0, 0, 1, 1], 3)), CLASSES[:3])
    assert table.loc["Normal", ["precision", "recall", "f1"]].to_list() == [0, 0, 0]


def test_a_class_without_test_images_is_undefined_and_left_out_of_the_macro_mean():
    targets, probabilities = skewed(num_classes=3)
    four = np.hstack([probabilities * 0.9, np.full((len(targets), 1), 0.1)])
    table = metrics.classification_scores(predictions_of(targets, four), CLASSES)
    assert table.loc[CLASSES[3], ["precision", "recall", "f1", "roc_auc"]].isna().all()
    three = metrics.classification_scores(predictions_of(targets, probabilities), CLASSES[:3])
    predicted_the_same = (four.argmax(axis=1) == probabilities.argmax(axis=1)).all()
    assert predicted_the_same
    np.testing.assert_allclose(
        table.loc["macro"].to_numpy(dtype=float), three.loc["macro"].to_numpy(dtype=float), atol=1e-12
    )


def test_logits_in_place_of_probabilities_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="softmax"):
        metrics.classification_scores(
            predictions_of(np.array([0, 1]), np.array([[3.0, -1.0], [0.2, 5.0]])), CLASSES[:2]
        )
    with pytest.raises(ValueError, match="softmax"):
        metrics.classification_scores(predictions_of(np.array([0, 1]), np.full((2, 2), np.nan)), CLASSES[:2])


# Bootstrap


def test_bootstrap_equals_a_plain_loop_that_repeats_rows_and_calls_sklearn(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 12)
    targets, probabilities = skewed(n=240)
    patients = np.random.default_rng(1).integers(90, size=240)
    table = score_table(predictions_of(targets, probabilities, patients), seed=2)
    weights = np.concatenate(list(intervals.patient_weights(patients, rng=np.random.default_rng(2))))
    looped = []
    for row in weights:
        index = np.repeat(np.arange(240), row.astype(int))
        looped.append(sklearn_scores(targets[index], probabilities[index]))
    low, high = np.quantile(looped, [0.025, 0.975], axis=0)
    shape = (len(CLASSES) + 1, len(metrics.METRICS))
    inside = ~table["estimate"].isin((0, 1)).to_numpy().reshape(shape)
    assert inside.sum() > 25
    np.testing.assert_allclose(table["low"].to_numpy().reshape(shape)[inside], low[inside], rtol=0, atol=1e-9)
    np.testing.assert_allclose(table["high"].to_numpy().reshape(shape)[inside], high[inside], rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        table["estimate"].to_numpy().reshape(shape), sklearn_scores(targets, probabilities), rtol=0, atol=1e-9
    )


def test_resamples_draw_whole_patients_as_many_as_there_are(monkeypatch):
    patients = np.array(["a", "b", "a", "c", "b", "a"])
    monkeypatch.setattr(intervals, "CHUNK", 6 * 7)
    chunks = list(intervals.patient_weights(patients, rng=np.random.default_rng(0)))
    weights = np.concatenate(chunks)
    assert weights.shape == (50, 6)
    assert max(len(chunk) for chunk in chunks) == 7
    assert (weights[:, [0]] == weights[:, [2, 5]]).all()
    assert (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()


def accuracy_interval(correct, patients, seed=0):
    """Return the bootstrap interval of the accuracy of a network that is right where `correct` is."""
    targets = np.arange(len(correct)) % 2
    probabilities = certain(np.where(correct, targets, 1 - targets), 2)
    table = score_table(predictions_of(targets, probabilities, patients), CLASSES[:2], seed=seed)
    row = table[(table["class"] == "macro") & (table["metric"] == "accuracy")].iloc[0]
    return intervals.Interval(row["estimate"], row["low"], row["high"])


def test_accuracy_interval_with_one_image_a_patient_is_the_binomial_one(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 4000)
    n, p = 400, 0.8
    interval = accuracy_interval(np.arange(n) < p * n, np.arange(n))
    half = 1.96 * math.sqrt(p * (1 - p) / n)
    assert interval.estimate == p
    assert interval.low == pytest.approx(p - half, abs=0.006)
    assert interval.high == pytest.approx(p + half, abs=0.006)


def test_identical_images_of_a_patient_do_not_narrow_the_interval(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 4000)
    k, n = 9, 200
    correct = np.random.default_rng(3).random(n) < 0.8
    once = accuracy_interval(correct, np.arange(n))
    repeated = accuracy_interval(np.tile(correct, k), np.tile(np.arange(n), k))
    naive = accuracy_interval(np.tile(correct, k), np.arange(n * k))
    width, wide, narrow = (i.high - i.low for i in (once, repeated, naive))
    assert wide == pytest.approx(width, rel=0.06)
    assert wide / narrow == pytest.approx(math.sqrt(k), rel=0.08)


def test_bootstrap_repeats_with_the_seed_and_does_not_depend_on_the_type_of_patient_ids():
    targets, probabilities = skewed(n=60)
    numbers = np.arange(60) // 2
    names = [f"patient {number:02}" for number in numbers]
    one, two = (score_table(predictions_of(targets, probabilities, ids), seed=5) for ids in (numbers, names))
    assert one.equals(two)


def test_a_class_of_one_patient_gets_an_estimate_but_no_interval():
    targets = np.array([0] * 40 + [1] * 40 + [2] * 5)
    patients = np.array([*range(80), *[80] * 5])
    table = score_table(predictions_of(targets, certain(targets, 3), patients), CLASSES[:3]).set_index(
        ["class", "metric"]
    )
    for figure in ("recall", "precision", "f1", "roc_auc"):
        assert table.loc[("Normal", figure), "estimate"] == 1
        assert np.isnan(table.loc[("Normal", figure), ["low", "high"]].to_numpy(dtype=float)).all()
    assert np.isnan(table.loc[("macro", "recall"), "low"])
    assert table.loc[("macro", "accuracy"), "low"] == pytest.approx(0.025 ** (1 / 81))
    assert table.loc[("COVID-19", "recall"), "low"] == pytest.approx(0.025 ** (1 / 40))


def clopper_pearson(hits, trials):
    interval = stats.binomtest(hits, trials).proportion_ci(0.95, method="exact")
    return interval.low, interval.high


@pytest.mark.parametrize("right", [True, False])
def test_proportions_of_none_and_all_have_scipys_exact_interval_over_patients(right):
    """9 patients of class 0 with 3 images each, 4 of class 1 with 2 each: all right, or all wrong."""
    targets = np.repeat([0, 1], [27, 8])
    patients = np.r_[np.repeat(np.arange(9), 3), np.repeat(np.arange(9, 13), 2)]
    probabilities = certain(targets if right else 1 - targets, 2)
    table = score_table(predictions_of(targets, probabilities, patients), ["a", "b"]).set_index(["class", "metric"])
    called = {"a": 9, "b": 4} if right else {"a": 4, "b": 9}
    for name, positives, negatives in (("a", 9, 4), ("b", 4, 9)):
        trials = {"accuracy": 13, "recall": positives, "specificity": negatives, "precision": called[name]}
        for metric, number in trials.items():
            estimate, *ends = table.loc[(name, metric)]
            assert estimate == right
            assert ends == pytest.approx(clopper_pearson(number * right, number))
    overall = table.loc[("macro", "accuracy"), ["low", "high"]].to_list()
    assert overall == pytest.approx(clopper_pearson(13 * right, 13))
    recall = np.mean([clopper_pearson(number * right, number) for number in (9, 4)], axis=0)
    assert table.loc[("macro", "recall"), ["low", "high"]].to_list() == pytest.approx(list(recall))


def test_f1_of_zero_or_one_has_the_interval_of_the_jaccard_index():
    # 5 patients are of class 1 or predicted as it; all 5 are both. So F1 = 2 J / (1 + J) = 1 with J = 5 of 5.
    targets, patients = np.repeat([0, 1], [6, 10]), np.r_[np.arange(6), np.repeat(np.arange(6, 11), 2)]
    table = score_table(predictions_of(targets, certain(targets, 2), patients), ["a", "b"]).set_index(
        ["class", "metric"]
    )
    j = 0.025 ** (1 / 5)
    assert table.loc[("b", "f1")].to_list() == pytest.approx([1, 2 * j / (1 + j), 1])
    wrong = score_table(predictions_of(targets, certain(1 - targets, 2), patients), ["a", "b"]).set_index(
        ["class", "metric"]
    )
    j = 1 - 0.025 ** (1 / 11)  # all 11 patients are of class 1 or predicted as it; none is both
    assert wrong.loc[("b", "f1")].to_list() == pytest.approx([0, 0, 2 * j / (1 + j)])


def test_an_area_of_one_has_an_interval_that_holds_the_truth():
    """With 8 and 20 patients and a true area of 0.9, the area is sometimes 1. Its interval must then reach 0.9."""
    rng, classes = np.random.default_rng(0), ["a", "b"]
    targets, shift = np.repeat([0, 1], [20, 8]), stats.norm.ppf(0.9) * math.sqrt(2)
    perfect = missed = 0
    for _ in range(3000):
        scores = special.expit(rng.normal(shift * targets))
        if scores[targets == 1].min() < scores[targets == 0].max():
            continue
        perfect += 1
        if perfect == 1:
            table = score_table(predictions_of(targets, np.stack([1 - scores, scores], 1)), classes).set_index(
                ["class", "metric"]
            )
            estimate, low, high = table.loc[("b", "roc_auc")]
            assert (estimate, low, high) == (1, pytest.approx(clopper_pearson(8, 8)[0]), 1)
            assert table.loc[("macro", "roc_auc")].to_list() == pytest.approx([1, low, 1])
        missed += low > 0.9
    assert perfect > 20
    assert missed == 0


def test_one_patient_has_no_interval():
    targets, p = skewed(n=30)
    alone = np.zeros(30)
    table = score_table(predictions_of(targets, p, alone))
    assert table["estimate"].notna().all()
    assert table[["low", "high"]].isna().all(axis=None)
    sure_table = score_table(predictions_of(targets, certain(targets, 4), alone))
    assert (sure_table["estimate"] == 1).all()
    assert sure_table[["low", "high"]].isna().all(axis=None)
    for values, options in ((np.arange(30.0), {}), (np.ones(30), {"proportion": True})):
        mean = intervals.bootstrap_mean(values, alone, **options, rng=np.random.default_rng(0))
        assert str(mean) == f"{values.mean():.3f} (no interval)"
    difference = difference_of(predictions_of(targets, p, alone), predictions_of(targets, p[::-1], alone))
    assert np.isnan(difference.low)


def test_a_mean_of_hits_is_a_proportion_and_a_mean_of_differences_is_not():
    rng, patients = np.random.default_rng(0), np.repeat(np.arange(6), 2)
    for value in (0.0, 1.0):
        hits = intervals.bootstrap_mean(np.r_[np.full(11, value), np.nan], patients, proportion=True, rng=rng)
        assert hits == pytest.approx((value, *clopper_pearson(6 * int(value), 6)))
    some = intervals.bootstrap_mean(np.arange(12) % 2, patients // 2, proportion=True, rng=rng)
    assert some.estimate == 0.5
    assert intervals.bootstrap_mean(np.zeros(12), patients, rng=rng) == (0, 0, 0)


def test_a_few_undefined_resamples_are_left_out_of_the_interval():
    values = np.array([np.nan, *range(99)])
    interval = intervals.percentile_interval(5.0, values)
    assert (interval.low, interval.high) == pytest.approx(np.quantile(np.arange(99), [0.025, 0.975]))


def test_networks_with_the_same_decisions_differ_by_zero_without_an_interval():
    targets, probabilities = skewed()
    interval = difference_of(predictions_of(targets, probabilities), predictions_of(targets, probabilities))
    assert str(interval) == "0.000 (no interval)"


def test_the_paired_difference_has_the_interval_of_the_mean_of_differences():
    targets, a = skewed(seed=0)
    noise = np.random.default_rng(8).dirichlet(np.ones(4), size=300)
    b = 0.5 * a + 0.5 * noise
    patients = np.arange(300) // 3
    paired = difference_of(predictions_of(targets, a, patients), predictions_of(targets, b, patients), seed=4)
    right_a, right_b = (p.argmax(axis=1) == targets for p in (a, b))
    mean = intervals.bootstrap_mean(right_a * 1.0 - right_b, patients, rng=np.random.default_rng(4))
    assert paired == pytest.approx(mean, abs=1e-12)
    areas = [sk.roc_auc_score(targets, p, multi_class="ovr") for p in (a, b)]
    paired = difference_of(
        predictions_of(targets, a, patients), predictions_of(targets, b, patients), metric="roc_auc", seed=4
    )
    assert paired.estimate == pytest.approx(areas[0] - areas[1], abs=1e-9)
    assert paired.low < paired.estimate < paired.high


def test_bootstrap_mean_leaves_out_missing_values_and_agrees_with_the_normal_interval(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 4000)
    rng = np.random.default_rng(0)
    values = rng.normal(3, 2, size=500)
    with_missing = np.concatenate([values, np.full(100, np.nan)])
    interval = intervals.bootstrap_mean(with_missing, np.arange(600), rng=rng)
    half = 1.96 * values.std() / math.sqrt(500)
    assert interval.estimate == pytest.approx(values.mean())
    assert (interval.low, interval.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    nothing = intervals.bootstrap_mean(np.full(3, np.nan), np.arange(3), rng=rng)
    assert all(math.isnan(value) for value in nothing)


def test_an_interval_reads_as_text():
    interval = intervals.Interval(0.9123, 0.88, 0.9407)
    assert str(interval) == f"{interval}" == "0.912 (0.880–0.941)"
    assert f"{interval:.1%}" == "91.2% (88.0%–94.1%)"
    assert f"{intervals.Interval(-0.02, -0.03, -0.01):.2f}" == "-0.02 (-0.03 to -0.01)"
    assert str(intervals.Interval(1.0, math.nan, math.nan)) == "1.000 (no interval)"
    assert str(intervals.Interval(math.nan, math.nan, math.nan)) == "–"


# Curves


def test_roc_points_have_the_area_of_the_score_table():
    targets, probabilities = skewed()
    table = metrics.classification_scores(predictions_of(targets, probabilities), CLASSES)
    for c, name in enumerate(CLASSES):
        curve = metrics.roc_points(targets, probabilities, c)
        assert curve.auc == pytest.approx(table.loc[name, "roc_auc"], abs=1e-9)
        assert (curve.false_positive_rate[0], curve.true_positive_rate[0]) == (0, 0)
        assert (curve.false_positive_rate[-1], curve.true_positive_rate[-1]) == (1, 1)


def test_a_class_without_images_has_no_roc_curve():
    curve = metrics.roc_points(np.array([0, 1]), certain([0, 1], 3), 2)
    assert curve.false_positive_rate.size == 0
    assert math.isnan(curve.auc)


def test_precision_recall_points_are_sklearns_at_every_threshold():
    targets, probabilities = skewed()
    curve = metrics.precision_recall_points(targets, probabilities, 1)
    truth = targets == 1
    for threshold, precision, recall in list(zip(*curve, strict=True))[::7]:
        called = probabilities[:, 1] >= threshold
        assert precision == pytest.approx(sk.precision_score(truth, called))
        assert recall == pytest.approx(sk.recall_score(truth, called))
    nothing = metrics.precision_recall_points(np.array([0, 1]), certain([0, 1], 3), 2)
    assert nothing.thresholds.size == 0


# Decisions and thresholds


def test_two_classes_are_decided_by_whether_class_one_is_above_its_threshold():
    p = np.array([0.1, 0.29, 0.31, 0.5, 0.9])
    probabilities = np.stack([1 - p, p], axis=1)
    assert predictions.decide(probabilities, (0.7, 0.3)).tolist() == [0, 0, 1, 1, 1]
    assert predictions.decide(probabilities).tolist() == [0, 0, 0, 0, 1]
    grid = np.random.default_rng(0).random(500)
    for t in (0.02, 0.4, 0.97):
        decided = predictions.decide(np.stack([1 - grid, grid], axis=1), (1 - t, t))
        assert np.array_equal(decided, grid > t)


def test_labels_are_decided_one_by_one():
    probabilities = np.array([[0.5, 0.2, 0.9], [0.49, 0.1, 0.95]])
    assert predictions.decide(probabilities, multilabel=True).tolist() == [[True, False, True], [False, False, True]]
    decided = predictions.decide(probabilities, (0.5, 0.15, 0.92), multilabel=True)
    assert decided.tolist() == [[True, True, False], [False, False, True]]


@pytest.mark.parametrize("thresholds", [(0.5,), (0.2, 0.3, 0.5), (None, None)])
def test_thresholds_that_do_not_fit_the_classes_are_refused(thresholds):
    with pytest.raises(ValueError, match=r"thresholds \[.*pass one"):
        predictions.decide(np.full((3, 2), 1 / 2), thresholds)


def test_three_classes_that_exclude_one_another_are_not_decided_by_thresholds():
    with pytest.raises(ValueError, match="thresholds for 3 classes: pass none for more than two classes"):
        predictions.decide(np.full((3, 3), 1 / 3), (0.6, 0.3, 0.1))


def test_the_threshold_applies_to_the_class_that_has_one():
    p = np.array([0.1, 0.3, 0.6, 1.0])
    rows = np.stack([1 - p, p], axis=1)
    assert predictions.decide(rows, (None, 0.3)).tolist() == [0, 1, 1, 1]
    assert predictions.decide(rows, (0.3, None)).tolist() == [0, 0, 0, 1]
    # If other findings have a threshold, a finding without one is never predicted. Nor is one without a probability.
    findings = np.array([[0.9, 0.9, np.nan], [0.1, 1.0, np.nan]])
    decided = predictions.decide(findings, (0.5, None, None), multilabel=True)
    assert decided.tolist() == [[True, False, False], [False, False, False]]
    assert predictions.decide(findings, multilabel=True).tolist() == [[True, True, False], [False, True, False]]


def test_scores_with_thresholds_are_those_of_the_decisions_and_leave_the_area_alone():
    targets, probabilities = skewed(num_classes=2)
    classes, thresholds = CLASSES[:2], (None, 0.7)
    table = metrics.classification_scores(predictions_of(targets, probabilities, thresholds=thresholds), classes)
    decided = (probabilities[:, 1] >= 0.7).astype(int)
    precision, recall, f1, _ = sk.precision_recall_fscore_support(targets, decided, zero_division=0)
    for name, values in {"precision": precision, "recall": recall, "f1": f1}.items():
        np.testing.assert_allclose(table[name].to_numpy()[:-1], values, atol=1e-12)
    assert table.loc["macro", "accuracy"] == pytest.approx(sk.accuracy_score(targets, decided))
    plain = metrics.classification_scores(predictions_of(targets, probabilities), classes)
    assert plain.loc["macro", "accuracy"] != table.loc["macro", "accuracy"]
    assert (plain["roc_auc"] == table["roc_auc"]).all()
    resampled = score_table(predictions_of(targets, probabilities, thresholds=thresholds), classes)
    assert resampled["estimate"].to_list() == table[list(metrics.METRICS)].to_numpy().ravel().tolist()
    gain = difference_of(
        predictions_of(targets, probabilities, thresholds=thresholds),
        predictions_of(targets, probabilities),
        classes,
        seed=7,
    )
    expected = table.loc["macro", "accuracy"] - plain.loc["macro", "accuracy"]
    assert gain.estimate == pytest.approx(expected, abs=1e-12)


BY_RULE = {
    "youden": lambda truth, called: sk.recall_score(truth, called) + sk.recall_score(truth, called, pos_label=0),
    "f1": lambda truth, called: sk.f1_score(truth, called, zero_division=0),
    "accuracy": sk.accuracy_score,
}


def scores_of_kind(kind, count, rng):
    """Return (count,) scores that tie, lie at the very ends, or are as near to each other as floats can be."""
    if kind == "coarse":
        return rng.random(count).round(1)
    if kind == "saturated":
        return rng.choice([0.0, 1e-30, 2e-30, 1e-9, 0.5, 1 - 1e-7, 1 - 2**-53, 1.0], count)
    if kind == "neighbours":
        return 0.3 + rng.integers(0, 4, count) * np.spacing(0.3)
    return softmax(rng.normal(scale=40, size=(count, 2)))[:, 1]


@pytest.mark.parametrize("rule", THRESHOLD_RULES)
@pytest.mark.parametrize("kind", ["coarse", "saturated", "neighbours", "confident"])
@pytest.mark.parametrize("positive", [0, 1])
def test_the_decisions_by_the_chosen_threshold_are_the_best_of_all_cuts(rule, kind, positive):
    rng = np.random.default_rng(0)
    for _ in range(4):
        p = scores_of_kind(kind, 12, rng)
        truth = np.r_[True, False, rng.random(10) < rng.random()]
        probabilities = np.stack([1 - p, p], axis=1)[:, :: 1 if positive else -1]
        targets = np.where(truth, positive, 1 - positive)
        thresholds = predictions.choose_thresholds(targets, probabilities, rule, positive=positive)
        assert np.isnan(thresholds[1 - positive])
        called = predictions.decide(probabilities, thresholds) == positive
        best = max(BY_RULE[rule](truth, p >= cut) for cut in [*p, 2.0])
        assert BY_RULE[rule](truth, called) == pytest.approx(best, abs=1e-12)
        of_label = predictions.choose_thresholds(truth[:, None].astype(int), p[:, None], rule, positive=None)
        label_predicted = predictions.decide(p[:, None], of_label, multilabel=True)[:, 0]
        assert np.array_equal(label_predicted, called)


def test_single_precision_scores_keep_their_decisions_in_a_file(tmp_path):
    """A file holds the shortest decimals of a float32. As float64, they are not the same numbers as the float32."""
    rng = np.random.default_rng(0)
    for scale in (1, 30):
        p = softmax(rng.normal(scale=scale, size=(60, 2))).astype(np.float32)
        p[:30] = np.nextafter(p[30:], np.float32(2)).clip(0, 1)  # the nearest scores that there can be
        targets = rng.integers(0, 2, 60)
        for positive in (0, 1):
            thresholds = predictions.choose_thresholds(targets, p, "accuracy", positive=positive)
            write_predictions(tmp_path / "p.csv", np.array(["no", "yes"])[targets], p, ["no", "yes"])
            read = predictions.read_predictions(tmp_path / "p.csv", ("no", "yes"), thresholds=thresholds)
            assert np.array_equal(read.predicted, predictions.decide(p, thresholds))


def test_no_score_of_one_is_called_positive_where_that_is_best():
    p = np.array([1.0, 1.0, 1.0, 0.2])
    thresholds = predictions.choose_thresholds(
        np.array([0, 0, 1, 0]), np.stack([1 - p, p], axis=1), "accuracy", positive=1
    )
    assert predictions.decide(np.array([[0.0, 1.0]]), thresholds).tolist() == [0]
    assert thresholds[1] == pytest.approx(1)


@pytest.mark.parametrize("rule", THRESHOLD_RULES)
def test_the_threshold_of_either_class_is_that_of_the_mirrored_problem(rule):
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 2, 50)
    probabilities = softmax(rng.normal(scale=2, size=(50, 2)) + np.eye(2)[truth])
    one = predictions.choose_thresholds(truth, probabilities, rule, positive=1)
    other = predictions.choose_thresholds(1 - truth, probabilities[:, ::-1], rule, positive=0)
    assert np.array_equal(one, other[::-1], equal_nan=True)


def test_youdens_threshold_does_not_depend_on_the_shares_of_the_classes():
    rng = np.random.default_rng(0)
    truth = np.arange(100) % 2
    p = np.clip(rng.normal(0.4 + 0.2 * truth, 0.15), 0, 1)
    # Nine copies of every negative image do not change sensitivity and specificity at any threshold.
    index = np.repeat(np.arange(100), np.where(truth, 1, 9))
    balanced, skew = (
        {
            rule: predictions.choose_thresholds(truth[i], np.stack([1 - p[i], p[i]], 1), rule, positive=1)[1]
            for rule in BY_RULE
        }
        for i in (np.arange(100), index)
    )
    assert balanced["youden"] == skew["youden"]
    assert balanced["accuracy"] < skew["accuracy"]


def test_the_threshold_lies_in_the_middle_of_the_widest_of_the_best_gaps():
    def chosen(truth, p, rule="youden"):
        p = np.array(p)
        return predictions.choose_thresholds(np.array(truth), np.stack([1 - p, p], 1), rule, positive=1)[1]

    assert chosen([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.9]) == pytest.approx(0.4)
    # Two thresholds classify three of four correctly: between 0.1 and 0.2, and between 0.3 and 0.9.
    assert chosen([0, 1, 0, 1], [0.1, 0.2, 0.3, 0.9], "accuracy") == pytest.approx(0.6)
    # With one class only, there is nothing to choose.
    assert chosen([0, 0], [0.1, 0.8]) == chosen([1, 1], [0.1, 0.8]) == 0.5
    # It is best to call all images positive (or negative), although a score lies at the end of the scale.
    assert chosen([1, 1, 0], [0.0, 0.0, 0.4], "accuracy") == 0
    assert chosen([0, 0, 0, 1], [0.6, 1.0, 1.0, 1.0], "accuracy") > 1


def test_each_label_has_the_threshold_that_it_has_alone():
    targets, probabilities = findings()
    thresholds = predictions.choose_thresholds(targets, probabilities, "f1", positive=None)
    for c in range(4):
        p = probabilities[:, c]
        alone = predictions.choose_thresholds(targets[:, c], np.stack([1 - p, p], 1), "f1", positive=1)
        assert thresholds[c] == alone[1]
    targets[:, 2], targets[:, 3] = 0, 1
    assert np.isnan(predictions.choose_thresholds(targets, probabilities, "f1", positive=None)).tolist() == [0, 0, 1, 1]


def test_a_first_class_that_is_positive_has_sklearns_scores_by_its_own_threshold():
    rng = np.random.default_rng(3)
    targets = (rng.random(200) < 0.7).astype(int)  # classes "abnormal", "healthy"
    probabilities = softmax(rng.normal(size=(200, 2)) + 1.2 * np.eye(2)[targets])
    thresholds = predictions.choose_thresholds(targets, probabilities, "f1", positive=0)
    table = metrics.classification_scores(
        predictions_of(targets, probabilities, thresholds=thresholds), ["abnormal", "healthy"]
    )
    decided = np.where(probabilities[:, 0] >= thresholds[0], 0, 1)
    f1 = sk.f1_score(targets, decided, pos_label=0)
    assert table.loc["abnormal", "f1"] == pytest.approx(f1)
    assert f1 == max(
        sk.f1_score(targets, np.where(probabilities[:, 0] >= t, 0, 1), pos_label=0) for t in probabilities[:, 0]
    )
    assert table.loc["abnormal", "recall"] == pytest.approx(sk.recall_score(targets, decided, pos_label=0))
    assert table.loc["abnormal", "roc_auc"] == pytest.approx(sk.roc_auc_score(targets == 0, probabilities[:, 0]))


# Multi-label


LABELS = ["Effusion", "Mass", "Hernia", "Edema"]


def findings(n=300, seed=0):
    """Return (n, 4) multi-label targets, and coarse probabilities that tell something."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((n, 4)) < (0.5, 0.2, 0.1, 0.3)).astype(np.uint8)
    logits = rng.normal(loc=-1, size=(n, 4)).round(1) + 1.5 * targets
    return targets, 1 / (1 + np.exp(-logits))


def multilabel_scores(targets, probabilities, thresholds=0.5):
    """Return (C + 1, 6) scores in the order of metrics.METRICS by scikit-learn, a label at a time."""
    rows = []
    for truth, p, threshold in zip(
        targets.T, probabilities.T, np.broadcast_to(thresholds, targets.shape[1]), strict=True
    ):
        called = p >= threshold
        row = [sk.accuracy_score(truth, called), sk.precision_score(truth, called, zero_division=0)]
        row += [sk.recall_score(truth, called), sk.recall_score(truth, called, pos_label=0)]
        rows.append([*row, sk.f1_score(truth, called), sk.roc_auc_score(truth, p)])
    return np.array([*rows, np.mean(rows, axis=0)])


@pytest.mark.parametrize("thresholds", [None, (0.3, 0.2, 0.15, 0.25)])
def test_multilabel_scores_match_sklearn_label_by_label(thresholds):
    targets, probabilities = findings()
    table = metrics.classification_scores(predictions_of(targets, probabilities, thresholds=thresholds), LABELS)
    expected = multilabel_scores(targets, probabilities, 0.5 if thresholds is None else thresholds)
    np.testing.assert_allclose(table[list(metrics.METRICS)], expected, atol=1e-9)
    assert table["support"].to_list() == [*targets.sum(axis=0), 300]
    assert table.index.to_list() == [*LABELS, "macro"]


def test_multilabel_bootstrap_equals_a_plain_loop_over_sklearn(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 12)
    targets, probabilities = findings()
    patients = np.random.default_rng(1).integers(120, size=300)
    table = score_table(predictions_of(targets, probabilities, patients), LABELS, seed=2)
    weights = intervals.patient_weights(patients, rng=np.random.default_rng(2))
    indices = [np.repeat(np.arange(300), row.astype(int)) for row in np.concatenate(list(weights))]
    looped = [multilabel_scores(targets[i], probabilities[i]) for i in indices]
    ends = np.quantile(looped, [0.025, 0.975], axis=0).reshape(2, -1)
    np.testing.assert_allclose(table[["low", "high"]].to_numpy().T, ends, atol=1e-9)


def test_labels_of_no_image_or_all_images_are_left_out_of_the_macro_means():
    targets, probabilities = findings()
    targets[:, 2], targets[:, 3] = 0, 1
    table = metrics.classification_scores(predictions_of(targets, probabilities), LABELS)
    assert table.loc["Hernia", ["precision", "recall", "f1", "roc_auc"]].isna().all()
    assert table.loc["Edema", ["specificity", "roc_auc"]].isna().all()
    expected = multilabel_scores(targets[:, :2], probabilities[:, :2])[-1]
    np.testing.assert_allclose(table.loc["macro", list(metrics.METRICS)].to_numpy(float), expected, atol=1e-9)
    empty = metrics.classification_scores(predictions_of(np.zeros((5, 2), int), np.full((5, 2), 0.1)), LABELS[:2])
    assert empty.loc["macro", list(metrics.METRICS)].isna().all()


def test_findings_without_probability_or_threshold_have_no_scores_and_are_in_no_mean(tmp_path):
    targets, probabilities = findings()
    thresholds = (0.4, 0.3, None, 0.3)
    unlearnt = probabilities.copy()
    unlearnt[:, 3] = np.nan
    names = ["|".join(name for name, has in zip(LABELS, row, strict=True) if has) or "No Finding" for row in targets]
    write_predictions(tmp_path / "p.csv", names, unlearnt, LABELS)
    read = predictions.read_predictions(tmp_path / "p.csv", LABELS, multilabel=True, thresholds=thresholds)
    assert read.reported.tolist() == [True, True, True, False]
    assert not read.predicted[:, 2:].any()
    decided_by = list(metrics.METRICS[:-1])
    table = metrics.classification_scores(
        predictions_of(read.targets, read.probabilities, thresholds=read.thresholds), LABELS
    )
    assert table.loc["Edema", list(metrics.METRICS)].isna().all()
    assert table.loc["Hernia", decided_by].isna().all()
    expected = multilabel_scores(targets[:, :2], probabilities[:, :2], (0.4, 0.3))
    np.testing.assert_allclose(table.loc[["Effusion", "Mass", "macro"], decided_by], expected[:, :5], atol=1e-9)
    areas = [sk.roc_auc_score(targets[:, c], probabilities[:, c]) for c in range(3)]
    assert table.loc["Hernia", "roc_auc"] == pytest.approx(areas[2])
    assert table.loc["macro", "roc_auc"] == pytest.approx(np.mean(areas))
    resampled = score_table(
        predictions_of(read.targets, read.probabilities, read.patients, thresholds=thresholds), LABELS
    )
    undefined = resampled["estimate"].isna()
    assert undefined.sum() == 6 + 5
    assert resampled[undefined][["low", "high"]].isna().all(axis=None)
    assert math.isnan(metrics.roc_points(targets, unlearnt, 3).auc)
    assert metrics.precision_recall_points(targets, unlearnt, 3).thresholds.size == 0
    mean = predictions.ensemble([predictions_of(targets, probabilities), predictions_of(targets, unlearnt)])
    assert mean.reported.tolist() == [True, True, True, False]


def test_the_paired_difference_of_multilabel_networks_is_that_of_their_mean_areas():
    targets, a = findings()
    b = np.clip(a + np.random.default_rng(3).normal(scale=0.2, size=a.shape), 0, 1)
    difference = difference_of(predictions_of(targets, a), predictions_of(targets, b), LABELS, metric="roc_auc")
    assert difference.estimate == pytest.approx(sk.roc_auc_score(targets, a) - sk.roc_auc_score(targets, b), abs=1e-9)
    assert 0 < difference.low < difference.estimate < difference.high


def test_the_paired_difference_is_over_the_findings_that_both_networks_count():
    targets, p = findings()
    fewer = p.copy()
    fewer[:, 3] = np.nan  # not reported
    one, other = (0.5, 0.3, 0.4, 0.2), (0.5, None, 0.4, 0.2)

    def difference(a, b, metric, *, of=metrics.MACRO, thresholds=(None, None)):
        return difference_of(
            predictions_of(targets, a, thresholds=thresholds[0]),
            predictions_of(targets, b, thresholds=thresholds[1]),
            LABELS,
            of=of,
            metric=metric,
        )

    for metric in metrics.METRICS:  # same probabilities; same thresholds where both have one
        for a, b in ((p, fewer), (fewer, p)):
            assert str(difference(a, b, metric)) == "0.000 (no interval)"
            assert str(difference(a, b, metric, thresholds=(one, other))) == "0.000 (no interval)"
        assert str(difference(p, fewer, metric, of="Edema")) == "–"
    worse = np.clip(p + np.random.default_rng(3).normal(scale=0.2, size=p.shape), 0, 1)
    expected = sk.roc_auc_score(targets[:, :3], p[:, :3]) - sk.roc_auc_score(targets[:, :3], worse[:, :3])
    assert difference(fewer, worse, "roc_auc").estimate == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("targets", "probabilities", "message"),
    [
        ([[0, 2]], [[0.1, 0.2]], "0 or 1"),
        ([[0, 1]], [[0.1, 1.2]], "sigmoid"),
        ([[0, 1]], [[np.nan, np.nan]], "sigmoid"),
        ([[0, 1], [1, 0]], [[np.nan, 0.2], [0.1, 0.2]], "sigmoid"),
        ([[0, 1, 1]], [[0.1, 0.2]], "one column of probabilities for each class"),
        ([[0, 1]], [[0.1, 0.2], [0.1, 0.2]], "one row for each image"),
    ],
)
def test_multilabel_arrays_that_do_not_fit_are_refused(targets, probabilities, message):
    with pytest.raises(ValueError, match=message):
        metrics.classification_scores(predictions_of(np.array(targets), np.array(probabilities)), LABELS[:2])


def test_roc_points_of_a_label_are_sklearns():
    targets, probabilities = findings()
    curve = metrics.roc_points(targets, probabilities, 1)
    false_positive_rate, true_positive_rate, _ = sk.roc_curve(targets[:, 1], probabilities[:, 1])
    np.testing.assert_allclose(curve.false_positive_rate, false_positive_rate)
    np.testing.assert_allclose(curve.true_positive_rate, true_positive_rate)


def test_the_summary_of_areas_is_over_labels_without_the_macro_row():
    targets, probabilities = findings()
    targets[:, 3] = 0
    scores = score_table(predictions_of(targets, probabilities), LABELS)
    areas = [sk.roc_auc_score(targets[:, c], probabilities[:, c]) for c in range(3)]
    expected = {"min": min(areas), "max": max(areas), "mean": np.mean(areas), "median": np.median(areas)}
    assert metrics.auc_summary(scores).to_dict() == pytest.approx(expected, abs=1e-9)


# scikit-learn's report


def test_the_report_has_the_numbers_of_sklearn():
    targets, probabilities = skewed()
    table = metrics.classification_report_table(predictions_of(targets, probabilities), CLASSES)
    decided = probabilities.argmax(axis=1)
    precision, recall, f1, support = sk.precision_recall_fscore_support(targets, decided)
    np.testing.assert_allclose(table.iloc[:4].to_numpy(float), np.stack([precision, recall, f1, support], 1))
    assert table.index.to_list() == [*CLASSES, "accuracy", "macro avg", "weighted avg"]
    assert table.loc["accuracy", "f1"] == pytest.approx(sk.accuracy_score(targets, decided))
    for average in ("macro", "weighted"):
        expected = sk.precision_recall_fscore_support(targets, decided, average=average)[:3]
        row = table.loc[f"{average} avg", ["precision", "recall", "f1"]]
        assert row.to_list() == pytest.approx(list(expected), abs=1e-12)
    assert table["support"].to_list() == [*support, 300, 300, 300]


def test_the_report_follows_thresholds():
    targets, probabilities = skewed(num_classes=2)
    table = metrics.classification_report_table(
        predictions_of(targets, probabilities, thresholds=(None, 0.7)), CLASSES[:2]
    )
    decided = probabilities[:, 1] >= 0.7
    assert table.loc["accuracy", "f1"] == pytest.approx(sk.accuracy_score(targets, decided))


def test_the_report_keeps_classes_without_images():
    targets, probabilities = skewed(num_classes=3)
    table = metrics.classification_report_table(
        predictions_of(targets, np.hstack([probabilities, np.zeros((300, 1))])), CLASSES
    )
    assert table.loc["accuracy", "f1"] == pytest.approx(sk.accuracy_score(targets, probabilities.argmax(axis=1)))
    assert table.loc[CLASSES[3]].to_list() == [0, 0, 0, 0]


# Predictions files and ensembles


def write_predictions(path, targets, probabilities, classes):
    frame = pd.DataFrame(probabilities, columns=classes)
    frame.insert(0, "path", [f"{i:03}.png" for i in range(len(frame))])
    frame.insert(1, "patient", "7")
    frame.insert(2, "target", targets)
    frame.to_csv(path, index=False)


def test_single_label_predictions_are_read_with_their_thresholds(tmp_path):
    write_predictions(
        tmp_path / "p.csv", ["NA", "Viral", "NA"], [[0.8, 0.2], [0.42, 0.58], [0.45, 0.55]], ["NA", "Viral"]
    )
    read = predictions.read_predictions(tmp_path / "p.csv", ("NA", "Viral"), thresholds=(0.4, 0.6))
    assert read.targets.tolist() == [0, 1, 0]
    assert not read.multilabel
    assert read.patients.tolist() == ["7"] * 3
    assert read.predicted.tolist() == [0, 0, 0]
    assert read._replace(thresholds=None).predicted.tolist() == [0, 1, 1]


def test_multilabel_predictions_are_read_finding_by_finding(tmp_path):
    targets = ["Mass|Effusion", "No Finding", "Edema"]
    write_predictions(tmp_path / "p.csv", targets, np.full((3, 4), 0.4), LABELS)
    read = predictions.read_predictions(tmp_path / "p.csv", LABELS, multilabel=True)
    assert read.targets.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert read.multilabel
    assert read.predicted.tolist() == [[False] * 4] * 3
    assert read._replace(thresholds=np.full(4, 0.3)).predicted.all()


@pytest.mark.parametrize("multilabel", [False, True])
def test_predictions_of_other_classes_are_refused(tmp_path, multilabel):
    write_predictions(tmp_path / "p.csv", ["Mass", "Pneumonia"], np.full((2, 4), 0.25), LABELS)
    for classes in (LABELS, [*LABELS, "Pneumonia"]):
        with pytest.raises(ValueError, match="does not have the classes Effusion, Mass"):
            predictions.read_predictions(tmp_path / "p.csv", classes, multilabel=multilabel)
    with pytest.raises(FileNotFoundError, match="run notebook 2"):
        predictions.read_predictions(tmp_path / "q.csv", LABELS, multilabel=multilabel)


@pytest.mark.parametrize("multilabel", [False, True])
def test_an_ensemble_is_the_mean_of_probabilities_matched_by_path(multilabel):
    targets, a = findings() if multilabel else skewed()
    _, b = findings(seed=1) if multilabel else skewed(seed=1)
    one, two = (predictions_of(targets, p, thresholds=np.full(4, t)) for p, t in ((a, 0.2), (b, 0.4)))
    order = np.random.default_rng(0).permutation(300)
    shuffled = predictions.Predictions(*(field[order] for field in two[:4]), two.thresholds)
    both = predictions.ensemble([one, shuffled])
    np.testing.assert_allclose(both.probabilities, (a + b) / 2)
    assert np.array_equal(both.targets, targets)
    assert np.array_equal(both.paths, one.paths)
    np.testing.assert_allclose(both.thresholds, 0.3)
    assert predictions.ensemble([one, shuffled._replace(thresholds=None)]).thresholds is None


def test_an_ensemble_of_different_images_targets_or_classes_says_what_differs():
    targets, p = skewed(n=20)
    one = predictions_of(targets, p)
    fewer = predictions_of(targets[:-1], p[:-1])
    for members in ([one, fewer], [fewer, one]):
        with pytest.raises(ValueError, match="differ in their images"):
            predictions.ensemble(members)
    with pytest.raises(ValueError, match="differ in their images"):
        predictions.ensemble([one._replace(paths=np.repeat(one.paths[::2], 2))] * 2)
    with pytest.raises(ValueError, match="differ in their classes or targets"):
        predictions.ensemble([one, one._replace(targets=(targets + 1) % 4)])
    with pytest.raises(ValueError, match="differ in their classes or targets"):
        predictions.ensemble([one, one._replace(probabilities=softmax(p[:, :3]))])


# Embeddings


def test_silhouette_is_sklearns_on_standardised_embeddings():
    points, labels = make_blobs(80, 5, centers=3, random_state=0)
    expected = sk.silhouette_score(StandardScaler().fit_transform(points), labels)
    assert metrics.silhouette(points, labels) == pytest.approx(expected)
    assert metrics.silhouette(points * [1, 10, 100, 1e3, 1e4], labels) == pytest.approx(expected)
    assert math.isnan(metrics.silhouette(points, np.zeros(80)))
    assert math.isnan(metrics.silhouette(points[:3], np.arange(3)))


def test_tsne_keeps_neighbours_together_and_repeats_with_the_seed():
    points, labels = make_blobs(60, 6, centers=3, random_state=0)
    arranged = metrics.tsne(points, seed=0)
    assert arranged.shape == (60, 2)
    assert sk.silhouette_score(arranged, labels) > 0.5
    assert trustworthiness(points, arranged) > 0.9
    assert np.array_equal(arranged, metrics.tsne(points, seed=0))
    assert np.isfinite(metrics.tsne(points[:4], seed=0)).all()
    assert not metrics.tsne(np.full((8, 5), 0.1), seed=0).any()
    with pytest.raises(ValueError, match="4 or more"):
        metrics.tsne(points[:3], seed=0)


def test_paired_difference_of_one_class_is_the_difference_of_its_scores():
    rng = np.random.default_rng(4)
    targets = rng.integers(0, 2, 60)
    a, b = (softmax(rng.normal(size=(60, 2)) + np.eye(2)[targets]) for _ in range(2))
    difference = difference_of(
        predictions_of(targets, a), predictions_of(targets, b), ("no", "yes"), of="yes", metric="recall"
    )
    expected = sk.recall_score(targets, a.argmax(1)) - sk.recall_score(targets, b.argmax(1))
    assert difference.estimate == pytest.approx(expected)
    assert difference.low <= difference.estimate <= difference.high
