"""X-ray in, the lungs alone out: a trained segmentation applied as preprocessing, each mask predicted once."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
from PIL import Image

from lung_segmentation import METHOD, LungSegmenter, batches, implausible
from utils import read_xray

if TYPE_CHECKING:
    import pandas as pd

MARGIN = 0.03  # of the longer side: masks stop at what is well aired, a lesion at the border goes beyond
MEMORY_MASKS = 50_000  # kept where there is no cache folder, as PNGs of 1–3 kB


class LungMask(NamedTuple):
    """The (H, W) bool lungs in an X-ray and, where they cannot be right, the reason (see `implausible`)."""

    mask: np.ndarray
    reason: str | None


def dilated(mask: np.ndarray, margin: float) -> np.ndarray:
    """Return an (H, W) bool mask grown by `margin` of the longer side, to all directions alike."""
    if not mask.any():
        return mask.copy()
    outside = (~mask).astype(np.uint8)
    distance = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return distance <= margin * max(mask.shape)


class LungMasking:
    """X-ray in, X-ray with all but the lungs black out; what was predicted once is kept.

    `cache`: a folder for the masks, or None to keep them in memory. A mask is found again by the segmenter and
    by the X-ray's content, wherever its file lies; several processes may use a folder at once. Lungs are
    grown by `margin` of the longer side first. An X-ray whose mask is implausible comes back whole;
    `failures_table` names such files.
    """

    def __init__(
        self, segmenter: LungSegmenter, cache: Path | None = None, *, margin: float = MARGIN
    ) -> None:
        self.segmenter, self.margin = segmenter, margin
        self.folder = None if cache is None else Path(cache) / f"{segmenter.fingerprint}-{METHOD}"
        self._memory: OrderedDict[str, bytes] = OrderedDict()

    @property
    def key(self) -> str:
        """What the result depends on beside the X-ray."""
        return f"{self.segmenter.fingerprint}-{METHOD}-{self.margin}"

    def __call__(self, xray: np.ndarray) -> np.ndarray:
        """Return an (H, W) uint8 X-ray with 0 outside the lungs, or as it is where they were not found."""
        mask, reason = self.mask_of(xray)
        return xray * dilated(mask, self.margin) if reason is None else xray

    def mask_of(self, xray: np.ndarray) -> LungMask:
        """Return the lungs of an (H, W) uint8 X-ray, not yet grown, and why they are not to be believed."""
        key = _key(xray)
        mask = self._recalled(key, xray.shape)
        if mask is None:
            (mask,) = self.segmenter.predict([xray])
            self._keep(key, mask)
        return LungMask(mask, implausible(mask))

    def prepare(self, xrays: Iterable[np.ndarray | str | os.PathLike[str]], *, batch_size: int = 16) -> int:
        """Predict, in batches, the masks of X-rays or files that are not kept yet; return how many were not."""
        from tqdm import tqdm

        def read(xray: np.ndarray | str | os.PathLike[str]) -> tuple[str, np.ndarray]:
            image = xray if isinstance(xray, np.ndarray) else read_xray(xray)
            return _key(image), image

        new, total = 0, len(xrays) if hasattr(xrays, "__len__") else None
        bar = tqdm(total=total, desc="lungs", unit="image", leave=False, disable=not sys.stderr.isatty())
        with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
            for batch in batches(xrays, batch_size):
                images = dict(pool.map(read, batch))
                images = {key: x for key, x in images.items() if self._recalled(key, x.shape) is None}
                masks = self.segmenter.predict(list(images.values()), batch_size=batch_size)
                for key, mask in zip(images, masks, strict=True):
                    self._keep(key, mask)
                new += len(images)
                bar.update(len(batch))
        return new

    def failures_table(self, paths: Sequence[str | os.PathLike[str]]) -> pd.DataFrame:
        """Return path and reason of each file whose lungs were not found, so that it is used whole."""
        import pandas as pd

        reasons = [(str(path), self.mask_of(read_xray(path)).reason) for path in paths]
        return pd.DataFrame([row for row in reasons if row[1]], columns=["path", "reason"])

    def _recalled(self, key: str, shape: tuple[int, int]) -> np.ndarray | None:
        try:
            png = self._memory[key] if self.folder is None else self._file(key).read_bytes()
            with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
                mask = np.array(image.convert("1"))
        except (KeyError, OSError, SyntaxError, ValueError):  # not there, or damaged: to be predicted anew
            return None
        return mask if mask.shape == shape else None

    def _keep(self, key: str, mask: np.ndarray) -> None:
        png = io.BytesIO()
        Image.fromarray(mask).save(png, "PNG")
        if self.folder is None:
            self._memory[key] = png.getvalue()
            if len(self._memory) > MEMORY_MASKS:
                self._memory.popitem(last=False)
            return
        file = self._file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        unfinished.write_bytes(png.getvalue())
        os.replace(unfinished, file)

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.png"


def _key(xray: np.ndarray) -> str:
    return hashlib.sha1(f"{xray.shape}".encode() + xray.tobytes(), usedforsecurity=False).hexdigest()
