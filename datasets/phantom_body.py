"""The synthetic patient and the film: pose, body coordinates, and the tree of vessels that lungs and lesions use.

The patient's right is on the image's left, as radiologists see it. Lengths in the image plane are fractions of the
image. `t` runs from the lung apex (0) to the costophrenic angle (1). `sign` is -1 for the lung on the image's left and
1 for the other lung. (S, S) pictures have row 0 at the top.
"""

from types import SimpleNamespace

import cv2
import numpy as np
from numpy.typing import ArrayLike

# What varies between patients and exposures: each value is uniform between two limits, whatever the class.
VARIATION = {
    "zoom": (0.95, 1.14),
    "tilt": (-0.06, 0.06),  # radians
    "shift_x": (-0.03, 0.03),
    "shift_y": (-0.02, 0.03),
    "apex": (0.09, 0.14),
    "lung_length": (0.66, 0.78),  # inspiration depth
    "cage_aspect": (0.49, 0.60),  # half width of the rib cage / lung length
    "turn": (-0.02, 0.02),  # patient turned about the long axis: mediastinum against spine
    "heart": (0.85, 1.2),
    "knob": (0.75, 1.15),
    "right_dome": (0.78, 0.86),  # t
    "left_dome_below": (0.02, 0.05),
    "depth": (18.0, 27.0),  # cm, front to back
    "chest_wall": (0.035, 0.12),
    "breast": (-2.0, 3.0),  # cm; negative: no shadow
    "breast_drop": (0.70, 0.92),  # t of the lower edge
    "bubble": (-0.05, 0.07),  # gastric bubble's half width; negative: none
    "arm_angle": (0.3, 0.85),
    "rib_slope": (0.85, 1.15),
    "rib_mass": (0.7, 1.3),
    "spine_mass": (0.6, 1.2),
    "vessel_mass": (0.8, 1.3),
    "photons": (8.3, 9.8),  # log of the number of photons per pixel of a 224 px image, in air
    "blur": (0.0005, 0.0022),
    "scatter": (0.01, 0.05),
    "window_low": (0.7, 1.5),
    "window_high": (0.3, 1.7),
    "gamma": (0.75, 1.3),
    "fog": (0.0, 0.09),  # what the display adds to black
}

# Half width of the rib cage (1 = widest) at t.
CAGE_T = (-0.06, -0.02, 0.0, 0.03, 0.08, 0.15, 0.25, 0.38, 0.55, 0.75, 1.0, 1.3)
CAGE_WIDTH = (0.30, 0.40, 0.46, 0.55, 0.66, 0.76, 0.86, 0.94, 0.99, 1.0, 0.98, 0.92)


def cage_width(t: ArrayLike) -> np.ndarray:
    """Return the half width of the rib cage at `t`, 1 = widest; lungs and ribs follow it."""
    return np.interp(t, CAGE_T, CAGE_WIDTH)


def developed(canvas: np.ndarray) -> np.ndarray:
    """Return (S, S) float32 0-1 from a (2S, 2S) uint8 canvas."""
    size = len(canvas) // 2
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


class Film:
    """A square film and the patient's pose on it. It draws shapes that are given in body coordinates.

    Body coordinates: x from the midline, positive towards the image's right; y from 0 (top) to 1 (bottom).
    """

    def __init__(self, size: int, patient: SimpleNamespace):
        self.size, self.zoom = size, patient.zoom
        cos, sin = np.cos(patient.tilt) * patient.zoom, np.sin(patient.tilt) * patient.zoom
        self._turn = np.array([[cos, -sin], [sin, cos]])
        self._centre = np.array([0.5 + patient.shift_x, 0.5 + patient.shift_y])
        steps = (np.arange(size) + 0.5) / size
        across = np.stack(np.meshgrid(steps, steps), axis=-1) - self._centre
        body = across @ np.linalg.inv(self._turn).T
        self.x = np.ascontiguousarray(body[..., 0], dtype=np.float32)
        self.y = np.ascontiguousarray(body[..., 1] + 0.5, dtype=np.float32)

    def _pixels(self, points: ArrayLike) -> np.ndarray:
        """Return body points (..., 2) as int32, in 1/16 pixels of a canvas of twice the size, for smooth edges."""
        places = (np.asarray(points) - (0, 0.5)) @ self._turn.T + self._centre
        return np.round((places * 2 * self.size - 0.5) * 16).astype(np.int32)

    def fill(self, *outlines: ArrayLike) -> np.ndarray:
        """Return (S, S) float32 0-1, the share of each pixel that the closed outlines, each (M, 2), cover."""
        canvas = np.zeros((2 * self.size, 2 * self.size), np.uint8)
        for outline in outlines:
            cv2.fillPoly(canvas, [self._pixels(outline)], 255, cv2.LINE_AA, 4)
        return developed(canvas)

    def stroke(self, *layers: tuple[ArrayLike, float, float]) -> np.ndarray:
        """Return (S, S) float32 0-1 of lines; a layer (paths (M, K, 2), width, value 0-1) covers those before it."""
        canvas = np.zeros((2 * self.size, 2 * self.size), np.uint8)
        for paths, width, value in layers:
            exact = width * self.zoom * 2 * self.size
            drawn = max(1, round(exact))
            # A line thinner than one pixel is drawn one pixel wide and fainter.
            shade = int(255 * value * min(1.0, exact / drawn))
            cv2.polylines(canvas, list(self._pixels(paths)), False, shade, drawn, cv2.LINE_8, 4)
        return developed(canvas)

    def rod(self, start: ArrayLike, end: ArrayLike, radius: float) -> np.ndarray:
        """Return (S, S) float32 path length in a round rod between two body points: 1 on its axis, 0 outside."""
        ends = np.array([start, end])
        pixels, margin = self._pixels(ends) / 32, radius * self.zoom * self.size + 2
        left, top = np.clip(pixels.min(0) - margin, 0, self.size).astype(int)
        right, bottom = np.clip(pixels.max(0) + margin, 0, self.size).astype(int)
        near = (slice(top, bottom), slice(left, right))  # only this part of the film is computed: most rods are small
        (x, y), (dx, dy) = ends[0].tolist(), (ends[1] - ends[0]).tolist()
        x, y = self.x[near] - x, self.y[near] - y
        along = np.clip((x * dx + y * dy) / (dx * dx + dy * dy), 0, 1)
        depth = np.zeros_like(self.x)
        depth[near] = np.sqrt(np.maximum(1 - ((x - along * dx) ** 2 + (y - along * dy) ** 2) / radius**2, 0))
        return depth

    def soften(self, picture: np.ndarray, radius: float) -> np.ndarray:
        """Return the (S, S) `picture` blurred by a Gaussian whose sigma is `radius` image widths."""
        sigma = max(radius * self.size, 0.05)
        if sigma < 4:
            return cv2.GaussianBlur(picture, (0, 0), sigma)
        # A wide blur leaves no fine detail, so it is computed at a quarter of the size, which is faster.
        small = cv2.resize(picture, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
        small = cv2.GaussianBlur(small, (0, 0), sigma / 4)
        return cv2.resize(small, (self.size, self.size), interpolation=cv2.INTER_LINEAR)

    def clouds(self, rng: np.random.Generator, cells: int) -> np.ndarray:
        """Return (S, S) smooth noise, mean about 0, deviation below 1, with `cells` lumps across the film."""
        grain = rng.standard_normal((cells, cells), dtype=np.float32)
        return cv2.resize(grain, (self.size, self.size), interpolation=cv2.INTER_CUBIC)


def draw_patient(rng: np.random.Generator) -> SimpleNamespace:
    """Return one patient and exposure: a value for every name in VARIATION, and `cage` and `arm`.

    `cage` is the half width of the rib cage; `arm` (2,) goes from the shoulder joint to the elbow on the image's right.
    """
    low, high = np.array(list(VARIATION.values())).T
    patient = SimpleNamespace(**dict(zip(VARIATION, rng.uniform(low, high).tolist(), strict=True)))
    patient.cage = patient.cage_aspect * patient.lung_length
    patient.arm = np.array([np.sin(patient.arm_angle), np.cos(patient.arm_angle)]) * 0.6
    return patient


def thorax(patient: SimpleNamespace, points: ArrayLike) -> np.ndarray:
    """Return the body coordinates (..., 2) of points (..., 2) given as (x in cage half widths, t)."""
    return np.asarray(points) * (patient.cage, patient.lung_length) + (0, patient.apex)


def mediastinum(patient: SimpleNamespace, points: ArrayLike) -> np.ndarray:
    """Return `thorax(...)` moved sideways by the patient's turn, which moves everything in front of the spine."""
    return thorax(patient, points) + np.array([patient.turn, 0])


def rounded(points: ArrayLike) -> np.ndarray:
    """Return a smooth closed outline (8 M, 2) through (M, 2) points: a Catmull-Rom spline, eight steps per point."""
    before, here, after, beyond = (np.roll(points, shift, axis=0)[:, None] for shift in (1, 0, -1, -2))
    s = np.linspace(0, 1, 8, endpoint=False)[:, None]
    bend = s * (after - before) + s**2 * (2 * before - 5 * here + 4 * after - beyond)
    return (here + 0.5 * (bend + s**3 * (3 * here - before - 3 * after + beyond))).reshape(-1, 2)


def hilum(patient: SimpleNamespace, sign: int) -> np.ndarray:
    """Return the body coordinates (2,) of a lung root; the patient's left one is slightly higher."""
    return mediastinum(patient, (sign * 0.24, 0.45 if sign < 0 else 0.42))


def branches(patient: SimpleNamespace, rng: np.random.Generator, sign: int) -> list[np.ndarray]:
    """Return segments (M, 2, 2) of one lung's tree of vessels or airways, one array per step, the stems first."""
    # The directions of the stems go from upwards to downwards; the lower lobes get more stems.
    heading = np.array([-1.3, -0.8, -0.2, 0.3, 0.75, 1.15, 1.5]) + rng.normal(0, 0.15, 7)
    at = hilum(patient, sign) + rng.normal(0, 0.008, (len(heading), 2))
    length, steps = 0.035 * patient.lung_length / 0.72, []
    for step in range(10):
        if step in (2, 4, 6, 8):
            heading, at = np.repeat(heading, 2), np.repeat(at, 2, axis=0)
            heading = heading + rng.uniform(0.2, 0.6, len(heading)) * np.tile((-1, 1), len(heading) // 2)
        heading = heading + rng.normal(0, 0.25, len(heading))
        stride = length * rng.uniform(0.7, 1.3, len(heading))[:, None]
        reached = at + stride * np.stack([sign * np.cos(heading) * 0.8, np.sin(heading) * 1.15], axis=1)
        steps.append(np.stack([at, reached], axis=1))
        at = reached
    return steps


def tree(film: Film, patient: SimpleNamespace, rng: np.random.Generator, stem: float) -> np.ndarray:
    """Return (S, S) 0-1 path length through both lungs' branching tubes, `stem` wide at the root, then thinner."""
    steps = zip(*(branches(patient, rng, sign) for sign in (-1, 1)), strict=True)
    layers = [(np.concatenate(paths), stem * 0.82**step, 0.82**step) for step, paths in enumerate(steps)]
    return film.soften(film.stroke(*layers[::-1]), 0.0015)
