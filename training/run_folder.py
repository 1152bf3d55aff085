"""What a training writes to disk: its run folder `runs/<study>/<network>/`.

An unfinished training keeps all its files in `resume/` in that folder. Its results are first written there as well.
When they are complete, they replace older results.
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
from datasets.splits import splits_frame
from datasets.table import relative_paths, target_names
from training.checkpoints import STATE
from training.loop import FineTuned
from utils import flush, remove_unfinished, write_whole

CARD, WEIGHTS = "model.json", "model.safetensors"
# Every training writes `ALWAYS`; a training on lungs alone writes `OF_LUNGS` too.
ALWAYS = (CARD, WEIGHTS, "history.csv", "timing.csv", "splits.csv", *(f"predictions_{split}.csv" for split in SPLITS))
OF_LUNGS = ("lungs", "lungs_failed.csv")
# An epoch may add a file to each of these folders in `resume/`. The folders belong to the results.
OF_EPOCHS = ("checkpoints", "tensorboard")
RESUME = "resume"
# Folders in `resume/`: results are written into the first one. Complete results are in the second one.
INCOMPLETE, COMPLETE = "results_incomplete", "results"


def log_epoch(folder: Path, history: pd.DataFrame, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the files of one epoch into `resume/`.

    Args:
        folder: the `resume/` folder.
        history: a row for each epoch so far. All go into `history.csv`, the last one also to TensorBoard where that
            is installed.
        weights: tensors on the CPU, saved as this epoch's checkpoint; None saves no checkpoint.
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


def write_tables(folder: Path, table: XrayTable, course: FineTuned, probabilities: Mapping[str, np.ndarray]) -> None:
    """Write the CSV files of the results.

    `predictions_<split>.csv` has a row for each image of the split, with the columns `path` (below the data root),
    `patient`, `target` (see `target_names`), and one for each class.

    Args:
        folder: where the files go.
        table: the study's images, split.
        course: the history and the timing of the training.
        probabilities: (N, C) for each split, in the order of `table.subset(split)` and `table.classes`.
    """
    course.history.to_csv(folder / "history.csv", index=False)
    course.timing.to_csv(folder / "timing.csv", index=False)
    splits_frame(table).to_csv(folder / "splits.csv", index=False)
    for split in SPLITS:
        rows = table.subset(split)
        frame = pd.DataFrame({"path": relative_paths(rows["path"], table.root), "patient": rows["patient"]})
        frame["target"] = target_names(table, split)
        frame[list(table.classes)] = probabilities[split]
        frame.to_csv(folder / f"predictions_{split}.csv", index=False)


@contextmanager
def training_folder(folder: Path, *, restart: bool) -> Iterator[Path]:
    """Yield `resume/` in a run folder, locked against other trainings.

    When several processes train together, only the main process calls this.

    Args:
        folder: the run folder.
        restart: whether to empty `resume/` first.

    Raises:
        ValueError: another training is using the folder.
    """
    working = folder / RESUME
    with _lock(folder):
        _put_in_place(folder)
        if (folder / CARD).is_file():
            print(f"{folder} holds older results: they are replaced when this training is done")
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
            if not any((working / name).exists() for name in (STATE, COMPLETE)):
                shutil.rmtree(working, ignore_errors=True)
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _lock(folder: Path) -> AcquireReturnProxy:
    """Return the lock of a run folder, acquired.

    The lock file is `runs/.locks/<study>/<network>.lock`. It is never deleted: a process that opened the file just
    before its deletion would hold a lock that no other process sees.
    """
    real = folder.resolve()  # a link and its target are one folder
    file = real.parent.parent / ".locks" / real.parent.name / f"{real.name}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(file).acquire(timeout=0)
    except Timeout:
        process = folder / RESUME / "process"
        name = f" ({process.read_text(encoding='utf-8')})" if process.is_file() else ""
        raise ValueError(f"another process{name} is training into {folder}: wait, or give another --runs") from None


def finished_digest(folder: Path) -> str | None:
    """Return the settings digest (see `training.provenance`) of the complete results in a run folder.

    If a killed process left complete results in `resume/`, they are put in place first.

    Returns:
        The digest, or None where a file of the results is missing or the digest is not recorded.

    Raises:
        ValueError: there are complete results in `resume/`, and another training is using the folder.
    """
    if (folder / RESUME / COMPLETE).is_dir():
        with _lock(folder):
            _put_in_place(folder)
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        names, digest = (*ALWAYS, *(OF_LUNGS if card["lung_masking"] else ())), card["origin"]["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return digest if all((folder / name).exists() for name in names) else None


@contextmanager
def replaced_results(folder: Path) -> Iterator[Path]:
    """Yield an empty folder for the results of a training; put them into the run folder when the block has succeeded.

    After a kill at any moment, the run folder holds the older or the newer results, or the next `training_folder` puts
    the newer ones in place. Files in the run folder that no training writes are kept.
    """
    working = folder / RESUME
    staged = working / INCOMPLETE
    staged.mkdir(parents=True)
    try:
        yield staged
        for path in (*staged.rglob("*"), staged):
            flush(path)  # before the older results and the training's state are deleted
        os.replace(staged, working / COMPLETE)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    flush(working)
    _put_in_place(folder)


def _put_in_place(folder: Path) -> None:
    """Replace the results in a run folder by the complete ones in `resume/`, if there are any; delete `resume/`.

    The older results are deleted first. Then the new weights are moved, then the other files, `model.json` last. If
    a call is killed, the next one continues: it deletes older results only while the new weights are not yet moved.
    """
    working = folder / RESUME
    complete = working / COMPLETE
    if not complete.is_dir():
        return
    if (complete / WEIGHTS).is_file():
        for name in (*ALWAYS, *OF_LUNGS, *OF_EPOCHS):  # `model.json` first
            _remove(folder / name)
        flush(folder)
        os.replace(complete / WEIGHTS, folder / WEIGHTS)
        flush(folder)
    epochs = [working / name for name in OF_EPOCHS if (working / name).is_dir()]
    for path in (*epochs, *sorted(complete.iterdir(), key=lambda path: path.name == CARD)):
        os.replace(path, folder / path.name)
    flush(folder)
    for path in set(working.iterdir()) - {complete}:
        _remove(path)
    shutil.rmtree(working)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
