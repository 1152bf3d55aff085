"""Find what could fool a network: features other than disease that tell the classes apart, and near-duplicates."""

import os
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import pandas as pd
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from evaluation.intervals import bootstrap_scores
from evaluation.metrics import MACRO
from evaluation.predictions import Predictions
from utils import FORMATS, read_xray

FOLDS = 5  # of a probe's cross-validation
NEAR_CHANCE = (0.4, 0.6)  # ROC-AUC; if the whole interval of a probe lies outside, it has found a shortcut
BINS = 10  # bins of file sizes; with a few hundred files, more bins would fit noise
RIM = 2  # pixels of a thumbnail's border
# At 32 x 32 pixels, X-rays of different patients correlate below 0.975. Copies that were resized, compressed or
# brightened correlate above 0.99.
DUPLICATE = 0.985
CHUNK = 4096  # thumbnails that are compared with all others at once


def thumbnails(paths: Sequence[str], size: int = 32) -> np.ndarray:
    """Return (N, size, size) uint8 small versions of the X-rays; each pixel is the mean of the area it covers."""
    return np.stack([cv2.resize(read_xray(path), (size, size), interpolation=cv2.INTER_AREA) for path in paths])


def border_pixels(thumbnails: np.ndarray) -> np.ndarray:
    """Return (N, P) outermost pixels of (N, H, W) thumbnails: they show no lung, so should not predict the class."""
    inside = np.zeros(thumbnails.shape[1:], dtype=bool)
    inside[RIM:-RIM, RIM:-RIM] = True
    return thumbnails[:, ~inside]


def brightness(thumbnails: np.ndarray) -> np.ndarray:
    """Return (N, 2) mean and standard deviation of (N, H, W) images; they show exposure, not anatomy."""
    flat = thumbnails.reshape(len(thumbnails), -1)
    return np.stack([flat.mean(axis=1), flat.std(axis=1)], axis=1)


def file_table(paths: Sequence[str]) -> pd.DataFrame:
    """Return one row for each file: width and height in pixels, bytes, format and colour mode (as "JPEG", "RGB")."""
    rows = []
    for path in paths:
        with Image.open(path, formats=FORMATS) as image:
            rows.append((*image.size, os.path.getsize(path), image.format, image.mode))
    return pd.DataFrame(rows, columns=["width", "height", "bytes", "format", "mode"])


def file_features(files: pd.DataFrame) -> np.ndarray:
    """Return (N, F) features of the rows of a `file_table` for a linear probe, none of them from the pixels.

    The features are

    - the ranks of width, height, bytes and bytes per pixel, so that a few very large files do not hide the others;
    - ten columns of 0 or 1 for each rank, one for each tenth of the ranks. With them, a linear probe also finds a class
      of middle-sized files;
    - 0 or 1 for each format and each mode.
    """
    sizes = files[["width", "height", "bytes"]].to_numpy(float)
    sizes = np.column_stack([sizes, sizes[:, 2] / (sizes[:, 0] * sizes[:, 1])])
    ranks = (rankdata(sizes, axis=0) - 0.5) / len(sizes)  # 0 to 1, the same for equal values
    tenths = np.eye(BINS)[(ranks * BINS).astype(int)].reshape(len(sizes), -1)
    formats = pd.get_dummies(files[["format", "mode"]]).to_numpy(float)
    return np.concatenate([ranks, tenths, formats], axis=1)


def erased(xray: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return an (H, W) uint8 X-ray in which the area of an (H, W) mask is filled in from its surroundings.

    If the answer of a network changes, it has used that area. Inpainting: Telea 2004, J. Graphics Tools 9:23.
    """
    with_soft_edge = cv2.dilate((mask != 0).astype(np.uint8), np.ones((3, 3), np.uint8))
    return cv2.inpaint(xray, with_soft_edge, 3, cv2.INPAINT_TELEA)


def probe_table(
    features: Mapping[str, np.ndarray], labels: np.ndarray, patients: Sequence, classes: Sequence[str], *, seed: int
) -> pd.DataFrame:
    """Return how well a linear probe tells the classes from features that should say nothing about them.

    The probe is a logistic regression (standardised features, L2, equal class weights). It predicts each image from
    the others, in folds that keep a patient's images together. Do not pass test images.

    Args:
        features: (N, F) arrays by name.
        labels: (N,) class indices.
        patients: (N,) patient ids.
        classes: names of the classes.
        seed: fixes the folds and the resampling.

    Returns:
        One row for each name in `features`, with the columns

        - roc_auc, low, high: the macro one-vs-rest ROC-AUC with its interval over patients; 0.5 is chance;
        - shortcut: whether the whole interval lies outside `NEAR_CHANCE`. Above it, a network can take the feature
          as a shortcut (Geirhos et al. 2020, arXiv:2004.07780; for chest X-rays of COVID-19, DeGrave et al. 2021,
          Nature Machine Intelligence 3). Below it, the feature tells the classes apart too, but in opposite ways in
          different folds.
    """
    rows = {}
    folds = min(FOLDS, int(np.bincount(labels).min()))
    # Without equal class weights, a probe that learnt nothing predicts the class frequencies of its training images. If
    # a fold holds out many images of a class, few are left for training, so the area would be far below 0.5.
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000, class_weight="balanced"))
    split = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    held_out = {"cv": split, "groups": patients, "method": "predict_proba"}
    for name, values in features.items():
        probabilities = cross_val_predict(probe, values.astype(float), labels, **held_out)
        predictions = Predictions(labels, probabilities, patients)
        scores = bootstrap_scores(predictions, classes, rng=np.random.default_rng(seed))
        area, low, high, _ = scores.set_index(["class", "metric"]).loc[(MACRO, "roc_auc")]
        rows[name] = area, low, high, low > NEAR_CHANCE[1] or high < NEAR_CHANCE[0]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["roc_auc", "low", "high", "shortcut"])


def near_duplicates(thumbnails: np.ndarray) -> np.ndarray:
    """Return (N,) group numbers of (N, H, W) thumbnails: the images of one group are copies or near-copies.

    Two images are joined if their Pearson correlation is above `DUPLICATE`. Groups grow by chains of such pairs.
    """
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
    starts = range(0, len(flat), CHUNK)
    pairs = [np.argwhere(flat[start : start + CHUNK] @ flat.T > DUPLICATE) + np.array([start, 0]) for start in starts]
    rows, columns = np.concatenate(pairs).T
    graph = coo_matrix((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(len(flat),) * 2)
    return connected_components(graph, directed=False)[1]


def duplicate_table(groups: np.ndarray, splits: Sequence[str], labels: Sequence[int]) -> pd.Series:
    """Return how many images have a near-duplicate: anywhere, in another split, and with another label.

    A near-duplicate in another split is a leak: the test repeats the training. If two near-duplicates have different
    labels, one label is wrong.

    Args:
        groups: (N,) group numbers of `near_duplicates`.
        splits: (N,) names of splits.
        labels: (N,) class indices.
    """
    by_group = pd.DataFrame({"split": list(splits), "label": list(labels)}).groupby(groups)
    different = by_group.transform("nunique")
    counts = {
        "images with a near-duplicate": by_group["split"].transform("size"),
        "… in another split": different["split"],
        "… with another label": different["label"],
    }
    return pd.Series({name: int((number > 1).sum()) for name, number in counts.items()})
