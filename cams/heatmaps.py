"""Draw maps on X-rays and put boxes around their regions.

Pictures are (H, W, 3) uint8 RGB. Boxes are (B, 4) rows of x, y (upper left corner), width and height as fractions of
the image, as in `XrayTable.boxes`, so they fit the image at any resolution.
"""

from collections.abc import Sequence

import cv2
import numpy as np

COLORMAPS = {
    name.removeprefix("COLORMAP_").lower(): value for name, value in vars(cv2).items() if name.startswith("COLORMAP_")
}


def overlay(xray: np.ndarray, map_: np.ndarray, *, alpha: float = 0.65, colormap: str = "plasma") -> np.ndarray:
    """Return an X-ray with a map laid over it in colour: (H, W, 3) uint8 RGB.

    The weight of the colour at a pixel is alpha · map. So the X-ray is unchanged where the map is 0, and any colour
    means evidence.

    Args:
        xray: (H, W) uint8.
        map_: (H, W), from 0 to 1.
        alpha: weight of the colour where the map is 1, from 0 to 1.
        colormap: a name in `COLORMAPS` (OpenCV's).

    Raises:
        ValueError: the shapes differ, the map is not from 0 to 1, or the X-ray is not uint8.
    """
    if xray.dtype != np.uint8:
        raise ValueError(f"the X-ray must be uint8, 0 to 255, not {xray.dtype}")
    if xray.shape != map_.shape:
        raise ValueError(f"X-ray {xray.shape} and map {map_.shape} differ: upsample the map to the X-ray")
    if not (map_.min() >= 0 and map_.max() <= 1):
        raise ValueError("the map must lie in 0–1: divide it by its maximum first")
    colours = cv2.applyColorMap(np.round(map_ * 255).astype(np.uint8), COLORMAPS[colormap])
    weight = (alpha * map_)[..., None]
    mixed = xray[..., None] * (1 - weight) + cv2.cvtColor(colours, cv2.COLOR_BGR2RGB) * weight
    return np.round(mixed).astype(np.uint8)


def boxes_from_map(map_: np.ndarray, threshold: float) -> np.ndarray:
    """Return (B, 4) boxes around the regions of an (H, W) map with at least `threshold` (0 to 1) times its maximum.

    A region is an 8-connected component. The region with the most pixels comes first. A box covers all pixels of its
    region. A map of zeros has no box: (0, 4).

    Raises:
        ValueError: the map is not finite or not (H, W).
    """
    if map_.ndim != 2 or not np.isfinite(map_).all():
        raise ValueError(f"a map must be finite and (H, W), not {map_.shape}: pass one map at a time")
    top = float(map_.max())
    if top <= 0:
        return np.zeros((0, 4))
    above = (map_ >= threshold * top).astype(np.uint8)
    regions = cv2.connectedComponentsWithStats(above, connectivity=8)[2][1:]  # The first one is the background.
    regions = regions[np.argsort(-regions[:, cv2.CC_STAT_AREA], kind="stable")]
    corners_and_sides = [cv2.CC_STAT_LEFT, cv2.CC_STAT_TOP, cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT]
    height, width = map_.shape
    return regions[:, corners_and_sides] / np.array([width, height, width, height], dtype=np.float64)


def draw_boxes(picture: np.ndarray, boxes: np.ndarray | Sequence) -> np.ndarray:
    """Return a copy of an (H, W, 3) picture with (B, 4) boxes outlined in white.

    The line lies inside the box, so all of a box at the image's border is visible. The line's width is 1/250 of the
    image's shorter side, at least one pixel.
    """
    drawn = picture.copy()
    height, width = picture.shape[:2]
    line = max(1, round(min(height, width) / 250))
    for x, y, box_width, box_height in np.asarray(boxes, dtype=np.float64).reshape(-1, 4):
        left, right = _pixels(x, box_width, width)
        top, bottom = _pixels(y, box_height, height)
        inside = np.s_[top + line : max(bottom - line, 0), left + line : max(right - line, 0)]
        content = drawn[inside].copy()
        drawn[top:bottom, left:right] = 255
        drawn[inside] = content
    return drawn


def _pixels(start: float, extent: float, size: int) -> tuple[int, int]:
    """Return the start and the end of a box along one axis, in pixels. At least one pixel lies in the image."""
    first = min(max(round(start * size), 0), size - 1)
    return first, min(max(round((start + extent) * size), first + 1), size)


def with_colour_bar(
    picture: np.ndarray, *, peak: float | None = None, alpha: float = 0.65, colormap: str = "plasma"
) -> np.ndarray:
    """Return an (H, W, 3) picture with a colour bar on black to its right.

    The bar shows the colours as they look on an X-ray: an `overlay` of the values 0 (at the bottom) to 1 on mid-grey.

    Args:
        picture: (H, W, 3) uint8; its pixels stay the same.
        peak: maximum of the raw map, finite and not negative; None means 1. The bar has the numbers 0, half the peak
            and the peak, or only 0 if the peak is 0.
        alpha: as for `overlay`.
        colormap: as for `overlay`.
    """
    peak = 1.0 if peak is None else peak
    height = picture.shape[0]
    text = max(1, round(min(max(10, height / 28), height / 4)))  # height of the numbers in pixels
    values = (0.0, 0.5, 1.0) if peak > 0 else (0.0,)
    numbers = [_drawn_text(f"{value * peak:.3g}", text) for value in values]

    # The first and the last number extend beyond the bar by half their height, so space is left above and below it.
    left, right = text, text + max(4, 3 * text // 2)
    strip = np.zeros((height, right + 2 * text + max(number.shape[1] for number in numbers), 3), dtype=np.uint8)
    grey = np.full((max(1, height - 2 * text), right - left), 128, dtype=np.uint8)
    levels = np.broadcast_to(np.linspace(1, 0, len(grey))[:, None], grey.shape)
    strip[text : text + len(levels), left:right] = overlay(grey, levels, alpha=alpha, colormap=colormap)
    line = max(1, round(text / 10))
    for value, number in zip(values, numbers, strict=True):
        row = text + round((1 - value) * (len(levels) - 1))
        first = max(0, row - line // 2)
        strip[first : first + line, right : right + max(1, text // 2)] = 255
        first = max(0, row - number.shape[0] // 2)
        place = strip[first : first + number.shape[0], right + text : right + text + number.shape[1]]
        place[:] = number[: len(place), :, None]
    return np.concatenate([picture, strip], axis=1)


def _drawn_text(text: str, height: int) -> np.ndarray:
    """Return (h, w) uint8 white text on black, about `height` pixels high, cropped to its white pixels.

    `cv2.getTextSize` is not used, because OpenCV 4 and 5 both return wrong sizes.
    """
    line = max(1, round(height / 10))
    scale = cv2.getFontScaleFromHeight(cv2.FONT_HERSHEY_SIMPLEX, height, line)
    canvas = np.zeros((4 * height + 8, (len(text) + 2) * (2 * height + 8)), dtype=np.uint8)
    origin = (height + 4, 3 * height)
    cv2.putText(canvas, text, origin, cv2.FONT_HERSHEY_SIMPLEX, scale, 255, line, cv2.LINE_AA)
    rows, columns = (np.flatnonzero(canvas.any(axis=axis)) for axis in (1, 0))
    return canvas[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
