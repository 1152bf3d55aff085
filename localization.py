"""Maps against masks and boxes, and against chance.

Maps (N, H, W), non-negative, any scale; masks (N, H, W), nonzero = inside, at the same resolution. An image
whose mask is empty has nothing to find: its scores are NaN and every mean leaves it out. A map that is zero
everywhere found nothing: its scores are 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from metrics import bootstrap_mean


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


def peak_inside(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return (N,) 1.0 where the map's peak lies inside the mask, else 0.0; NaN where the mask is empty.

    The pointing game (Zhang et al. 2016, "Top-down neural attention by excitation backprop", ECCV), without
    its tolerance of 15 pixels.
    """
    maps, masks = _checked(maps, masks)
    peaks = [peak(map_) for map_ in maps]
    hits = np.array([float(at is not None and mask[at]) for at, mask in zip(peaks, masks, strict=True)])
    return np.where(masks.any(axis=(1, 2)), hits, np.nan)


def mass_inside(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return (N,) shares, 0..1, of the map's sum that lies inside the mask; NaN where the mask is empty."""
    maps, masks = _checked(maps, masks)
    total = maps.sum(axis=(1, 2))
    inside = (maps * masks).sum(axis=(1, 2))
    share = np.divide(inside, total, out=np.zeros_like(total), where=total > 0)
    return np.where(masks.any(axis=(1, 2)), share, np.nan)


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


def pointing_table(
    maps: np.ndarray,
    masks: np.ndarray,
    patients: Sequence,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Return the maps' scores beside chance: rows "map", "centred Gaussian", "uniform".

    Columns hit_rate, hit_rate_low, hit_rate_high (mean of `peak_inside`), mass, mass_low, mass_high (mean of
    `mass_inside`), with bootstrap intervals over patients, all from the same resamples, and `images`: how
    many had anything to find. The uniform map's hit rate is the expected one.
    """
    maps, masks = _checked(maps, masks)
    gaussian, uniform = (
        np.broadcast_to(make(maps.shape[1:]), maps.shape) for make in (centred_gaussian_map, uniform_map)
    )
    area = mass_inside(uniform, masks)
    scores = {
        "map": (peak_inside(maps, masks), mass_inside(maps, masks)),
        "centred Gaussian": (peak_inside(gaussian, masks), mass_inside(gaussian, masks)),
        "uniform": (area, area),
    }
    seed = int(rng.integers(2**63))
    rows = {}
    for name, values in scores.items():
        # The same seed for all: the rows differ by the maps, not by which patients were drawn.
        hit, mass = (
            bootstrap_mean(
                value, patients, resamples=resamples, confidence=confidence, rng=np.random.default_rng(seed)
            )
            for value in values
        )
        rows[name] = {**_columns("hit_rate", hit), **_columns("mass", mass)}
    table = pd.DataFrame.from_dict(rows, orient="index")
    table["images"] = int(masks.any(axis=(1, 2)).sum())
    return table


def _columns(name: str, interval: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))


def _checked(maps: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (N, H, W) float64 maps and bool masks, or say what does not fit."""
    maps, masks = np.asarray(maps, dtype=np.float64), np.asarray(masks) != 0
    if maps.ndim != 3 or maps.shape != masks.shape:
        raise ValueError(
            f"maps {maps.shape} and masks {masks.shape} must both be (N, H, W) at one resolution: "
            "upsample the maps to the masks (not the masks down: small lesions would vanish)"
        )
    if not np.isfinite(maps).all() or (maps < 0).any():
        raise ValueError("maps must be finite and non-negative: keep the positive part, np.maximum(maps, 0)")
    return maps, masks
