"""The training of a lung model: pairs of X-rays and lung masks in, a `LungSegmenter` out."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import TensorDataset

from datasets.phantom import CLASSES, write_phantom
from lungs import segmentation
from lungs.segmentation import LungSegmenter, Pair
from studies.settings import NetworkTraining
from training.augmentation import Augmentation, Draws
from training.batches import Batch, Batches
from training.loop import fine_tune
from training.objectives import MULTI_LABEL, Objective
from utils import resized_mask

# A flip moves the heart to the other side. It is allowed here, because a lung mask has no side.
XRAY_VIEWS = Augmentation(
    horizontal_flip=True, rotation=15, translation=0.08, scale=(0.8, 1.25), brightness=0.3, contrast=0.3
)
MASK_VIEWS = replace(XRAY_VIEWS, brightness=0.0, contrast=0.0)
VALIDATION_SHARE = 8  # one pair in eight is used to choose the epoch, not to train
# A phantom depends on [seed, patient]. numpy splits each number into words of 32 bits. A study's seed is one word.
# These seeds are two words. The second one is where a study has the patient, and is larger than every patient number.
PHANTOM_SEEDS = 2**63
# The training of `default_segmenter`, which takes half a minute.
PHANTOMS, PHANTOM_TRAINING = 240, NetworkTraining(epochs=2, image_size=128, batch_size=8, learning_rate=1e-3)


class PairViews:
    """An augmentation that moves an X-ray and its mask alike, and changes the grey values of the X-ray alone."""

    draw = staticmethod(XRAY_VIEWS.draw)

    def __call__(self, pictures: Tensor, draws: Draws) -> Tensor:
        """Return (B, 2, S, S) uint8 X-rays and masks as (B, 2, S, S) float32, 0 to 255."""
        xrays, masks = pictures.split(1, dim=1)
        return torch.cat([XRAY_VIEWS(xrays, draws), MASK_VIEWS(masks, draws)], dim=1)


class PairBatches(Batches):
    """Batches whose images are standardised X-rays and whose targets are their (b, 1, S, S) bool masks."""

    def epoch(self, number: int = 0, **place: object) -> Iterator[Batch]:
        """Yield the batches of an epoch; see `Batches.epoch`."""
        for batch in super().epoch(number, **place):
            xrays, masks = batch.images.split(1, dim=1)
            yield batch._replace(images=segmentation.standardised(xrays), targets=masks > 127.5)


def decoded(pairs: Sequence[Pair], size: int) -> TensorDataset:
    """Return (2, size, size) uint8 pictures, each an X-ray and its mask (0 or 255), and their row numbers."""

    def picture(pair: Pair) -> Tensor:
        xray, mask = segmentation.read_pair(pair)
        small = torch.from_numpy(resized_mask(mask, (size, size)) * np.uint8(255))
        return torch.cat([segmentation.resized(xray, size), small[None]])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return TensorDataset(torch.stack(list(pool.map(picture, pairs))), torch.arange(len(pairs)))


def mask_loss(outputs: Tensor, targets: Tensor, weights: None = None) -> Tensor:
    """Return the cross-entropy plus the Dice loss of (N, 1, S, S) logits for (N, 1, S, S) bool masks."""
    from segmentation_models_pytorch.losses import DiceLoss  # the import takes seconds

    masks = targets.float()
    return binary_cross_entropy_with_logits(outputs, masks) + DiceLoss("binary")(outputs, masks)


def mean_dice(outputs: Tensor, targets: Tensor) -> float:
    """Return the mean Dice of (N, 1, S, S) logits for (N, 1, S, S) bool masks, at the training's image size."""
    pairs = zip((outputs > 0).numpy(), targets.numpy(), strict=True)
    return float(np.mean([segmentation.dice(prediction, mask) for prediction, mask in pairs]))


LUNG_MASKS = Objective(mask_loss, MULTI_LABEL.size, mean_dice, "dice", weighted_validation=False)


def untrained_segmenter(encoder: str = "resnet18", *, seed: int = 0) -> LungSegmenter:
    """Return a segmenter with random weights. The state of torch's global generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LungSegmenter(segmentation.unet(encoder).eval(), encoder, image_size=256)


def fit(
    start: LungSegmenter, pairs: Sequence[Pair], training: NetworkTraining, *, seed: int = 0, device: str = "cpu"
) -> LungSegmenter:
    """Return a segmenter, trained from the weights of `start`, with the weights of its best epoch.

    The best epoch has the lowest loss on an eighth of the pairs, which are not trained on. All pairs are held in
    memory. The same arguments give the same weights on a CPU. If several processes were launched, only this one trains.

    Args:
        start: the segmenter to go on from; it stays as it is.
        pairs: of at least two groups of patients.
        training: the epochs, learning rate, batch size and image size are used.
        seed: decides the split, the order and the augmentation.
        device: as in `fine_tune`.

    Raises:
        ValueError: the pairs are too few.
    """
    network, size, batch_size = deepcopy(start.network), training.image_size, training.batch_size
    network.head_name = "segmentation_head"  # `fine_tune` needs the name
    train, val = segmentation.split_pairs(pairs, test=max(1, len(pairs) // VALIDATION_SHARE), seed=seed)
    batches = {
        "train": PairBatches(decoded(train, size), batch_size, seed=seed, augment=PairViews()),
        "val": PairBatches(decoded(val, size), batch_size),
    }
    one_cycle = training.model_copy(update={"schedule": "one_cycle", "patience": training.epochs})
    options = {"objective": LUNG_MASKS, "device": device, "title": "lungs", "alone": True}
    done = fine_tune(network, batches, training=one_cycle, **options)
    settings = training.model_dump(include={"epochs", "batch_size", "learning_rate"})
    begun = {"fingerprint": start.fingerprint, **start.origin} if start.origin else "random weights"
    origin = {"train_pairs": len(train), "start": begun, "seed": seed, **settings}
    best_dice = float(done.history["val_dice"][done.best_epoch - 1])
    validation = {"dice": best_dice, "pairs": len(val), "best_epoch": done.best_epoch}
    network.requires_grad_(False)
    return replace(start, network=network, image_size=size, origin=origin, validation=validation)


def phantom_pairs(root: Path, count: int, *, image_size: int, seed: int) -> list[Pair]:
    """Write about `count` phantoms into the new folder `root`, equally many of each class, and return their pairs.

    None of these patients occurs in a study's phantom, whatever the study's seed.
    """
    each = dict.fromkeys(CLASSES, -(-count // len(CLASSES)))
    write_phantom(root, images_per_class=each, size=image_size, seed=PHANTOM_SEEDS + seed)
    return segmentation.find_pairs(root)


def phantom_segmenter(
    start: LungSegmenter, count: int, training: NetworkTraining, *, seed: int = 0, device: str = "cpu"
) -> LungSegmenter:
    """Return a segmenter trained on about `count` phantoms, which are written to disk and removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = phantom_pairs(Path(folder) / "phantom", count, image_size=training.image_size, seed=seed)
        segmenter = fit(start, pairs, training, seed=seed, device=device)
    data = {"data": segmentation.PHANTOM, "phantom_seed": PHANTOM_SEEDS + seed}
    return replace(segmenter, origin=data | segmenter.origin)


def default_segmenter(folder: Path) -> LungSegmenter:
    """Return the segmenter in `folder`, or train a small one on phantoms (half a minute) and save it there.

    Training takes place in two cases: the folder holds no segmenter, or one that was trained on phantoms that may be
    patients of a study. A message says so. Another message tells of a segmenter that was trained on phantoms alone.
    """
    segmenter = segmentation.load_segmenter(folder) if (folder / "model.safetensors").is_file() else None
    # Older versions drew the phantoms with the seeds of studies.
    if segmenter is None or (segmenter.phantom_only and "phantom_seed" not in segmenter.origin):
        segmentation.refuse_other_models(folder)  # before the training, not after it
        reason = "no lung model" if segmenter is None else "a lung model of phantoms that may be a study's patients"
        print(f"{reason} in {folder}: training a small one, which takes half a minute", flush=True)
        segmenter = phantom_segmenter(untrained_segmenter(), PHANTOMS, PHANTOM_TRAINING)
        segmentation.save_segmenter(folder, segmenter)
    if segmenter.phantom_only:
        command = f"python lung_segmentation.py fit --pairs DIR --phantom 240 -o {folder}"
        trained = f"the lung model in {folder} was trained on the synthetic phantom alone, which is a stopgap"
        print(f"{trained}; for real X-rays train one on real masks: {command}", flush=True)
    return segmenter
