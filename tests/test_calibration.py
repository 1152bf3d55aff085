"""Claims about calibration.py, with answers from scikit-learn, closed forms and draws at a known temperature."""

import numpy as np
import pytest
from scipy import special
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

import calibration
from metrics import softmax


def test_temperature_is_recovered_from_labels_drawn_at_a_known_one():
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(20000, 4))
    chances = softmax(logits, 2.5)
    targets = (chances.cumsum(axis=1) < rng.random((20000, 1))).sum(axis=1)
    temperature = calibration.fit_temperature(logits, targets)
    assert temperature == pytest.approx(2.5, rel=0.04)
    assert calibration.fit_temperature(3 * logits, targets) == pytest.approx(3 * temperature, rel=1e-4)
    # At the optimum, mean logit of the true class = mean logit expected under the scaled probabilities.
    scaled = softmax(logits, temperature)
    true = logits[np.arange(20000), targets].mean()
    assert (scaled * logits).sum(axis=1).mean() == pytest.approx(true, abs=1e-4)
    assert calibration.expected_calibration_error(targets, scaled) < 0.02
    assert calibration.expected_calibration_error(targets, softmax(logits)) > 0.1


def test_temperature_is_left_alone_where_the_likelihood_has_no_maximum():
    # All right: ever more confident is ever better. All wrong: ever less.
    targets = np.array([0, 1, 2] * 10)
    logits = 5.0 * np.eye(3)[targets]
    assert calibration.fit_temperature(logits, targets) == 1
    assert calibration.fit_temperature(-logits, targets) == 1
    assert np.isfinite(softmax(logits * 1e4, 0.05)).all()


def test_negative_log_likelihood_matches_sklearn_and_is_finite_at_zero():
    rng = np.random.default_rng(0)
    targets, probabilities = rng.integers(4, size=300), softmax(rng.normal(size=(300, 4)))
    assert calibration.negative_log_likelihood(targets, probabilities) == pytest.approx(
        sk.log_loss(targets, probabilities), abs=1e-9
    )
    assert np.isfinite(calibration.negative_log_likelihood(np.array([0]), np.array([[0.0, 1.0]])))


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


# Single-sigmoid and multi-label networks


def test_tied_logits_of_a_single_sigmoid_have_the_temperature_of_that_sigmoid():
    rng = np.random.default_rng(0)
    z = rng.normal(scale=4, size=(8000, 1))
    targets = (rng.random((8000, 1)) < special.expit(z / 2)).astype(int)
    tied = np.hstack([-z / 2, z / 2])
    temperature = calibration.fit_temperature(tied, targets[:, 0])
    assert temperature == pytest.approx(2, rel=0.06)
    assert temperature == pytest.approx(calibration.fit_temperature(z, targets), rel=1e-5)


def test_multilabel_temperature_is_recovered_from_labels_drawn_at_a_known_one():
    rng = np.random.default_rng(1)
    logits = rng.normal(loc=-2, scale=3, size=(6000, 5))
    targets = (rng.random(logits.shape) < special.expit(logits / 1.7)).astype(np.uint8)
    temperature = calibration.fit_temperature(logits, targets)
    assert temperature == pytest.approx(1.7, rel=0.04)
    assert calibration.fit_temperature(np.where(targets == 1, 2.0, -2.0), targets) == 1
    raw, scaled = (special.expit(logits / t) for t in (1, temperature))
    errors = [calibration.expected_calibration_error(targets, p) for p in (raw, scaled)]
    assert errors[1] < 0.02 < errors[0]


def test_multilabel_likelihood_and_reliability_match_sklearn_over_all_decisions():
    rng = np.random.default_rng(2)
    probabilities = rng.random((300, 4)).round(3)
    targets = (rng.random((300, 4)) < probabilities**2).astype(int)
    flat = targets.ravel(), probabilities.ravel()
    likelihood = calibration.negative_log_likelihood(targets, probabilities)
    assert likelihood == pytest.approx(sk.log_loss(*flat), abs=1e-9)
    table = calibration.reliability_table(targets, probabilities, bins=8)
    share, mean = calibration_curve(*flat, n_bins=8)
    np.testing.assert_allclose(table["accuracy"], share, atol=1e-12)
    np.testing.assert_allclose(table["confidence"], mean, atol=1e-12)
    assert table["count"].sum() == 1200


def test_multilabel_targets_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="0 or 1"):
        calibration.fit_temperature(np.zeros((2, 2)), np.array([[0, 2], [1, 0]]))
    with pytest.raises(ValueError, match="3 targets but 2 rows"):
        calibration.fit_temperature(np.zeros((2, 2)), np.zeros((3, 2), dtype=int))
