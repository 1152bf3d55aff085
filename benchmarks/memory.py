"""How much memory a study of 112,120 X-rays takes, the number in ChestX-ray14.

    python benchmarks/memory.py [--rows 112120] [--size 224] [--network lenet5] [--epochs 1]

`finetune.py` trains on this number of files, which are hard links to 400 synthetic X-rays. "ours" is the largest
resident size (`ru_maxrss`, GB) of that training. "plain" is that of the same training on a hundredth of the files:
Python, the libraries and the network. The difference is the memory for the images. "images" is the size of the decoded
images in GB.
"""

import argparse
import os
import random
import resource
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reports import report

from datasets.phantom import CLASSES, write_phantom

PROJECT = Path(__file__).resolve().parent.parent
STUDY = """
title = "Memory"
[data]
reader = "folder"
root = "ROWS"
[split]
val = 0.1
test = 0.1
[preprocessing]
image_size = SIZE
[augmentation]
horizontal_flip = true
[training]
weights = "none"
learning_rate = 1e-4
epochs = EPOCHS
batch_size = 64
[networks.NETWORK]
"""


def peak(study: Path, runs: Path) -> float:
    """Train in a new process; return its largest resident size in GB."""
    command = [sys.executable, str(PROJECT / "finetune.py"), str(study), "--runs", str(runs), "--device", "cpu"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert after > before, "measure the smaller training first: this counter only grows"
    return after * 1024 / 1e9


def links(folder: Path, drawn: list[Path], number: int) -> None:
    """Fill one folder for each class with `number` links to the drawn images."""
    for place in range(number):
        source = drawn[place % len(drawn)]
        name = folder / source.parent.parent.name / f"{place}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, name)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="Measure the memory of a large study.")
    parser.add_argument("--rows", type=int, default=112_120)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--network", default="lenet5")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    arguments = parser.parse_args()
    with TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        write_phantom(folder / "drawn", images_per_class=dict.fromkeys(CLASSES, 100), size=arguments.size, seed=0)
        drawn = [path for path in sorted((folder / "drawn").rglob("*.png")) if path.parent.name == "images"]
        random.Random(0).shuffle(drawn)  # the first few then have all classes
        peaks = []
        for number in (arguments.rows // 100, arguments.rows):
            links(folder / str(number), drawn, number)
            text = STUDY.replace("ROWS", str(number)).replace("SIZE", str(arguments.size))
            study = folder / f"rows{number}.toml"
            study.write_text(text.replace("EPOCHS", str(arguments.epochs)).replace("NETWORK", arguments.network))
            peaks.append(peak(study, folder / "runs"))
    few, many = peaks
    row = {"name": f"{arguments.rows} images of {arguments.size} px", "ours": many, "plain": few, "ratio": many / few}
    report("memory", [{**row, "difference": many - few, "images": arguments.rows * arguments.size**2 / 1e9}])


if __name__ == "__main__":
    main()
