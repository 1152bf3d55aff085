"""The times of a training step, of loading and of a whole epoch, compared with the plain loop of the usual tutorial.

    python benchmarks/training.py [--networks resnet18,densenet121] [--images 96] [--size 224] [--batch 16]
                                  [--rounds 5] [--device cpu] [--data FOLDER]

The plain loop decodes each file with PIL in a `DataLoader`. torchvision resizes it and makes a tensor of it. It uses
fp32, the default memory format and Adam. Our loop takes images from the memory-mapped file of `training.image_cache`,
computes by the rule of `training.devices` (bf16 where the device has units for it, channels last) and uses fused Adam.
Both train the same network on the same files, in turns. The script prints medians.

    step NETWORK    seconds of a training step on a batch in memory
    loading         seconds to load the images of an epoch to the device, from the second epoch on
    loop NETWORK    seconds of an epoch of our loop with images from the file ("ours") and from memory ("plain"): a
                    ratio of 0.95 means that loading takes a twentieth of the time
    epoch NETWORK   seconds of a whole epoch with loading, in our loop and in the plain loop

The files are synthetic X-rays of 1,024 px in PNG files, unless `--data` names a folder with images.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reports import machine, report

from datasets.phantom import CLASSES, write_phantom
from networks import build_network
from studies.settings import IMAGENET_MEAN, IMAGENET_STD
from training.batches import Batches, XrayDataset
from training.devices import autocast_options, described, in_order
from training.image_cache import cached
from utils import Preprocessing

Step = Callable[[Tensor, Tensor], object]


class PlainDataset(Dataset):
    """A tutorial's dataset: it reads and transforms one file for each item."""

    def __init__(self, paths: list[str], size: int) -> None:
        self.paths = paths
        normalise = v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)
        to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        self.transform = v2.Compose([v2.Resize((size, size)), *to_tensor, normalise])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.open(self.paths[index]).convert("RGB")), index % 4


def plain_step(name: str, device: torch.device) -> Step:
    """Return a tutorial's training step for a new network."""
    network = build_network(name, 4).to(device).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    loss_of = nn.CrossEntropyLoss()

    def step(images: Tensor, targets: Tensor) -> float:
        images, targets = images.to(device), targets.to(device)
        optimizer.zero_grad()
        loss = loss_of(network(images), targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def our_step(name: str, device: torch.device) -> Step:
    """Return the training step of `training.optimisation.Optimisation` for a new network."""
    network = build_network(name, 4).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)

    def step(images: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(**autocast_options("auto", device)):
            output = network(in_order(images))
        loss = nn.functional.cross_entropy(output.float(), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds until the device has done a piece of work."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def in_turns(rounds: int, *works: Callable[[], object], device: torch.device) -> list[float]:
    """Return the median seconds of each piece of work, after one round to warm up."""
    times_of_rounds = [[seconds(work, device) for work in works] for _ in range(rounds + 1)][1:]
    return [statistics.median(times) for times in zip(*times_of_rounds, strict=True)]


def train_on(batches: Iterable, step: Step) -> None:
    """Train on all batches."""
    for images, targets, *_ in batches:
        step(images, targets)


def files(folder: Path, number: int) -> list[str]:
    """Draw X-rays of 1,024 px, the size in public archives; return their paths."""
    write_phantom(folder / "drawn", images_per_class=dict.fromkeys(CLASSES, -(-number // 4)), size=256, seed=0)
    drawn = [path for path in sorted((folder / "drawn").rglob("*.png")) if path.parent.name == "images"][:number]
    paths = []
    rng = np.random.default_rng(0)
    for place, path in enumerate(drawn):
        large = cv2.resize(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), (1024, 1024), interpolation=cv2.INTER_CUBIC)
        noisy = (large + rng.normal(0, 3, large.shape)).clip(0, 255).astype(np.uint8)
        paths.append(str(folder / f"{place}.png"))
        cv2.imwrite(paths[-1], noisy)
    return paths


def row(name: str, ours: float, plain: float, **more: object) -> dict[str, object]:
    """Return a row of the report. The ratio says how many times faster our loop is."""
    return {"name": name, "ours": ours, "plain": plain, "ratio": plain / ours, **more}


def loading(ours: Batches, plain: DataLoader, rounds: int, device: torch.device) -> dict[str, object]:
    """Time how long it takes to have all batches of an epoch on the device."""

    def load_ours() -> None:
        for _ in ours.epoch(1, device=device):
            pass

    def load_plain() -> None:
        for images, targets in plain:
            images.to(device), targets.to(device)

    return row("loading", *in_turns(rounds, load_ours, load_plain, device=device))


def steps_and_epochs(
    name: str, ours: Batches, plain: DataLoader, rounds: int, device: torch.device
) -> list[dict[str, object]]:
    """Time training steps on a batch in memory, and epochs from memory, from the file and by the plain loop."""
    ready = [(batch.images, batch.targets) for batch in ours.epoch(1, device=device)]
    usual = [(images.contiguous(), targets) for images, targets in ready]
    quick, slow = our_step(name, device), plain_step(name, device)
    step = in_turns(rounds, lambda: quick(*ready[0]), lambda: slow(*usual[0]), device=device)
    more = {"images_per_second": ours.batch_size / step[0], "computed in": described("auto", device)}
    from_file, from_memory, tutorial = in_turns(
        rounds,
        lambda: train_on(ours.epoch(1, device=device), quick),
        lambda: train_on(ready, quick),
        lambda: train_on(plain, slow),
        device=device,
    )
    return [
        row(f"step {name}", *step, **more),
        row(f"loop {name}", from_file, from_memory),
        row(f"epoch {name}", from_file, tutorial),
    ]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="Time training beside the plain loop.")
    parser.add_argument("--networks", default="resnet18,densenet121")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path, help="a folder with images in place of synthetic ones")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        paths = files(folder, arguments.images)
        if arguments.data is not None:
            kinds = {".png", ".jpg", ".jpeg"}
            images = (str(path) for path in sorted(arguments.data.rglob("*")) if path.suffix.lower() in kinds)
            paths = list(itertools.islice(images, arguments.images))
        preprocessing = Preprocessing(arguments.size, IMAGENET_MEAN, IMAGENET_STD)
        images = cached({"train": paths}, preprocessing, folder / "cache")["train"]
        dataset = XrayDataset(paths, np.arange(len(paths)) % 4, preprocessing, images=images)
        ours = Batches(dataset, arguments.batch, seed=0, prepare=preprocessing.normalise)
        plain = DataLoader(PlainDataset(paths, arguments.size), arguments.batch, shuffle=True, drop_last=True)
        rows = [loading(ours, plain, arguments.rounds, device)]
        for name in arguments.networks.split(","):
            rows += steps_and_epochs(name, ours, plain, arguments.rounds, device)
    report("training", [{**row, "machine": machine(device)} for row in rows])


if __name__ == "__main__":
    main()
