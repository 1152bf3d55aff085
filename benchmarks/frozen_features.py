"""The time of an epoch of a frozen network on features that are computed once, compared with the usual way.

    python benchmarks/frozen_features.py [--networks resnet101,densenet169,vgg19] [--images 48] [--size 224]

The usual way sends every image through the frozen trunk in every epoch. Both ways train the same new head (as in
`studies/covid_frozen.toml`) on the same random images with random flips, in turns. The script prints medians and two
ratios: for one epoch without the time to compute the features, and for a training of 20 epochs with it.
"""

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from reports import report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from networks import build_network
from studies.loading import load_study
from studies.settings import Training
from training.augmentation import Augmentation
from training.batches import Batches, XrayDataset
from training.loop import fine_tune
from utils import Preprocessing


class RandomXrays(XrayDataset):
    """Noise in memory, because the benchmark must not measure the disk."""

    def __init__(self, number: int, size: int) -> None:
        super().__init__([""] * number, np.arange(number) % 4, Preprocessing(size, (0, 0, 0), (1, 1, 1)))
        self.pictures = torch.randint(0, 256, (number, 1, size, size), dtype=torch.uint8)

    def images(self, rows: torch.Tensor) -> torch.Tensor:
        """Return pictures from memory."""
        return self.pictures[rows]


def seconds(name: str, training: Training, batches: dict[str, Batches], epochs: int) -> tuple[float, float]:
    """Return how much longer the first epoch takes than the median of the others, and that median.

    A single epoch is its own median.
    """
    network = build_network(name, 4, hidden_units=training.hidden_units)
    settings = training.model_copy(update={"epochs": epochs, "patience": epochs})
    took = fine_tune(network, batches, training=settings, device="cpu").timing["seconds"].tolist()
    epoch = statistics.median(took[1:] or took)
    return took[0] - epoch, epoch


def main() -> None:
    """Measure, and print a line for each network."""
    parser = argparse.ArgumentParser(description="Time frozen-backbone epochs with and without cached features.")
    parser.add_argument("--networks", default="resnet101,densenet169,vgg19")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    study = load_study("covid_frozen")
    train, val = RandomXrays(arguments.images, arguments.size), RandomXrays(16, arguments.size)
    normalise, flip = train.preprocessing.normalise, Augmentation(horizontal_flip=True)
    batches = {
        "train": Batches(train, 16, seed=0, augment=flip, prepare=normalise),
        "val": Batches(val, 16, prepare=normalise),
    }
    rows = []
    for name in arguments.networks.split(","):
        once = study.training_of(name).model_copy(update={"weights": "none", "precision": "fp32"})
        usual = once.model_copy(update={"cache_features": False})
        rounds = [
            (*seconds(name, once, batches, 5), seconds(name, usual, batches, 1)[1]) for _ in range(arguments.rounds)
        ]
        start, epoch, plain = (statistics.median(values) for values in zip(*rounds, strict=True))
        whole = {"name": f"20 epochs {name}", "ours": start + 20 * epoch, "plain": 20 * plain}
        rows += [{"name": f"epoch {name}", "ours": epoch, "plain": plain, "ratio": plain / epoch}]
        rows += [{**whole, "ratio": whole["plain"] / whole["ours"], "features": start}]
    report("frozen_features", rows)


if __name__ == "__main__":
    main()
