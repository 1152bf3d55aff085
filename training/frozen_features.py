"""Features of a frozen network, computed once and then used to train the head.

A frozen trunk gives the same features for an image in every epoch. Without augmentation an image has one view, with
flips alone it has two. Then each view goes through the trunk once, and every epoch trains the head on the features.
The trained weights are the same as after a training on images.
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

from networks import trunk_features
from training.augmentation import Augmentation, Draws
from training.batches import Batches
from training.image_cache import reserve
from training.optimisation import Setup
from training.processes import put_rows


class FlippedFeatures(Augmentation):
    """Takes from features (B, 2, D) those of the unchanged or the mirrored image, by the same draws as a flip."""

    def __call__(self, features: Tensor, draws: Draws) -> Tensor:
        """Return (B, 1, D)."""
        return features[torch.arange(len(features)), draws.flip.long()][:, None]


def can_be_cached(batches: Batches) -> bool:
    """Return whether images have at most two views, so that the features of each can be computed once."""
    return batches.augment is None or batches.augment.views is not None


@contextmanager
def feature_batches(
    setup: Setup, batches: Mapping[str, Batches], folder: Path | None, before_batch: Callable[[], None]
) -> Iterator[dict[str, Batches]]:
    """Yield batches of features (B, D) in place of images, in the same order and the same views.

    The features are in temporary files, not in memory: in a VGG-19 they take 100 kB for each view.

    Args:
        setup: its network is frozen except the head (`set_training_mode`).
        batches: the batches of images, "train" and "val".
        folder: where the temporary files are; None for the system's folder.
        before_batch: called before each batch of images.
    """
    setup.network.eval()  # in training mode the head's dropout would draw random numbers
    with TemporaryDirectory(dir=folder, prefix="features-") as scratch:
        of_features = {}
        for split in ("train", "val"):
            images = batches[split]
            values = _features(setup, images, Path(scratch) / split, before_batch)
            of_features[split] = replace(
                images,
                dataset=TensorDataset(values, images.dataset.targets),
                augment=FlippedFeatures(horizontal_flip=True) if values.shape[1] > 1 else None,
                prepare=lambda views: views[:, 0],
            )
        yield of_features


def _features(setup: Setup, images: Batches, file: Path, before_batch: Callable[[], None]) -> Tensor:
    """Return (N, V, D) float32 features of all V views of the images, mapped from `file`."""
    processes, number, features = setup.processes, images.augment.views if images.augment else 1, None
    plain = Batches(images.dataset, images.batch_size)
    sizes, batches = plain.sizes(), plain.epoch(device=processes.device, share=processes.share)
    bar = processes.bar(batches, f"{setup.title} {file.name} features", len(sizes))
    with torch.inference_mode(), torch.autocast(**setup.autocast):
        for size, batch in zip(sizes, bar, strict=True):
            before_batch()
            rows, share = {}, processes.share.slice(size)
            views = [batch.images, batch.images.flip(-1)][:number]
            computed = [trunk_features(setup.network, images.prepare(view)).float() for view in views]
            put_rows(rows, size, share, features=torch.stack(computed, dim=1))
            whole = processes.summed(rows["features"]).cpu()
            if features is None:
                shape = (len(plain.dataset), *whole.shape[1:])
                with file.open("wb") as stream:
                    reserve(stream, 4 * math.prod(shape), "features")
                features = torch.from_file(str(file), shared=True, size=math.prod(shape)).view(shape)
            start = batch.rows.start - share.start
            features[start : start + size] = whole
    return features
