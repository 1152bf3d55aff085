"""What the class activation maps of a study's networks are worth: the tables of notebook 3 on maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from IPython.display import Markdown

from cams.methods import METHODS
from evaluation import map_summary
from evaluation.cam_scores import ANOTHER, MapScores, score_maps
from evaluation.localization import CHANCE, overlap_table
from evaluation.map_cases import MapCase, map_cases
from evaluation.report import Results
from lungs.masking import LungMask, LungMasking
from lungs.segmentation import load_segmenter

FindLungs = Callable[[np.ndarray], LungMask] | None  # finds the lungs of an (H, W) X-ray
NO_MAPS = Markdown("*No map to score: no test image was classified correctly, or has a finding.*")


class MapReport(NamedTuple):
    """Scores of the maps of a study's networks.

    Attributes:
        scored: the scores of each network's maps, by title, where it has a case.
        means: their means with intervals and verdicts (see `map_summary.summary`), by title.
        find_lungs: finds the lungs of an X-ray; None where the data has lung masks, or where there is no lung model.
        lungs_from: words that say who found the lungs, if anyone had to.
    """

    scored: Mapping[str, MapScores]
    means: Mapping[str, pd.DataFrame]
    find_lungs: FindLungs
    lungs_from: str


def cases_of(results: Results, title: str) -> list[MapCase]:
    """Return the test images by which the maps of a network are scored."""
    most, seed = results.study.maps.images, results.study.seed
    return map_cases(results.table, results.test[title], most=most, seed=seed)


def map_report(results: Results, lung_model: Path) -> MapReport:
    """Return the scores of every network's maps. Where the data has no lung masks, the lung model in the folder
    `training.lung_model` finds the lungs, if there is one.
    """
    settings, find_lungs, lungs_from = results.study.maps, None, ""
    if results.table.frame["mask"].isna().all() and (lung_model / "model.json").is_file():
        segmenter = load_segmenter(lung_model)
        find_lungs, lungs_from = LungMasking(segmenter).mask_of, f", as found by {segmenter.knows}"
    how = {"methods": settings.methods, "faithful": settings.faithful, "steps": settings.steps}
    scored, means = {}, {}
    for title, network in results.networks.items():
        cases = cases_of(results, title)
        if cases:
            scored[title] = score_maps(network, cases, **how, find_lungs=find_lungs, seed=results.study.seed)
            means[title] = map_summary.summary(scored[title], rng=results.rng())
    return MapReport(scored, means, find_lungs, lungs_from)


def map_tables(maps: MapReport) -> list[pd.DataFrame | Markdown]:
    """Return how many cases the scores of the maps stand on, and the scores."""
    if not maps.scored:
        return [NO_MAPS]
    lines = [f"{title}: {map_summary.case_counts(scores)}" for title, scores in maps.scored.items()]
    lines += [f"share in lungs{maps.lungs_from}"] * bool(maps.lungs_from)
    tables = {title: map_summary.readable(means) for title, means in maps.means.items()}
    return [Markdown("  \n".join(lines)), pd.concat(tables, names=["network", "map"])]


def box_tables(results: Results, maps: MapReport) -> list[pd.DataFrame | Markdown]:
    """Return the shares of maps that meet the true boxes: of all networks, then finding by finding of one method."""
    if not len(results.table.boxes):
        return [Markdown("*This data has no boxes.*")]
    shares = {title: overlap_table(maps.scored[title].located, rng=results.rng()).iloc[:, :9] for title in maps.scored}
    if results.example not in shares:
        return [NO_MAPS]
    method = METHODS[results.study.maps.methods[0]].title
    pooled = pd.concat(shares, names=["network"]).xs("all", level="finding").round(2)
    title = Markdown(f"**{results.example}, {method}**")
    return [pooled, title, shares[results.example].loc[method].dropna().round(2)]


def map_lines(maps: MapReport) -> list[str]:
    """Return lines for the conclusion: each network's first method beside chance, and methods not to be believed."""
    lines = []
    for title, means in maps.means.items():
        method, first = means.index[0], means.iloc[0]
        chance = means.loc[[name for name in (ANOTHER, *CHANCE) if name in means.index]]
        for column, words in (
            ("peak in lesion", "its peak in the lesion"),
            ("share in lungs", f"share inside the lungs{maps.lungs_from}:"),
        ):
            if column in means:
                beside = ", ".join(f"{name} {figure.estimate:.0%}" for name, figure in chance[column].items())
                lines.append(f"{title}, {method}: {words} **{first[column]:.0%}** ({beside}).")
        for column in means.columns.intersection(["peak, minus another's"]):
            lines.append(f"{title}, {method}: {column}, case by case: **{first[column]:.2f}**.")
        doubtful = means["verdict"][means["verdict"].str.contains("does not explain")]
        lines += [f"{title}, {name}: {verdict}." for name, verdict in doubtful.items()]
    return lines
