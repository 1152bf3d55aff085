"""One table of all scores of a network's maps, with intervals and verdicts."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from evaluation.cam_scores import ANOTHER, MapScores
from evaluation.intervals import Interval, bootstrap_mean, patient_weights
from evaluation.randomisation import verdict

# Column of the summary -> column of `MapScores` whose mean it is.
MEANS = {
    "empty": "empty",
    "peak in lesion": "peak",
    "peak, minus another's": "peak_difference",
    "share in lesion": "in_lesion",
    "share, minus another's": "in_lesion_difference",
    "share in lungs": "in_lungs",
    "probability": "probability",
    "deletion": "deletion",
    "insertion": "insertion",
    "average drop": "drop",
    "increase": "increase",
}
PROPORTIONS = ("empty", "peak", "increase")  # their values are 0 or 1


def summary(scores: MapScores, *, rng: np.random.Generator) -> pd.DataFrame:
    """Return the means by kind of map as `Interval`s over patients, and a verdict on each method.

    Returns:
        One row for each kind of map. Columns without any value are left out:

        - empty: the share of empty maps, if there are any;
        - peak in lesion, share in lesion;
        - peak and share, "minus another's": the mean difference, case by case, from the map of another patient;
        - share in lungs;
        - probability: of the class;
        - deletion and average drop: small for a faithful map;
        - insertion and increase: large for a faithful map;
        - agreement, head random, and agreement, all random: absolute rank correlations with the trained network's
          maps;
        - verdict: what these two agreements say about a method, see `randomisation.verdict`.
    """
    seed = int(rng.integers(2**63))
    differences = {f"{name}_difference": _beyond_another(scores.located, name) for name in ("peak", "in_lesion")}
    located = scores.located.assign(**differences)
    columns = {
        name: _means(located if column in located else scores.faithful, column, seed) for name, column in MEANS.items()
    }
    stage = scores.randomised["stage"]
    head, all_random = (_agreements(scores.randomised[stage == number], seed) for number in (stage.min(), stage.max()))
    columns |= {"agreement, head random": head, "agreement, all random": all_random}
    kinds = scores.located["map"].unique()
    table = pd.DataFrame(
        {name: [of.get(kind, Interval(np.nan)) for kind in kinds] for name, of in columns.items()}, index=kinds
    )
    estimates = table.map(lambda cell: cell.estimate)
    informative = estimates.notna().any()
    informative["empty"] = estimates["empty"].any()
    verdicts = [verdict(head[kind], all_random[kind]) if kind in head else "" for kind in kinds]
    return table.loc[:, informative].assign(verdict=verdicts)


def _means(frame: pd.DataFrame, column: str, seed: int) -> dict[str, Interval]:
    """Return the mean of a column for each kind of map. All kinds use the same resamples."""
    how = {"proportion": column in PROPORTIONS}
    return {
        kind: bootstrap_mean(rows[column], rows["patient"], **how, rng=np.random.default_rng(seed))
        for kind, rows in frame.groupby("map", sort=False)
    }


def _beyond_another(located: pd.DataFrame, column: str) -> pd.Series:
    """Return how much greater the scores of a column are than those of `ANOTHER` for the same case."""
    case = located.groupby("map").cumcount()  # every kind of map has the same cases in the same order
    is_another = located["map"] == ANOTHER
    another_scores = located.loc[is_another, column].set_axis(case[is_another])
    return (located[column] - case.map(another_scores)).mask(is_another)


def _agreements(stage: pd.DataFrame, seed: int) -> dict[str, Interval]:
    """Return the `mean_agreement` of each method, from the rows of one stage of randomisation."""
    intervals = {}
    for kind, rows in stage.groupby("map", sort=False):
        # Every network has the same cases in the same order.
        agreement = rows["agreement"].to_numpy().reshape(rows["network"].nunique(), -1)
        patients = rows["patient"].to_numpy()[: agreement.shape[1]]
        intervals[kind] = mean_agreement(agreement, patients, rng=np.random.default_rng(seed))
    return intervals


def mean_agreement(agreement: np.ndarray, patients: Sequence, *, rng: np.random.Generator) -> Interval:
    """Return the mean agreement of maps with those of random networks, with its 95 % interval.

    Random networks and patients are drawn with replacement, independently of one another: the pigeonhole bootstrap,
    Owen 2007, Ann. Appl. Stat. 1:386. Networks and patients are few, so the usual percentiles would be too
    narrow. They are widened by Student's t for the smaller number: the expanded percentile interval, Hesterberg 2015,
    Am. Stat. 69:371, section 5.3. One patient has no interval.

    Args:
        agreement: (M, N) absolute rank correlations for M random networks and N images; NaN images are left out.
        patients: (N,) patient ids.
        rng: draws the resamples.
    """
    defined = ~np.isnan(agreement).all(axis=0)
    agreement, patients = agreement[:, defined], np.asarray(patients)[defined]
    fewer = min(len(agreement), len(np.unique(patients)))
    if fewer < 2:
        return Interval(agreement.mean() if defined.any() else np.nan)
    networks, images = (
        np.concatenate(list(patient_weights(drawn, rng=rng))) for drawn in (np.arange(len(agreement)), patients)
    )
    resampled = ((networks @ agreement) * images).sum(axis=1) / (networks.sum(axis=1) * images.sum(axis=1))
    tail = stats.norm.cdf(np.sqrt(fewer / (fewer - 1)) * stats.t.ppf(0.025, fewer - 1))
    return Interval(agreement.mean(), *np.quantile(resampled, (tail, 1 - tail)))


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Return a `summary` as text: `0.65 (0.56–0.74)`, and a dash where nothing is known."""
    return table.map(lambda cell: cell if isinstance(cell, str) else f"{cell:.2f}")


def case_counts(scores: MapScores) -> str:
    """Return the numbers of cases behind the scores, in words."""
    one = scores.located[scores.located["map"] == scores.located["map"].iloc[0]]
    lesions, lungs = one[["in_lesion", "in_lungs"]].notna().sum()
    cases = f"{len(one)} cases, {lesions} with a lesion or box, {lungs} with lungs"
    return f"{cases}; the columns from probability on use {scores.faithful['path'].nunique()}"
