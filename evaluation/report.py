"""What notebook 3 says in numbers: finished trainings in, tables and a conclusion out, one function for each question.

The way through: `read_results` -> `Results.scores` -> `differences` and the other tables -> `conclusion`. A function
that has nothing to show for a study returns one line that says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """A study's trained networks and what they answered for the test images.

    Attributes:
        study: its settings.
        table: its images, split as the networks were trained on them.
        runs: the networks by title, one seed of each.
        seeds: the runs of each network by seed.
        teams: the members of each ensemble, by the ensemble's name.
        test: what networks and ensembles answered for the test images, by title.
        example: the network that figures of a single one show: the best on validation. Folds were validated on
            different images, so that among them none is best: the first one is an example.
        leader: the title that the others are compared with: the example, or the ensemble of its folds.
    """

    study: Study
    table: XrayTable
    runs: Mapping[str, Run]
    seeds: Mapping[str, Mapping[int, Run]]
    teams: Mapping[str, list[str]]
    test: Mapping[str, Predictions]
    example: str
    leader: str

    @property
    def positive(self) -> int | None:
        """The index of the positive one of two classes; None for more classes and for findings."""
        return self.runs[self.example].card.positive_index

    @property
    def focus(self) -> str:
        """The row of the scores that comparisons are about: the positive class, or the mean over all."""
        return metrics.MACRO if self.positive is None else self.table.classes[self.positive]

    @property
    def about(self) -> str:
        """What comparisons are about, in words."""
        return "all classes" if self.positive is None else self.focus

    @property
    def headline(self) -> str:
        """The metric that comes first."""
        return "roc_auc" if self.table.multilabel else "accuracy"

    @cached_property
    def networks(self) -> dict[str, TrainedNetwork]:
        """The networks themselves, by title."""
        return {title: load_network(run.folder) for title, run in self.runs.items()}

    @cached_property
    def scores(self) -> pd.DataFrame:
        """The scores on the test images with their intervals: columns class, metric, estimate, low, high, network and,
        as text, figure.
        """
        tables = []
        for title, answers in self.test.items():
            table = intervals.bootstrap_scores(answers, self.table.classes, rng=self.rng())
            tables.append(table.assign(network=title))
        scores = pd.concat(tables)
        limits = scores[["estimate", "low", "high"]].to_numpy()
        return scores.assign(figure=[str(intervals.Interval(*row)) for row in limits])

    @property
    def headlines(self) -> pd.DataFrame:
        """The rows of `scores` that come first, by network."""
        chosen = (self.scores["class"] == self.focus) & (self.scores["metric"] == self.headline)
        return self.scores[chosen].set_index("network")

    @property
    def repeated(self) -> dict[str, Mapping[int, Run]]:
        """The runs by seed of the networks that were trained with several."""
        return {title: by_seed for title, by_seed in self.seeds.items() if len(by_seed) > 1}

    def rng(self) -> np.random.Generator:
        """Return a new generator with the study's seed: no result depends on the order of the questions."""
        return np.random.default_rng(self.study.seed)


def read_results(study: Study, runs: Path) -> Results:
    """Return what the trainings of a study left below `runs`.

    Raises FileNotFoundError or ValueError, with the remedy, where there is none or where they do not belong together.
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
    return Results(study, table, trained, seeds, teams, test, example, leader)


def curve_score(card: ModelCard) -> str:
    """Return the name of the score beside the loss in a network's history: "accuracy" or "auc"."""
    return "auc" if card.multilabel else "accuracy"


def best_on_validation(cards: Mapping[str, ModelCard]) -> tuple[str, str]:
    """Return the title of the network that is best on validation, and in words what it is best by."""
    measures = {title: card.validation for title, card in cards.items()}
    if any(card.multilabel for card in cards.values()):
        return max(measures, key=lambda title: measures[title]["auc"]), "Highest mean AUC on validation"
    return min(measures, key=lambda title: measures[title]["loss"]), "Lowest validation loss"


def training_table(cards: Mapping[str, ModelCard]) -> pd.DataFrame:
    """Return what notebook 2 says of each training."""
    rows = {
        title: {
            "parameters": f"{card.origin['parameters']:,}",
            "epochs": card.validation["epochs"],
            "best epoch": card.validation["best_epoch"],
            "minutes": round(card.validation["training_seconds"] / 60, 1),
            "validation loss": round(card.validation["loss"], 4),
            "without a look at the image": round(card.validation["uninformed_loss"], 4),
            f"validation {curve_score(card)}": round(card.validation[curve_score(card)], 4),
            "temperature": round(card.temperature, 2),
        }
        for title, card in cards.items()
    }
    return pd.DataFrame(rows).T


def overview(results: Results) -> str:
    """Return lines that name the networks, the one that is shown, and what some of them cannot say."""
    role = "best on validation" if results.leader == results.example else "shown as an example"
    lines = [f"trained: {'; '.join(results.runs)}", f"{role}: {results.example}"]
    if results.focus != metrics.MACRO:
        lines.append(f"positive class, which figures of one class are about: {results.focus}")
    for title, card in ((title, run.card) for title, run in results.runs.items()):
        if card.unreported:
            names = ", ".join(card.unreported)
            lines.append(f"{title}: nothing is said of {names}: no training image has it, or all have")
        if card.undecided:
            names = ", ".join(card.undecided)
            lines.append(f"{title}: no threshold could be chosen for {names}: never said to be there")
        if card.lung_masking:
            failed = len(pd.read_csv(results.runs[title].folder / "lungs_failed.csv"))
            images = len(results.runs[title].splits())
            lines.append(f"{title}: on segmented lungs, but {failed} of {images} images whole: no lungs found")
    return "\n".join(lines)


def _of_each(score: Callable, answers: Mapping[str, Predictions], results: Results) -> dict[str, pd.DataFrame]:
    """Return a table of scores for each network's answers, by title."""
    return {title: score(answer, results.table.classes) for title, answer in answers.items()}


def classification_reports(results: Results) -> pd.DataFrame | Markdown:
    """Return scikit-learn's report on the test images for each network."""
    if results.table.multilabel:
        return Markdown("*Several findings an image: the next table has their scores.*")
    reports = _of_each(metrics.classification_report_table, results.test, results)
    return pd.concat(reports, names=["network", ""]).round(3)


def seed_tables(results: Results, study: str) -> list[pd.DataFrame | Markdown]:
    """Return the spread of the scores over seeds, and a line with the networks that have one seed; `study` is what
    `finetune.py` calls it.
    """
    tables = [seed_spread(seed_scores(results.repeated)).round(3)] if results.repeated else []
    single = ", ".join(title for title in results.seeds if title not in results.repeated)
    command = f"`python finetune.py {study} --seeds 0,1,2`"
    line = Markdown(f"one seed only: {single}. For more: {command}, then run this again")
    return [*tables, line] if single else tables


def differences(results: Results) -> pd.DataFrame:
    """Return, as texts, the paired differences between the leader and each other network or ensemble."""
    rows = {
        f"{results.leader} − {title}": {metric: str(_difference(results, title, metric)) for metric in COMPARED}
        for title in results.test
        if title != results.leader
    }
    return pd.DataFrame(rows).T


def _difference(results: Results, title: str, metric: str) -> intervals.Interval:
    networks = results.test[results.leader], results.test[title]
    subject = {"metric": metric, "of": results.focus}
    return intervals.paired_difference(*networks, results.table.classes, **subject, rng=results.rng())


def fold_tables(results: Results) -> list[pd.DataFrame | Markdown]:
    """Return each fold's scores on the images that it did not train on, and their mean and standard deviation."""
    scores = _of_each(metrics.classification_scores, out_of_fold(results.runs), results)
    if not scores:
        return [Markdown("*This study was not trained fold by fold.*")]
    folds = pd.DataFrame({title: table.loc[results.focus] for title, table in scores.items()}).T
    return [folds.round(3), folds.agg(["mean", "std"])[list(metrics.METRICS)].round(3)]


def conclusion(results: Results, compared: pd.DataFrame) -> list[str]:
    """Return lines on which network is best; `compared` are the `differences`."""
    figures = results.headlines["figure"]
    role = "Best on validation" if results.leader == results.example else "Ensemble of the folds"
    lines = [f"{role}: **{results.leader}**, test {results.headline} **{figures[results.leader]}**."]
    for pair, by_metric in compared.iterrows():
        lines.append(f"Difference in test accuracy, {pair}: {by_metric['accuracy']}.")
    for name, members in results.teams.items():
        lines.append(f"{name} ({', '.join(members)}): test {results.headline} {figures[name]}.")
    return lines
