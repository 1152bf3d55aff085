"""What a training leaves on disk, `runs/<study>/<network>/`: written by `finetune.py`, read back by notebook 3."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from datasets import XrayTable
from datasets.table import relative_paths, target_names
from networks import ARCHITECTURES, architecture
from predictions import Predictions, ensemble, read_predictions
from studies import Study
from trained_networks import ModelCard, read_card


@dataclass(frozen=True)
class Run:
    """One trained network, read back: its folder, card, history and predictions."""

    folder: Path
    card: ModelCard
    history: pd.DataFrame

    @property
    def score(self) -> str:
        """The name of the score in the history beside the loss: "accuracy" or "auc"."""
        return "auc" if self.card.multilabel else "accuracy"

    def predictions(self, split: str) -> Predictions:
        """Read what the network said of a split."""
        card = self.card
        return read_predictions(
            self.folder / f"predictions_{split}.csv",
            card.classes,
            multilabel=card.multilabel,
            thresholds=card.thresholds,
        )

    def splits(self) -> pd.DataFrame:
        """Read which image was on which side."""
        return pd.read_csv(self.folder / "splits.csv", dtype=str, keep_default_na=False)


def read_runs(study: Study, runs: Path) -> dict[str, Run]:
    """Return the trained networks of a study by title: its own, those of its folds and those of the studies
    that it is compared with, as far as they are there.

    Raises FileNotFoundError where the study has no trained network at all, ValueError where two of them know
    other classes or were tested on other images: their figures could not be compared.
    """
    found = {title: folder for title, folder in _folders(study, runs) if (folder / "model.json").is_file()}
    if not found:
        networks = ", ".join(study.networks)
        others = sorted(path.name for path in runs.glob(f"{study.name}-*") if any(path.glob("*/model.json")))
        there = f"; there is {', '.join(others)}: set `limit` or `quick` for it" if others else ""
        raise FileNotFoundError(
            f"no trained network of {study.name} ({networks}) in {runs}: run notebook 2 or finetune.py first{there}"
        )
    read = {
        title: Run(folder, read_card(folder), pd.read_csv(folder / "history.csv"))
        for title, folder in found.items()
    }
    _refuse_other_tests(read)
    return read


def _folders(study: Study, runs: Path) -> Iterator[tuple[str, Path]]:
    """Yield title and folder of every run that may be there."""
    networks = [*study.networks, *_trained_besides(study, runs)]
    alone = len(networks) == 1
    for network in networks:
        title = architecture(network).title
        yield (study.name if study.compare and alone else title), runs / study.name / network
        for fold in range(1, (study.split.folds or 0) + 1):
            yield f"{title}, fold {fold}", runs / f"{study.name}-fold{fold}" / network
        for other in (name for name in study.compare if name != study.name):
            yield (other if alone else f"{title}, {other}"), runs / other / network


def _trained_besides(study: Study, runs: Path) -> list[str]:
    """Return the networks that were trained for a study without being in its file."""
    folders = [runs / study.name, *runs.glob(f"{study.name}-fold[0-9]*")]
    found = sorted({card.parent.name for folder in folders for card in folder.glob("*/model.json")})
    return [name for name in found if name in ARCHITECTURES and name not in study.networks]


def _refuse_other_tests(read: Mapping[str, Run]) -> None:
    (first, run), *others = read.items()
    tested = _test_targets(run)
    for title, other in others:
        if other.card.classes != run.card.classes or not tested.equals(_test_targets(other)):
            raise ValueError(f"{first} and {title} were tested on other images or classes: train them again")


def _test_targets(run: Run) -> pd.Series:
    splits = run.splits()
    return splits[splits["split"] == "test"].set_index("path")["label"].sort_index()


def with_ensembles(study: Study, runs: Mapping[str, Run]) -> dict[str, Predictions]:
    """Return every run's test predictions, and those of ensembles: of a network's folds, else of the study's
    own networks where there are several. An ensemble's probability is the mean of its members'.
    """
    said = {title: run.predictions("test") for title, run in runs.items()}
    teams = ensembles(study, runs)
    return said | {name: ensemble([said[title] for title in members]) for name, members in teams.items()}


def ensembles(study: Study, runs: Mapping[str, Run]) -> dict[str, list[str]]:
    """Return the titles of each ensemble's members, by the ensemble's name."""
    networks = dict.fromkeys(run.card.architecture for run in runs.values())
    teams = {}
    for title in (architecture(network).title for network in networks):
        folds = [name for name in runs if name.startswith(f"{title}, fold ")]
        teams[f"{title}, ensemble of {len(folds)} folds"] = folds
    if not any(teams.values()):
        own = [name for name, run in runs.items() if run.folder.parent.name == study.name]
        teams = {f"Ensemble of {len(own)}": own}
    return {name: members for name, members in teams.items() if len(members) > 1}


def out_of_fold(runs: Mapping[str, Run]) -> dict[str, Predictions]:
    """Return each fold's validation predictions, by title. An image is in one fold of a network at most.

    Each fold's epoch, temperature and thresholds were chosen on these very images, so scores of them are a
    little too good; those on the test images are not.
    """
    return {title: run.predictions("val") for title, run in runs.items() if ", fold " in title}


def predictions_frame(table: XrayTable, split: str, probabilities: np.ndarray) -> pd.DataFrame:
    """Return one row an image of a split: path below the data root, patient, target (see `target_names`) and
    a probability a class.
    """
    rows = table.subset(split)
    frame = pd.DataFrame({"path": relative_paths(rows["path"], table.root), "patient": rows["patient"]})
    frame["target"] = target_names(table, split)
    frame[list(table.classes)] = probabilities
    return frame


@contextmanager
def history_log(folder: Path) -> Iterator[Callable[[pd.DataFrame], None]]:
    """Yield a function that writes the history so far to `history.csv`, and its last row to TensorBoard too
    where that is installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder / "tensorboard")
    except ImportError:
        writer = None

    def log(history: pd.DataFrame) -> None:
        history.to_csv(folder / "history.csv.tmp", index=False)
        os.replace(folder / "history.csv.tmp", folder / "history.csv")
        if writer is not None:
            for column in history.columns.drop(["epoch", "phase"]):
                writer.add_scalar(column, history[column].iloc[-1], int(history["epoch"].iloc[-1]))

    try:
        yield log
    finally:
        if writer is not None:
            writer.close()


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `folder` to fill, which takes its place when all went well; otherwise it
    is removed, and an older `folder` stays as it was.
    """
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)
