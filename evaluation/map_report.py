"""How far the class activation maps of a study's networks can be trusted: the tables of notebook 3 on maps."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from IPython.display import Markdown

from cams.methods import METHODS
from evaluation import map_summary
from evaluation.cam_scores import ANOTHER, MapScores, score_maps
from evaluation.localization import CHANCE, overlap_table
from evaluation.map_cases import FindLungs, MapCase, map_cases
from evaluation.report import Results
from lungs.masking import LungMasking
from lungs.segmentation import load_segmenter

NO_MAPS = Markdown("*No map to score: no test image was classified correctly, or has a finding.*")


class MapReport(NamedTuple):
    """Scores of the maps of a study's networks.

    Attributes:
        scored: by title, the scores of a network's maps. Networks without a case are left out.
        means: by title, their means with intervals and verdicts (see `map_summary.summary`).
        find_lungs: finds the lungs of an X-ray; None where the data has lung masks, or where there is no lung model.
        lungs_from: text on the source of the lungs; empty without `find_lungs`.
    """

    scored: Mapping[str, MapScores]
    means: Mapping[str, pd.DataFrame]
    find_lungs: FindLungs
    lungs_from: str


def cases_of(results: Results, title: str) -> list[MapCase]:
    """Return the test images on which the maps of a network are scored."""
    study = results.study
    return map_cases(results.table, results.test[title], most=study.maps.images, seed=study.seed)


def map_report(results: Results, lung_model: Path) -> MapReport:
    """Return the scores of every network's maps. Where the data has no lung masks, the lung model in the folder
    `lung_model` finds the lungs, if the folder has one.
    """
    settings, find_lungs, lungs_from = results.study.maps, None, ""
    if results.table.frame["mask"].isna().all() and (lung_model / "model.json").is_file():
        segmenter = load_segmenter(lung_model)
        find_lungs, lungs_from = LungMasking(segmenter).mask_of, f", as found by {segmenter.knows}"
    scored, means = {}, {}
    for title, network in results.networks.items():
        if cases := cases_of(results, title):
            scored[title] = score_maps(network, cases, settings, find_lungs=find_lungs, seed=results.study.seed)
            means[title] = map_summary.summary(scored[title], rng=results.rng())
    return MapReport(scored, means, find_lungs, lungs_from)


def map_tables(maps: MapReport) -> list[pd.DataFrame | Markdown]:
    """Return the number of cases behind the scores of the maps, and the scores."""
    if not maps.scored:
        return [NO_MAPS]
    lines = [f"{title}: {map_summary.case_counts(scores)}" for title, scores in maps.scored.items()]
    lines += [f"share in lungs{maps.lungs_from}"] * bool(maps.lungs_from)
    tables = {title: map_summary.readable(means) for title, means in maps.means.items()}
    return [Markdown("  \n".join(lines)), pd.concat(tables, names=["network", "map"])]


def box_tables(results: Results, maps: MapReport) -> list[pd.DataFrame | Markdown]:
    """Return the shares of maps that overlap the true boxes: first for all networks, then by finding for the first
    method of the example.
    """
    if not len(results.table.boxes):
        return [Markdown("*This data has no boxes.*")]
    if results.example not in maps.scored:
        return [NO_MAPS]
    shares = {
        title: overlap_table(scores.located, rng=results.rng()).iloc[:, :9] for title, scores in maps.scored.items()
    }
    method = METHODS[results.study.maps.methods[0]].title
    pooled = pd.concat(shares, names=["network"]).xs("all", level="finding").round(2)
    return [pooled, Markdown(f"**{results.example}, {method}**"), shares[results.example].loc[method].dropna().round(2)]


def map_lines(maps: MapReport) -> list[str]:
    """Return lines for the conclusion: scores of each network's first method and of chance; failed methods."""
    lungs = f"share inside the lungs{maps.lungs_from}:"
    lines = []
    for title, means in maps.means.items():
        method, first = means.index[0], means.iloc[0]
        chance = means.loc[means.index.intersection([ANOTHER, *CHANCE])]
        for column, words in (("peak in lesion", "its peak in the lesion"), ("share in lungs", lungs)):
            if column in means:
                beside = ", ".join(f"{name} {figure.estimate:.0%}" for name, figure in chance[column].items())
                lines.append(f"{title}, {method}: {words} **{first[column]:.0%}** ({beside}).")
        if "peak, minus another's" in means:
            difference = first["peak, minus another's"]
            lines.append(f"{title}, {method}: peak, minus another's, case by case: **{difference:.2f}**.")
        doubtful = means["verdict"][means["verdict"].str.contains("does not explain")]
        lines += [f"{title}, {name}: {verdict}." for name, verdict in doubtful.items()]
    return lines
