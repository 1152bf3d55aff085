"""How long `overlay_cam.py` takes for one X-ray, beside the least that could do it.

    python benchmarks/overlay.py -m demo/resnet18 [-i IMAGE] [-n 7]

The least: a Python that imports torch and torchvision, plus one forward pass of the same network at the same
size (timed inside that process). Runs alternate; medians and their ratio (ours / least) are arguments.
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
    """Measure and print."""
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
            code = FORWARD.format(project=str(PROJECT), model=arguments.model)
            command = [sys.executable, "-c", code]
            result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=PROJECT)
            forwards.append(float(result.stdout))
    # The first round fills the file cache and does not count.
    ours, imports, forwards = (statistics.median(times[1:]) for times in (ours, imports, forwards))
    least = imports + forwards
    row = {"name": f"one X-ray, {arguments.model}", "ours": ours, "plain": least, "ratio": ours / least}
    report("overlay", [{**row, "imports": imports, "forward": forwards}])


if __name__ == "__main__":
    main()
