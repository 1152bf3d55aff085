"""Read the trained networks of a study from their run folders, for notebook 3."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pandas as pd

from datasets import XrayTable, data_fingerprint
from datasets.splits import apply_splits
from datasets.table import FINGERPRINT
from evaluation.metrics import MACRO, METRICS, classification_scores
from evaluation.predictions import Predictions, ensemble, read_predictions
from inference.trained_networks import ModelCard, read_card
from networks import ARCHITECTURES, architecture
from studies.settings import Study


@dataclass(frozen=True)
class Run:
    """One trained network, read back.

    Attributes:
        study: the name of the study, without `-foldK` and `-seedN`.
        fold: the number of the fold that is held out for validation, from 1; None in a study without folds.
        folder: the run folder.
        card: its `model.json`.
        history: its `history.csv`, a row for each epoch.
    """

    study: str
    fold: int | None
    folder: Path
    card: ModelCard
    history: pd.DataFrame

    @property
    def seed(self) -> int:
        """The seed of the initial weights, the order of the images and the augmentation."""
        return self.card.origin["seed"]

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the images; None in runs of older versions, which do not record it."""
        recorded = str(self.card.origin.get("data_fingerprint"))
        return recorded if recorded.startswith(FINGERPRINT) else None

    @property
    def settings(self) -> dict[str, object]:
        """The settings of this network: training, augmentation and preprocessing."""
        study = self.card.origin["study"]
        own = study["networks"].get(self.card.architecture, {})
        return {**study["training"], **study["augmentation"], **study["preprocessing"], **own}

    def predictions(self, split: str) -> Predictions:
        """Return the predictions for the images of a split."""
        card, file = self.card, self.folder / f"predictions_{split}.csv"
        return read_predictions(file, card.classes, multilabel=card.multilabel, thresholds=card.thresholds)

    def splits(self) -> pd.DataFrame:
        """Return a table of the images and their splits."""
        return pd.read_csv(self.folder / "splits.csv", dtype=str, keep_default_na=False)

    def test_labels(self) -> pd.Series:
        """Return the labels of the test images by path."""
        splits = self.splits()
        return splits[splits["split"] == "test"].set_index("path")["label"].sort_index()


def read_runs(study: Study, runs: Path, images: XrayTable) -> dict[str, Run]:
    """Return the trained networks of a study by title. Networks that have not been trained are left out.

    These are the study's own networks, those of its folds, and those of the studies that it is compared with. If a
    network was trained only with other seeds (`Study.repeated`), the run with the lowest seed is returned.

    Args:
        study: the study.
        runs: the folder of all run folders.
        images: all images of the study, as `read_images` returns them.

    Raises:
        FileNotFoundError: the study has no trained network.
        ValueError: two networks differ in their classes, positive class or test images, or an image is missing or has
            changed since a network was trained.
    """
    trained = {title: by_seed[0] for title, by_seed in _all_runs(study, runs).items()}
    if not trained:
        networks = ", ".join(study.networks)
        others = sorted({card.parent.parent.name for card in runs.glob(f"{study.name}-*/*/model.json")})
        hint = f"; {', '.join(others)} exists: set `limit` to read it" if others else ""
        raise FileNotFoundError(
            f"no trained network of {study.name} ({networks}) in {runs}: run notebook 2 or finetune.py first{hint}"
        )
    _refuse_other_tests(trained)
    _refuse_changed_images(trained, images)
    for title, run in trained.items():
        if run.fingerprint is None:
            print(f"{title} ({run.folder}) does not record what was in its images: they may have changed since")
    return trained


def read_seeds(study: Study, runs: Path, images: XrayTable) -> dict[str, dict[int, Run]]:
    """Return each network's runs by title and seed. The first of them is the run of `read_runs`.

    Args:
        study: as in `read_runs`.
        runs: as in `read_runs`.
        images: as in `read_runs`.

    Raises:
        ValueError: as in `read_runs`, or the seeds of a network were trained with other settings.
    """
    seeds: dict[str, dict[int, Run]] = {}
    for title, trained in _all_runs(study, runs).items():
        seeds[title] = by_seed = {}
        for run in trained:
            by_seed.setdefault(run.seed, run)  # the study's own run comes before a repeat with the same seed
        named = {f"{title}, seed {seed}": run for seed, run in by_seed.items()}
        _refuse_other_tests(named)
        _refuse_changed_images(named, images)
        _refuse_other_settings(named)
    return seeds


def seed_scores(seeds: Mapping[str, Mapping[int, Run]]) -> pd.DataFrame:
    """Return the test scores of `read_seeds`.

    Returns:
        A row for each network and seed; the columns are `metrics.METRICS`, each as in the macro row of
        `metrics.classification_scores`.
    """
    rows = {
        (title, seed): classification_scores(run.predictions("test"), run.card.classes).loc[MACRO, list(METRICS)]
        for title, by_seed in seeds.items()
        for seed, run in by_seed.items()
    }
    return pd.DataFrame(rows).T.rename_axis(["network", "seed"])


def seed_spread(scores: pd.DataFrame) -> pd.DataFrame:
    """Return how the scores of `seed_scores` vary over seeds.

    Returns:
        A row for each network and metric; columns: mean, std (n - 1 in the denominator; NaN for one seed), lowest,
        highest, and the number of seeds.
    """
    spread = {
        title: by_seed.agg(["mean", "std", "min", "max"]).T.assign(seeds=len(by_seed))
        for title, by_seed in scores.groupby(level="network", sort=False)
    }
    return pd.concat(spread, names=["network", "metric"]).rename(columns={"min": "lowest", "max": "highest"})


def with_ensembles(study: Study, runs: Mapping[str, Run]) -> dict[str, Predictions]:
    """Return the test predictions of every run and of every ensemble (see `ensembles`), by title.

    An ensemble's probability is the mean of its members' probabilities.
    """
    single = {title: run.predictions("test") for title, run in runs.items()}
    teams = ensembles(study, runs)
    return single | {name: ensemble([single[title] for title in members]) for name, members in teams.items()}


def ensembles(study: Study, runs: Mapping[str, Run]) -> dict[str, list[str]]:
    """Return the titles of each ensemble's members, by the ensemble's name.

    The folds of a network form an ensemble. If no network has folds, the networks in the study's file form one.
    """
    folds: dict[str, list[str]] = {}
    for title, run in runs.items():
        if run.fold is not None:
            folds.setdefault(architecture(run.card.architecture).title, []).append(title)
    teams = {f"{title}, ensemble of {len(members)} folds": members for title, members in folds.items()}
    if not teams:
        ours = [t for t, r in runs.items() if r.study == study.name and r.card.architecture in study.networks]
        teams = {f"Ensemble of {len(ours)}": ours}
    return {name: members for name, members in teams.items() if len(members) > 1}


def out_of_fold(runs: Mapping[str, Run]) -> dict[str, Predictions]:
    """Return each fold's validation predictions, by title. Each image is in at most one fold of a network.

    Their scores are a little too good: each fold chose its epoch, temperature and thresholds on these images.
    """
    return {title: run.predictions("val") for title, run in runs.items() if run.fold is not None}


def _all_runs(study: Study, runs: Path) -> dict[str, list[Run]]:
    """Return all trained runs by title; the runs of one network are in the order of `_read`.

    They include networks that were trained for the study but are not in its file.
    """
    folders = [study.name, f"{study.name}-fold[0-9]*", f"{study.name}-seed[0-9]*"]
    trained = {card.parent.name for folder in folders for card in runs.glob(f"{folder}/*/model.json")}
    networks = list(dict.fromkeys([*study.networks, *sorted(trained & ARCHITECTURES.keys())]))
    places, alone = {}, len(networks) == 1
    for network in networks:
        title = architecture(network).title
        places[study.name if study.compare and alone else title] = study.name, None, network
        for fold in range(1, (study.split.folds or 0) + 1):
            places[f"{title}, fold {fold}"] = study.name, fold, network
        for other in (name for name in study.compare if name != study.name):
            places[other if alone else f"{title}, {other}"] = other, None, network
    read = {title: _read(runs, *place) for title, place in places.items()}
    return {title: trained for title, trained in read.items() if trained}


def _read(runs: Path, study: str, fold: int | None, network: str) -> list[Run]:
    """Return the runs of one network, with or without a fold: the study's own, then its repeats by seed."""
    name = study if fold is None else f"{study}-fold{fold}"
    repeats = [path.name.removeprefix(f"{name}-seed") for path in runs.glob(f"{name}-seed*")]
    names = [name, *(f"{name}-seed{seed}" for seed in sorted(filter(str.isdecimal, repeats), key=int))]
    return [
        Run(study, fold, folder, read_card(folder), pd.read_csv(folder / "history.csv"))
        for folder in (runs / each / network for each in names)
        if (folder / "model.json").is_file()
    ]


def _refuse_other_tests(runs: Mapping[str, Run]) -> None:
    (first, run), *others = runs.items()
    for title, other in others:
        same_test = other.card.classes == run.card.classes and run.test_labels().equals(other.test_labels())
        if not same_test or other.card.positive_index != run.card.positive_index:
            wrong = "have another positive class" if same_test else "were tested on other images or classes"
            raise ValueError(
                f"{first} ({run.folder}) and {title} ({other.folder}) {wrong}: train one of them again, or take its "
                "study out of `compare`"
            )


def _refuse_changed_images(runs: Mapping[str, Run], images: XrayTable) -> None:
    """Raise ValueError if images of a run are missing or have changed. The predictions are for the old images, but
    maps would show the new ones.
    """
    for run in runs.values():
        as_trained = apply_splits(images, run.folder / "splits.csv", run.card.classes)
        if run.fingerprint not in (None, data_fingerprint(as_trained)):
            raise ValueError(
                f"images in {images.root} have changed since {run.folder} was trained: put them back, or train again"
            )


def _refuse_other_settings(runs: Mapping[str, Run]) -> None:
    for (first, run), (title, other) in pairwise(runs.items()):
        for key in [key for key in run.settings if key in other.settings]:  # versions have different settings
            if run.settings[key] != other.settings[key]:
                raise ValueError(
                    f"{first} and {title} were trained with another {key}: train them again, or delete {other.folder}"
                )
