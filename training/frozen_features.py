"""Features for the head of a frozen network, computed once in place of the images.

A frozen trunk gives the same features for an image in every epoch. Where an image has one or two views only (no
augmentation, or a flip), each view goes through the trunk once. Every further epoch costs the head alone and gives the
same weights.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from tqdm import tqdm

from networks import trunk_features
from training.augmentation import Augmentation, Draws
from training.batches import Batches
from training.image_cache import reserve
from training.optimisation import Setup
from training.processes import SharedRows


class DrawnView:
    """An augmentation of features (B, 2, D) of two views: it picks the view that `augment` would draw."""

    def __init__(self, augment: Augmentation) -> None:
        self.draw = augment.draw

    def __call__(self, features: Tensor, draws: Draws) -> Tensor:
        """Return (B, 1, D)."""
        return features[torch.arange(len(features)), draws.flip.long()][:, None]


def can_be_cached(batches: Batches) -> bool:
    """Return whether images have so few views that the features of each view can be computed once."""
    return batches.augment is None or batches.augment.views is not None


@contextmanager
def feature_batches(
    setup: Setup, batches: Mapping[str, Batches], folder: Path | None, before_batch: Callable[[], None]
) -> Iterator[dict[str, Batches]]:
    """Yield batches of features (B, D) in place of images: the same images, in the same order and the same views.

    The features lie in temporary files, not in memory: those of a VGG-19 are 100 kB a view.

    Args:
        setup: its network is frozen but for the head (`set_training_mode`).
        batches: the batches of images, "train" and "val".
        folder: where the temporary files are, None for the system's folder.
        before_batch: called before each batch of images.
    """
    setup.network.eval()  # the head is computed too, and its dropout would draw random numbers
    with TemporaryDirectory(dir=folder, prefix="features-") as scratch:
        features = {
            split: _features(setup, images, Path(scratch) / split, before_batch)
            for split, images in batches.items()
            if split in ("train", "val")
        }
        yield {
            split: replace(
                batches[split],
                dataset=TensorDataset(values, batches[split].dataset.targets),
                augment=DrawnView(batches[split].augment) if values.shape[1] > 1 else None,
                prepare=lambda values: values[:, 0],
            )
            for split, values in features.items()
        }


def _features(setup: Setup, images: Batches, file: Path, before_batch: Callable[[], None]) -> Tensor:
    """Return (N, V, D) float32 features of all V views of the images, mapped from `file`."""
    processes, features = setup.processes, None
    number = images.augment.views if images.augment else 1
    plain = Batches(images.dataset, images.batch_size)
    batches = plain.epoch(device=processes.device, share=processes.share)
    bar = tqdm(
        batches,
        f"{setup.title} {file.name} features",
        len(plain.sizes()),
        leave=False,
        disable=None if processes.is_main else True,
    )
    with torch.inference_mode(), torch.autocast(**setup.autocast):
        for size, batch in zip(plain.sizes(), bar, strict=True):
            before_batch()
            rows, share = SharedRows(size), processes.share.slice(size)
            if len(batch.images) or features is None:  # a process may have no image of a last batch
                views = [batch.images, batch.images.flip(-1)][:number]
                computed = [trunk_features(setup.network, images.prepare(view)).float() for view in views]
                rows.put(share, torch.stack(computed, dim=1))
            else:
                rows.tensor = torch.zeros(size, *features.shape[1:], device=processes.device)
            whole = processes.summed(rows.tensor).cpu()
            if features is None:
                features = _on_disk(file, (len(images.dataset), *whole.shape[1:]))
            start = batch.rows.start - share.start
            features[start : start + size] = whole
    return features


def _on_disk(file: Path, shape: tuple[int, ...]) -> Tensor:
    """Return a float32 tensor of this shape that is mapped from a new file."""
    with file.open("wb") as stream:
        reserve(stream, 4 * math.prod(shape), "features")
    return torch.from_file(str(file), shared=True, size=math.prod(shape)).view(shape)
