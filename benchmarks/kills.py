"""Kill a training again and again at random moments. It must end with the same bytes as one without kills.

    python benchmarks/kills.py [--kills 20] [--seed 0] [--network resnet18]

One training of a small study on synthetic X-rays runs without kills. Another one is killed by SIGKILL, which no program
can catch, and started again each time. A kill may come while it imports, draws, decodes, trains, validates, saves or
writes its results. The script prints when each kill came. The script exits with status 1 if `model.safetensors`,
`history.csv` or a file of predictions differs. The "ours" of that file is then 0.
"""

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reports import report

PROJECT = Path(__file__).resolve().parent.parent
STUDY = """
title = "Kills"
[data]
reader = "covid_radiography"
root = "phantom"
[data.phantom]
size = 96
images_per_class = { "COVID-19" = 60, "Lung Opacity" = 60, "Normal" = 60, "Viral Pneumonia" = 60 }
[split]
val = 0.2
test = 0.2
[preprocessing]
image_size = 96
[augmentation]
horizontal_flip = true
rotation = 10
brightness = 0.1
[training]
weights = "none"
phases = [{ trainable = "head", epochs = 2, learning_rate = 1e-3 }, { epochs = 6, learning_rate = 1e-3 }]
schedule = "one_cycle"
batch_size = 8
hidden_units = [16]
dropout = 0.3
checkpoint_minutes = 0.03
[networks.NETWORK]
"""
COMPARED = ("model.safetensors", "history.csv", "predictions_train.csv", "predictions_val.csv", "predictions_test.csv")


def training(study: Path, runs: Path) -> subprocess.Popen:
    """Start the training as a user does."""
    command = [sys.executable, str(PROJECT / "finetune.py"), str(study), "--runs", str(runs), "--device", "cpu"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    """Wait until a training ends by itself."""
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"the training failed:\n{errors}")


def moment(folder: Path) -> str:
    """Return how far a killed training had come, from its files."""
    history = folder / "resume" / "history.csv"
    if not (folder / "resume").is_dir():
        return "before the training" if not (folder / "model.json").is_file() else "after the training"
    done = len(history.read_text().splitlines()) - 1 if history.is_file() else 0
    return f"after {done} epochs" + ("" if (folder / "resume" / "state.pt").is_file() else ", nothing saved yet")


def compared(whole: Path, killed: Path) -> dict[str, bool]:
    """Return for each file whether it has the same bytes in both run folders."""
    return {name: (whole / name).read_bytes() == (killed / name).read_bytes() for name in COMPARED}


def undisturbed(study: Path, runs: Path, network: str) -> tuple[float, float]:
    """Return the seconds of a training without kills: until the first state was saved, and from then to the end."""
    started = time.perf_counter()
    process = training(study, runs)
    while process.poll() is None and not (runs / "kills" / network / "resume" / "state.pt").is_file():
        time.sleep(0.01)
    saved = time.perf_counter()
    finish(process)
    return saved - started, time.perf_counter() - saved


def main() -> int:
    """Measure, print and return the exit status."""
    parser = argparse.ArgumentParser(description="Kill a training again and again.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--network", default="resnet18")
    arguments = parser.parse_args()
    rng, network = random.Random(arguments.seed), arguments.network
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        study = folder / "kills.toml"
        study.write_text(STUDY.replace("NETWORK", network))
        start, rest = undisturbed(study, folder / "whole", network)
        runs, equal = 1, dict.fromkeys(COMPARED, True)
        killed = 0
        while killed <= arguments.kills:
            process = training(study, folder / str(runs))
            last = killed == arguments.kills
            try:
                # One run is killed about as often as asked. A kill may come at any moment of the run.
                process.wait(None if last else rng.uniform(0, start + 2 * rest / arguments.kills))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                killed += 1
                print(f"kill {killed}: {moment(folder / str(runs) / 'kills' / network)}", flush=True)
                continue
            finish(process)
            ends = compared(folder / "whole" / "kills" / network, folder / str(runs) / "kills" / network)
            equal = {name: equal[name] and ends[name] for name in COMPARED}
            if last:
                break
            runs += 1  # this run ended early: the next run gets the remaining kills
    title = f"after {killed} kills of {runs} run{'s' * (runs > 1)}: the same"
    rows = [
        {"name": f"{name} {title}", "ours": int(same), "plain": 1, "ratio": int(same)} for name, same in equal.items()
    ]
    report("kills", rows)
    return 0 if all(equal.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
