"""Compare maps with masks and boxes; chance maps are compared in the same way.

A map is (H, W) float64, not negative, at any scale. A mask is (H, W) bool at the same resolution. Boxes are (B, 4) rows
of x, y (upper left corner), width and height as fractions of the image. A score is NaN where there is nothing to find:
an empty mask, or no box. It is 0 for a map that is zero everywhere.
"""

import numpy as np
import pandas as pd

from cams.heatmaps import boxes_from_map
from evaluation.intervals import bootstrap_mean

# Wang et al. 2017 threshold a heatmap of 0 to 255 at 60 and at 180, and score it against these overlaps.
BOX_THRESHOLDS = (60 / 255, 180 / 255)
OVERLAPS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
SIGMA = 0.25  # of the centred Gaussian, as a share of the image's height and width


def peak(map_: np.ndarray) -> tuple[int, int] | None:
    """Return (row, column) of the greatest value of an (H, W) map; None if all values are zero.

    If several values are equally great (to 1 part in a million), the one nearest to the image's centre counts.
    Upsampling extends the outermost cell of a map as a plateau to the image's edge. The evidence is at the cell's
    centre, which is the inner end of the plateau.
    """
    if not map_.any():
        return None
    equals = np.argwhere(map_ >= map_.max() * (1 - 1e-6))
    distances = ((equals - (np.array(map_.shape) - 1) / 2) ** 2).sum(axis=1)
    return tuple(equals[distances.argmin()].tolist())


def peak_inside(map_: np.ndarray, mask: np.ndarray) -> float:
    """Return 1.0 if the peak of an (H, W) map lies inside the mask, else 0.0; NaN if the mask is empty.

    The pointing game: Zhang et al. 2016, "Top-down neural attention by excitation backprop", ECCV; here without their
    tolerance of 15 pixels.
    """
    place = peak(map_)
    return float(place is not None and mask[place]) if mask.any() else np.nan


def mass_inside(map_: np.ndarray, mask: np.ndarray) -> float:
    """Return the share, 0 to 1, of the sum of an (H, W) map that lies inside the mask; NaN if the mask is empty."""
    if not mask.any():
        return np.nan
    return float(map_[mask].sum() / map_.sum()) if map_.any() else 0.0


def centred_gaussian_map(shape: tuple[int, int]) -> np.ndarray:
    """Return an (H, W) map exp(-(y² + x²) / 2), y and x from the centre in units of `SIGMA` · height and width.

    This map only knows that the patient is in the middle. It is harder to beat than a uniform map.
    """
    y, x = ((np.arange(side) - (side - 1) / 2) / (SIGMA * side) for side in shape)
    return np.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / 2)


# Maps that do not depend on the network: tables show their scores beside those of the methods. The share of a uniform
# map inside a mask is the mask's share of the image. The expected hit rate of a random peak is the same number.
CHANCE = {"centred Gaussian": centred_gaussian_map, "uniform": np.ones}


def box_mask(boxes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return the (H, W) bool union of (B, 4) boxes: True where a pixel's centre lies in one.

    If a box is too narrow to contain a pixel's centre, the pixels that contain the box's centre are marked. Parts
    beyond the image are cut off.
    """
    mask = np.zeros(shape, dtype=bool)
    for x, y, width, height in boxes:
        mask[_centres_inside(y, height, shape[0]), _centres_inside(x, width, shape[1])] = True
    return mask


def _centres_inside(start: float, extent: float, size: int) -> slice:
    """Return the pixels of one axis whose centres lie in [start, start + extent); if none, the pixel at its middle."""
    # Floats are rounded because 0.3 * 5 - 0.5 is not 1. An edge on a pixel's centre then counts alike for every box.
    first, stop = (int(np.ceil(np.round(edge * size - 0.5, decimals=6))) for edge in (start, start + extent))
    if stop <= first:
        first = int(np.floor((start + extent / 2) * size))
        stop = first + 1
    return slice(max(first, 0), max(stop, 0))


def box_overlaps(detected: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """Return the (A, B) overlaps, 0 to 1, of (A, 4) detected boxes with (B, 4) true boxes.

    - iou: intersection over union;
    - iobb: intersection over the detected box (Wang et al. 2017, "ChestX-ray8", CVPR, arXiv:1705.02315). A
      detected box that is too small can have a large iobb; one that is too large cannot.
    """
    upper_left = np.maximum(detected[:, None, :2], truth[:, :2])
    lower_right = np.minimum((detected[:, :2] + detected[:, 2:])[:, None], truth[:, :2] + truth[:, 2:])
    intersection = np.maximum(lower_right - upper_left, 0).prod(axis=2)
    area, true_area = detected[:, 2:].prod(axis=1)[:, None], truth[:, 2:].prod(axis=1)
    return {"iou": intersection / (area + true_area - intersection), "iobb": intersection / area}


def best_overlap(map_: np.ndarray, boxes: np.ndarray) -> dict[str, float]:
    """Return how well the boxes around a map's high values overlap the true boxes.

    Detected boxes surround the regions above each of `BOX_THRESHOLDS` (shares of the map's maximum). The boxes of both
    thresholds are pooled, as in Wang et al. 2017.

    Args:
        map_: (H, W), the map for one finding.
        boxes: (B, 4), the true boxes of this finding. Their parts beyond the image are left out, because nothing
            can be detected there.

    Returns:
        - iou, iobb: the best overlap of any detected box with any true box, 0 to 1. 0 where nothing is detected, NaN
          where there is no true box;
        - detected: the number of detected boxes.
    """
    detected = np.concatenate([boxes_from_map(map_, threshold) for threshold in BOX_THRESHOLDS])
    corners = np.clip(np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]), 0, 1)
    truth = np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]])
    truth = truth[(truth[:, 2:] > 0).all(axis=1)]
    overlaps = box_overlaps(detected, truth).items()
    best = {name: values.max(initial=0.0) if len(truth) else np.nan for name, values in overlaps}
    return best | {"detected": len(detected)}


def overlap_table(located: pd.DataFrame, *, rng: np.random.Generator) -> pd.DataFrame:
    """Return the share of cases whose best overlap with a true box is above each of `OVERLAPS`.

    Args:
        located: `cam_scores.MapScores.located`: a row for each case and kind of map, with the columns map, label,
            patient and those of `best_overlap`.
        rng: draws the resamples. All rows of one finding share them, so rows differ by their maps alone.

    Returns:
        One row for each (map, finding, score). The findings are the labels, and "all" for all cases together; the
        scores are "IoU" and "IoBB". Columns:

        - images: how many cases had a true box;
        - regions: mean number of detected boxes. With many small boxes, one may have a large IoBB by chance;
        - at 0.1, …: the shares;
        - at 0.1 low, at 0.1 high, …: their intervals over patients, see `intervals.bootstrap_mean`.
    """
    seed = int(rng.integers(2**63))
    rows = {
        (kind, finding, score): _shares_above(cases.dropna(subset=score.lower()), score.lower(), seed)
        for kind, of_kind in located.groupby("map", sort=False)
        for finding, cases in [*of_kind.groupby("label"), ("all", of_kind)]
        for score in ("IoU", "IoBB")
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["map", "finding", "score"])


def _shares_above(cases: pd.DataFrame, column: str, seed: int) -> dict[str, float]:
    """Return a row of `overlap_table` for cases that have a true box."""
    row, ends = {"images": len(cases), "regions": float(cases["detected"].mean())}, {}
    for overlap in OVERLAPS:
        rng, name = np.random.default_rng(seed), f"at {overlap:g}"
        share = bootstrap_mean(cases[column] > overlap, cases["patient"], proportion=True, rng=rng)
        row[name] = share.estimate
        ends |= {f"{name} low": share.low, f"{name} high": share.high}
    return row | ends
