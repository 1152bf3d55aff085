"""The lungs in an X-ray: train a U-Net on masks that people drew, predict masks, blacken the rest.

    python lung_segmentation.py fit --pairs DIR [DIR ...] [--phantom N] -o FOLDER
    python lung_segmentation.py predict -m FOLDER -i FILE [FILE ...] -o FOLDER

Masks are (H, W) bool, True = lung, at their X-ray's own size. Stands under the command line too, so it imports
nothing heavier than torch and OpenCV at the top.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from utils import read_mask, read_xray, resized_mask, write_whole

if TYPE_CHECKING:
    import pandas as pd

REMEDY = "run python lung_segmentation.py fit --pairs DIR -o FOLDER"
KIND = "lung segmentation"
# Part of every cache's name: raise it when `LungSegmenter.predict` or `two_lungs` draw other masks than before.
METHOD = 1
CRUMB = (
    0.005  # of the image's area; the smaller lung of the 59 masks of covid-chestxray covers at least 0.100
)
AREA_LIMITS = (0.05, 0.70)  # of the image's area; those masks 0.21–0.62
SMALLEST_HALF = 0.02  # of the image's area that is lung, in its left and in its right half; those masks 0.084
CORNER, CORNER_SHARE = (
    0.08,
    0.05,
)  # of the sides; of the corner's area: background taken for lung, those masks 0
MASK_SOFTWARE = "xraycam lung mask"  # what a mask's PNG says it was made by: no other file is replaced
PHANTOM = "synthetic phantom"  # what `origin` says of a segmenter that has seen nothing else
# Seeds of studies are below 2**32. The upper 32 bits of a seed are mixed where a smaller one has the patient's
# number, so they must be larger than any patient's number too.
PHANTOM_SEEDS = 2**63
PHANTOMS, PHANTOM_SIZE, PHANTOM_EPOCHS = 240, 128, 2  # what `default_segmenter` trains on: half a minute


class Pair(NamedTuple):
    """An X-ray, the mask of its lungs, and the patient (or more than one) that both are of."""

    image: Path
    mask: Path
    group: str


def find_pairs(root: Path) -> list[Pair]:
    """Return every X-ray with a mask below `root`: files of one stem in folders `images` and `masks` that lie
    side by side, at any depth; a mask's name may end in `_mask`.

    So it reads covid-chestxray, the COVID-19 Radiography Database, the phantom, and one's own. Raises
    ValueError where there is none.
    """
    pairs = []
    for folder in sorted(root.rglob("masks")):
        images = {path.stem: path for path in (folder.parent / "images").glob("*")}
        stems = {mask: mask.stem.removesuffix("_mask") for mask in sorted(folder.glob("*.*"))}
        pairs += [Pair(images[s], mask, patient_group(s)) for mask, s in stems.items() if s in images]
    if not pairs:
        raise ValueError(
            f"no X-rays with lung masks in {root}: put files of the same names into images/ and masks/"
        )
    return pairs


def patient_group(stem: str) -> str:
    """Return what the file names of one patient have in common.

    Names from case reports tell a patient's images apart by figure, page, day, view or panel. The name is cut
    at the first `fig`, `f1`, `g1`, `pdf`, `day`, `3-days`, `12-hours` or `admission`; single letters, `PA` and
    `AP` between separators go, and so does one letter behind a number at the end. Some patients of one paper
    fall into one group that way, which costs nothing. Names that only count (`COVID-12`) stay as they are.
    """
    cut = r"(?<=.)[-_. ](fig|f\d+[a-h]?(?![^\W_])|gr?\d|pdf|day|\d+-(day|hour)|admission).*$"
    short = re.sub(r"[-_. ]([a-z]|pa|ap)(?=[-_. ]|$)", "", re.sub(cut, "", stem, flags=re.I), flags=re.I)
    return re.sub(r"(?<=\d)[a-h]$", "", short, flags=re.I)


def split_pairs(pairs: Sequence[Pair], *, test: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Return (train, test), all pairs of a group on one side, with as near to `test` for the test as the
    groups allow.

    Raises ValueError where one side would be empty.
    """
    sizes: dict[str, int] = {}
    for pair in pairs:
        sizes[pair.group] = sizes.get(pair.group, 0) + 1
    groups = [sorted(sizes)[i] for i in np.random.default_rng(seed).permutation(len(sizes))]
    if len(groups) < 2 or not 0 < test < len(pairs):
        raise ValueError(
            f"{len(pairs)} pairs of {len(groups)} patients cannot be split {len(pairs) - test} : {test}: give more "
            "pairs or another --test"
        )
    # Bit n of reachable[k] says whether some of the first k groups have n pairs in sum.
    reachable = list(itertools.accumulate(groups, lambda bits, g: bits | bits << sizes[g], initial=1))
    left = min((n for n in range(1, len(pairs)) if reachable[-1] >> n & 1), key=lambda n: abs(n - test))
    held_out = set()
    for before, group in reversed(list(zip(reachable[:-1], groups, strict=True))):
        if not before >> left & 1:
            held_out.add(group)
            left -= sizes[group]
    return [p for p in pairs if p.group not in held_out], [p for p in pairs if p.group in held_out]


def two_lungs(mask: np.ndarray) -> np.ndarray:
    """Return an (H, W) bool mask with its two largest connected parts only, holes filled, crumbs gone."""
    # The outermost contours, drawn filled: nothing in them is a hole.
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    parts = []
    for contour in contours:
        part = cv2.drawContours(np.zeros(mask.shape, np.uint8), [contour], -1, 1, cv2.FILLED)
        parts.append(part.astype(bool))
    parts = sorted((p for p in parts if p.mean() >= CRUMB), key=lambda p: -p.sum())[:2]
    return np.logical_or.reduce([np.zeros(mask.shape, bool), *parts])


def implausible(mask: np.ndarray) -> str | None:
    """Return why an (H, W) bool mask cannot be the lungs of a frontal chest X-ray, None where it may be."""
    area, (least, most) = float(mask.mean()), AREA_LIMITS
    middle = mask.shape[1] // 2
    if area < least:
        return "no lung found" if area < CRUMB else f"lungs cover only {area:.1%} of the image"
    if area > most:
        return f"lungs cover {area:.0%} of the image"
    height, width = (max(1, round(CORNER * side)) for side in mask.shape)
    if max(mask[:height, :width].mean(), mask[:height, -width:].mean()) > CORNER_SHARE:
        return "lungs reach into an upper corner"
    halves = mask[:, :middle].sum() / mask.size, mask[:, middle:].sum() / mask.size
    return "one lung only" if min(halves) < SMALLEST_HALF else None


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Return 2|A∩B| / (|A| + |B|) of two (H, W) bool masks; 1 where both are empty."""
    total = int(prediction.sum()) + int(truth.sum())
    return 2 * int((prediction & truth).sum()) / total if total else 1.0


def iou(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Return |A∩B| / |A∪B| of two (H, W) bool masks; 1 where both are empty."""
    union = int((prediction | truth).sum())
    return int((prediction & truth).sum()) / union if union else 1.0


@dataclass(frozen=True)
class LungSegmenter:
    """A trained U-Net, in eval mode, and all that is needed to use it.

    `network` takes (N, 1, S, S) float32, each image with mean 0 and standard deviation 1, S = `image_size`,
    and returns (N, 1, S, S) logits. `threshold`: the probability from which a pixel is lung. `origin` (how it was
    trained) and `validation` (Dice, …) are for people.
    """

    network: nn.Module
    encoder: str
    image_size: int
    threshold: float = 0.5
    origin: Mapping[str, object] = field(default_factory=dict)
    validation: Mapping[str, object] = field(default_factory=dict)

    @property
    def phantom_only(self) -> bool:
        """Whether it has seen no real X-ray."""
        return self.origin.get("data") == PHANTOM

    @property
    def knows(self) -> str:
        """What it learnt from, in words for wherever its masks are used."""
        if self.phantom_only:
            return f"a lung model that knows the {PHANTOM} only"
        return f"a lung model that learnt from {self.origin.get('train_pairs', 'unknown')} X-rays with lung masks"

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything that could change a mask."""
        digest = hashlib.sha256(f"{self.encoder} {self.image_size} {self.threshold}".encode())
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def predict(self, xrays: Sequence[np.ndarray], *, batch_size: int = 16) -> list[np.ndarray]:
        """Return the (H, W) bool lungs of each (H, W) uint8 X-ray, at most two connected parts without holes."""
        device = next(self.network.parameters()).device
        boundary = float(np.log(self.threshold / (1 - self.threshold)))
        masks = []
        for batch in batches(xrays, batch_size):
            images = torch.stack([standardised(resized(xray, self.image_size) / 255) for xray in batch])
            with torch.inference_mode():
                logits = self.network(images.to(device).contiguous(memory_format=torch.channels_last))
            for xray, logit in zip(batch, logits[:, 0].float().cpu().numpy(), strict=True):
                # Logits are enlarged, not the decisions: a mask's outline is smooth in a large X-ray too.
                logit = cv2.resize(logit, xray.shape[::-1], interpolation=cv2.INTER_LINEAR)
                masks.append(two_lungs(logit > boundary))
        return masks


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Yield lists of `size` items, the last one of what is left."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def resized(xray: np.ndarray, size: int) -> Tensor:
    """Return an (H, W) uint8 X-ray as (1, size, size) uint8, anti-aliased; the aspect is not kept."""
    from torchvision.transforms.v2 import functional

    return functional.resize(torch.from_numpy(np.ascontiguousarray(xray))[None], [size, size], antialias=True)


def standardised(image: Tensor) -> Tensor:
    """Return an image with mean 0 and standard deviation 1 (a plain one with 0): exposure does not matter."""
    return (image - image.mean()) / image.std().clamp_min(1e-3)


def lung_augmentation() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the random transform of a (1, S, S) uint8 image and its (1, S, S) mask to float32 and mask.

    Affine (15°, shift 8 %, scale 0.8–1.25, shear 5°), horizontal flip (a mask has no side), brightness and
    contrast ± 30 %, gamma e^±0.4, now and then blur; noise. Draws from torch's global generator.
    """
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    bilinear = v2.InterpolationMode.BILINEAR
    both = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(15, translate=(0.08, 0.08), scale=(0.8, 1.25), shear=5, interpolation=bilinear),
            v2.ColorJitter(brightness=0.3, contrast=0.3),
            v2.RandomApply([v2.GaussianBlur(5, (0.1, 1.5))], p=0.2),
        ]
    )

    def augment(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        image, mask = both(tv_tensors.Image(image), tv_tensors.Mask(mask))
        gamma = torch.empty(()).uniform_(-0.4, 0.4).exp()
        values = (image.as_subclass(Tensor) / 255) ** gamma
        return values + 0.03 * torch.rand(()) * torch.randn_like(values), mask.as_subclass(Tensor)

    return augment


def unet(encoder: str) -> nn.Module:
    """Return a U-Net for one channel in and out, its weights random."""
    import segmentation_models_pytorch as smp

    return smp.Unet(encoder, encoder_weights=None, in_channels=1, classes=1)


def fit(
    train: Sequence[Pair],
    val: Sequence[Pair],
    *,
    start: LungSegmenter | None = None,
    epochs: int,
    image_size: int = 256,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    seed: int = 0,
    encoder: str = "resnet18",
    device: str | torch.device = "cpu",
) -> LungSegmenter:
    """Train a U-Net and return it with the weights of the epoch of the best mean Dice on `val`; of the last one
    where `val` is empty.

    `start`: whose weights (and encoder) to go on from; None: random ones. Loss: cross-entropy + Dice; AdamW
    with one cycle (up to `learning_rate` over the first 30 % of the steps, then down to almost 0). All images
    are held in memory, `image_size`² bytes each. The same arguments give the same weights on a CPU.
    """
    if len(train) < 2:
        raise ValueError(f"{len(train)} pairs are too few to train on: batch normalisation needs two")
    encoder = start.encoder if start else encoder
    begun = {"fingerprint": start.fingerprint, **start.origin} if start else "random weights"
    origin = {"train_pairs": len(train), "start": begun, "epochs": epochs, "batch_size": batch_size}
    origin |= {"learning_rate": learning_rate, "seed": seed}
    data, truths = loaded_pairs(train, image_size), [_xray_and_mask(pair) for pair in val]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = unet(encoder)
        if start:
            network.load_state_dict(start.network.state_dict())
        network.to(device, memory_format=torch.channels_last)
        segmenter = LungSegmenter(network, encoder, image_size, origin=origin)
        best, validation, state = -1.0, {}, {}
        losses = _epochs(network, data, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate)
        started = time.perf_counter()
        for epoch, loss in enumerate(losses, start=1):
            line = f"lungs epoch {epoch:>2}/{epochs}  train loss {loss:.4f}"
            score = _mean_dice(segmenter, truths) if truths else float(epoch)
            line += f"  val Dice {score:.4f}" if truths else ""
            if better := score > best:
                best, state = score, {k: v.detach().cpu().clone() for k, v in network.state_dict().items()}
                validation = {"dice": score, "pairs": len(truths), "best_epoch": epoch} if truths else {}
            seconds, started = time.perf_counter() - started, time.perf_counter()
            line += f"  {seconds:.0f} s, {len(train) / seconds:.0f} images/s"
            print(line + ("  best" if better and truths else ""), flush=True)
    network.load_state_dict(state)
    network.eval().requires_grad_(False)
    return LungSegmenter(network, encoder, image_size, origin=origin, validation=validation)


def _xray_and_mask(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    xray = read_xray(pair.image)
    return xray, read_mask(pair.mask, xray.shape)


def loaded_pairs(pairs: Sequence[Pair], size: int) -> list[tuple[Tensor, Tensor]]:
    """Return each pair's X-ray and mask as (1, size, size) uint8, the mask 0 or 1."""

    def load(pair: Pair) -> tuple[Tensor, Tensor]:
        xray, mask = _xray_and_mask(pair)
        small = torch.from_numpy(resized_mask(mask, (size, size)).astype(np.uint8))
        return resized(xray, size), small[None]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(load, pairs))


def _epochs(
    network: nn.Module,
    data: Sequence[tuple[Tensor, Tensor]],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
) -> Iterator[float]:
    """Train epoch by epoch; yield the mean loss of each, the network in eval mode."""
    import segmentation_models_pytorch as smp

    augment, device = lung_augmentation(), next(network.parameters()).device
    crossentropy, overlap = nn.BCEWithLogitsLoss(), smp.losses.DiceLoss("binary")
    # Batch normalisation cannot train on a single image: a last batch of one is left out.
    steps = sum(len(batch) > 1 for batch in batches(data, batch_size))
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=learning_rate, weight_decay=1e-4, fused=device.type != "mps"
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=epochs * steps, cycle_momentum=False
    )
    for _ in range(epochs):
        network.train()
        losses = []
        for indices in itertools.islice(torch.randperm(len(data)).split(batch_size), steps):
            pairs = [augment(*data[index]) for index in indices]
            images = torch.stack([standardised(image) for image, _ in pairs])
            masks = torch.stack([mask for _, mask in pairs]).to(device).float()
            logits = network(images.to(device).contiguous(memory_format=torch.channels_last))
            loss = crossentropy(logits, masks) + overlap(logits, masks)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        network.eval()
        yield float(np.mean(losses))


def _mean_dice(segmenter: LungSegmenter, truths: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    predictions = segmenter.predict([xray for xray, _ in truths])
    return float(np.mean([dice(p, mask) for p, (_, mask) in zip(predictions, truths, strict=True)]))


def score_pairs(segmenter: LungSegmenter, pairs: Sequence[Pair]) -> pd.DataFrame:
    """Return one row a pair: path of the X-ray, group, dice and iou, at the X-ray's own size."""
    import pandas as pd

    rows = []
    for batch in batches(pairs, 16):
        xrays, masks = zip(*map(_xray_and_mask, batch), strict=True)
        for pair, mask, predicted in zip(batch, masks, segmenter.predict(xrays), strict=True):
            scores = dice(predicted, mask), iou(predicted, mask)
            rows.append((str(pair.image), pair.group, *scores))
    return pd.DataFrame(rows, columns=["path", "group", "dice", "iou"])


def save_segmenter(folder: Path, segmenter: LungSegmenter) -> None:
    """Write `model.safetensors` and `model.json` into `folder`, each complete or not at all.

    Raises ValueError where another kind of model lies there.
    """
    refuse_other_models(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: v.detach().cpu().contiguous() for key, v in segmenter.network.state_dict().items()}
    about = {f.name: getattr(segmenter, f.name) for f in fields(segmenter) if f.name != "network"}
    about = {"kind": KIND, "fingerprint": segmenter.fingerprint} | about
    write_whole(folder / "model.safetensors", partial(save_file, state))
    write_whole(folder / "model.json", json.dumps(about, indent=2) + "\n")


def refuse_other_models(folder: Path) -> None:
    """Raise ValueError where the model in `folder`, if there is one, is no lung model: it must not be replaced."""
    text, weights = folder / "model.json", folder / "model.safetensors"
    if not text.exists() and not weights.exists():
        return
    try:
        ours = json.loads(text.read_text(encoding="utf-8")).get("kind") == KIND
    except FileNotFoundError:  # `save_segmenter` was killed between its two files
        ours = _is_unet(weights)
    except (OSError, ValueError, AttributeError):  # damaged, or no JSON object
        ours = False
    if not ours:
        raise ValueError(f"the model in {folder} is no lung model: choose another folder, or move it away")


def _is_unet(weights: Path) -> bool:
    """Return whether a file holds weights of a U-Net of `unet`, going by the tensors' names."""
    try:
        with safe_open(weights, "pt") as file:
            return {name.split(".")[0] for name in file.keys()} == {"encoder", "decoder", "segmentation_head"}  # noqa: SIM118
    except (OSError, SafetensorError):
        return False


def load_segmenter(folder: Path, device: str | torch.device = "cpu") -> LungSegmenter:
    """Load the segmenter that `save_segmenter` wrote.

    Raises FileNotFoundError or ValueError, with the remedy, where the folder holds none, or a damaged one.
    """
    text, weights = folder / "model.json", folder / "model.safetensors"
    for path in (text, weights):
        if not path.is_file():
            raise FileNotFoundError(f"no lung model in {folder} ({path.name} is missing): {REMEDY}")
    try:
        about = json.loads(text.read_text(encoding="utf-8"))
        if about.pop("kind", None) != KIND:
            raise ValueError(f"it is no {KIND}")
        fingerprint = about.pop("fingerprint")
        # Random numbers for weights that the file replaces would take longer than all the rest.
        with torch.device("meta"):
            network = unet(about["encoder"])
        with torch.inference_mode(False):
            network.load_state_dict(load_file(weights), assign=True)
        segmenter = LungSegmenter(network.eval().requires_grad_(False), **about)
        if segmenter.fingerprint != fingerprint:
            raise ValueError("model.json and model.safetensors do not belong together")
    except Exception as error:  # the formats' readers raise types of their own for a file that is not theirs
        reason = str(error).splitlines()[0]
        raise ValueError(f"the lung model in {folder} is damaged or none ({reason}): {REMEDY}") from None
    segmenter.network.to(device, memory_format=torch.channels_last)
    return segmenter


def default_segmenter(folder: Path) -> LungSegmenter:
    """Load the segmenter in `folder`; where there is none, or one whose phantoms may be a study's own patients, train
    a small one on the phantom (half a minute) and save it there. Say so whenever the phantom is all that it knows.
    """
    segmenter = load_segmenter(folder) if (folder / "model.json").is_file() else None
    lacking = f"no lung model in {folder}"
    if segmenter and segmenter.phantom_only and "phantom_seed" not in segmenter.origin:
        # Older versions drew its phantoms with the seeds of studies.
        lacking = f"the lung model in {folder} learnt from phantoms that a study may have as its patients"
        segmenter = None
    if segmenter is None:
        refuse_other_models(folder)  # not after the training
        print(f"{lacking}: training a small one, which takes half a minute", flush=True)
        segmenter = phantom_segmenter(PHANTOMS, image_size=PHANTOM_SIZE, epochs=PHANTOM_EPOCHS)
        save_segmenter(folder, segmenter)
    if segmenter.phantom_only:
        print(
            f"the lung model in {folder} was trained on the synthetic phantom alone, which is a stopgap; for real "
            "X-rays train one on real masks: python lung_segmentation.py fit --pairs DIR --phantom 240 -o "
            f"{folder}",
            flush=True,
        )
    return segmenter


def phantom_pairs(root: Path, count: int, *, image_size: int, seed: int) -> list[Pair]:
    """Write about `count` phantoms, as many of each class, into the new folder `root`; none of them is a patient of
    a study's phantom, whatever that one's seed.
    """
    from datasets.phantom import CLASSES, write_phantom

    each = dict.fromkeys(CLASSES, -(-count // len(CLASSES)))
    write_phantom(root, images_per_class=each, size=image_size, seed=PHANTOM_SEEDS + seed)
    return find_pairs(root)


def phantom_segmenter(
    count: int, *, image_size: int, epochs: int, seed: int = 0, device: str | torch.device = "cpu"
) -> LungSegmenter:
    """Train a segmenter on about `count` phantoms, drawn for it and thrown away; an eighth is for validation."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = phantom_pairs(Path(folder) / "phantom", count, image_size=image_size, seed=seed)
        train, val = split_pairs(pairs, test=max(1, count // 8), seed=seed)
        segmenter = fit(train, val, epochs=epochs, image_size=image_size, seed=seed, device=device)
    origin = {"data": PHANTOM, "phantom_seed": PHANTOM_SEEDS + seed, **segmenter.origin}
    return replace(segmenter, origin=origin)


def _fit(given: argparse.Namespace) -> int:
    from intervals import bootstrap_mean
    from networks import resolve_device

    settings = {"image_size": given.image_size, "seed": given.seed, "device": resolve_device(given.device)}
    start = None if given.start == "none" else load_segmenter(Path(given.start))
    if not given.pairs and not given.phantom:
        raise ValueError("nothing to train on: give --pairs DIR, --phantom N, or both")
    refuse_other_models(given.output)
    pairs = [pair for root in given.pairs for pair in find_pairs(root)]
    if pairs:
        train, test = split_pairs(pairs, test=given.test or max(1, len(pairs) // 5), seed=given.seed)
    if given.phantom:
        print(f"first on {given.phantom} phantoms", flush=True)
        start = segmenter = phantom_segmenter(given.phantom, epochs=PHANTOM_EPOCHS, **settings)
    if pairs:
        print(f"{len(train)} pairs to train on, {len(test)} held out", flush=True)
        segmenter = fit(
            train,
            [],  # the one cycle ends at its best; an epoch chosen by the held-out pairs would flatter
            start=start,
            epochs=given.epochs,
            batch_size=given.batch_size,
            learning_rate=given.learning_rate,
            encoder=given.encoder,
            **settings,
        )
        scores = score_pairs(segmenter, test)
        means = {
            name: bootstrap_mean(scores[name], scores["group"], rng=np.random.default_rng(given.seed))
            for name in ("dice", "iou")
        }
        worst = scores.loc[scores["dice"].idxmin()]
        print(
            f"held out: Dice {means['dice']}, IoU {means['iou']}; lowest Dice {worst['dice']:.3f} {worst['path']}"
        )
        found = {name: mean.estimate for name, mean in means.items()} | {"pairs": len(test)}
        segmenter = replace(segmenter, validation=found)
    save_segmenter(given.output, segmenter)
    print(f"saved {given.output}")
    return 0


def _predict(given: argparse.Namespace) -> int:
    outputs = _mask_files(given.images, given.output)
    segmenter, failed = load_segmenter(given.model), 0
    given.output.mkdir(parents=True, exist_ok=True)
    for output, path in outputs.items():
        try:
            (mask,) = segmenter.predict([read_xray(path)])
        except (ValueError, OSError) as error:
            failed += 1
            print(f"lung_segmentation.py: {error}", file=sys.stderr)
            continue
        _write_mask(output, mask)
        reason = implausible(mask)
        verdict = f"IMPLAUSIBLE, {reason}" if reason else f"lungs, {mask.mean():.0%} of the image"
        print(f"{path}: {verdict}: {output}", flush=True)
    return 0 if not failed else 1 if failed < len(outputs) else 2


def _mask_files(images: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Return the X-ray by the file that its mask goes to.

    Raises ValueError where two masks would go to one file, or where one would replace an X-ray that was given or
    any other file that is no mask of this command's.
    """
    outputs: dict[Path, Path] = {}
    for path in images:
        output = folder / f"{path.stem}.png"
        if outputs.setdefault(output, path) != path:
            raise ValueError(
                f"two X-rays of one name, {outputs[output]} and {path}: give them to two commands, with another -o"
            )
    given = {_identity(path) for path in images if os.path.exists(path)}
    for output in outputs:
        if os.path.lexists(output) and (not _is_own_mask(output) or _identity(output) in given):
            raise ValueError(f"{output} is there and is no mask of this command's: choose another -o")
    return outputs


def _identity(file: Path) -> tuple[int, int]:
    return (status := file.stat()).st_dev, status.st_ino


def _is_own_mask(file: Path) -> bool:
    if file.is_symlink() or not file.is_file():
        return False
    try:
        with Image.open(file, formats=["PNG"]) as image:
            return image.info.get("Software") == MASK_SOFTWARE
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def _write_mask(file: Path, mask: np.ndarray) -> None:
    """Write a mask as a PNG of 0 and 255 that says what it is. Raises OSError, which names the file."""
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
    training = commands.add_parser("fit", help="train on X-rays with lung masks")
    training.set_defaults(run=_fit)
    training.add_argument(
        "--pairs", metavar="DIR", nargs="+", type=Path, default=[], help="images/ and masks/"
    )
    first = training.add_mutually_exclusive_group()
    first.add_argument("--phantom", metavar="N", type=int, default=0, help="train on N phantoms first")
    first.add_argument("--start", metavar="FOLDER|none", default="none", help="go on from this lung model")
    training.add_argument("--test", metavar="N", type=int, help="pairs held out (default: a fifth)")
    training.add_argument("--epochs", metavar="N", type=int, default=40)
    training.add_argument("--image-size", metavar="N", type=int, default=256)
    training.add_argument("--batch-size", metavar="N", type=int, default=8)
    training.add_argument("--learning-rate", metavar="X", type=float, default=1e-3)
    training.add_argument("--encoder", metavar="NAME", default="resnet18")
    training.add_argument("--seed", metavar="N", type=int, default=0)
    training.add_argument("--device", metavar="D", default="auto", help="auto, cpu, cuda, … (default: auto)")
    training.add_argument("-o", "--output", metavar="FOLDER", type=Path, required=True)
    predicting = commands.add_parser("predict", help="write the masks of X-rays")
    predicting.set_defaults(run=_predict)
    predicting.add_argument("-m", "--model", metavar="FOLDER", type=Path, required=True)
    predicting.add_argument("-i", "--images", metavar="FILE", nargs="+", type=Path, required=True)
    predicting.add_argument("-o", "--output", metavar="FOLDER", type=Path, required=True)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer the command line; return the exit status: 0 done, 1 some images could not be done, 2 none."""
    given = _parser().parse_args(arguments)
    try:
        return given.run(given)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"lung_segmentation.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
