"""Score a network's maps by several methods, and chance maps, which do not depend on the network.

`localization` compares maps with the lesions and lungs of the data. `faithfulness` and `randomisation` run the network
again. They ask whether its maps name the pixels that it uses, and whether they depend on its weights. `map_cases`
chooses the cases, `map_summary` makes a table of the scores.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cams.maps import CamMaps, LayerMaps
from cams.methods import METHODS
from evaluation.faithfulness import ClassifiedImages, deletion_insertion, masked_confidence
from evaluation.localization import CHANCE, best_overlap, box_mask, mass_inside, peak_inside
from evaluation.map_cases import FindLungs, MapCase, lungs_of, refuse_other_answer
from evaluation.randomisation import random_network, randomised, rank_correlation
from inference.explanations import cam_of
from inference.trained_networks import TrainedNetwork
from studies.settings import Maps
from utils import read_mask, read_xray

NETWORKS = 10  # random networks to compare with; a single one may agree with the trained network by chance
BATCH = 16  # images in one forward pass
# The first method's map of another patient, of the same class if possible. It depends on the class, not on this image.
ANOTHER = "another patient's"


class MapScores(NamedTuple):
    """Scores of one network's maps: a row for each case and kind of map.

    All frames have the columns path, patient, label and map. `map` is a method's title, or a kind of map that
    does not depend on the image: `ANOTHER`, or one of `localization.CHANCE`.

    Attributes:
        located: comparison with lesion and lungs, NaN where these are unknown:

            - peak: 1.0 if the map's peak is in the lesion mask (without a mask: in the boxes), else 0.0;
            - in_lesion: share of the map's sum in the lesion, 0 for an empty map;
            - in_lungs: share of the map's sum in the lungs, NaN for an empty map;
            - iou, iobb, detected: see `localization.best_overlap`;
            - empty: 1.0 for a map without evidence, else 0.0.
        faithful: what `faithfulness.deletion_insertion` and `faithfulness.masked_confidence` return; NaN for an empty
            map.
        randomised: a row for each case, method, random network and stage of randomisation:

            - network: 0 to `NETWORKS` - 1;
            - stage: 0 is the head alone;
            - share: the share of modules that are random;
            - correlation: the rank correlation with the trained network's map; NaN if that map is empty;
            - agreement: the absolute correlation.
    """

    located: pd.DataFrame
    faithful: pd.DataFrame
    randomised: pd.DataFrame


def score_maps(
    trained: TrainedNetwork, cases: Sequence[MapCase], settings: Maps, *, find_lungs: FindLungs = None, seed: int
) -> MapScores:
    """Return the scores of a network's maps by several methods, and of maps that do not depend on the image.

    Args:
        trained: the network.
        cases: what `map_cases` returns. All of them are compared with their masks and boxes, at the X-rays' own size.
        settings: the methods, the number of cases on which the network is run again (drawn by `seed`), and the steps
            of `faithfulness.deletion_insertion`.
        find_lungs: finds the lungs of an X-ray without a lung mask (`lungs.masking.LungMasking.mask_of`).
        seed: fixes all draws.

    Raises:
        ValueError: there are no cases, or the network's probabilities for a case are not the stored ones.
    """
    if not cases:
        raise ValueError("no test image to score maps on: none was classified correctly, or has the finding")
    device = next(trained.network.parameters()).device
    images = torch.stack([trained.preprocessing(read_xray(case.path)) for case in cases]).to(device)
    classes = torch.tensor([case.class_index for case in cases], device=device)
    maps = _maps(trained, images, classes, settings.methods)
    first = maps[settings.methods[0]]
    for case, probabilities in zip(cases, trained.card.probabilities(first.logits).cpu().numpy(), strict=True):
        if case.probabilities is not None:
            refuse_other_answer(trained, case.path, probabilities, case.probabilities)
    kinds = {METHODS[name].title: of_method for name, of_method in maps.items()}
    if (partners := _partners(cases, seed)) is not None:
        kinds[ANOTHER] = first[partners]
    drawn = np.sort(np.random.default_rng(seed).permutation(len(cases))[: settings.faithful])
    drawn_cases = [cases[i] for i in drawn]
    subject = _subject(trained, images[drawn], classes[drawn])
    drawn_kinds, drawn_maps = ({name: m[drawn] for name, m in of.items()} for of in (kinds, maps))
    return MapScores(
        _located(cases, kinds, find_lungs),
        _faithful(subject, drawn_cases, drawn_kinds, steps=settings.steps, seed=seed),
        _randomised(trained, subject, drawn_cases, drawn_maps, seed),
    )


def _maps(trained: TrainedNetwork, images: Tensor, classes: Tensor, methods: Sequence[str]) -> dict[str, CamMaps]:
    """Return a map for each image and its class, by the methods' names."""
    with cam_of(trained) as cam:
        pairs = zip(images.split(BATCH), classes.split(BATCH), strict=True)
        batches = [cam.by_method(methods, *pair) for pair in pairs]
    maps = {}
    for name in methods:
        parts = [batch[name] for batch in batches]
        raw, logits = torch.cat([part.raw for part in parts]), torch.cat([part.logits for part in parts])
        maps[name] = CamMaps((LayerMaps(raw, parts[0].layers[0].grid),), classes[:, None], logits)
    return maps


def _partners(cases: Sequence[MapCase], seed: int) -> list[int] | None:
    """Return for each case a case of another patient, of the same class if possible; None if there is one patient."""
    rng = np.random.default_rng(seed)
    patients = np.array([str(case.patient) for case in cases])
    labels = np.array([case.class_index for case in cases])
    if (patients == patients[0]).all():
        return None
    partners = []
    for patient, label in zip(patients, labels, strict=True):
        others = np.flatnonzero(patients != patient)
        same_class = others[labels[others] == label]
        partners.append(int(rng.choice(same_class if len(same_class) else others)))
    return partners


def _subject(trained: TrainedNetwork, images: Tensor, classes: Tensor) -> ClassifiedImages:
    """Return what the scores of faithfulness need: the images, their classes, their baseline and the network.

    Deleted pixels become 0, the mean. If the network was trained on lungs with black around them, black pixels stay
    black, because it has never seen grey there.
    """
    baseline = torch.zeros_like(images)
    if trained.lungs is not None:
        black = [-mean / std for mean, std in zip(trained.card.mean, trained.card.std, strict=True)]
        difference = images - torch.tensor(black).to(images)[:, None, None]
        baseline = torch.where((difference.abs() < 1e-3).all(dim=1, keepdim=True), images, baseline)
    return ClassifiedImages(lambda batch: trained.card.probabilities(trained.network(batch)), images, classes, baseline)


def _names(cases: Sequence[MapCase], kind: str) -> pd.DataFrame:
    """Return the columns that all frames of `MapScores` have, a row for each case."""
    names = [(case.path, case.patient, case.label, kind) for case in cases]
    return pd.DataFrame(names, columns=["path", "patient", "label", "map"])


def _chance(shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return (H, W) float32 maps that do not depend on the image, by kind."""
    return {kind: make(shape).astype(np.float32) for kind, make in CHANCE.items()}


def _located(cases: Sequence[MapCase], kinds: Mapping[str, CamMaps], find_lungs: FindLungs) -> pd.DataFrame:
    """Return `MapScores.located`, case by case."""
    rows = []
    for i, case in enumerate(cases):
        xray = read_xray(case.path)
        shape, lungs = xray.shape, lungs_of(case, xray, find_lungs)
        target = box_mask(case.boxes, shape) if case.lesion is None else read_mask(case.lesion, shape)
        maps = {kind: of[i : i + 1].upsampled(shape)[0, 0].cpu().numpy() for kind, of in kinds.items()}
        for kind, map_ in (maps | _chance(shape)).items():
            map_ = map_.astype(np.float64)
            scores = {
                "peak": peak_inside(map_, target),
                "in_lesion": mass_inside(map_, target),
                "in_lungs": mass_inside(map_, lungs) if lungs is not None and map_.any() else np.nan,
                **best_overlap(map_, case.boxes),
                "empty": float(not map_.any()),
            }
            rows.append(_names([case], kind).assign(**scores))
    located = pd.concat(rows, ignore_index=True)
    # The uniform map gets the expected score of a random peak: the lesion's share of the image.
    return located.assign(peak=located["peak"].mask(located["map"] == "uniform", located["in_lesion"]))


def _faithful(
    subject: ClassifiedImages, cases: Sequence[MapCase], kinds: Mapping[str, CamMaps], *, steps: int, seed: int
) -> pd.DataFrame:
    """Return `MapScores.faithful`, kind by kind."""
    size = tuple(subject.images.shape[2:])
    maps = {kind: of_kind.upsampled(size)[:, 0] for kind, of_kind in kinds.items()}
    for kind, map_ in _chance(size).items():
        maps[kind] = torch.from_numpy(map_).to(subject.images).expand(len(cases), -1, -1)
    frames = []
    for kind, of_kind in maps.items():
        areas = deletion_insertion(subject, of_kind, steps=steps, seed=seed)
        scores = pd.DataFrame(areas | masked_confidence(subject, of_kind))
        scores[~of_kind.flatten(1).any(dim=1).cpu().numpy()] = np.nan  # an empty map names no pixels
        frames.append(_names(cases, kind).join(scores))
    return pd.concat(frames, ignore_index=True)


def _randomised(
    trained: TrainedNetwork, subject: ClassifiedImages, cases: Sequence[MapCase], maps: Mapping[str, CamMaps], seed: int
) -> pd.DataFrame:
    """Return `MapScores.randomised`, network by network and stage by stage."""
    frames = []
    # With the study's own seed, the first random network would be the one from which the training started.
    seeds = np.random.SeedSequence(seed).generate_state(NETWORKS).tolist()
    for number, network_seed in enumerate(seeds):
        fresh = random_network(trained.card, subject.images, seed=network_seed)
        stages = randomised(trained.network, fresh, subject.images[:1])
        for stage, (share, network) in enumerate(stages):
            random_maps = _maps(trained._replace(network=network), subject.images, subject.classes, list(maps))
            for name, of_method in maps.items():
                correlation = rank_correlation(random_maps[name].raw[:, 0], of_method.raw[:, 0])
                correlation[of_method.empty[:, 0].cpu().numpy()] = np.nan
                names = _names(cases, METHODS[name].title).assign(network=number, stage=stage, share=share)
                frames.append(names.assign(correlation=correlation, agreement=np.abs(correlation)))
    return pd.concat(frames, ignore_index=True)
