"""Command line: train a lung model on X-rays with hand-drawn masks, and write masks for other X-rays.

    python lung_segmentation.py fit --pairs DIR [DIR ...] [--phantom N] -o FOLDER
    python lung_segmentation.py predict -m FOLDER -i FILE [FILE ...] -o FOLDER

`fit` splits the pairs by patient, trains on one part and reports Dice and IoU on the other.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lungs import segmentation
from lungs.segmentation import LungSegmenter, Pair
from utils import read_xray, resolve_device, write_whole

MASK_SOFTWARE = "xraycam lung mask"  # the PNG text "Software" of each mask; only files with it are replaced
SETTINGS = {"epochs": 40, "image_size": 256, "batch_size": 8, "learning_rate": 1e-3}


def fit(arguments: argparse.Namespace) -> int:
    """Train a lung model, score it on held-out pairs and save it."""
    from studies.settings import NetworkTraining
    from training import lung_model  # slow to import, and `predict` does not need it

    seed, run = arguments.seed, {"seed": arguments.seed, "device": str(resolve_device(arguments.device))}
    training = NetworkTraining(**{name: getattr(arguments, name) for name in SETTINGS})
    if arguments.start == "none":
        segmenter = lung_model.untrained_segmenter(arguments.encoder, seed=seed)
    else:
        segmenter = segmentation.load_segmenter(Path(arguments.start))
    pairs = [pair for root in arguments.pairs for pair in segmentation.find_pairs(root)]
    if pairs:
        train, test = segmentation.split_pairs(pairs, test=arguments.test or max(1, len(pairs) // 5), seed=seed)
    elif not arguments.phantom:
        raise ValueError("nothing to train on: give --pairs DIR, --phantom N, or both")
    segmentation.refuse_other_models(arguments.output)
    if arguments.phantom:
        print(f"training on {arguments.phantom} phantoms first", flush=True)
        short = lung_model.PHANTOM_TRAINING.model_copy(update={"image_size": arguments.image_size})
        segmenter = lung_model.phantom_segmenter(segmenter, arguments.phantom, short, **run)
    if pairs:
        print(f"{len(train)} pairs to train on and to choose the epoch, {len(test)} held out", flush=True)
        segmenter = scored(lung_model.fit(segmenter, train, training, **run), test, seed=seed)
    segmentation.save_segmenter(arguments.output, segmenter)
    print(f"saved {arguments.output}")
    return 0


def scored(segmenter: LungSegmenter, test: Sequence[Pair], *, seed: int) -> LungSegmenter:
    """Print Dice and IoU on held-out pairs, with intervals. Return the segmenter with both scores in `validation`."""
    from evaluation.intervals import bootstrap_mean

    scores = segmentation.score_pairs(segmenter, test)
    dice = bootstrap_mean(scores["dice"], scores["group"], rng=np.random.default_rng(seed))
    iou = bootstrap_mean(scores["iou"], scores["group"], rng=np.random.default_rng(seed))
    worst = scores.loc[scores["dice"].idxmin()]
    print(f"held out: Dice {dice}, IoU {iou}; lowest Dice {worst['dice']:.3f} {worst['path']}")
    return replace(segmenter, validation={"dice": dice.estimate, "iou": iou.estimate, "pairs": len(test)})


def predict(arguments: argparse.Namespace) -> int:
    """Write a mask for each X-ray. If an X-ray cannot be read, print a line on stderr and go on."""
    outputs = mask_files(arguments.images, arguments.output)
    segmenter, failed = segmentation.load_segmenter(arguments.model), 0
    arguments.output.mkdir(parents=True, exist_ok=True)
    for output, path in outputs.items():
        try:
            mask = segmenter.predict(read_xray(path))
        except (ValueError, OSError) as error:
            failed += 1
            print(f"lung_segmentation.py: {error}", file=sys.stderr)
            continue
        write_mask(output, mask)
        reason = segmentation.implausible(mask)
        verdict = f"IMPLAUSIBLE, {reason}" if reason else f"lungs, {mask.mean():.0%} of the image"
        print(f"{path}: {verdict}: {output}", flush=True)
    return 0 if not failed else 1 if failed < len(outputs) else 2


def mask_files(images: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Return the X-ray for each mask file that is to be written.

    Raises ValueError if two masks would have the same file, if a mask would replace a given X-ray, or if it would
    replace a file that this command did not write.
    """
    xrays: dict[Path, Path] = {}
    inputs = {os.stat(path)[1:3] for path in images if os.path.exists(path)}  # inode and device
    for path in images:
        output = folder / f"{path.stem}.png"
        if xrays.setdefault(output, path) != path:
            raise ValueError(f"two X-rays of one name, {xrays[output]} and {path}: give each command another -o")
        if os.path.lexists(output) and (not is_own_mask(output) or os.stat(output)[1:3] in inputs):
            raise ValueError(f"{output} is there and is no mask of this command's: choose another -o")
    return xrays


def is_own_mask(file: Path) -> bool:
    """Return whether a file is a mask of this command: it contains `MASK_SOFTWARE` and is not a link."""
    return file.is_file() and not file.is_symlink() and MASK_SOFTWARE.encode() in file.read_bytes()[:200]


def write_mask(file: Path, mask: np.ndarray) -> None:
    """Write a mask as a PNG of 0 and 255 with `MASK_SOFTWARE` in it. Raises OSError with the name of the file."""
    about = PngInfo()
    about.add_text("Software", MASK_SOFTWARE)
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    try:
        write_whole(file, lambda unfinished: picture.save(unfinished, "PNG", pnginfo=about))
    except OSError as error:
        raise OSError(f"stopped: {file} cannot be written ({error.strerror or error})") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Find the lungs in X-rays. For research, not for diagnosis.")
    commands = parser.add_subparsers(required=True)
    fitting = commands.add_parser("fit", help="train on X-rays with lung masks")
    fitting.set_defaults(run=fit)
    fitting.add_argument("--pairs", metavar="DIR", nargs="+", type=Path, default=[], help="with images/ and masks/")
    first = fitting.add_mutually_exclusive_group()
    first.add_argument("--phantom", metavar="N", type=int, default=0, help="train on N phantoms first")
    first.add_argument("--start", metavar="FOLDER|none", default="none", help="go on training this lung model")
    fitting.add_argument("--test", metavar="N", type=int, help="pairs held out (default: a fifth)")
    fitting.add_argument("--encoder", metavar="NAME", default="resnet18")
    fitting.add_argument("--device", metavar="D", default="auto", help="auto, cpu, cuda, … (default: auto)")
    for name, value in (SETTINGS | {"seed": 0}).items():
        fitting.add_argument(f"--{name.replace('_', '-')}", metavar="N", type=type(value), default=value)
    predicting = commands.add_parser("predict", help="write the masks of X-rays")
    predicting.set_defaults(run=predict)
    predicting.add_argument("-m", "--model", metavar="FOLDER", type=Path, required=True)
    predicting.add_argument("-i", "--images", metavar="FILE", nargs="+", type=Path, required=True)
    for command in (fitting, predicting):
        command.add_argument("-o", "--output", metavar="FOLDER", type=Path, required=True)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 for success, 1 if some images failed, 2 if all failed or the command could not run."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"lung_segmentation.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
