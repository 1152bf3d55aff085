"""The scores beside the loss against scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from training.objectives import macro_auc


def test_macro_auc_is_sklearns_over_the_labels_that_have_an_area():
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(60, 5)).round(1)  # coarse, so that outputs tie
    targets = (rng.random((60, 5)) < 0.3).astype(int)
    targets[:, 1], targets[:, 2] = 0, 1
    outputs[0, 3] = np.nan
    expected = np.mean([roc_auc_score(targets[:, c], outputs[:, c]) for c in (0, 4)])
    assert macro_auc(torch.tensor(outputs), torch.tensor(targets)) == pytest.approx(expected)
    assert math.isnan(macro_auc(torch.tensor(outputs[:, 1:4]), torch.tensor(targets[:, 1:4])))
