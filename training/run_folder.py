"""What a training writes to disk: its run folder `runs/<study>/<network>/`.

An unfinished training has all its files in `resume/` in that folder. Its results are staged there as well, and replace
older results when they are complete.
"""

import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import AcquireReturnProxy, FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from datasets import SPLITS, XrayTable
from datasets.table import relative_paths, target_names
from training.checkpoints import STATE
from utils import flush, remove_unfinished, write_whole

CARD = "model.json"
# Every training writes these files; a training on lungs alone writes `OF_LUNGS` too.
ALWAYS = frozenset(
    {CARD, "model.safetensors", "history.csv", "timing.csv", "splits.csv"}
    | {f"predictions_{split}.csv" for split in SPLITS}
)
OF_LUNGS = frozenset({"lungs", "lungs_failed.csv"})
# These grow in `resume/` epoch by epoch and belong to the results.
OF_EPOCHS = ("checkpoints", "tensorboard")
RESUME = "resume"
# Staged results in `resume/`: being written, complete, and on their way into the run folder.
INCOMPLETE, COMPLETE, MOVING = "results_incomplete", "results", "results_moving"


def predictions_frame(table: XrayTable, split: str, probabilities: np.ndarray) -> pd.DataFrame:
    """Return a row for each image of a split, as `predictions_<split>.csv` holds it.

    Args:
        table: the study's images, split.
        split: "train", "val" or "test".
        probabilities: (N, C), in the order of `table.subset(split)` and `table.classes`.

    Returns:
        The columns `path` (below the data root), `patient`, `target` (see `target_names`), and one for each class.
    """
    rows = table.subset(split)
    frame = pd.DataFrame({"path": relative_paths(rows["path"], table.root), "patient": rows["patient"]})
    frame["target"] = target_names(table, split)
    frame[list(table.classes)] = probabilities
    return frame


def log_epoch(folder: Path, history: pd.DataFrame, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write what an epoch leaves in `resume/`.

    Args:
        folder: the `resume/` folder.
        history: a row for each epoch so far. All go into `history.csv`, the last one also to TensorBoard where that
            is installed.
        weights: tensors on the CPU that are kept as this epoch's checkpoint, or None.
    """
    write_whole(folder / "history.csv", history.to_csv(index=False))
    if weights is not None:
        checkpoint = folder / "checkpoints" / f"epoch_{len(history):02}.safetensors"
        checkpoint.parent.mkdir(exist_ok=True)
        write_whole(checkpoint, partial(save_file, weights))
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return
    with SummaryWriter(folder / "tensorboard") as writer:
        for column in history.columns.drop(["epoch", "phase"]):
            writer.add_scalar(column, history[column].iloc[-1], len(history))


@contextmanager
def training_folder(folder: Path, *, restart: bool) -> Iterator[Path]:
    """Yield `resume/` in a run folder, locked against other trainings.

    Of several processes that train together only the main one calls it.

    Args:
        folder: the run folder.
        restart: whether to empty `resume/` first.

    Raises:
        ValueError: another training is at work on the folder.
    """
    working = folder / RESUME
    with _lock(folder):
        _put_in_place(folder)
        if restart:
            shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True, exist_ok=True)
        for leftover in (working / INCOMPLETE, *working.glob("features-*")):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        remove_unfinished(working)
        (working / "process").write_text(f"number {os.getpid()} on {platform.node()}", encoding="utf-8")
        try:
            yield working
        finally:
            if not any((working / name).exists() for name in (STATE, COMPLETE, MOVING)):
                shutil.rmtree(working, ignore_errors=True)
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _lock(folder: Path) -> AcquireReturnProxy:
    """Return the lock of a run folder, acquired.

    The lock file is `runs/.locks/<study>/<network>.lock` and is never deleted: a process that has opened a lock file
    just before it is deleted would hold a lock that nobody else sees.
    """
    file = folder.parent.parent / ".locks" / folder.parent.name / f"{folder.name}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(file).acquire(timeout=0)
    except Timeout:
        process = folder / RESUME / "process"
        name = f" ({process.read_text(encoding='utf-8')})" if process.is_file() else ""
        raise ValueError(
            f"another process{name} is training into {folder}: wait for it, or give another --runs"
        ) from None


def finished_digest(folder: Path) -> str | None:
    """Return the settings digest (see `training.provenance`) of the complete results in a run folder.

    Complete results that a killed process has left in `resume/` are put in place first.

    Returns:
        The digest, or None where a file of the results is missing or the digest is not recorded.

    Raises:
        ValueError: results wait in `resume/`, and another training is at work on the folder.
    """
    if any((folder / RESUME / name).is_dir() for name in (COMPLETE, MOVING)):
        with training_folder(folder, restart=False):
            pass
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        files = ALWAYS | OF_LUNGS if card["lung_masking"] else ALWAYS
        digest = card["origin"]["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return digest if all((folder / name).exists() for name in files) else None


@contextmanager
def replaced_results(folder: Path) -> Iterator[Path]:
    """Yield an empty folder for the results of a training; put them into the run folder when the block has succeeded.

    A kill at any moment leaves the older results, or the newer ones, or newer ones that `training_folder` puts in
    place. Files in the run folder that no training writes are kept.
    """
    staged = folder / RESUME / INCOMPLETE
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
        for path in (*staged.rglob("*"), staged):
            flush(path)  # before the older results and the state to go on from are deleted
        os.replace(staged, folder / RESUME / COMPLETE)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    flush(folder / RESUME)
    _put_in_place(folder)


def _put_in_place(folder: Path) -> None:
    """Replace the results in a run folder by complete ones that wait in `resume/`, and delete `resume/`.

    The older results are deleted, then the new ones are moved, `model.json` last. A call that was killed is repeated:
    the name of the folder with the new results says whether older ones are still to be deleted.
    """
    working = folder / RESUME
    complete, moving = working / COMPLETE, working / MOVING
    if complete.is_dir():
        for name in (CARD, *ALWAYS, *OF_LUNGS, *OF_EPOCHS):
            _remove(folder / name)
        os.replace(complete, moving)
        flush(working)
    if moving.is_dir():
        epochs = [working / name for name in OF_EPOCHS if (working / name).is_dir()]
        for path in (*epochs, *(path for path in moving.iterdir() if path.name != CARD)):
            os.replace(path, folder / path.name)
        for path in set(working.iterdir()) - {moving}:  # finished results have no state to go on from
            _remove(path)
        flush(folder)
        if (moving / CARD).is_file():
            os.replace(moving / CARD, folder / CARD)
            flush(folder)
        shutil.rmtree(working)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
