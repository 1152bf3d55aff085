"""The time that `overlay_cam.py` takes for one X-ray, and the shortest possible time.

    python benchmarks/overlay.py -m demo/resnet18 [-i IMAGE] [-n 7]

The shortest possible time is that of importing torch and torchvision in a new Python process, plus that of one forward
pass of the same network at the same size. The runs alternate. The report has the medians, and the ratio ours / plain.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from reports import report

PROJECT = Path(__file__).resolve().parent.parent
FORWARD = """
import time, sys, torch
sys.path.insert(0, {project!r})
from inference.trained_networks import load_network, run_folder
network, card, _ = load_network(run_folder({model!r}))
images = torch.randn(1, 3, card.image_size, card.image_size)
with torch.inference_mode():
    started = time.perf_counter()
    network(images)
print(time.perf_counter() - started)
"""


def seconds(command: list[str]) -> float:
    """Return the wall-clock time of a command, which must succeed."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=PROJECT)
    return time.perf_counter() - started


def main() -> None:
    """Measure both times and report them."""
    parser = argparse.ArgumentParser(description="Time overlay_cam.py against bare imports and a forward pass.")
    parser.add_argument("-m", "--model", default="demo/resnet18")
    parser.add_argument("-i", "--image", default="assets/phantom.png")
    parser.add_argument("-n", "--rounds", type=int, default=7)
    arguments = parser.parse_args()
    ours, imports, forwards = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        options = ["-i", arguments.image, "-m", arguments.model, "-o", f"{folder}/o.png", "--device", "cpu"]
        for _ in range(arguments.rounds + 1):
            ours.append(seconds([sys.executable, "overlay_cam.py", *options]))
            imports.append(seconds([sys.executable, "-c", "import torch, torchvision"]))
            command = [sys.executable, "-c", FORWARD.format(project=str(PROJECT), model=arguments.model)]
            result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=PROJECT)
            forwards.append(float(result.stdout))
    # The first round fills the file cache and does not count.
    ours, imports, forwards = (statistics.median(times[1:]) for times in (ours, imports, forwards))
    plain = imports + forwards
    row = {"name": f"one X-ray, {arguments.model}", "ours": ours, "plain": plain, "ratio": ours / plain}
    report("overlay", [{**row, "imports": imports, "forward": forwards}])


if __name__ == "__main__":
    main()
