"""The numbers of notebook 3: tables and a conclusion about finished trainings, one function for each question.

The order of the calls: `read_results` -> `Results.scores` -> `differences` and the other tables -> `conclusion`. If a
study has nothing to show, the function returns one line that says why.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import Markdown

from datasets import XrayTable
from datasets.splits import apply_splits
from evaluation import intervals, metrics
from evaluation.predictions import Predictions
from evaluation.runs import Run, ensembles, out_of_fold, read_runs, read_seeds, seed_scores, seed_spread, with_ensembles
from inference.trained_networks import ModelCard, TrainedNetwork, load_network
from studies.loading import read_images
from studies.settings import Study

COMPARED = ("accuracy", "precision", "recall", "f1")  # metrics of the paired differences


@dataclass(frozen=True)
class Results:
    """A study's trained networks and their predictions for the test images.

    Attributes:
        study: the settings.
        table: the images, split as for the training.
        runs: the runs by title, one seed of each network.
        seeds: the runs of each network, by seed.
        test: the test predictions of each network and ensemble, by title.
        example: the network that is shown in figures of one network: the best on validation. Folds have different
            validation images and cannot be ranked, so the first fold is the example.
        leader: the network or ensemble with which the others are compared: the example, or the ensemble of its folds.
    """

    study: Study
    table: XrayTable
    runs: Mapping[str, Run]
    seeds: Mapping[str, Mapping[int, Run]]
    test: Mapping[str, Predictions]
    example: str
    leader: str

    @property
    def positive(self) -> int | None:
        """The index of the positive class of two; None for more classes and for findings."""
        return self.runs[self.example].card.positive_index

    @property
    def focus(self) -> str:
        """The row of the scores that is compared: the positive class, or the mean over all classes."""
        return metrics.MACRO if self.positive is None else self.table.classes[self.positive]

    @property
    def about(self) -> str:
        """The `focus` in words."""
        return "all classes" if self.positive is None else self.focus

    @property
    def headline(self) -> str:
        """The metric that is reported first."""
        return "roc_auc" if self.table.multilabel else "accuracy"

    @cached_property
    def networks(self) -> dict[str, TrainedNetwork]:
        """The loaded networks, by title."""
        return {title: load_network(run.folder) for title, run in self.runs.items()}

    @cached_property
    def scores(self) -> pd.DataFrame:
        """The test scores with their intervals: the table of `intervals.bootstrap_scores` with a column network."""
        tables = []
        for title, test in self.test.items():
            table = intervals.bootstrap_scores(test, self.table.classes, rng=self.rng())
            tables.append(table.assign(network=title))
        return pd.concat(tables)

    @property
    def headlines(self) -> pd.DataFrame:
        """The rows of `scores` for the `headline` of the `focus`, by network."""
        chosen = (self.scores["class"] == self.focus) & (self.scores["metric"] == self.headline)
        return self.scores[chosen].set_index("network")

    @property
    def repeated(self) -> dict[str, Mapping[int, Run]]:
        """The runs by seed of each network that was trained with several seeds."""
        return {title: by_seed for title, by_seed in self.seeds.items() if len(by_seed) > 1}

    def rng(self) -> np.random.Generator:
        """Return a new generator with the study's seed, so that no result depends on the order of the calls."""
        return np.random.default_rng(self.study.seed)


def read_results(study: Study, runs: Path) -> Results:
    """Return the results of a study's trainings in the folder `runs`.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they do not belong together.
    """
    images = read_images(study)
    trained = read_runs(study, runs, images)
    teams = ensembles(study, trained)
    of_folds = [name for name, members in teams.items() if trained[members[0]].fold]
    cards = {title: run.card for title, run in trained.items()}
    leader = of_folds[0] if of_folds else best_on_validation(cards)[0]
    example = teams[leader][0] if of_folds else leader
    table = apply_splits(images, trained[example].folder / "splits.csv", cards[example].classes)
    seeds, test = read_seeds(study, runs, images), with_ensembles(study, trained)
    return Results(study, table, trained, seeds, test, example, leader)


def best_on_validation(cards: Mapping[str, ModelCard]) -> tuple[str, str]:
    """Return the title of the network that is best on validation, and the measure in words."""
    if any(card.multilabel for card in cards.values()):
        return max(cards, key=lambda title: cards[title].validation["auc"]), "Highest mean AUC on validation"
    return min(cards, key=lambda title: cards[title].validation["loss"]), "Lowest validation loss"


def training_table(cards: Mapping[str, ModelCard]) -> pd.DataFrame:
    """Return a row for each training: its size, its duration and its scores on validation."""
    rows = {}
    for title, card in cards.items():
        validation, score = card.validation, "auc" if card.multilabel else "accuracy"
        rows[title] = {
            "parameters": f"{card.origin['parameters']:,}",
            "epochs": validation["epochs"],
            "best epoch": validation["best_epoch"],
            "minutes": round(validation["training_seconds"] / 60, 1),
            "validation loss": round(validation["loss"], 4),
            "without a look at the image": round(validation["uninformed_loss"], 4),
            f"validation {score}": round(validation[score], 4),
            "temperature": round(card.temperature, 2),
        }
    return pd.DataFrame(rows).T


def overview(results: Results) -> str:
    """Return lines with the networks, the example, and the limits of each network."""
    role = "best on validation" if results.leader == results.example else "shown as an example"
    lines = [f"trained: {'; '.join(results.runs)}", f"{role}: {results.example}"]
    if results.focus != metrics.MACRO:
        lines.append(f"positive class (a score of a single class is the score of this class): {results.focus}")
    for title, run in results.runs.items():
        card = run.card
        if card.unreported:
            lines.append(f"{title}: does not report {', '.join(card.unreported)}: all or no training images have it")
        if card.undecided:
            lines.append(f"{title}: never predicts {', '.join(card.undecided)}: no threshold could be chosen")
        if card.lung_masking:
            failed = len(pd.read_csv(run.folder / "lungs_failed.csv"))
            lines.append(f"{title}: sees lungs only; {failed} of {len(run.splits())} images stay whole: no lungs found")
    return "\n".join(lines)


def classification_reports(results: Results) -> pd.DataFrame | Markdown:
    """Return scikit-learn's classification report on the test images, for each network."""
    if results.table.multilabel:
        return Markdown("*Several findings an image: the next table has their scores.*")
    report, classes = metrics.classification_report_table, results.table.classes
    reports = {title: report(predictions, classes) for title, predictions in results.test.items()}
    return pd.concat(reports, names=["network", ""]).round(3)


def seed_tables(results: Results, study: str) -> list[pd.DataFrame | Markdown]:
    """Return the spread of the scores over seeds, and a line with the networks that have one seed. `study` is the
    argument STUDY of `finetune.py`.
    """
    tables = [seed_spread(seed_scores(results.repeated)).round(3)] if results.repeated else []
    single = ", ".join(title for title in results.seeds if title not in results.repeated)
    line = f"one seed only: {single}. For more: `python finetune.py {study} --seeds 0,1,2`, then run this again"
    return [*tables, Markdown(line)] if single else tables


def differences(results: Results) -> pd.DataFrame:
    """Return, as texts, the paired differences between the leader and each other network or ensemble."""
    leader, rows = results.test[results.leader], {}
    subject = {"classes": results.table.classes, "of": results.focus}
    others = {title: test for title, test in results.test.items() if title != results.leader}
    for title, other in others.items():
        rows[f"{results.leader} − {title}"] = {
            metric: str(intervals.paired_difference(leader, other, metric=metric, **subject, rng=results.rng()))
            for metric in COMPARED
        }
    return pd.DataFrame(rows).T


def fold_tables(results: Results) -> list[pd.DataFrame | Markdown]:
    """Return each fold's scores on the images that it did not train on, and their mean and standard deviation."""
    held_out, classes = out_of_fold(results.runs), results.table.classes
    if not held_out:
        return [Markdown("*This study was not trained fold by fold.*")]
    tables = {title: metrics.classification_scores(fold, classes) for title, fold in held_out.items()}
    folds = pd.DataFrame({title: table.loc[results.focus] for title, table in tables.items()}).T
    return [folds.round(3), folds.agg(["mean", "std"])[list(metrics.METRICS)].round(3)]


def conclusion(results: Results, compared: pd.DataFrame) -> list[str]:
    """Return lines on which network is best. `compared` is what `differences` returns."""
    figures = results.headlines["figure"]
    role = "Best on validation" if results.leader == results.example else "Ensemble of the folds"
    lines = [f"{role}: **{results.leader}**, test {results.headline} **{figures[results.leader]}**."]
    for pair, by_metric in compared.iterrows():
        lines.append(f"Difference in test accuracy, {pair}: {by_metric['accuracy']}.")
    for name, members in ensembles(results.study, results.runs).items():
        lines.append(f"{name} ({', '.join(members)}): test {results.headline} {figures[name]}.")
    return lines
