"""What a training leaves on disk, `runs/<study>/<network>/`: written by `finetune.py`, read back by notebook 3."""

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

from checkpoints import STATE
from datasets import SPLITS, XrayTable, data_fingerprint
from datasets.splits import apply_splits
from datasets.table import FINGERPRINT, relative_paths, target_names
from metrics import MACRO, METRICS, classification_scores
from networks import ARCHITECTURES, architecture
from predictions import Predictions, ensemble, read_predictions
from study_settings import Study
from trained_networks import ModelCard, read_card
from utils import flush, remove_unfinished, write_whole

CARD = "model.json"
# What every training writes into its run folder, and what one on lungs alone writes besides.
ALWAYS = frozenset(
    {CARD, "model.safetensors", "history.csv", "timing.csv", "splits.csv"}
    | {f"predictions_{split}.csv" for split in SPLITS}
)
OF_LUNGS = frozenset({"lungs", "lungs_failed.csv"})
# All that a training may write, and so may replace or delete there.
WRITTEN = ALWAYS | OF_LUNGS | {"checkpoints", "tensorboard", "resume"}


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


def read_runs(study: Study, runs: Path, images: XrayTable) -> dict[str, Run]:
    """Return the trained networks of a study by title: its own, those of its folds and those of the studies
    that it is compared with, as far as they are there. Where one was trained with other seeds only
    (`Study.repeated`), the lowest of them stands in.

    `images`: all of the study's, as `read_images` returns them. Raises FileNotFoundError where the study has
    no trained network at all, ValueError where two of them know other classes, have another positive one or were
    tested on other images, and where an image is not among the study's or has changed since: the figures would be
    those of another study. A run that does not record the content of its images, of an older version, is named.
    """
    found = {title: there[0] for title, folder in _folders(study, runs) if (there := _of_all_seeds(folder))}
    if not found:
        networks = ", ".join(study.networks)
        others = sorted(path.name for path in runs.glob(f"{study.name}-*") if any(path.glob("*/model.json")))
        there = f"; there is {', '.join(others)}: set `limit` for it" if others else ""
        raise FileNotFoundError(
            f"no trained network of {study.name} ({networks}) in {runs}: run notebook 2 or finetune.py first{there}"
        )
    read = {title: _read_run(folder) for title, folder in found.items()}
    _refuse_other_tests(read)
    _refuse_changed_images(read, images)
    for title, run in read.items():
        if not _recorded_images(run).startswith(FINGERPRINT):
            print(
                f"{title} ({run.folder}) does not record what was in its images: they may have changed since"
            )
    return read


def read_seeds(study: Study, runs: Path, images: XrayTable) -> dict[str, dict[int, Run]]:
    """Return, by the titles of `read_runs`, each network's runs by seed: first the one that `read_runs` returns,
    then the study's repeats with other seeds, ascending.

    Raises ValueError where the seeds of a network know other classes, were tested on other images, on images that
    have changed since (see `read_runs`), or trained with other settings.
    """
    seeds = {}
    for title, folder in _folders(study, runs):
        by_seed: dict[int, Run] = {}
        for run in map(_read_run, _of_all_seeds(folder)):
            by_seed.setdefault(run.card.origin["seed"], run)  # the study's own beside a repeat of its seed
        if by_seed:
            named = {f"{title}, seed {seed}": run for seed, run in by_seed.items()}
            _refuse_other_tests(named)
            _refuse_changed_images(named, images)
            _refuse_other_settings(named)
            seeds[title] = by_seed
    return seeds


def seed_scores(seeds: Mapping[str, Mapping[int, Run]]) -> pd.DataFrame:
    """Return the test scores of `read_seeds`: a row a network and seed, `metrics.METRICS` as columns, each as in
    the macro row of `metrics.classification_scores`.
    """
    rows = {}
    for title, by_seed in seeds.items():
        for seed, run in by_seed.items():
            targets, probabilities, *_, thresholds = run.predictions("test")
            scores = classification_scores(targets, probabilities, run.card.classes, thresholds=thresholds)
            rows[title, seed] = scores.loc[MACRO, list(METRICS)]
    return pd.DataFrame(rows).T.rename_axis(["network", "seed"])


def seed_spread(scores: pd.DataFrame) -> pd.DataFrame:
    """Return, of a table of `seed_scores`, a row a network and metric: mean, standard deviation (n - 1; NaN of
    one seed), lowest and highest score over seeds, and the number of seeds.
    """
    spread = {}
    for title, own in scores.groupby(level="network", sort=False):
        figures = {"mean": own.mean(), "std": own.std(), "lowest": own.min(), "highest": own.max()}
        spread[title] = pd.DataFrame(figures).assign(seeds=len(own))
    return pd.concat(spread, names=["network", "metric"])


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


def _of_all_seeds(folder: Path) -> list[Path]:
    """Return the folders with one trained network: the study's own, then those of its repeats by seed."""
    runs, own = folder.parent.parent, f"{folder.parent.name}-seed"
    seeds = [path.name.removeprefix(own) for path in runs.glob(f"{own}*")]
    repeats = [runs / f"{own}{seed}" / folder.name for seed in sorted(filter(str.isdecimal, seeds), key=int)]
    return [path for path in (folder, *repeats) if (path / "model.json").is_file()]


def _read_run(folder: Path) -> Run:
    return Run(folder, read_card(folder), pd.read_csv(folder / "history.csv"))


def _trained_besides(study: Study, runs: Path) -> list[str]:
    """Return the networks that were trained for a study without being in its file."""
    folders = [runs / study.name]
    for kind in ("fold", "seed"):
        folders += runs.glob(f"{study.name}-{kind}[0-9]*")
    found = sorted({card.parent.name for folder in folders for card in folder.glob("*/model.json")})
    return [name for name in found if name in ARCHITECTURES and name not in study.networks]


def _refuse_other_tests(read: Mapping[str, Run]) -> None:
    (first, run), *others = read.items()
    tested = _test_targets(run)
    for title, other in others:
        if other.card.classes != run.card.classes or not tested.equals(_test_targets(other)):
            raise ValueError(
                f"{first} ({run.folder}) and {title} ({other.folder}) were tested on other images or classes: train "
                "one of them again, or take its study out of `compare`"
            )
        if other.card.positive_index != run.card.positive_index:
            raise ValueError(
                f"{first} ({run.folder}) and {title} ({other.folder}) have another positive class: train one of them "
                "again, or take its study out of `compare`"
            )


def _refuse_changed_images(read: Mapping[str, Run], images: XrayTable) -> None:
    """Raise ValueError where a network's images are not among `images`, or are no longer what it was trained on: its
    predictions of the old ones must not stand beside maps of the new ones.
    """
    for run in read.values():
        as_trained = apply_splits(images, run.folder / "splits.csv", run.card.classes)
        recorded = _recorded_images(run)
        if recorded.startswith(FINGERPRINT) and recorded != data_fingerprint(as_trained):
            raise ValueError(
                f"the images in {images.root} have changed since {run.folder} was trained: put them back, or train "
                "again"
            )


def _recorded_images(run: Run) -> str:
    return str(run.card.origin.get("data_fingerprint"))


def _refuse_other_settings(read: Mapping[str, Run]) -> None:
    def settings(run: Run) -> dict[str, object]:
        study = run.card.origin["study"]
        own = study["networks"].get(run.card.architecture, {})
        return {**{key: study[key] for key in ("augmentation", "preprocessing")}, **study["training"], **own}

    (first, run), *others = read.items()
    expected = settings(run)
    for title, other in others:
        found = settings(other)
        wrong = [key for key in expected | found if expected.get(key) != found.get(key)]
        if wrong:
            raise ValueError(
                f"{first} and {title} were trained with another {wrong[0]}: train them again, or delete {other.folder}"
            )


def _test_targets(run: Run) -> pd.Series:
    splits = run.splits()
    return splits[splits["split"] == "test"].set_index("path")["label"].sort_index()


def with_ensembles(study: Study, runs: Mapping[str, Run]) -> dict[str, Predictions]:
    """Return every run's test predictions, and those of ensembles: of a network's folds, else of the networks in
    the study's file where there are several. An ensemble's probability is the mean of its members'.
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
        folder = re.compile(re.escape(study.name) + r"(-seed\d+)?")
        own = [
            name
            for name, run in runs.items()
            if folder.fullmatch(run.folder.parent.name) and run.card.architecture in study.networks
        ]
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
def history_log(folder: Path | None) -> Iterator[Callable[[pd.DataFrame], None]]:
    """Yield a function that writes the history so far to `history.csv`, and its last row to TensorBoard too
    where that is installed; without a folder, one that does nothing.
    """
    if folder is None:
        yield lambda history: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder / "tensorboard")
    except ImportError:
        writer = None

    def log(history: pd.DataFrame) -> None:
        write_whole(folder / "history.csv", history.to_csv(index=False))
        if writer is not None:
            for column in history.columns.drop(["epoch", "phase"]):
                writer.add_scalar(column, history[column].iloc[-1], int(history["epoch"].iloc[-1]))

    try:
        yield log
    finally:
        if writer is not None:
            writer.close()


@contextmanager
def training_folder(folder: Path, *, restart: bool, write: bool = True) -> Iterator[Path]:
    """Yield `resume/` in a run folder, for the state of a training, while no other process may have it.

    `restart` empties it first. Of several processes that train together the one that may `write` prepares it.
    Raises ValueError where another training is at work on the folder.
    """
    working = folder / "resume"
    if not write:
        yield working
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder.with_name(f".{folder.name}.lock")).acquire(timeout=0)
    except Timeout:
        who = _text_in(working / "process")
        raise ValueError(
            f"another process{who and f' ({who})'} is training into {folder}: wait for it, or give another --runs"
        ) from None
    with lock:
        _put_in_place(folder)
        if restart:
            shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True, exist_ok=True)
        for left in working.glob("features-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        remove_unfinished(working)
        (working / "process").write_text(f"number {os.getpid()} on {platform.node()}", encoding="utf-8")
        try:
            yield working
        finally:
            if working.is_dir() and not (working / STATE).is_file():
                shutil.rmtree(working, ignore_errors=True)  # nothing to go on from
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _text_in(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


def linked(source: str, target: str) -> None:
    """Give a file a second name, where the disk can, else copy it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def read_complete_card(folder: Path) -> ModelCard | None:
    """Return the card of a run folder that holds all of a training's results, None for another one. Results that
    were left waiting, complete, by a process that was killed are put in place first.

    Raises ValueError where there are such and another training is at work on the folder.
    """
    if _staging(folder)[-1].is_dir():
        with training_folder(folder, restart=False):
            pass
    try:
        card = read_card(folder)
    except (OSError, ValueError):
        return None
    needed = ALWAYS | OF_LUNGS if card.lung_masking else ALWAYS
    return card if all((folder / name).exists() for name in needed) else None


def _staging(folder: Path) -> tuple[Path, Path, Path]:
    """Return a run folder, where new results are filled in, and where they wait when they are complete."""
    folder = folder.resolve()
    return folder, folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.complete")


def _put_in_place(folder: Path) -> None:
    """Replace the results in a run folder by complete new ones, where some wait beside it, and touch nothing else
    there. After a kill in between, it is done again from the start: `model.json` comes last.
    """
    folder, partial, complete = _staging(folder)
    shutil.rmtree(partial, ignore_errors=True)
    if (complete / CARD).is_file():
        for name in (CARD, *(WRITTEN - {"resume"})):
            _remove(folder / name)
        shutil.copytree(
            complete,
            folder,
            copy_function=linked,
            ignore=lambda where, names: {CARD} if where == str(complete) else set(),  # lungs/ has one too
            dirs_exist_ok=True,
        )
        flush(folder)
        shutil.rmtree(folder / "resume", ignore_errors=True)  # finished results have no state to go on from
        os.replace(complete / CARD, folder / CARD)
        flush(folder)
    shutil.rmtree(complete, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder beside the run folder `folder` to fill with all that a training leaves there. When all
    went well, that takes the place of the older results; otherwise it is removed, and the older ones stay as they
    were. What is not a training's own (`WRITTEN`) stays in `folder` in any case.
    """
    folder, partial, complete = _staging(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for file in (*partial.rglob("*"), partial):
        flush(file)  # before the older results and the state to go on from are gone
    os.replace(partial, complete)
    flush(folder.parent)
    _put_in_place(folder)
