"""Time to read the label table of ChestX-ray14 at full size into an `XrayTable`, and to split it by patient.

    python benchmarks/read_table.py [--rows 112120] [--rounds 5]

It writes a table and one empty file for each image into a temporary folder. It prints median times, and for comparison
the time of `pandas.read_csv` on the same file, which every reader needs.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from reports import report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.chestxray14 import FINDINGS, read_chestxray14
from datasets.splits import split_by_patient


def write_table(root: Path, rows: int) -> Path:
    """Write `Data_Entry_2017.csv` with `rows` images of about `rows / 4` patients, and the image files."""
    rng = np.random.default_rng(0)
    patients = np.sort(rng.integers(1, rows // 4 + 2, rows))
    number = pd.Series(patients).groupby(patients).cumcount()
    names = [f"{patient:08d}_{k:03d}.png" for patient, k in zip(patients, number, strict=True)]
    kinds = np.array(["No Finding", *FINDINGS, "|".join(FINDINGS[:3])])
    frame = pd.DataFrame({"Image Index": names, "Finding Labels": rng.choice(kinds, rows)})
    frame = frame.assign(**{"Follow-up #": number, "Patient ID": patients, "Patient Age": 50, "Patient Gender": "F"})
    frame.to_csv(root / "Data_Entry_2017.csv", index=False)
    (root / "images").mkdir()
    for name in names:
        (root / "images" / name).touch()
    return root / "Data_Entry_2017.csv"


def median_seconds(work: Callable[[], object], rounds: int) -> float:
    """Return the median wall-clock time of `work` over `rounds` calls."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time reading and splitting the full ChestX-ray14 table.")
    parser.add_argument("--rows", type=int, default=112_120)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = write_table(Path(folder), arguments.rows)
        table = read_chestxray14(Path(folder))
        plain = median_seconds(lambda: pd.read_csv(file), arguments.rounds)
        read = median_seconds(lambda: read_chestxray14(Path(folder)), arguments.rounds)
        split = median_seconds(lambda: split_by_patient(table, val=0.05, test=0.15, seed=0), arguments.rounds)
    row = {"name": f"read {arguments.rows:,} rows", "ours": read, "plain": plain, "ratio": read / plain}
    report("read_table", [{**row, "split by patient": split}])


if __name__ == "__main__":
    main()
