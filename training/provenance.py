"""What the results of a training depend on, and where they come from."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState

from datasets import SPLITS, XrayTable, data_fingerprint
from datasets.table import content_digests
from studies.loading import PROJECT, positive_class
from studies.settings import Study
from training.devices import resolve_precision

# These settings change how long a training takes, not its results.
COSTS = frozenset({"cache_images", "checkpoint_minutes"})
# These settings change the results but not the weights: an interrupted training may continue with other values.
AFTER_TRAINING = frozenset({"keep_checkpoints", "threshold"})


@dataclass(frozen=True)
class Provenance:
    """What one training depends on.

    Attributes:
        settings: everything that the weights depend on. It must be the same when the training continues.
        digest: 16 hex digits that change with anything that the results depend on.
        content: a digest for each image of the table when the training began, None for an unreadable one.
    """

    settings: dict[str, object]
    digest: str
    content: Sequence[str | None]


def process_settings(accelerator: PartialState) -> dict[str, object]:
    """Return the settings that each process determines for itself and that must be the same in all processes."""
    return {"threads": torch.get_num_threads(), "device": accelerator.device.type, "torch": str(torch.__version__)}


def provenance_of(
    study: Study, table: XrayTable, network: str, images: str, weights: Path | None, accelerator: PartialState
) -> Provenance:
    """Return what the training of one network depends on. This reads all images.

    Args:
        study: the study.
        table: its images, split.
        network: the name of the architecture.
        images: the `key` of the preprocessing.
        weights: the file that the training starts from, or None.
        accelerator: this process's device and the number of processes.
    """
    content = content_digests(table.frame["path"])  # first, so that every later change of an image is noticed
    training = study.training_of(network)
    groups = {"preprocessing": study.preprocessing, "augmentation": study.augmentation}
    settings = {
        **training.model_dump(mode="json", exclude=COSTS | AFTER_TRAINING),
        **{f"{name} {key}": value for name in groups for key, value in groups[name].model_dump(mode="json").items()},
        "seed": study.seed,
        "precision": resolve_precision(training.precision, accelerator.device),
        "data": data_fingerprint(table),
        "images": images,
        # The card beside a weights file names the classes of its head.
        "content of weights": weights and content_digests([weights, weights.with_name("model.json")]),
        "processes": accelerator.num_processes,
        **process_settings(accelerator),
    }
    results = settings | training.model_dump(mode="json", include=AFTER_TRAINING)
    results["positive"] = positive_class(study, table)  # the same whether the study names it or not
    digest = hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()[:16]
    return Provenance(settings, digest, content)


def origin(study: Study, table: XrayTable, provenance: Provenance) -> dict[str, object]:
    """Return where a network comes from, as `model.json` records it."""
    settings = provenance.settings
    packages = ("torch", "torchvision", "accelerate")
    return {
        # The data root may differ between machines, so it is no part of the experiment.
        "study": study.model_dump(mode="json", exclude={"data": {"root"}, "datasets": {"__all__": {"root"}}}),
        "seed": study.seed,
        "images": {split: len(table.subset(split)) for split in SPLITS},
        "commit": _commit(),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
        "settings": provenance.digest,
        "data_fingerprint": settings["data"],
        # Another number of threads adds in another order, which changes the last bits.
        **{key: settings[key] for key in ("threads", "processes", "precision", "device")},
    }


def _commit() -> str | None:
    """Return the commit of this project, or None in a copy without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def changed_images(table: XrayTable, provenance: Provenance) -> list[str]:
    """Return a text for each image that has changed since the training began: its path and what happened to it."""
    paths = table.frame["path"]
    rows = zip(paths, provenance.content, content_digests(paths), strict=True)
    return [f"{path} {'has other content' if now else 'is gone'}" for path, before, now in rows if before != now]
