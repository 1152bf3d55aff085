"""Maps against masks and boxes, and against chance.

Maps (N, H, W), non-negative, any scale; masks (N, H, W), nonzero = inside, at the same resolution; or a
sequence of N maps and one of N masks, (H, W) each, where the images differ in size. Boxes are (B, 4) rows of
x, y (upper left corner), width and height as fractions of the image. An image whose mask is empty, or that has
no box, has nothing to find: its scores are NaN and every mean leaves it out. A map that is zero everywhere
found nothing: its scores are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from heatmaps import boxes_from_map
from metrics import bootstrap_mean

Arrays = np.ndarray | Sequence[np.ndarray]

# Wang et al. 2017 threshold a heatmap of 0..255 at 60 and at 180 and score against these overlaps.
BOX_THRESHOLDS = (60 / 255, 180 / 255)
OVERLAPS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def peak(map_: np.ndarray) -> tuple[int, int] | None:
    """Return (row, column) of the greatest value of an (H, W) map; None if all is zero.

    Of equals (to 1 part in a million) the one nearest to the image's centre. Upsampling continues the
    outermost cell of a map as a plateau up to the image's edge: its inner end is the cell's centre, which
    is where the evidence is, whereas the first in reading order lies at the edge.
    """
    map_ = np.asarray(map_)
    if not map_.any():
        return None
    equals = np.argwhere(map_ >= map_.max() * (1 - 1e-6))
    distances = ((equals - (np.array(map_.shape) - 1) / 2) ** 2).sum(axis=1)
    row, column = equals[distances.argmin()]
    return int(row), int(column)


def peak_inside(maps: Arrays, masks: Arrays, *, tolerance: int = 0) -> np.ndarray:
    """Return (N,) 1.0 where the map's peak lies inside the mask, else 0.0; NaN where the mask is empty.

    The pointing game (Zhang et al. 2016, "Top-down neural attention by excitation backprop", ECCV). A peak
    within `tolerance` pixels (Euclidean) of the mask counts as inside: 15 in that paper.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance {tolerance} must not be negative: it is a distance in pixels")
    return _per_image(lambda map_, mask: float(_near(peak(map_), mask, tolerance)), maps, masks)


def _near(at: tuple[int, int] | None, mask: np.ndarray, tolerance: int) -> bool:
    if at is None or mask[at] or not tolerance:
        return at is not None and bool(mask[at])
    rows, columns = np.nonzero(mask)
    return bool(((rows - at[0]) ** 2 + (columns - at[1]) ** 2 <= tolerance**2).any())


def mass_inside(maps: Arrays, masks: Arrays) -> np.ndarray:
    """Return (N,) shares, 0..1, of the map's sum that lies inside the mask; NaN where the mask is empty."""

    def share(map_: np.ndarray, mask: np.ndarray) -> float:
        total = map_.sum()
        return map_[mask].sum() / total if total > 0 else 0.0

    return _per_image(share, maps, masks)


def uniform_map(shape: tuple[int, int]) -> np.ndarray:
    """Return an (H, W) map that prefers no place: its mass inside a mask is the mask's share of the image,
    and so is the expected hit of a peak put anywhere at random.
    """
    return np.ones(shape)


def centred_gaussian_map(shape: tuple[int, int], *, sigma_fraction: float = 0.25) -> np.ndarray:
    """Return an (H, W) map exp(-(y² + x²) / 2), y and x from the centre in units of `sigma_fraction` of the
    height and the width.

    What a map scores that knows only that the patient is in the middle: the chance to beat, a harder one than
    the uniform map.
    """
    if sigma_fraction <= 0:
        raise ValueError(
            f"sigma_fraction {sigma_fraction} must be positive: 0.25 is a quarter of the image's side"
        )
    y, x = ((np.arange(side) - (side - 1) / 2) / (sigma_fraction * side) for side in shape)
    return np.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / 2)


# What maps score that know nothing of the network: each figure stands beside theirs.
CHANCE = {"centred Gaussian": centred_gaussian_map, "uniform": uniform_map}


def box_masks(boxes: np.ndarray | Sequence, shape: tuple[int, int]) -> np.ndarray:
    """Return the (H, W) bool union of (B, 4) boxes: True where a pixel's centre lies in one.

    A box that holds no pixel's centre along an axis, being narrower than a pixel, still marks the pixels that
    its own centre lies in. What reaches beyond the image is cut off.
    """
    mask = np.zeros(shape, dtype=bool)
    for x, y, width, height in _as_boxes(boxes):
        mask[_centres_inside(y, height, shape[0]), _centres_inside(x, width, shape[1])] = True
    return mask


def _centres_inside(start: float, extent: float, size: int) -> slice:
    """Return the pixels of one axis whose centres lie in [start, start + extent), or that hold its centre."""
    # Rounded: 0.3 * 5 - 0.5 is not 1, and an edge on a pixel's centre must fall to one side for every box.
    first, stop = (int(np.ceil(np.round(edge * size - 0.5, decimals=6))) for edge in (start, start + extent))
    if stop <= first:
        first = int(np.floor((start + extent / 2) * size))
        stop = first + 1
    return slice(max(first, 0), max(stop, 0))


def iou(a: np.ndarray | Sequence, b: np.ndarray | Sequence) -> np.ndarray:
    """Return (A, B) intersections over unions, 0..1, of (A, 4) with (B, 4) boxes."""
    a, b = _as_boxes(a), _as_boxes(b)
    intersection = _intersections(a, b)
    return intersection / (_areas(a)[:, None] + _areas(b)[None, :] - intersection)


def iobb(detected: np.ndarray | Sequence, truth: np.ndarray | Sequence) -> np.ndarray:
    """Return (A, B) shares, 0..1, of the area of each of (A, 4) detected boxes that lies in each true one.

    "Intersection over the detected bounding box", IoBB, of Wang et al. 2017, "ChestX-ray8", CVPR,
    arXiv:1705.02315: unlike `iou`, it forgives a detection that is too small, but not one that is too large.
    """
    detected, truth = _as_boxes(detected), _as_boxes(truth)
    return _intersections(detected, truth) / _areas(detected)[:, None]


class BoxOverlaps(NamedTuple):
    """Of M maps: the best IoU and the best IoBB, (M,) each, 0..1, that any detected box has with any true box,
    and how many boxes were detected, (M,).
    """

    iou: np.ndarray
    iobb: np.ndarray
    detected: np.ndarray


def best_overlaps(
    maps: Arrays, boxes: Sequence[np.ndarray], *, thresholds: Sequence[float] = BOX_THRESHOLDS
) -> BoxOverlaps:
    """Return how well boxes drawn around a map's high values meet the true ones.

    A map is one image's for one finding, `boxes` its (B, 4) true boxes of that finding. Detected are the
    regions above each of the thresholds (shares of the map's maximum), pooled, as in Wang et al. 2017. The best
    overlap is 0 where nothing is detected and NaN where there is no true box.
    """
    _check_lengths(maps, boxes=boxes)
    best, detected = [], []
    for map_, truth in zip(maps, boxes, strict=True):
        map_ = _checked_map(map_)
        found = np.concatenate([boxes_from_map(map_, threshold) for threshold in thresholds])
        truth = _inside_image(truth)  # a box that lies outside altogether is none
        best.append([score(found, truth).max(initial=0.0) if len(truth) else np.nan for score in (iou, iobb)])
        detected.append(len(found))
    ious, iobbs = np.array(best, dtype=np.float64).reshape(-1, 2).T
    return BoxOverlaps(ious, iobbs, np.array(detected, dtype=np.int64))


def overlap_table(
    found: Mapping[str, BoxOverlaps],
    labels: Sequence[str],
    patients: Sequence,
    *,
    overlaps: Sequence[float] = OVERLAPS,
    resamples: int = 1000,
    confidence: float = 0.95,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Return the share of M maps whose best overlap with a true box is above each of `overlaps`.

    `found`: what `best_overlaps` says of each kind of map, chance among them; `labels` and `patients`: (M,) the
    finding and the patient of each map. Rows (map, finding, score): the kinds; each of the labels and, pooled,
    "all"; "IoU" and "IoBB". Columns `images` (how many had a true box), `regions` (how many a map were detected on
    average: of many small ones, one meets a box by chance, so read IoBB beside it) and `at 0.1` …; behind them
    all, so that the shares can be read side by side, `at 0.1 low`, `at 0.1 high` …: intervals over patients (see
    `metrics.bootstrap_mean`), of one finding all from the same resamples.
    """
    labels, patients = np.asarray(labels), np.asarray(patients)
    findings = {str(label): labels == label for label in np.unique(labels)}
    findings["all"] = np.ones(len(labels), dtype=bool)
    seed = int(rng.integers(2**63))
    rows = {
        (name, finding, score): _shares_above(
            # The same seed for all: rows differ by the maps, not by which patients were drawn.
            values[chosen],
            best.detected[chosen],
            patients[chosen],
            overlaps,
            seed,
            resamples=resamples,
            confidence=confidence,
        )
        for name, best in found.items()
        for finding, chosen in findings.items()
        for score, values in (("IoU", best.iou), ("IoBB", best.iobb))
    }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis(["map", "finding", "score"])
    shares = [f"at {overlap:g}" for overlap in overlaps]
    first = ["images", "regions", *shares]
    return table[[*first, *(column for column in table if column not in first)]]


def _shares_above(
    values: np.ndarray,
    detected: np.ndarray,
    patients: np.ndarray,
    overlaps: Sequence[float],
    seed: int,
    **bootstrap: float,
) -> dict[str, float]:
    known = ~np.isnan(values)
    row = {"images": int(known.sum()), "regions": float(detected[known].mean()) if known.any() else np.nan}
    for overlap in overlaps:
        above = np.where(np.isnan(values), np.nan, values > overlap)
        rng = np.random.default_rng(seed)
        interval = bootstrap_mean(above, patients, proportion=True, rng=rng, **bootstrap)
        at = f"at {overlap:g}"
        row |= dict(zip((at, f"{at} low", f"{at} high"), interval, strict=True))
    return row


def _as_boxes(boxes: np.ndarray | Sequence) -> np.ndarray:
    """Return (B, 4) float64 boxes, or say what is wrong with them."""
    boxes = np.asarray(boxes, dtype=np.float64)
    boxes = boxes if boxes.size else boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be (B, 4), not {boxes.shape}: rows of x, y, width and height")
    if not (np.isfinite(boxes).all() and (boxes[:, 2:] > 0).all()):
        raise ValueError("boxes must be finite, their width and height positive: leave the others out")
    return boxes


def _inside_image(boxes: np.ndarray | Sequence) -> np.ndarray:
    """Return (B, 4) boxes without what reaches beyond the image, where nothing can be detected."""
    boxes = _as_boxes(boxes)
    corners = np.clip(np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]), 0, 1)
    inside = np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]])
    return inside[(inside[:, 2:] > 0).all(axis=1)]


def _areas(boxes: np.ndarray) -> np.ndarray:
    return boxes[:, 2] * boxes[:, 3]


def _intersections(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the (A, B) areas that boxes have in common."""
    upper_left = np.maximum(a[:, None, :2], b[None, :, :2])
    lower_right = np.minimum((a[:, :2] + a[:, 2:])[:, None], (b[:, :2] + b[:, 2:])[None, :])
    return np.maximum(lower_right - upper_left, 0).prod(axis=2)


def _per_image(score: Callable[[np.ndarray, np.ndarray], float], maps: Arrays, masks: Arrays) -> np.ndarray:
    """Return (N,) scores of float64 map and bool mask, NaN where the mask is empty, one image at a time: a
    copy of all in float64 would not fit into memory.
    """
    _check_shapes(maps, masks)
    pairs = ((_checked_map(map_), np.asarray(mask) != 0) for map_, mask in zip(maps, masks, strict=True))
    return np.array([score(map_, mask) if mask.any() else np.nan for map_, mask in pairs], dtype=np.float64)


def _check_lengths(maps: Arrays, **others: Sequence) -> None:
    for name, other in others.items():
        if len(other) != len(maps):
            raise ValueError(f"{len(other)} {name} for {len(maps)} maps: pass one per map, in their order")


def _check_shapes(maps: Arrays, masks: Arrays) -> None:
    """Say which maps and masks do not fit each other."""
    if isinstance(maps, np.ndarray) and isinstance(masks, np.ndarray):
        axes, shapes = 3, [(maps.shape, masks.shape)]
    else:
        _check_lengths(maps, masks=masks)
        axes, shapes = 2, [(np.shape(a), np.shape(b)) for a, b in zip(maps, masks, strict=True)]
    for of_map, of_mask in shapes:
        if len(of_map) != axes or of_map != of_mask:
            raise ValueError(
                f"maps {of_map} and masks {of_mask} must both be (N, H, W) at one resolution: "
                "upsample the maps to the masks (not the masks down: small lesions would vanish)"
            )


def _checked_map(map_: np.ndarray) -> np.ndarray:
    """Return a map in float64, or say what is wrong with it."""
    map_ = np.asarray(map_, dtype=np.float64)
    if not np.isfinite(map_).all() or (map_ < 0).any():
        raise ValueError("maps must be finite and non-negative: keep the positive part, np.maximum(maps, 0)")
    return map_
