"""Train the head of a frozen network on features that are computed once, in place of the images.

What a frozen trunk makes of an image does not change from epoch to epoch. Where the augmentation has a few views
only (none, or a flip), each view of each image goes through the trunk once; every further epoch costs the head
alone, and the same weights come out.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from augmentation import Augmentation, Draws
from batches import Batches
from image_cache import reserve
from networks import trunk_features
from processes import in_place, share_of


class FeatureDataset(Dataset):
    """Features with targets: `dataset[rows]` is ((B, V, D) float32, targets), of V views of each image."""

    def __init__(self, features: np.ndarray, targets: Tensor) -> None:
        self.features, self.targets = features, targets

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.features[rows.numpy()]), self.targets[rows]


class DrawnView:
    """In place of an augmentation with two views: of (B, 2, D) features those of the view that it would draw."""

    def __init__(self, augment: Augmentation) -> None:
        self.draw = augment.draw

    def __call__(self, features: Tensor, draws: Draws) -> Tensor:
        """Return (B, D)."""
        return features[torch.arange(len(features)), draws.flip.long()]


def can_be_cached(batches: Batches) -> bool:
    """Return whether images have so few views that what a network makes of each can be computed once."""
    return batches.augment is None or batches.augment.views is not None


@contextmanager
def feature_batches(
    network: nn.Module,
    batches: Mapping[str, Batches],
    *,
    accelerator: Accelerator,
    autocast: Mapping[str, object],
    folder: Path | None = None,
    title: str = "",
    each_batch: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, Batches]]:
    """Yield, for the batches "train" and "val", batches of features (B, D) for `network`'s head: of the same
    images, in the same order, in the same views.

    `network` is frozen but for its head (`set_training_mode`). Several processes share the work. The features lie in
    a temporary file in `folder` (default: the system's), not in memory: those of a VGG-19 are 100 kB a view. They are
    gone after the `with`. `each_batch` is called before each batch of images.
    """
    network.eval()  # the head runs along, and its dropout would draw random numbers
    with TemporaryDirectory(dir=folder, prefix="features-") as scratch:
        yield {
            split: _of_features(
                network,
                batches[split],
                Path(scratch) / f"{split}.f32",
                accelerator=accelerator,
                autocast=autocast,
                title=f"{title} {split} features",
                each_batch=each_batch,
            )
            for split in ("train", "val")
        }


def _of_features(
    network: nn.Module,
    images: Batches,
    file: Path,
    *,
    accelerator: Accelerator,
    autocast: Mapping[str, object],
    title: str,
    each_batch: Callable[[], None],
) -> Batches:
    views = 1 if images.augment is None else images.augment.views
    context = {"accelerator": accelerator, "autocast": autocast, "title": title, "each_batch": each_batch}
    features = _features(network, images, views, file, **context)
    return Batches(
        FeatureDataset(features, images.dataset.targets),
        images.batch_size,
        seed=images.seed,
        weights=images.weights,
        augment=DrawnView(images.augment) if views > 1 else None,
        prepare=(lambda found: found) if views > 1 else (lambda found: found[:, 0]),
    )


def _features(
    network: nn.Module,
    images: Batches,
    views: int,
    file: Path,
    *,
    accelerator: Accelerator,
    autocast: Mapping[str, object],
    title: str,
    each_batch: Callable[[], None],
) -> np.ndarray:
    """Return (N, V, D) float32 features of all views of the images, kept in `file`."""
    device, share = accelerator.device, share_of(accelerator)
    number, features = len(images.dataset), None
    plain = Batches(images.dataset, images.batch_size)
    total = len(plain.sizes())
    quiet = None if accelerator.is_main_process else True
    start = 0
    with torch.inference_mode(), torch.autocast(**autocast):
        for batch, size in zip(
            tqdm(plain.epoch(device=device, share=share), title, total, leave=False, disable=quiet),
            plain.sizes(),
            strict=True,
        ):
            each_batch()
            own = slice(batch.rows.start - start, batch.rows.stop - start)
            for view in range(views):
                shown = batch.images if views == 1 else images.augment.view(batch.images, view)
                if len(shown) or features is None:
                    found = trunk_features(network, images.prepare(shown)).float()
                else:  # of a last batch, a process may have no image
                    found = torch.zeros(0, features.shape[2], device=device)
                if features is None:
                    features = _on_disk(file, (number, views, found.shape[1]))
                whole = in_place(accelerator, found, [own], size)
                features[start : start + size, view] = whole.cpu().numpy()
            start += size
    return features


def _on_disk(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    size = 4 * math.prod(shape)
    with file.open("wb") as stream:
        try:
            reserve(stream.fileno(), size)  # to write into a map when the disk is full kills the process
        except OSError as error:
            raise OSError(
                f"no room for {size / 1e9:.2g} GB of features in {file.parent}: {error.strerror}"
            ) from None
    return np.memmap(file, dtype=np.float32, mode="r+", shape=shape)
