"""The lesions of the diseases in a synthetic chest radiograph.

Their look follows the Fleischner Society's glossary (Hansell et al., Radiology 2008;246:697-722: air
bronchogram, consolidation, ground-glass opacity, reticulation). The numbers are plausible, not measured.
`datasets/phantom_body.py` explains the coordinates.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from datasets.phantom_body import Film, cage_width, hilum, thorax, tree


class Lesion(NamedTuple):
    """What a disease adds to the lungs."""

    mask: np.ndarray  # (S, S) bool, the region that a radiologist would outline
    filled: np.ndarray | float  # (S, S) share 0-1 of the air that is replaced by tissue or fluid
    streaks: np.ndarray | float = 0.0  # (S, S) cm of tissue in thickened lines


def no_lesion(film: Film, patient: SimpleNamespace, mask: np.ndarray, rng: np.random.Generator) -> Lesion:
    """Return the empty lesion of a healthy chest."""
    return Lesion(np.zeros_like(mask), 0.0)


def ground_glass(film: Film, patient: SimpleNamespace, mask: np.ndarray, rng: np.random.Generator) -> Lesion:
    """Return hazy patches along the pleura of both lungs, peripheral and basal; the vessels stay visible."""
    haze = np.zeros_like(film.x)
    for sign in (-1, 1):
        for t in rng.uniform(0.42, 0.9, rng.integers(3, 6)):
            x, y = thorax(patient, (sign * cage_width(t) * rng.uniform(0.74, 0.94), t)).tolist()
            wide, tall = rng.uniform(0.05, 0.09), rng.uniform(0.07, 0.12)
            patch = np.exp(-0.5 * (((film.x - x) / wide) ** 2 + ((film.y - y) / tall) ** 2) ** 2)
            haze = np.maximum(haze, patch * rng.uniform(0.75, 1.0))
    ragged = np.clip(haze + 0.28 * film.clouds(rng, 14) * haze, 0, 1)
    region = mask & (film.soften(ragged, 0.006) > 0.4)
    filled = film.soften(ragged, 0.008) * rng.uniform(0.36, 0.56) * (1 + 0.15 * film.clouds(rng, 40))
    return Lesion(region, np.clip(filled, 0, 0.8))


def consolidation(film: Film, patient: SimpleNamespace, mask: np.ndarray, rng: np.random.Generator) -> Lesion:
    """Return one partly filled lobe: dense, with a sharp edge at the fissure, often with air bronchograms."""
    sign = int(rng.choice((-1, 1)))
    upper = rng.random() < 0.45
    # The lower edge of an upper region is nearly level; the upper edge of a lower region falls outwards.
    fissure_t = rng.uniform(0.40, 0.50) if upper else rng.uniform(0.52, 0.62)
    slope = rng.uniform(-0.1, 0.05) if upper else rng.uniform(0.0, 0.35)
    across = film.x * sign / patient.cage
    t = (film.y - patient.apex) / patient.lung_length
    fissure = fissure_t + slope * (across - 0.5) + rng.uniform(-0.12, 0.12) * (across - 0.5) ** 2
    side = (fissure - t) if upper else (t - fissure)
    # The edge is sharp in the right lung only: its minor fissure is parallel to the rays.
    sharp = np.clip(side * patient.lung_length / (0.011 if sign < 0 else 0.03) + 0.5, 0, 1)
    centre, wide, tall = rng.uniform(0.35, 0.8), rng.uniform(0.3, 0.55), rng.uniform(0.2, 0.45)
    lobe = np.exp(-0.5 * (((across - centre) / wide) ** 2 + (side / tall) ** 2) ** 1.5)
    lobe = np.clip(1.3 * lobe * (1 + 0.25 * film.clouds(rng, 12)), 0, 1) * sharp * (across > 0)
    filled = lobe * rng.uniform(0.55, 0.9)
    if rng.random() < 0.6:
        filled = filled * (1 - 0.6 * tree(film, patient, rng, 0.014))
    return Lesion(mask & (film.soften(lobe, 0.004) > 0.5), filled)


def interstitial_lines(film: Film, root: np.ndarray, sign: int, extent: float, rng: np.random.Generator) -> np.ndarray:
    """Return (S, S) 0-1: thickened interstitium of one lung, within about `extent` of its `root` (body coordinates)."""
    heading, length = rng.uniform(-np.pi / 2, np.pi / 2, 170), rng.uniform(0.02, 0.08, (170, 1))
    outwards = np.stack([sign * np.cos(heading) * 0.9, np.sin(heading) * 1.25], axis=1)
    first = root + outwards * np.abs(rng.normal(0, 0.8 * extent, (170, 1)))
    bent = heading + rng.normal(0, 0.55, 170)
    second = first + length * np.stack([sign * np.cos(bent), np.sin(bent)], axis=1)
    streaks = np.stack([first, second], axis=1)
    knots = root + rng.normal(0, extent, (380, 2)) * (0.9, 1.25)
    net = np.stack([knots, knots + rng.normal(0, 0.014, (380, 2))], axis=1)
    # Peribronchial cuffing: bronchi parallel to the rays appear as rings.
    angle = np.linspace(0, 2 * np.pi, 12)
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1) * rng.uniform(0.006, 0.011, (8, 1, 1))
    cuffs = ring + (root + rng.normal(0, 0.05, (8, 2)) * (1, 1.4))[:, None]
    return film.stroke((net, 0.0035, 0.7), (streaks, 0.0045, 0.9), (cuffs, 0.0045, 1.0))


def interstitial(film: Film, patient: SimpleNamespace, mask: np.ndarray, rng: np.random.Generator) -> Lesion:
    """Return streaks, a fine net, thickened bronchial walls and little haze, in both lungs from the hila outwards."""
    extent, strength = rng.uniform(0.16, 0.25), rng.uniform(0.9, 1.4)
    envelope, lines = np.zeros_like(film.x), np.zeros_like(film.x)
    for sign in (-1, 1):
        root = hilum(patient, sign) + np.array([sign * 0.03, 0.03])
        x, y = root.tolist()
        far = np.hypot((film.x - x) / 0.8, (film.y - y) / 1.25) / (extent * rng.uniform(0.85, 1.15))
        envelope = np.maximum(envelope, np.exp(-0.5 * (far * far) ** 2))
        lines = np.maximum(lines, interstitial_lines(film, root, sign, extent, rng))
    envelope = np.clip(envelope * (1 + 0.15 * film.clouds(rng, 8)), 0, 1)
    uneven = np.clip(1 + 0.4 * film.clouds(rng, 11), 0.2, 2)
    lines = 2.0 * strength * film.soften(lines, 0.0012) * envelope * uneven
    # The mask is the region where the drawn lines are dense.
    lung = mask.astype(np.float32)
    density = film.soften(lines * lung, 0.04) / np.maximum(film.soften(lung, 0.04), 0.05)
    region = mask & (density > 0.27 * density[mask].max())
    return Lesion(region, 0.1 * strength * film.soften(envelope, 0.01), lines)


LESIONS: dict[str, Callable[..., Lesion]] = {
    "COVID-19": ground_glass,
    "Lung Opacity": consolidation,
    "Normal": no_lesion,
    "Viral Pneumonia": interstitial,
}
