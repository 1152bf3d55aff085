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
from accelerate import Accelerator

from datasets import SPLITS, XrayTable, data_fingerprint
from datasets.table import content_digests
from studies.loading import PROJECT, positive_class
from studies.settings import Study
from training.devices import resolve_precision

# These settings change how long a training takes, not its results.
COSTS = frozenset({"cache_images", "checkpoint_minutes"})
# These settings change the results but not the weights: a training may go on with others.
AFTER_TRAINING = frozenset({"keep_checkpoints", "threshold"})


@dataclass(frozen=True)
class Provenance:
    """What one training depends on.

    Attributes:
        settings: all that the weights depend on, so all that must be the same when the training goes on.
        digest: 16 hex digits that change with anything that the results depend on.
        content: a digest for each image of the table when the training began, None for an unreadable one.
    """

    settings: dict[str, object]
    digest: str
    content: Sequence[str | None]


def process_settings(accelerator: Accelerator) -> dict[str, object]:
    """Return those settings that each process has by itself and that all processes must share."""
    return {"threads": torch.get_num_threads(), "device": accelerator.device.type, "torch": str(torch.__version__)}


def provenance_of(
    study: Study, table: XrayTable, network: str, images: str, weights: Path | None, accelerator: Accelerator
) -> Provenance:
    """Return what the training of one network depends on. All images are read for it.

    Args:
        study: the study.
        table: its images, split.
        network: the name of the architecture.
        images: the `key` of the preprocessing.
        weights: the file that the training starts from, or None.
        accelerator: this process's device and the number of processes.
    """
    content = content_digests(table.frame["path"])  # first: what changes from now on is noticed
    training = study.training_of(network)
    groups = {name: getattr(study, name).model_dump(mode="json") for name in ("preprocessing", "augmentation")}
    settings = {
        **training.model_dump(mode="json", exclude=COSTS | AFTER_TRAINING),
        **{f"{name} {key}": value for name, group in groups.items() for key, value in group.items()},
        "seed": study.seed,
        "precision": resolve_precision(training.precision, accelerator.device),
        "data": data_fingerprint(table),
        "images": images,
        # The card beside a file names the classes of its head.
        "content of weights": weights and content_digests([weights, weights.with_name("model.json")]),
        "processes": accelerator.num_processes,
        **process_settings(accelerator),
    }
    results = settings | training.model_dump(mode="json", include=AFTER_TRAINING)
    results["positive"] = positive_class(study, table)  # the same whether the study names it or not
    digest = hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()[:16]
    return Provenance(settings, digest, content)


def origin(study: Study, table: XrayTable, provenance: Provenance) -> dict[str, object]:
    """Return what `model.json` says of where a network comes from."""
    settings = provenance.settings
    versions = {package: version(package) for package in ("torch", "torchvision", "accelerate")}
    return {
        # The data root is where one machine keeps the data: it is no part of the experiment.
        "study": study.model_dump(mode="json", exclude={"data": {"root"}, "datasets": {"__all__": {"root"}}}),
        "seed": study.seed,
        "images": {split: len(table.subset(split)) for split in SPLITS},
        "commit": _commit(),
        "versions": {"python": platform.python_version()} | versions,
        "settings": provenance.digest,
        "data_fingerprint": settings["data"],
        # Another number of threads sums in another order, which changes the last bits.
        **{key: settings[key] for key in ("threads", "processes", "precision")},
    }


def _commit() -> str | None:
    """Return the commit of this project, or None in a copy without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def changed_images(table: XrayTable, provenance: Provenance) -> list[str]:
    """Return the images that have other content than when the training began, each with what has become of it."""
    paths = table.frame["path"]
    rows = zip(paths, provenance.content, content_digests(paths), strict=True)
    return [
        f"{path} {'is gone' if now is None else 'has other content'}" for path, before, now in rows if before != now
    ]
