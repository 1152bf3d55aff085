"""How long an epoch of a frozen network takes with features that are computed once, beside the usual way.

    python benchmarks/frozen_features.py [--networks resnet101,densenet169,vgg19] [--images 48] [--size 224]

The usual way sends every image through the frozen trunk in every epoch. Both train the same new head (as in
`studies/covid_frozen.toml`) on the same random images with a random flip; runs alternate, medians are printed.
Ratios: of an epoch after the features are there, and of a training of 20 epochs with what computing them costs.
"""

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from networks import build_network
from studies import Training, load_study
from training import fine_tune
from utils import Preprocessing, RandomFlip, XrayDataset


class RandomXrays(XrayDataset):
    """Noise in place of files, so that no disk is measured."""

    def __init__(self, number: int, size: int, augment: RandomFlip | None) -> None:
        targets = np.arange(number) % 4
        super().__init__([""] * number, targets, Preprocessing(size, (0, 0, 0), (1, 1, 1)), augment=augment)
        self.pictures = torch.randint(0, 256, (number, 1, size, size), dtype=torch.uint8)

    def resized(self, index: int) -> torch.Tensor:
        """Return a picture that is there already."""
        return self.pictures[index]


def seconds(
    name: str, training: Training, loaders: dict[str, DataLoader], epochs: int
) -> tuple[float, float]:
    """Return how much longer the first epoch of a training takes than the median of the others, and that (of a
    single epoch: 0 and its own).
    """
    network = build_network(name, 4, hidden_units=training.hidden_units)
    settings = training.model_copy(update={"epochs": epochs, "patience": epochs})
    took = fine_tune(network, loaders, training=settings, device="cpu").history["seconds"].tolist()
    epoch = statistics.median(took[1:] or took)
    return took[0] - epoch, epoch


def main() -> None:
    """Measure and print a line a network."""
    parser = argparse.ArgumentParser(
        description="Time frozen-backbone epochs with and without cached features."
    )
    parser.add_argument("--networks", default="resnet101,densenet169,vgg19")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    study = load_study("covid_frozen")
    train, val = RandomXrays(given.images, given.size, RandomFlip()), RandomXrays(16, given.size, None)
    loaders = {
        "train": DataLoader(train, 16, shuffle=True, collate_fn=train.collate),
        "val": DataLoader(val, 16, collate_fn=val.collate),
    }
    for name in given.networks.split(","):
        once = study.training_of(name).model_copy(update={"weights": "none", "precision": "fp32"})
        usual = once.model_copy(update={"cache_features": False})
        rounds = [
            (*seconds(name, once, loaders, 5), seconds(name, usual, loaders, 1)[1])
            for _ in range(given.rounds)
        ]
        start, epoch, plain = (statistics.median(values) for values in zip(*rounds, strict=True))
        print(
            f"{name}: features {start:.2f} s once, then {epoch:.3f} s an epoch; usual way {plain:.2f} s an epoch: "
            f"{plain / epoch:.0f} times; 20 epochs {20 * plain / (start + 20 * epoch):.1f} times"
        )


if __name__ == "__main__":
    main()
