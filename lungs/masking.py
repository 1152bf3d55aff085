"""A lung model as preprocessing: everything outside the lungs becomes black. Each mask is predicted once."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from lungs.segmentation import METHOD, LungSegmenter, implausible
from utils import read_xray, write_whole

MARGIN = 0.03  # of the longer side, because a lesion at the lung's border may lie partly outside the mask


class LungMask(NamedTuple):
    """The (H, W) bool lungs in an X-ray and the reason why they are implausible, or None (see `implausible`)."""

    mask: np.ndarray
    reason: str | None


def dilated(mask: np.ndarray, margin: float) -> np.ndarray:
    """Return an (H, W) bool mask grown by `margin` of the longer side, in all directions alike."""
    distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return distance <= margin * max(mask.shape)


class LungMasking:
    """Makes everything but the lungs of an X-ray black. Each mask is predicted once and stored.

    A stored mask belongs to a segmenter and to the content of an X-ray, not to its path. The mask is grown by `MARGIN`
    before it is applied. An X-ray with an implausible mask stays as it is; `failures` names such files.

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
        """A text that names all that the result depends on, besides the X-ray."""
        return f"{self.segmenter.fingerprint}-{METHOD}-{MARGIN}"

    def __call__(self, xray: np.ndarray) -> np.ndarray:
        """Return an (H, W) uint8 X-ray with 0 outside the lungs, or as it is where they were not found."""
        mask, reason = self.mask_of(xray)
        return xray * dilated(mask, MARGIN) if reason is None else xray

    def mask_of(self, xray: np.ndarray) -> LungMask:
        """Return the lungs of an (H, W) uint8 X-ray, not grown, and why they are implausible."""
        key = hashlib.sha1(f"{xray.shape}".encode() + xray.tobytes(), usedforsecurity=False).hexdigest()
        mask = self._stored(key, xray.shape)
        if mask is None:
            mask = self.segmenter.predict(xray)
            self._store(key, mask)
        return LungMask(mask, implausible(mask))

    def failures(self, paths: Sequence[str | Path]) -> dict[str, str]:
        """Return, by path, the reason for each file whose lungs are not found; store the masks of all files."""
        from tqdm import tqdm

        bar = tqdm(paths, "lungs", unit="image", leave=False, disable=None)  # None: a bar on a terminal only
        reasons = {str(path): self.mask_of(read_xray(path)).reason for path in bar}
        return {path: reason for path, reason in reasons.items() if reason is not None}

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
