"""Claims about metrics.py, with answers from scikit-learn, closed forms and plain loops."""

import math

import numpy as np
import pytest
from sklearn import metrics as sk

import metrics

CLASSES = ["COVID-19", "Lung Opacity", "Normal", "Viral Pneumonia"]


def skewed(n=300, num_classes=4, seed=0, decimals=1):
    """Return targets of unequal frequency and better-than-chance probabilities, coarse so that many scores
    tie.
    """
    rng = np.random.default_rng(seed)
    share = np.arange(1, num_classes + 1) ** 2.0
    targets = rng.choice(num_classes, size=n, p=share / share.sum())
    logits = rng.normal(size=(n, num_classes)).round(decimals)
    logits[np.arange(n), targets] += 1
    return targets, metrics.softmax(logits)


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
    return metrics.softmax(4.0 * np.eye(num_classes)[labels])


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


@pytest.mark.parametrize("bad", [[0, 3], [-1, 0]])
def test_labels_out_of_range_are_named_in_the_error(bad):
    good = np.array([0, 1])
    with pytest.raises(ValueError, match=r"targets.*outside 0\.\.2"):
        metrics.confusion_counts(np.array(bad), good, 3)
    with pytest.raises(ValueError, match=r"predictions.*outside 0\.\.2"):
        metrics.confusion_counts(good, np.array(bad), 3)


@pytest.mark.parametrize(
    "counts",
    [
        # Row = true, column = predicted.
        [[2, 8], [1, 89]],
        [[5, 3, 2], [0, 40, 10], [6, 4, 30]],
    ],
)
def test_precision_and_recall_are_not_swapped(counts):
    """A published project swaps them; on skewed classes they differ by a lot."""
    counts = np.array(counts)
    num_classes = len(counts)
    cells = np.repeat(np.arange(num_classes**2), counts.ravel())
    targets, predictions = cells // num_classes, cells % num_classes
    table = metrics.classification_scores(targets, certain(predictions, num_classes), CLASSES[:num_classes])
    by_hand = {
        2: ([2 / 3, 89 / 97], [2 / 10, 89 / 90]),
        3: ([5 / 11, 40 / 47, 30 / 42], [5 / 10, 40 / 50, 30 / 40]),
    }
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
    table = metrics.classification_scores(targets, probabilities, CLASSES[:num_classes])
    ours = table[list(metrics.METRICS)].to_numpy()
    np.testing.assert_allclose(ours, sklearn_scores(targets, probabilities), rtol=0, atol=1e-9)
    assert table["support"].to_list() == [*np.bincount(targets), len(targets)]
    assert table.index.to_list() == [*CLASSES[:num_classes], "macro"]
    if num_classes > 2:
        macro_auc = sk.roc_auc_score(targets, probabilities, multi_class="ovr", average="macro")
        assert table.loc["macro", "roc_auc"] == pytest.approx(macro_auc, abs=1e-9)


def test_a_class_that_is_never_predicted_has_zero_precision_and_recall():
    targets = np.array([0, 0, 1, 2])
    table = metrics.classification_scores(targets, certain([0, 0, 1, 1], 3), CLASSES[:3])
    assert table.loc["Normal", ["precision", "recall", "f1"]].to_list() == [0, 0, 0]


def test_a_class_without_test_images_is_undefined_and_left_out_of_the_macro_mean():
    targets, probabilities = skewed(num_classes=3)
    four = np.hstack([probabilities * 0.9, np.full((len(targets), 1), 0.1)])
    table = metrics.classification_scores(targets, four, CLASSES)
    assert table.loc[CLASSES[3], ["precision", "recall", "f1", "roc_auc"]].isna().all()
    three = metrics.classification_scores(targets, probabilities, CLASSES[:3])
    predicted_the_same = (four.argmax(axis=1) == probabilities.argmax(axis=1)).all()
    assert predicted_the_same
    np.testing.assert_allclose(
        table.loc["macro"].to_numpy(dtype=float), three.loc["macro"].to_numpy(dtype=float), atol=1e-12
    )


def test_logits_in_place_of_probabilities_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="softmax"):
        metrics.classification_scores(np.array([0, 1]), np.array([[3.0, -1.0], [0.2, 5.0]]), CLASSES[:2])
    with pytest.raises(ValueError, match="softmax"):
        metrics.classification_scores(np.array([0, 1]), np.full((2, 2), np.nan), CLASSES[:2])


# Bootstrap


def test_bootstrap_equals_a_plain_loop_that_repeats_rows_and_calls_sklearn():
    targets, probabilities = skewed(n=240)
    patients = np.random.default_rng(1).integers(90, size=240)
    table = metrics.bootstrap_scores(
        targets, probabilities, patients, CLASSES, resamples=30, rng=np.random.default_rng(2)
    )
    weights = np.concatenate(
        list(metrics.patient_weights(patients, resamples=30, rng=np.random.default_rng(2)))
    )
    looped = []
    for row in weights:
        index = np.repeat(np.arange(240), row.astype(int))
        looped.append(sklearn_scores(targets[index], probabilities[index]))
    low, high = np.quantile(looped, [0.025, 0.975], axis=0)
    shape = (len(CLASSES) + 1, len(metrics.METRICS))
    np.testing.assert_allclose(table["low"].to_numpy().reshape(shape), low, rtol=0, atol=1e-9)
    np.testing.assert_allclose(table["high"].to_numpy().reshape(shape), high, rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        table["estimate"].to_numpy().reshape(shape), sklearn_scores(targets, probabilities), rtol=0, atol=1e-9
    )


def test_resamples_draw_whole_patients_as_many_as_there_are(monkeypatch):
    patients = np.array(["a", "b", "a", "c", "b", "a"])
    monkeypatch.setattr(metrics, "CHUNK", 6 * 7)
    chunks = list(metrics.patient_weights(patients, resamples=50, rng=np.random.default_rng(0)))
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
    table = metrics.bootstrap_scores(
        targets, probabilities, patients, CLASSES[:2], resamples=4000, rng=np.random.default_rng(seed)
    )
    row = table[(table["class"] == "macro") & (table["metric"] == "accuracy")].iloc[0]
    return metrics.Interval(row["estimate"], row["low"], row["high"])


def test_accuracy_interval_with_one_image_a_patient_is_the_binomial_one():
    n, p = 400, 0.8
    interval = accuracy_interval(np.arange(n) < p * n, np.arange(n))
    half = 1.96 * math.sqrt(p * (1 - p) / n)
    assert interval.estimate == p
    assert interval.low == pytest.approx(p - half, abs=0.006)
    assert interval.high == pytest.approx(p + half, abs=0.006)


def test_identical_images_of_a_patient_do_not_narrow_the_interval():
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
    one, two = (
        metrics.bootstrap_scores(
            targets, probabilities, ids, CLASSES, resamples=20, rng=np.random.default_rng(5)
        )
        for ids in (numbers, names)
    )
    assert one.equals(two)


def test_a_class_of_one_patient_gets_an_estimate_but_no_interval():
    targets = np.array([0] * 40 + [1] * 40 + [2] * 5)
    patients = np.array([*range(80), *[80] * 5])
    table = metrics.bootstrap_scores(
        targets, certain(targets, 3), patients, CLASSES[:3], resamples=200, rng=np.random.default_rng(0)
    ).set_index(["class", "metric"])
    for figure in ("recall", "precision", "f1", "roc_auc"):
        assert table.loc[("Normal", figure), "estimate"] == 1
        assert np.isnan(table.loc[("Normal", figure), ["low", "high"]].to_numpy(dtype=float)).all()
    # Specificity is defined without the class, but its macro mean would be one over fewer classes.
    for figure in ("recall", "specificity"):
        assert np.isnan(table.loc[("macro", figure), "low"])
    assert table.loc[("macro", "accuracy"), "low"] == 1
    assert table.loc[("COVID-19", "recall"), "low"] == 1


def test_a_few_undefined_resamples_are_left_out_of_the_interval():
    values = np.array([np.nan, *range(99)])
    interval = metrics._percentile_interval(5.0, values, 0.9)
    assert (interval.low, interval.high) == pytest.approx(np.quantile(np.arange(99), [0.05, 0.95]))


def test_the_paired_difference_of_a_network_with_itself_is_exactly_zero():
    targets, probabilities = skewed()
    interval = metrics.paired_difference(
        targets, probabilities, probabilities, np.arange(300), CLASSES, rng=np.random.default_rng(0)
    )
    assert interval == (0, 0, 0)


def test_the_paired_difference_has_the_interval_of_the_mean_of_differences():
    targets, a = skewed(seed=0)
    noise = np.random.default_rng(8).dirichlet(np.ones(4), size=300)
    b = 0.5 * a + 0.5 * noise
    patients = np.arange(300) // 3
    settings = {"resamples": 500, "confidence": 0.9}
    paired = metrics.paired_difference(
        targets, a, b, patients, CLASSES, **settings, rng=np.random.default_rng(4)
    )
    right_a, right_b = (p.argmax(axis=1) == targets for p in (a, b))
    mean = metrics.bootstrap_mean(right_a * 1.0 - right_b, patients, **settings, rng=np.random.default_rng(4))
    assert paired == pytest.approx(mean, abs=1e-12)
    areas = [sk.roc_auc_score(targets, p, multi_class="ovr") for p in (a, b)]
    paired = metrics.paired_difference(
        targets, a, b, patients, CLASSES, metric="roc_auc", **settings, rng=np.random.default_rng(4)
    )
    assert paired.estimate == pytest.approx(areas[0] - areas[1], abs=1e-9)
    assert paired.low < paired.estimate < paired.high


def test_an_unknown_metric_is_refused_with_the_known_ones():
    targets, p = skewed()
    with pytest.raises(ValueError, match="roc_auc"):
        metrics.paired_difference(
            targets, p, p, np.arange(300), CLASSES, metric="auc", rng=np.random.default_rng(0)
        )


def test_bootstrap_mean_leaves_out_missing_values_and_agrees_with_the_normal_interval():
    rng = np.random.default_rng(0)
    values = rng.normal(3, 2, size=500)
    with_missing = np.concatenate([values, np.full(100, np.nan)])
    interval = metrics.bootstrap_mean(with_missing, np.arange(600), resamples=4000, rng=rng)
    half = 1.96 * values.std() / math.sqrt(500)
    assert interval.estimate == pytest.approx(values.mean())
    assert (interval.low, interval.high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.02
    )
    nothing = metrics.bootstrap_mean(np.full(3, np.nan), np.arange(3), rng=rng)
    assert all(math.isnan(value) for value in nothing)


def test_an_interval_reads_as_text():
    interval = metrics.Interval(0.9123, 0.88, 0.9407)
    assert str(interval) == f"{interval}" == "0.912 (0.880–0.941)"
    assert f"{interval:.1%}" == "91.2% (88.0%–94.1%)"
    assert f"{metrics.Interval(-0.02, -0.03, -0.01):.2f}" == "-0.02 (-0.03 to -0.01)"
    assert str(metrics.Interval(1.0, math.nan, math.nan)) == "1.000 (no interval)"


# Calibration and ROC


def test_temperature_is_recovered_from_labels_drawn_at_a_known_one():
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(20000, 4))
    chances = metrics.softmax(logits, 2.5)
    targets = (chances.cumsum(axis=1) < rng.random((20000, 1))).sum(axis=1)
    temperature = metrics.fit_temperature(logits, targets)
    assert temperature == pytest.approx(2.5, rel=0.04)
    assert metrics.fit_temperature(3 * logits, targets) == pytest.approx(3 * temperature, rel=1e-4)
    # At the optimum, mean logit of the true class = mean logit expected under the scaled probabilities.
    scaled = metrics.softmax(logits, temperature)
    true = logits[np.arange(20000), targets].mean()
    assert (scaled * logits).sum(axis=1).mean() == pytest.approx(true, abs=1e-4)
    assert metrics.expected_calibration_error(targets, scaled) < 0.02
    assert metrics.expected_calibration_error(targets, metrics.softmax(logits)) > 0.1


def test_temperature_is_left_alone_where_the_likelihood_has_no_maximum():
    # All right: ever more confident is ever better. All wrong: ever less.
    targets = np.array([0, 1, 2] * 10)
    logits = 5.0 * np.eye(3)[targets]
    assert metrics.fit_temperature(logits, targets) == 1
    assert metrics.fit_temperature(-logits, targets) == 1
    assert np.isfinite(metrics.softmax(logits * 1e4, 0.05)).all()


def test_softmax_is_stable_and_shift_invariant():
    logits = np.array([[1000.0, 1000.0], [-1000.0, 0.0]])
    np.testing.assert_allclose(metrics.softmax(logits), [[0.5, 0.5], [0, 1]])
    np.testing.assert_allclose(metrics.softmax(np.array([[0.0, math.log(9)]]), 2), [[0.25, 0.75]])


def test_negative_log_likelihood_matches_sklearn_and_is_finite_at_zero():
    targets, probabilities = skewed()
    assert metrics.negative_log_likelihood(targets, probabilities) == pytest.approx(
        sk.log_loss(targets, probabilities), abs=1e-9
    )
    assert np.isfinite(metrics.negative_log_likelihood(np.array([0]), np.array([[0.0, 1.0]])))


def test_calibration_error_of_a_hand_made_example():
    # 10 images at 0.9, 6 of them right; 10 at 0.6, all right: 0.5 * 0.3 + 0.5 * 0.4.
    top = np.repeat([0.9, 0.6], 10)
    targets = np.array([0] * 6 + [1] * 4 + [0] * 10)
    probabilities = np.stack([top, 1 - top], axis=1)
    assert metrics.expected_calibration_error(targets, probabilities, bins=10) == pytest.approx(0.35)
    table = metrics.reliability_table(targets, probabilities, bins=10)
    assert table["count"].sum() == 20
    filled = table[table["count"] > 0]
    assert filled["accuracy"].to_list() == pytest.approx([1.0, 0.6])
    assert filled["confidence"].to_list() == pytest.approx([0.6, 0.9])


def test_certain_predictions_fall_into_the_last_bin():
    table = metrics.reliability_table(np.array([0, 1]), np.array([[1.0, 0.0], [0.0, 1.0]]))
    assert table["count"].iloc[-1] == 2


def test_roc_points_have_the_area_of_the_score_table():
    targets, probabilities = skewed()
    table = metrics.classification_scores(targets, probabilities, CLASSES)
    for c, name in enumerate(CLASSES):
        curve = metrics.roc_points(targets, probabilities, c)
        assert curve.auc == pytest.approx(table.loc[name, "roc_auc"], abs=1e-9)
        assert (curve.false_positive_rate[0], curve.true_positive_rate[0]) == (0, 0)
        assert (curve.false_positive_rate[-1], curve.true_positive_rate[-1]) == (1, 1)


def test_a_class_without_images_has_no_roc_curve():
    curve = metrics.roc_points(np.array([0, 1]), certain([0, 1], 3), 2)
    assert curve.false_positive_rate.size == 0
    assert math.isnan(curve.auc)
