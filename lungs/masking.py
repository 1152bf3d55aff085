"""X-ray in, its lungs alone out: a lung model as preprocessing, which predicts each mask once."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
from PIL import Image

from lungs.segmentation import METHOD, LungSegmenter, implausible
from utils import read_xray, write_whole

if TYPE_CHECKING:
    import pandas as pd

MARGIN = 0.03  # of the longer side: masks end where the lung is well aired, but a lesion at the border goes further


class LungMask(NamedTuple):
    """The (H, W) bool lungs in an X-ray and the reason why they cannot be right, or None (see `implausible`)."""

    mask: np.ndarray
    reason: str | None


def dilated(mask: np.ndarray, margin: float) -> np.ndarray:
    """Return an (H, W) bool mask grown by `margin` of the longer side, in all directions alike."""
    if not mask.any():
        return mask.copy()
    outside = (~mask).astype(np.uint8)
    distance = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return distance <= margin * max(mask.shape)


class LungMasking:
    """X-ray in, X-ray with everything but the lungs black out. Each mask is predicted once and stored.

    A stored mask belongs to a segmenter and to the content of an X-ray, wherever its file lies. The lungs are grown by
    `MARGIN` first. An X-ray whose mask is implausible comes back whole; `failures_table` names such files.

    Args:
        segmenter: predicts the masks.
        cache: a folder for the masks, which several processes may use at once; None keeps them in memory.
    """

    def __init__(self, segmenter: LungSegmenter, cache: Path | None = None) -> None:
        self.segmenter = segmenter
        self.folder = None if cache is None else Path(cache) / f"{segmenter.fingerprint}-{METHOD}"
        self._memory: dict[str, bytes] = {}

    @property
    def key(self) -> str:
        """What the result depends on beside the X-ray."""
        return f"{self.segmenter.fingerprint}-{METHOD}-{MARGIN}"

    def __call__(self, xray: np.ndarray) -> np.ndarray:
        """Return an (H, W) uint8 X-ray with 0 outside the lungs, or as it is where they were not found."""
        mask, reason = self.mask_of(xray)
        return xray * dilated(mask, MARGIN) if reason is None else xray

    def mask_of(self, xray: np.ndarray) -> LungMask:
        """Return the lungs of an (H, W) uint8 X-ray, not grown, and why they are implausible."""
        key = _key(xray)
        mask = self._stored(key, xray.shape)
        if mask is None:
            mask = self.segmenter.predict(xray)
            self._store(key, mask)
        return LungMask(mask, implausible(mask))

    def failures_table(self, paths: Sequence[str | os.PathLike[str]]) -> pd.DataFrame:
        """Return path and reason of each file whose lungs were not found, so that it is used whole.

        Afterwards the masks of all files are stored.
        """
        import pandas as pd
        from tqdm import tqdm

        bar = tqdm(paths, "lungs", unit="image", leave=False, disable=not sys.stderr.isatty())
        reasons = [(str(path), self.mask_of(read_xray(path)).reason) for path in bar]
        return pd.DataFrame([row for row in reasons if row[1]], columns=["path", "reason"])

    def _stored(self, key: str, shape: tuple[int, int]) -> np.ndarray | None:
        try:
            png = self._memory[key] if self.folder is None else self._file(key).read_bytes()
            with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
                mask = np.array(image.convert("1"))
        except (KeyError, OSError, SyntaxError, ValueError):  # absent or damaged: the mask is predicted again
            return None
        return mask if mask.shape == shape else None

    def _store(self, key: str, mask: np.ndarray) -> None:
        png = io.BytesIO()
        Image.fromarray(mask).save(png, "PNG")
        if self.folder is None:
            self._memory[key] = png.getvalue()
        else:
            self._file(key).parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._file(key), png.getvalue())

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.png"


def _key(xray: np.ndarray) -> str:
    return hashlib.sha1(f"{xray.shape}".encode() + xray.tobytes(), usedforsecurity=False).hexdigest()
