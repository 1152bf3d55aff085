"""What in the data, other than disease, could fool a network: probes that must fail, and near-duplicates."""

import os
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import pandas as pd
from PIL import Image
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from metrics import MACRO, bootstrap_scores
from utils import FORMATS, read_xray

NEAR_CHANCE = (0.4, 0.6)  # ROC-AUC: a probe whose whole interval lies outside has found a shortcut
BINS = 10  # of sizes: more would fit noise in a few hundred files


def thumbnails(paths: Sequence[str], size: int = 32) -> np.ndarray:
    """Return (N, size, size) uint8 small versions of the X-rays; each pixel is the mean of the area it covers."""
    return np.stack(
        [cv2.resize(read_xray(path), (size, size), interpolation=cv2.INTER_AREA) for path in paths]
    )


def border_pixels(thumbnails: np.ndarray, *, rim: int = 2) -> np.ndarray:
    """Return (N, P) the outermost `rim` pixels of (N, H, W) thumbnails: no lung lies there, so nothing in them
    should tell a class.
    """
    inside = np.zeros(thumbnails.shape[1:], dtype=bool)
    inside[rim:-rim, rim:-rim] = True
    return thumbnails[:, ~inside]


def brightness(thumbnails: np.ndarray) -> np.ndarray:
    """Return (N, 2) mean and standard deviation of (N, H, W) images: exposure, not anatomy."""
    flat = thumbnails.reshape(len(thumbnails), -1)
    return np.stack([flat.mean(axis=1), flat.std(axis=1)], axis=1)


def file_table(paths: Sequence[str]) -> pd.DataFrame:
    """Return a row a file: width and height in pixels, bytes, format and colour mode (as "JPEG", "RGB")."""
    rows = []
    for path in paths:
        with Image.open(path, formats=FORMATS) as image:
            rows.append((*image.size, os.path.getsize(path), image.format, image.mode))
    return pd.DataFrame(rows, columns=["width", "height", "bytes", "format", "mode"])


def file_features(files: pd.DataFrame) -> np.ndarray:
    """Return (N, F) what the rows of a `file_table` tell without their pixels, for a linear probe: 0 and 1 for the
    format, the mode and the tenth of the files that the width, height, bytes and bytes a pixel lie in, and
    the ranks of these. So neither a few very large files nor a class of middle size hides anything.
    """
    sizes = files[["width", "height", "bytes"]].to_numpy(float)
    sizes = np.column_stack([sizes, sizes[:, 2] / (sizes[:, 0] * sizes[:, 1])])
    ranks = (rankdata(sizes, axis=0) - 0.5) / len(sizes)  # in 0..1, the same for equal values
    tenths = np.eye(BINS)[(ranks * BINS).astype(int)].reshape(len(sizes), -1)
    kinds = pd.get_dummies(files[["format", "mode"]]).to_numpy(float)
    return np.concatenate([ranks, tenths, kinds], axis=1)


def erased(xray: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return an (H, W) uint8 X-ray in which what an (H, W) mask covers is painted over from its surroundings (Telea
    2004, J. Graphics Tools 9:23): a network whose answer changes has used it.
    """
    around = cv2.dilate(
        (np.asarray(mask) != 0).astype(np.uint8), np.ones((3, 3), np.uint8)
    )  # its soft edge too
    return cv2.inpaint(xray, around, 3, cv2.INPAINT_TELEA)


def probe_table(
    features: Mapping[str, np.ndarray],
    labels: np.ndarray,
    patients: Sequence,
    classes: Sequence[str],
    *,
    folds: int = 5,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return how well a linear probe tells the classes from features that should say nothing of them.

    `features` holds (N, F) arrays by name. A logistic regression (standardised, L2, classes weighing the same)
    predicts each image from the others in `folds` folds that keep a patient together; the macro one-vs-rest
    ROC-AUC of those predictions, with its interval over patients, is a row. 0.5 is chance. "shortcut" says
    whether the whole interval lies outside `NEAR_CHANCE`: above, the feature is one that a network can take
    (Geirhos et al. 2020, arXiv:2004.07780; DeGrave et al. 2021, Nature Machine Intelligence 3, for chest X-rays
    of COVID-19); below, it tells the classes apart too, but the other way round in other folds. Give it no
    test images.
    """
    rows = {}
    smallest = int(np.bincount(labels).min())
    for name, values in features.items():
        # Unweighted, a probe that found nothing would rank the folds by their shares of the classes: the more
        # images of a class are held out, the fewer it was fitted on, which gives areas far below 0.5.
        probe = make_pipeline(
            StandardScaler(), LogisticRegression(C=0.1, max_iter=1000, class_weight="balanced")
        )
        split = StratifiedGroupKFold(min(folds, smallest), shuffle=True, random_state=seed)
        probabilities = cross_val_predict(
            probe, values.astype(float), labels, groups=patients, cv=split, method="predict_proba"
        )
        scores = bootstrap_scores(
            labels, probabilities, patients, classes, resamples=resamples, rng=np.random.default_rng(seed)
        )
        found = scores[(scores["class"] == MACRO) & (scores["metric"] == "roc_auc")].iloc[0]
        rows[name] = {"roc_auc": found["estimate"], "low": found["low"], "high": found["high"]}
        rows[name]["shortcut"] = bool(found["low"] > NEAR_CHANCE[1] or found["high"] < NEAR_CHANCE[0])
    return pd.DataFrame.from_dict(rows, orient="index")


def near_duplicates(thumbnails: np.ndarray, *, correlation: float = 0.985, chunk: int = 4096) -> np.ndarray:
    """Return (N,) group numbers: images of one group are copies of one another, or nearly.

    Two (H, W) thumbnails whose Pearson correlation is above `correlation` are joined, and groups grow by
    chains. At 32 x 32 pixels, X-rays of different patients stay below 0.975, while copies that were resized,
    compressed or brightened lie above 0.99.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
    pairs = []
    for start in range(0, len(flat), chunk):
        rows, columns = np.nonzero(flat[start : start + chunk] @ flat.T > correlation)
        pairs.append(np.stack([rows + start, columns]))
    rows, columns = np.concatenate(pairs, axis=1)
    graph = coo_matrix((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(len(flat),) * 2)
    return connected_components(graph, directed=False)[1]


def duplicate_table(groups: np.ndarray, splits: Sequence[str], labels: Sequence[int]) -> pd.Series:
    """Return how many images have a near-duplicate, how many of them in another split (a leak: the test
    repeats the training) and how many with another label (one of the two is wrong).
    """
    frame = pd.DataFrame({"group": groups, "split": list(splits), "label": list(labels)})
    by_group = frame.groupby("group").transform("nunique")
    return pd.Series(
        {
            "images with a near-duplicate": int(
                frame.groupby("group")["split"].transform("size").gt(1).sum()
            ),
            "… in another split": int(by_group["split"].gt(1).sum()),
            "… with another label": int(by_group["label"].gt(1).sum()),
        }
    )
