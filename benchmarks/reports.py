"""The output of every benchmark: a table on the screen and `benchmarks/results/NAME.json`."""

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def machine(device: torch.device) -> str:
    """Return a description of the machine and its torch, for the report."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    units = [name for name, there in torch.cpu.get_capabilities().items() if there is True]
    named = ", ".join(name for name in units if "512" in name or "bf16" in name or "amx" in name)
    return f"{platform.machine()}, {os.cpu_count()} cores ({named or 'no AVX-512'}), torch {torch.__version__}"


def report(name: str, rows: Sequence[dict[str, object]]) -> None:
    """Print the rows, each {"name", "ours", "plain", "ratio", …}, and write them to `results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(list(rows), indent=2) + "\n", encoding="utf-8")
    for row in rows:
        figures = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
            if key != "name"
        )
        print(f"{row['name']}: {figures}")
