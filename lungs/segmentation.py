"""The lungs in an X-ray: pairs of X-rays and lung masks, and a trained U-Net that predicts masks.

A mask is (H, W) bool, True = lung, of the same size as its X-ray. The command line imports this module, so it
imports nothing heavier than torch and OpenCV at its top.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from utils import read_mask, read_xray, write_whole

if TYPE_CHECKING:
    import pandas as pd

REMEDY = "run python lung_segmentation.py fit --pairs DIR -o FOLDER"
KIND = "lung segmentation"
SETTINGS = ("encoder", "image_size", "origin", "validation", "decoder_channels")  # of a segmenter, in its model.json
FILES = ("model.json", "model.safetensors")
# Part of the name of every cache: raise it when `LungSegmenter.predict` or `two_lungs` return other masks than before.
METHOD = 1
# Shares of the image's area. The comment at each limit gives the range in the 59 masks of covid-chestxray.
CRUMB = 0.005  # a smaller part is no lung; range of the smaller lung: 0.100 or more
AREA_LIMITS = (0.05, 0.70)  # both lungs: 0.21 to 0.62
SMALLEST_HALF = 0.02  # lung in the left or the right half of the image: 0.084 or more
# A corner is 8 % of each side. At most 5 % of an upper corner's area may be lung. None of the 59 masks has any there.
CORNER, CORNER_SHARE = 0.08, 0.05
# The channels of the U-Net's decoder, from its coarsest step to its finest. The decoder takes most of the time.
DECODER_CHANNELS = (128, 64, 32, 16, 16)
OLD_DECODER_CHANNELS = (256, 128, 64, 32, 16)  # of models whose model.json does not name them
PHANTOM = "synthetic phantom"  # `origin["data"]` of a segmenter that was trained on phantoms only


class Pair(NamedTuple):
    """The files of an X-ray and of its lung mask, and the patient group of both."""

    image: Path
    mask: Path
    group: str


def find_pairs(root: Path) -> list[Pair]:
    """Return all X-rays with a lung mask below `root`.

    A pair is two files with the same stem in the folders `images` and `masks`, which lie side by side at any depth. The
    name of a mask may end in `_mask`. This fits covid-chestxray, the COVID-19 Radiography Database, and the phantom.
    Raises ValueError where there is no pair.
    """
    pairs = []
    for folder in sorted(root.rglob("masks")):
        images = {path.stem: path for path in (folder.parent / "images").glob("*")}
        stems = {mask: mask.stem.removesuffix("_mask") for mask in sorted(folder.glob("*.*"))}
        pairs += [Pair(images[s], mask, patient_group(s)) for mask, s in stems.items() if s in images]
    if not pairs:
        raise ValueError(f"no X-rays with lung masks in {root}: put files of the same names into images/ and masks/")
    return pairs


def patient_group(stem: str) -> str:
    """Return the part that the file names of one patient have in common.

    In case reports, the names of one patient's images differ by figure, page, day, view or panel. The name is cut at
    the first `fig`, `f1`, `g1`, `pdf`, `day`, `3-days`, `12-hours` or `admission`. Single letters, `PA` and `AP`
    between separators are removed, and so is one letter after a number at the end. Several patients of one paper may
    get one group, which does no harm. Names with a number alone (`COVID-12`) stay as they are.
    """
    cut = r"(?<=.)[-_. ](fig|f\d+[a-h]?(?![^\W_])|gr?\d|pdf|day|\d+-(day|hour)|admission).*$"
    short = re.sub(r"[-_. ]([a-z]|pa|ap)(?=[-_. ]|$)", "", re.sub(cut, "", stem, flags=re.I), flags=re.I)
    return re.sub(r"(?<=\d)[a-h]$", "", short, flags=re.I)


def split_pairs(pairs: Sequence[Pair], *, test: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Return (train, test) pairs, with at most `test` test pairs if a group is as small as that.

    Groups are drawn one by one. Each goes into the test if it still fits. If no group fits, the smallest group is the
    test. Raises ValueError where one side would be empty.
    """
    sizes, held_out = Counter(pair.group for pair in pairs), []
    for group in np.random.default_rng(seed).permutation(sorted(sizes)).tolist():
        if sum(sizes[name] for name in [*held_out, group]) <= test:
            held_out.append(group)
    held_out = held_out or [min(sizes, key=sizes.__getitem__)]
    if test < 1 or len(held_out) == len(sizes):
        number = f"{len(pairs)} pairs of {len(sizes)} patients"
        raise ValueError(f"{number} cannot be split {len(pairs) - test} : {test}: give more pairs or another --test")
    return [p for p in pairs if p.group not in held_out], [p for p in pairs if p.group in held_out]


def read_pair(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Return a pair's (H, W) uint8 X-ray and its (H, W) bool mask."""
    xray = read_xray(pair.image)
    return xray, read_mask(pair.mask, xray.shape)


def two_lungs(mask: np.ndarray) -> np.ndarray:
    """Return the two largest connected parts of an (H, W) bool mask, holes filled and small parts removed."""
    # Only the outermost contours are found. Drawing them filled closes the holes.
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    blank = np.zeros(mask.shape, np.uint8)
    parts = [cv2.drawContours(blank.copy(), [contour], -1, 1, cv2.FILLED) > 0 for contour in contours]
    largest = sorted((part for part in parts if part.mean() >= CRUMB), key=np.sum, reverse=True)[:2]
    return np.logical_or.reduce([blank > 0, *largest])


def implausible(mask: np.ndarray) -> str | None:
    """Return why an (H, W) bool mask cannot be the lungs of a frontal chest X-ray; None where it can be."""
    area, (least, most) = float(mask.mean()), AREA_LIMITS
    if area < least:
        return "no lung found" if area < CRUMB else f"lungs cover only {area:.1%} of the image"
    if area > most:
        return f"lungs cover {area:.0%} of the image"
    height, width = (max(1, round(CORNER * side)) for side in mask.shape)
    if max(mask[:height, :width].mean(), mask[:height, -width:].mean()) > CORNER_SHARE:
        return "lungs reach into an upper corner"
    halves = np.split(mask, [mask.shape[1] // 2], axis=1)
    return "one lung only" if min(half.sum() for half in halves) / mask.size < SMALLEST_HALF else None


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Return 2|A∩B| / (|A| + |B|) of two (H, W) bool masks; 1 where both are empty."""
    total = int(prediction.sum()) + int(truth.sum())
    return 2 * int((prediction & truth).sum()) / total if total else 1.0


def resized(xray: np.ndarray, size: int) -> Tensor:
    """Return an (H, W) uint8 X-ray as (1, size, size) uint8, anti-aliased; the aspect is not kept."""
    from torchvision.transforms.v2 import functional

    return functional.resize(torch.from_numpy(np.ascontiguousarray(xray))[None], [size, size], antialias=True)


def standardised(images: Tensor) -> Tensor:
    """Return (N, 1, S, S) images of 0 to 255 as float32, each with mean 0 and standard deviation 1.

    The exposure then has no influence. An image of one grey value becomes 0 everywhere.
    """
    return torch.stack([(image - image.mean()) / image.std().clamp_min(1e-3) for image in images / 255])


def unet(encoder: str, decoder_channels: Sequence[int] = DECODER_CHANNELS) -> nn.Module:
    """Return a U-Net with one input channel, one output channel and random weights."""
    import segmentation_models_pytorch as smp

    return smp.Unet(encoder, encoder_weights=None, decoder_channels=decoder_channels, in_channels=1, classes=1)


@dataclass(frozen=True)
class LungSegmenter:
    """A U-Net in eval mode, with all settings that its use needs.

    Attributes:
        network: takes (N, 1, S, S) float32, each image standardised, S = `image_size`; returns (N, 1, S, S) logits.
        encoder: the name of the U-Net's encoder.
        image_size: S, in pixels.
        origin: how it was trained, for people.
        validation: its scores, such as Dice, for people.
        decoder_channels: the channels of the U-Net's decoder, from its coarsest step to its finest.
    """

    network: nn.Module
    encoder: str
    image_size: int
    origin: Mapping[str, object] = field(default_factory=dict)
    validation: Mapping[str, object] = field(default_factory=dict)
    decoder_channels: Sequence[int] = DECODER_CHANNELS

    @property
    def phantom_only(self) -> bool:
        """Whether it was trained on phantoms alone."""
        return self.origin.get("data") == PHANTOM

    @property
    def knows(self) -> str:
        """A text about the training data, which is shown with the masks."""
        if self.phantom_only:
            return f"a lung model that knows the {PHANTOM} only"
        return f"a lung model that learnt from {self.origin.get('train_pairs', 'unknown')} X-rays with lung masks"

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with everything that can change a mask."""
        digest = hashlib.sha256(f"{self.encoder} {self.image_size} 0.5".encode())
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def predict(self, xray: np.ndarray) -> np.ndarray:
        """Return the (H, W) bool lungs of an (H, W) uint8 X-ray: at most two connected parts without holes."""
        device = next(self.network.parameters()).device
        image = standardised(resized(xray, self.image_size)[None])
        with torch.inference_mode():
            logits = self.network(image.to(device, memory_format=torch.channels_last))[0, 0].float().cpu().numpy()
        # The logits are enlarged, not the decisions, so the outline is smooth in a large X-ray too.
        logits = cv2.resize(logits, xray.shape[::-1], interpolation=cv2.INTER_LINEAR)
        return two_lungs(logits > 0)  # a probability above 0.5


def score_pairs(segmenter: LungSegmenter, pairs: Sequence[Pair]) -> pd.DataFrame:
    """Return one row a pair: path of the X-ray, group, dice and iou, at the X-ray's own size."""
    import pandas as pd

    rows = []
    for pair in pairs:
        xray, truth = read_pair(pair)
        score = dice(segmenter.predict(xray), truth)
        rows.append((str(pair.image), pair.group, score, score / (2 - score)))  # IoU is a function of Dice
    return pd.DataFrame(rows, columns=["path", "group", "dice", "iou"])


def save_segmenter(folder: Path, segmenter: LungSegmenter) -> None:
    """Write `model.json` and `model.safetensors` into `folder`, each complete or not at all.

    Raises ValueError where another kind of model lies there.
    """
    refuse_other_models(folder)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"kind": KIND, "fingerprint": segmenter.fingerprint} | {name: vars(segmenter)[name] for name in SETTINGS}
    state = {key: v.detach().cpu().contiguous() for key, v in segmenter.network.state_dict().items()}
    # model.json comes first: if the process is killed before the weights, the file shows what the folder is for.
    write_whole(folder / "model.json", json.dumps(about, indent=2) + "\n")
    write_whole(folder / "model.safetensors", partial(save_file, state))


def refuse_other_models(folder: Path) -> None:
    """Raise ValueError where `folder` holds a model that is no lung model, because it must not be replaced."""
    try:
        kind = json.loads((folder / "model.json").read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, LookupError, TypeError):  # absent, damaged, or of another kind
        kind = None
    if kind != KIND and any((folder / name).exists() for name in FILES):
        raise ValueError(f"the model in {folder} is no lung model: choose another folder, or move it away")


def load_segmenter(folder: Path, device: str | torch.device = "cpu") -> LungSegmenter:
    """Return the segmenter that `save_segmenter` wrote.

    Raises FileNotFoundError or ValueError, with the remedy, where the folder holds no segmenter or a damaged one.
    """
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise FileNotFoundError(f"no lung model in {folder} ({missing[0]} is missing): {REMEDY}")
    try:
        about = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        about = {"decoder_channels": OLD_DECODER_CHANNELS} | about
        # On the meta device no random weights are drawn. Drawing them takes longer than all the rest.
        with torch.device("meta"):
            network = unet(about["encoder"], about["decoder_channels"])
        with torch.inference_mode(False):
            network.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
        network.eval().requires_grad_(False)
        segmenter = LungSegmenter(network, **{name: about[name] for name in SETTINGS})
        if segmenter.fingerprint != about["fingerprint"]:
            raise ValueError("model.json and model.safetensors do not belong together")
    except Exception as error:  # The readers of a damaged file raise exceptions of many types.
        reason = str(error).splitlines()[0]
        raise ValueError(f"the lung model in {folder} is damaged or no lung model ({reason}): {REMEDY}") from None
    segmenter.network.to(device, memory_format=torch.channels_last)
    return segmenter
