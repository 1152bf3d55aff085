"""Calibration against scikit-learn, closed forms and draws at a known temperature."""

import numpy as np
import pytest
from scipy.special import expit
from scipy.special import softmax as softmax_of
from sklearn.calibration import calibration_curve

from evaluation import calibration


def softmax(logits, temperature=1):
    return softmax_of(logits / temperature, axis=1)


def test_temperature_is_recovered_from_labels_drawn_at_a_known_one():
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(20000, 4))
    chances = softmax(logits, 2.5)
    targets = (chances.cumsum(axis=1) < rng.random((20000, 1))).sum(axis=1)
    temperature = calibration.fit_temperature(logits, targets)
    assert temperature == pytest.approx(2.5, rel=0.04)
    assert calibration.fit_temperature(3 * logits, targets) == pytest.approx(3 * temperature, rel=1e-4)
    # At the optimum, the mean logit of the true class equals the mean logit under the scaled probabilities.
    scaled = softmax(logits, temperature)
    true = logits[np.arange(20000), targets].mean()
    assert (scaled * logits).sum(axis=1).mean() == pytest.approx(true, abs=1e-4)
    assert calibration.expected_calibration_error(targets, scaled) < 0.02
    assert calibration.expected_calibration_error(targets, softmax(logits)) > 0.1


def test_temperature_is_one_where_the_likelihood_has_no_maximum():
    # All correct: the likelihood grows with confidence. All wrong: it falls.
    targets = np.array([0, 1, 2] * 10)
    logits = 5.0 * np.eye(3)[targets]
    assert calibration.fit_temperature(logits, targets) == 1
    assert calibration.fit_temperature(-logits, targets) == 1
    assert np.isfinite(softmax(logits * 1e4, 0.05)).all()


def test_calibration_error_of_a_hand_made_example():
    # 10 images at 0.9, 6 of them right; 10 at 0.6, all right: 0.5 * 0.3 + 0.5 * 0.4.
    top = np.repeat([0.9, 0.6], 10)
    targets = np.array([0] * 6 + [1] * 4 + [0] * 10)
    probabilities = np.stack([top, 1 - top], axis=1)
    assert calibration.expected_calibration_error(targets, probabilities, bins=10) == pytest.approx(0.35)
    table = calibration.reliability_table(targets, probabilities, bins=10)
    assert table["count"].sum() == 20
    filled = table[table["count"] > 0]
    assert filled["accuracy"].to_list() == pytest.approx([1.0, 0.6])
    assert filled["confidence"].to_list() == pytest.approx([0.6, 0.9])


def test_certain_predictions_fall_into_the_last_bin():
    table = calibration.reliability_table(np.array([0, 1]), np.array([[1.0, 0.0], [0.0, 1.0]]))
    assert table["count"].iloc[-1] == 2


def test_tied_logits_of_a_single_sigmoid_have_the_temperature_of_that_sigmoid():
    rng = np.random.default_rng(0)
    z = rng.normal(scale=4, size=8000)
    targets = (rng.random(8000) < expit(z / 2)).astype(int)
    tied = np.stack([-z / 2, z / 2], axis=1)
    assert calibration.fit_temperature(tied, targets) == pytest.approx(2, rel=0.06)


def test_multilabel_reliability_matches_sklearn_over_all_decisions():
    rng = np.random.default_rng(2)
    probabilities = rng.random((300, 4)).round(3)
    targets = (rng.random((300, 4)) < probabilities**2).astype(int)
    flat = targets.ravel(), probabilities.ravel()
    table = calibration.reliability_table(targets, probabilities, bins=8)
    share, mean = calibration_curve(*flat, n_bins=8)
    np.testing.assert_allclose(table["accuracy"], share, atol=1e-12)
    np.testing.assert_allclose(table["confidence"], mean, atol=1e-12)
    assert table["count"].sum() == 1200
