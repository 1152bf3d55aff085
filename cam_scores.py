"""How far a network's maps can be believed: every score of several methods, beside chance.

A case is a test image and the class that its map is for. Where the data says where something is, maps are held
against it (`localization`); the network itself is asked whether they are faithful to it (`faithfulness`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from cam_methods import METHODS
from datasets import XrayTable
from datasets.table import relative_paths
from explanations import cam_of
from faithfulness import (
    deletion_insertion,
    masked_confidence,
    random_network,
    randomised,
    rank_correlation,
    verdict,
)
from localization import (
    CHANCE,
    BoxOverlaps,
    best_overlaps,
    box_masks,
    mass_inside,
    overlap_table,
    peak_inside,
)
from maps import CamMaps, LayerMaps
from metrics import Interval, bootstrap_mean, patient_weights
from predictions import Predictions
from trained_networks import TrainedNetwork
from utils import read_mask, read_xray

if TYPE_CHECKING:
    from lung_masking import LungMask

NETWORKS = 10  # random networks to compare with: one random head may by chance point as the trained one does
YES_OR_NO = ("empty", "peak", "increase")  # of these a mean is a proportion
ROUNDING = 0.01  # probabilities that differ by no more are the same ones, computed on another device
BATCH = 16  # images that a network sees at once
# The first method's map of another patient, of the same class where there is one: what it knows is the class.
ANOTHER = "another patient's"


class MapCase(NamedTuple):
    """A test image, its patient, the class whose map is scored, and what is known of the image: the files of a
    lesion's and of the lungs' mask, (B, 4) boxes as fractions; and the (C,) probabilities by which it was chosen.
    """

    path: str
    patient: object
    class_index: int
    label: str
    lesion: str | None = None
    lung: str | None = None
    boxes: np.ndarray = np.zeros((0, 4))
    probabilities: np.ndarray | None = None


class MapScores(NamedTuple):
    """Scores of one network's maps, a row a case and a kind of `map`: a method's title, or what knows nothing of the
    image, `ANOTHER` and `localization.CHANCE`.

    `located`: `peak` (in the lesion, or in its boxes where it has no mask: 1.0 or 0.0), `in_lesion` and `in_lungs`
    (the share of the map's sum; of an empty map 0 of the lesion, which was not found, and NaN of the lungs), `iou`,
    `iobb` and `detected` (see `localization.BoxOverlaps`), `empty`; NaN where there is nothing to hold it against.
    `faithful`: `probability` of the class for the whole image, `deletion`, `insertion`, `drop`, `increase`; NaN of
    an empty map. `randomised`: a row for each random `network`, 0 to `NETWORKS` - 1, too, and `stage`, 0 the head
    alone; the `share` of the modules that are random, the `correlation` of the map's ranks with the trained network's
    and its size, `agreement`, whatever its sign; NaN where the trained network's map is empty.
    """

    located: pd.DataFrame
    faithful: pd.DataFrame
    randomised: pd.DataFrame


def map_cases(table: XrayTable, said: Predictions, *, most: int, seed: int) -> list[MapCase]:
    """Return at most `most` cases of the test images, drawn by `seed`.

    Of one class an image: the images that were classified correctly, with their class (a wrong answer has no right
    place to look at). Of several findings: the pairs of image and finding that have a box; where no image has
    one, those that have the finding.
    """
    test = table.subset("test")
    if table.multilabel:
        boxed = set(zip(table.boxes["path"], table.boxes["label"], strict=True))
        pairs = [
            (image, index)
            for image in test.to_dict("records")
            for index, name in enumerate(table.classes)
            if said.reported[index] and (image[name] == 1 or (image["path"], index) in boxed)
        ]
        pairs = [(image, index) for image, index in pairs if (image["path"], index) in boxed] or pairs
    else:
        right = set(said.paths[said.predicted == said.targets])
        known = relative_paths(test["path"], table.root).isin(right).to_numpy(bool)
        pairs = [(image, int(image["label"])) for image in test[known].to_dict("records")]
    drawn = np.sort(np.random.default_rng(seed).permutation(len(pairs))[:most])
    stored = stored_probabilities(said, table)
    return [_case(table, *pairs[i], stored) for i in drawn]


def stored_probabilities(said: Predictions, table: XrayTable) -> dict[str, np.ndarray]:
    """Return the (C,) probabilities in the predictions of each test image, by the path of its file.

    Raises ValueError where an image has none.
    """
    rows = dict(zip(said.paths, said.probabilities, strict=True))
    paths = table.subset("test")["path"]
    named = dict(zip(paths, relative_paths(paths, table.root), strict=True))
    missing = [path for path, name in named.items() if name not in rows]
    if missing:
        raise ValueError(f"the predictions lack {missing[0]}: train again (notebook 2)")
    return {path: rows[name] for path, name in named.items()}


def refuse_other_answer(trained: TrainedNetwork, path: str, found: np.ndarray, stored: np.ndarray) -> None:
    """Raise ValueError where the (C,) probabilities that a network gives to an X-ray are not those stored for it."""
    most = int(np.nanargmax(np.abs(found - stored)))  # findings that are not reported are NaN
    if abs(found[most] - stored[most]) > ROUNDING:
        raise ValueError(
            f"{path}: {trained.card.architecture} says {trained.card.classes[most]} {found[most]:.2f}, but its "
            f"predictions have {stored[most]:.2f}: the image or the network has changed since they were written. "
            "Train it again (notebook 2)"
        )


def _case(
    table: XrayTable, image: Mapping[str, object], index: int, stored: Mapping[str, np.ndarray]
) -> MapCase:
    own = table.boxes[(table.boxes["path"] == image["path"]) & (table.boxes["label"] == index)]
    boxes = own[["x", "y", "width", "height"]].to_numpy(float)
    known = (image["lesion"], image["mask"], boxes)
    subject = image["path"], image["patient"], index, table.classes[index]
    return MapCase(*subject, *known, stored[image["path"]])


def score_maps(
    trained: TrainedNetwork,
    cases: Sequence[MapCase],
    *,
    methods: Sequence[str],
    faithful: int,
    steps: int = 16,
    find_lungs: Callable[[np.ndarray], LungMask] | None = None,
    seed: int,
) -> MapScores:
    """Return the scores of a network's maps by each of `methods` (names of `cam_methods.METHODS`) and of maps that
    know nothing.

    All cases are held against what is known of them, at the X-rays' own size; `find_lungs` finds the lungs of an
    X-ray without a mask of its own (`lung_masking.LungMasking.mask_of`). The network is asked about `faithful` of
    them, drawn by `seed`: several hundred passes each. `steps` of `faithfulness.deletion_insertion`.

    Raises ValueError where there are no cases, or where the network does not say of a case what its probabilities are.
    """
    if not cases:
        raise ValueError("no test image to score maps on: none was classified correctly, or has the finding")
    images = _inputs(trained, cases)
    classes = torch.tensor([case.class_index for case in cases], device=images.device)
    found = _maps(trained, images, classes, methods)
    answers = trained.card.probabilities(next(iter(found.values())).logits).cpu().numpy()
    for case, answer in zip(cases, answers, strict=True):
        if case.probabilities is not None:
            refuse_other_answer(trained, case.path, answer, case.probabilities)
    others = _partners(cases, seed)
    asked = np.sort(np.random.default_rng(seed).permutation(len(cases))[:faithful])
    return MapScores(
        pd.DataFrame(_located(cases, found, others, find_lungs)),
        pd.DataFrame(_faithful(trained, cases, images, classes, found, others, asked, steps, seed)),
        pd.DataFrame(_randomised(trained, cases, images, classes, found, asked, seed)),
    )


def _inputs(trained: TrainedNetwork, cases: Sequence[MapCase]) -> Tensor:
    device = next(trained.network.parameters()).device
    return torch.stack([trained.preprocessing(read_xray(case.path)) for case in cases]).to(device)


def _maps(
    trained: TrainedNetwork, images: Tensor, classes: Tensor, methods: Sequence[str]
) -> dict[str, CamMaps]:
    """Return a map an image by each method, by title."""
    with cam_of(trained) as cam:
        batches = [
            cam.by_method(methods, *batch)
            for batch in zip(images.split(BATCH), classes.split(BATCH), strict=True)
        ]
    found = {}
    for name in methods:
        parts = [batch[name] for batch in batches]
        raw = LayerMaps(torch.cat([part.raw for part in parts]), parts[0].grid)
        rest = (torch.cat([getattr(part, field) for part in parts]) for field in ("classes", "logits"))
        found[METHODS[name].title] = CamMaps((raw,), *rest)
    return found


def _partners(cases: Sequence[MapCase], seed: int) -> list[int | None]:
    """Return, for each case, another patient's, of the same class where there is one; None where there is none."""
    rng = np.random.default_rng(seed)
    patients = np.array([str(case.patient) for case in cases])
    labels = np.array([case.class_index for case in cases])
    partners: list[int | None] = []
    for i in range(len(cases)):
        others = np.flatnonzero(patients != patients[i])
        alike = others[labels[others] == labels[i]]
        choice = alike if len(alike) else others
        partners.append(int(rng.choice(choice)) if len(choice) else None)
    return partners


def _located(
    cases: Sequence[MapCase],
    found: Mapping[str, CamMaps],
    others: Sequence[int | None],
    find_lungs: Callable[[np.ndarray], LungMask] | None,
) -> Iterator[dict[str, object]]:
    for i, case in enumerate(cases):
        xray = read_xray(case.path)
        target = _mask(case.lesion, xray)
        if target is None and len(case.boxes):
            target = box_masks(case.boxes, xray.shape)
        lung = lungs_of(case, xray, find_lungs)
        kinds = {title: _placed(maps, i, xray.shape) for title, maps in found.items()}
        first = next(iter(found.values()))
        kinds[ANOTHER] = None if others[i] is None else _placed(first, others[i], xray.shape)
        kinds |= {name: make(xray.shape).astype(np.float32) for name, make in CHANCE.items()}
        for kind, map_ in kinds.items():
            row = _unknown() if map_ is None else _held_against(map_, target, lung, case.boxes)
            # A peak put anywhere at random hits as often as the target is large.
            yield _named(case, kind) | row | ({"peak": row["in_lesion"]} if kind == "uniform" else {})


def _placed(maps: CamMaps, i: int, shape: tuple[int, int]) -> np.ndarray:
    return maps[i : i + 1].upsampled(shape)[0, 0].cpu().numpy()


def _unknown() -> dict[str, float]:
    return dict.fromkeys(("peak", "in_lesion", "in_lungs", "iou", "iobb", "detected", "empty"), np.nan)


def _held_against(
    map_: np.ndarray, target: np.ndarray | None, lung: np.ndarray | None, boxes: np.ndarray
) -> dict[str, float]:
    row = _unknown() | {"empty": float(not map_.any())}
    if target is not None:
        row |= {"peak": peak_inside([map_], [target])[0], "in_lesion": mass_inside([map_], [target])[0]}
    if lung is not None and map_.any():
        row["in_lungs"] = mass_inside([map_], [lung])[0]
    overlap = best_overlaps([map_], [boxes])
    return row | {name: float(values[0]) for name, values in overlap._asdict().items()}


def lungs_of(
    case: MapCase, xray: np.ndarray, find_lungs: Callable[[np.ndarray], LungMask] | None
) -> np.ndarray | None:
    """Return the (H, W) lungs of a case's X-ray: of its mask, else as `find_lungs` finds them, None where it does
    not or is not to be believed.
    """
    if case.lung is None and find_lungs is not None:
        found = find_lungs(xray)
        return found.mask if found.reason is None else None
    return _mask(case.lung, xray)


def _faithful(
    trained: TrainedNetwork,
    cases: Sequence[MapCase],
    images: Tensor,
    classes: Tensor,
    found: Mapping[str, CamMaps],
    others: Sequence[int | None],
    asked: np.ndarray,
    steps: int,
    seed: int,
) -> Iterator[dict[str, object]]:
    size = tuple(images.shape[2:])
    kinds = {title: maps[asked].upsampled(size)[:, 0] for title, maps in found.items()}
    theirs = [others[i] for i in asked]
    if None not in theirs:
        kinds[ANOTHER] = next(iter(found.values()))[theirs].upsampled(size)[:, 0]
    for name, make in CHANCE.items():
        kinds[name] = torch.from_numpy(make(size)).to(images).expand(len(asked), -1, -1)
    own_images, own_classes = images[asked], classes[asked]
    baseline = _baseline(trained, own_images)

    def probabilities(batch: Tensor) -> Tensor:
        return trained.card.probabilities(trained.network(batch))

    for kind, maps in kinds.items():
        given = (probabilities, own_images, maps, own_classes)
        curves = deletion_insertion(*given, baseline=baseline, steps=steps, seed=seed)
        confidence = masked_confidence(*given, baseline=baseline)
        columns = {
            "probability": confidence.whole,
            **curves._asdict(),
            "drop": confidence.drop,
            "increase": confidence.increase,
        }
        there = maps.flatten(1).any(dim=1).cpu().numpy()  # an empty map names no pixels
        for row, i in enumerate(asked):
            scores = {name: values[row] if there[row] else np.nan for name, values in columns.items()}
            yield _named(cases[i], kind) | scores


def _baseline(trained: TrainedNetwork, images: Tensor) -> Tensor | None:
    """Return what deleted pixels become: None, the mean. For a network that sees lungs on black, the black stays:
    grey there would be nothing that it knows.
    """
    if trained.lungs is None:
        return None
    black = trained.card.mean, trained.card.std
    black = torch.tensor([-m / s for m, s in zip(*black, strict=True)]).to(images)[:, None, None]
    outside = ((images - black).abs() < 1e-3).all(dim=1, keepdim=True)
    return torch.where(outside, images, torch.zeros_like(images))


def _randomised(
    trained: TrainedNetwork,
    cases: Sequence[MapCase],
    images: Tensor,
    classes: Tensor,
    found: Mapping[str, CamMaps],
    asked: np.ndarray,
    seed: int,
) -> Iterator[dict[str, object]]:
    titles = {method.title: name for name, method in METHODS.items()}
    known = {title: maps.raw[asked, 0] for title, maps in found.items()}
    # Seeds that are drawn: with the study's own, the random network would be the one that the training started from.
    for number, own_seed in enumerate(np.random.SeedSequence(seed).generate_state(NETWORKS).tolist()):
        fresh = random_network(trained.card, images[asked], seed=own_seed)
        for step, stage in enumerate(randomised(trained.network, fresh, images[:1])):
            network = trained._replace(network=stage.network)
            maps_of = _maps(network, images[asked], classes[asked], [titles[title] for title in known])
            for title, maps in maps_of.items():
                ranks = rank_correlation(maps.raw[:, 0], known[title])
                # A map without evidence has no ranks to keep.
                ranks[~known[title].flatten(1).any(dim=1).cpu().numpy()] = np.nan
                for rank, i in zip(ranks, asked, strict=True):
                    of_stage = {"network": number, "stage": step, "share": stage.share}
                    agreement = {"correlation": rank, "agreement": abs(rank)}
                    yield _named(cases[i], title) | of_stage | agreement


def _named(case: MapCase, kind: str) -> dict[str, object]:
    return {"path": case.path, "patient": case.patient, "label": case.label, "map": kind}


def _mask(path: str | None, xray: np.ndarray) -> np.ndarray | None:
    return None if path is None else read_mask(path, xray.shape)


def summary(scores: MapScores, *, rng: np.random.Generator) -> pd.DataFrame:
    """Return the means by kind of map as `Interval`s over patients (one patient has none) and `verdict`, what
    randomising the network says of a method.

    Columns, those left out that nothing is known for: "empty" maps, if any; "peak in lesion", "share in lesion", each
    also "minus another's", case by case the difference to `ANOTHER`; "share in lungs"; "probability" of the class;
    "deletion" and "average drop" (small is faithful), "insertion" and "increase" (large is); "agreement, head
    random" and "agreement, all random" (absolute rank correlations with the trained network's maps, on which the
    verdict stands).
    """
    seed = int(rng.integers(2**63))
    stage = scores.randomised["stage"]
    head, everything = (scores.randomised[stage == step] for step in (stage.min(), stage.max()))
    columns = {
        "empty": _means(scores.located, "empty", seed),
        "peak in lesion": _means(scores.located, "peak", seed),
        "peak, minus another's": _differences(scores.located, "peak", seed),
        "share in lesion": _means(scores.located, "in_lesion", seed),
        "share, minus another's": _differences(scores.located, "in_lesion", seed),
        "share in lungs": _means(scores.located, "in_lungs", seed),
        "probability": _means(scores.faithful, "probability", seed),
        "deletion": _means(scores.faithful, "deletion", seed),
        "insertion": _means(scores.faithful, "insertion", seed),
        "average drop": _means(scores.faithful, "drop", seed),
        "increase": _means(scores.faithful, "increase", seed),
        "agreement, head random": _agreements(head, seed),
        "agreement, all random": _agreements(everything, seed),
    }
    kinds = scores.located["map"].unique()
    unknown = Interval(np.nan, np.nan, np.nan)
    table = pd.DataFrame(
        {name: [c.get(kind, unknown) for kind in kinds] for name, c in columns.items()}, index=kinds
    )
    told = {name: [cell.estimate for cell in table[name] if not np.isnan(cell.estimate)] for name in table}
    table = table[[name for name, known in told.items() if (any(known) if name == "empty" else known)]]
    rows = zip(
        columns["agreement, head random"].items(), columns["agreement, all random"].values(), strict=True
    )
    said = {kind: verdict(after_head, after_all) for (kind, after_head), after_all in rows}
    return table.assign(verdict=[said.get(kind, "") for kind in kinds])


def _differences(located: pd.DataFrame, column: str, seed: int) -> dict[str, Interval]:
    """Return by kind the mean of what each case has more than it has with another patient's map."""
    theirs = located.loc[located["map"] == ANOTHER, column].to_numpy(float)
    kinds = {kind: own for kind, own in located.groupby("map", sort=False) if kind != ANOTHER}
    # Every kind has the same cases in the same order.
    frames = [own.assign(difference=own[column].to_numpy(float) - theirs) for own in kinds.values()]
    return _means(pd.concat(frames), "difference", seed)


def case_counts(scores: MapScores) -> str:
    """Return in words how many cases the scores stand on."""
    one = scores.located[scores.located["map"] == scores.located["map"].iloc[0]]
    lesions, lungs = (int(one[column].notna().sum()) for column in ("in_lesion", "in_lungs"))
    asked = scores.faithful["path"].nunique()
    return f"{len(one)} cases, {lesions} with a lesion or box, {lungs} with lungs; the network was asked of {asked}"


def _means(frame: pd.DataFrame, column: str, seed: int) -> dict[str, Interval]:
    means = {}
    for kind, own in frame.groupby("map", sort=False):
        values, patients, yes_or_no = own[column].to_numpy(float), own["patient"], column in YES_OR_NO
        rng = np.random.default_rng(seed)
        means[kind] = bootstrap_mean(values, patients, proportion=yes_or_no, rng=rng)
    return means


def _agreements(frame: pd.DataFrame, seed: int) -> dict[str, Interval]:
    means = {}
    for kind, own in frame.groupby("map", sort=False):
        # Each network has the same cases in the same order.
        agreement = own["agreement"].to_numpy().reshape(own["network"].nunique(), -1)
        patients = own["patient"].to_numpy()[: agreement.shape[1]]
        means[kind] = mean_agreement(agreement, patients, rng=np.random.default_rng(seed))
    return means


def mean_agreement(agreement: np.ndarray, patients: Sequence, *, rng: np.random.Generator) -> Interval:
    """Return the mean of (M, N) agreements of N images' maps with those of M random networks, images that are NaN left
    out, with its 95 % interval over networks and patients.

    Both are drawn with replacement, independently of one another, 1,000 times (the pigeonhole bootstrap, Owen 2007,
    Ann. Appl. Stat. 1:386): how much a map agrees depends on both, and a few of either are at hand. So few that
    percentiles would be too narrow: they are taken as far out as Student's t of the fewer ones asks for (the expanded
    percentile interval, Hesterberg 2015, Am. Stat. 69:371, section 5.3). One patient has no interval.
    """
    known = ~np.isnan(agreement).all(axis=0)
    agreement, patients = agreement[:, known], np.asarray(patients)[known]
    fewer = min(len(agreement), len(np.unique(patients)))
    if fewer < 2:
        return Interval(agreement.mean() if known.any() else np.nan, np.nan, np.nan)
    networks, images = (
        np.concatenate(list(patient_weights(drawn, resamples=1000, rng=rng)))
        for drawn in (np.arange(len(agreement)), patients)
    )
    resampled = ((networks @ agreement) * images).sum(axis=1) / (networks.sum(axis=1) * images.sum(axis=1))
    tail = stats.norm.cdf(np.sqrt(fewer / (fewer - 1)) * stats.t.ppf(0.025, fewer - 1))
    return Interval(agreement.mean(), *np.quantile(resampled, (tail, 1 - tail)))


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Return a `summary` as text: `0.65 (0.56–0.74)`, and a dash where nothing is known."""
    return table.map(
        lambda cell: cell if isinstance(cell, str) else "–" if np.isnan(cell.estimate) else f"{cell:.2f}"
    )


def overlaps(located: pd.DataFrame, *, rng: np.random.Generator) -> pd.DataFrame:
    """Return `localization.overlap_table` of the frame of `MapScores.located`: a row a kind of map, finding, score."""
    kinds = dict(list(located.groupby("map", sort=False)))
    found = {
        kind: BoxOverlaps(*(own[name].to_numpy() for name in BoxOverlaps._fields))
        for kind, own in kinds.items()
    }
    first = next(iter(kinds.values()))  # every kind has the same cases in the same order
    return overlap_table(found, first["label"].to_list(), first["patient"].to_list(), rng=rng)
