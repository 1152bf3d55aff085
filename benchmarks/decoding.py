"""What decoding a JPEG at reduced size saves, and what it changes.

    python benchmarks/decoding.py [--images 40] [--size 224] [--data FOLDER]

Decodes and resizes JPEGs in full ("plain") and as for training ("ours": at a half, a quarter or an eighth, as long as
both sides keep twice the pixels of the result); seconds for all, medians of rounds in turns. "error" is the mean
difference in grey levels of 255, "worst" that of the worst image, "most" what 999 of 1,000 pixels keep to.
The files are synthetic X-rays of 1,500 px with noise, at quality 92, unless `--data` names a folder.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reports import report

from datasets.phantom import CLASSES, draw_phantoms
from utils import Preprocessing, read_xray

ROUNDS = 5


def files(folder: Path, number: int) -> list[Path]:
    """Draw X-rays and write them as JPEG."""
    rng = np.random.default_rng(0)
    paths = []
    for place, image in enumerate(
        draw_phantoms([i % len(CLASSES) for i in range(number)], seed=0, size=500).images
    ):
        large = cv2.resize(image, (1500, 1500), interpolation=cv2.INTER_CUBIC)
        noisy = (large + rng.normal(0, 6, large.shape)).clip(0, 255).astype(np.uint8)
        paths.append(folder / f"{place}.jpg")
        cv2.imwrite(str(paths[-1]), noisy, [cv2.IMWRITE_JPEG_QUALITY, 92])
    return paths


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="Time decoding JPEGs at reduced size.")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument(
        "--data", type=Path, help="a folder with .jpg or .jpeg files in place of synthetic ones"
    )
    given = parser.parse_args()
    preprocessing = Preprocessing(given.size, (0, 0, 0), (1, 1, 1))

    def in_full(path: Path) -> torch.Tensor:
        return preprocessing.resize(read_xray(path))

    with TemporaryDirectory() as scratch:
        paths = files(Path(scratch), given.images)
        if given.data is not None:
            paths = [
                path for path in sorted(given.data.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")
            ]
            paths = paths[: given.images]
        found, took = {}, {"ours": [], "plain": []}
        for _ in range(ROUNDS + 1):
            for way, read in (("ours", preprocessing.read), ("plain", in_full)):
                started = time.perf_counter()
                found[way] = [read(path) for path in paths]
                took[way].append(time.perf_counter() - started)
    ours, plain = (statistics.median(took[way][1:]) for way in ("ours", "plain"))
    errors = (torch.cat(found["ours"]).int() - torch.cat(found["plain"]).int()).abs().double()
    row = {
        "name": f"{len(paths)} JPEGs to {given.size} px",
        "ours": ours,
        "plain": plain,
        "ratio": plain / ours,
    }
    more = {"error": float(errors.mean()), "worst": float(errors.mean((1, 2)).max())}
    report(
        "decoding",
        [{**row, **more, "most": float(np.quantile(errors, 0.999)), "largest": float(errors.max())}],
    )


if __name__ == "__main__":
    main()
