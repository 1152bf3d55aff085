"""Train the head of a frozen network on features that are computed once, in place of the images.

What a frozen trunk makes of an image does not change from epoch to epoch. Where the augmentation has a few views
only (none, or a flip), each view of each image goes through the trunk once; every further epoch costs the head
alone, and the same weights come out.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from networks import trunk_features
from utils import RandomFlip, XrayDataset


class FeatureDataset(Dataset):
    """Features of an `XrayDataset` with its targets: item i is ((D,) float32, target), of a view that is drawn
    as the augmentation of the images would be.
    """

    def __init__(self, features: np.ndarray, images: XrayDataset) -> None:
        self.features, self.images = features, images  # (N, V, D), of V views

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        augment = self.images.augment
        view = 0 if augment is None else augment.draw()
        return torch.from_numpy(self.features[index, view].copy()), self.images.target(index)


def can_be_cached(loader: DataLoader) -> bool:
    """Return whether the images of a loader have so few views that each can be computed once."""
    augment = loader.dataset.augment
    return augment is None or isinstance(augment, RandomFlip)


@contextmanager
def feature_loaders(
    network: nn.Module,
    loaders: Mapping[str, DataLoader],
    *,
    device: torch.device,
    autocast: Mapping[str, object],
    folder: Path | None = None,
    title: str = "",
) -> Iterator[dict[str, DataLoader]]:
    """Yield, for the loaders "train" and "val", loaders of features (B, D) for `network`'s head.

    They draw the same images in the same order, from the same generators. `network` is frozen but for its head
    (`set_training_mode`). The features lie in a temporary file in `folder` (default: the system's), not in
    memory: those of a VGG-19 are 100 kB a view. They are gone after the `with`.
    """
    network.eval()  # the head runs along, and its dropout would draw random numbers
    with TemporaryDirectory(dir=folder, prefix="features-") as scratch:
        yield {
            split: _with_dataset(
                loaders[split],
                FeatureDataset(
                    _features(
                        network,
                        loaders[split],
                        Path(scratch) / f"{split}.f32",
                        device=device,
                        autocast=autocast,
                        title=f"{title} {split} features",
                    ),
                    loaders[split].dataset,
                ),
            )
            for split in ("train", "val")
        }


def _with_dataset(loader: DataLoader, dataset: Dataset) -> DataLoader:
    """Return a loader that goes through another dataset as `loader` goes through its own."""
    return DataLoader(
        dataset,
        batch_size=loader.batch_size,
        sampler=loader.sampler,
        generator=loader.generator,
        drop_last=loader.drop_last,
    )


def _features(
    network: nn.Module,
    loader: DataLoader,
    file: Path,
    *,
    device: torch.device,
    autocast: Mapping[str, object],
    title: str,
) -> np.ndarray:
    """Return (N, V, D) float32 features of all views of a loader's images, kept in `file`."""
    images: XrayDataset = loader.dataset
    augment = images.augment
    views = 1 if augment is None else augment.views
    features: np.ndarray | None = None
    step = loader.batch_size
    with torch.inference_mode(), torch.autocast(**autocast):
        for start in tqdm(range(0, len(images), step), desc=title, leave=False, disable=None):
            rows = range(start, min(start + step, len(images)))
            resized = torch.stack([images.resized(row) for row in rows])
            for view in range(views):
                shown = resized if augment is None else augment.view(resized, view)
                batch = images.preprocessing.normalise(shown).to(device)
                found = trunk_features(network, batch.contiguous(memory_format=torch.channels_last))
                if features is None:
                    shape = (len(images), views, found.shape[1])
                    features = np.memmap(file, dtype=np.float32, mode="w+", shape=shape)
                features[rows.start : rows.stop, view] = found.float().cpu().numpy()
    return features
