"""The cases on which maps are scored. A case is a test image, a class, and the place of the class in the image."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from datasets import XrayTable
from datasets.table import relative_paths
from evaluation.predictions import Predictions
from inference.trained_networks import TrainedNetwork
from lungs.masking import LungMask
from utils import read_mask

FindLungs = Callable[[np.ndarray], LungMask] | None  # finds the lungs of an (H, W) X-ray
ROUNDING = 0.01  # the largest difference that another device can make to a probability


class MapCase(NamedTuple):
    """A test image and the class whose map is scored.

    Attributes:
        path: the image file.
        patient: the patient's id.
        class_index: the class.
        label: the name of the class.
        lesion: file of the lesion mask.
        lung: file of the lung mask.
        boxes: (B, 4) x, y, width and height of the class's boxes, as fractions of the image.
        probabilities: (C,) the stored probabilities by which the case was chosen.
    """

    path: str
    patient: object
    class_index: int
    label: str
    lesion: str | None = None
    lung: str | None = None
    boxes: np.ndarray = np.zeros((0, 4))
    probabilities: np.ndarray | None = None


def map_cases(table: XrayTable, predictions: Predictions, *, most: int, seed: int) -> list[MapCase]:
    """Return at most `most` cases of the test images.

    With one class an image, a case is a correctly classified image and its class: a wrong answer has no correct place
    in the image. With several findings, a case is an image and a finding with a box in this image. If there are no
    boxes, a case is an image and a finding that is present.

    Args:
        table: the study's images.
        predictions: the network's predictions on the test split.
        most: the largest number of cases.
        seed: fixes the draw.
    """
    pairs = (_findings if table.multilabel else _correct)(table, predictions)
    drawn = np.sort(np.random.default_rng(seed).permutation(len(pairs))[:most])
    stored = stored_probabilities(predictions, table)
    return [map_case(table, *pairs[i], stored) for i in drawn]


def _findings(table: XrayTable, predictions: Predictions) -> list[tuple[dict[str, object], int]]:
    """Return pairs of a test image and a reported finding: those with a box; without boxes, all present ones."""
    boxed = set(zip(table.boxes["path"], table.boxes["label"], strict=True))
    pairs = [
        (image, index)
        for image in table.subset("test").to_dict("records")
        for index in np.flatnonzero(predictions.reported).tolist()
        if image[table.classes[index]] == 1 or (image["path"], index) in boxed
    ]
    return [(image, index) for image, index in pairs if (image["path"], index) in boxed] or pairs


def _correct(table: XrayTable, predictions: Predictions) -> list[tuple[dict[str, object], int]]:
    """Return the test images that were classified correctly, with their class."""
    test = table.subset("test")
    correct = predictions.paths[predictions.predicted == predictions.targets]
    chosen = relative_paths(test["path"], table.root).isin(correct).to_numpy(bool)
    return [(image, int(image["label"])) for image in test[chosen].to_dict("records")]


def map_case(table: XrayTable, image: Mapping[str, object], index: int, stored: Mapping[str, np.ndarray]) -> MapCase:
    """Return a test image and a class as a case. `stored` is what `stored_probabilities` returns."""
    path, boxes = image["path"], table.boxes
    of_case = boxes.loc[(boxes["path"] == path) & (boxes["label"] == index), ["x", "y", "width", "height"]]
    places = {"lesion": image["lesion"], "lung": image["mask"], "boxes": of_case.to_numpy(float)}
    return MapCase(path, image["patient"], index, table.classes[index], **places, probabilities=stored[path])


def stored_probabilities(predictions: Predictions, table: XrayTable) -> dict[str, np.ndarray]:
    """Return the (C,) predicted probabilities of each test image, by the path of its file.

    Raises:
        ValueError: the predictions lack a test image.
    """
    paths = table.subset("test")["path"]
    rows = pd.Index(predictions.paths).get_indexer(relative_paths(paths, table.root))
    if (rows < 0).any():
        raise ValueError(f"the predictions lack {paths.iloc[rows.argmin()]}: train again (notebook 2)")
    return dict(zip(paths, predictions.probabilities[rows], strict=True))


def refuse_other_answer(trained: TrainedNetwork, path: str, probabilities: np.ndarray, stored: np.ndarray) -> None:
    """Raise ValueError if a network's (C,) probabilities differ from the stored ones by more than `ROUNDING`."""
    largest = int(np.nanargmax(np.abs(probabilities - stored)))  # findings that are not reported are NaN
    if abs(probabilities[largest] - stored[largest]) > ROUNDING:
        raise ValueError(
            f"{path}: {trained.card.architecture} says {trained.card.classes[largest]} {probabilities[largest]:.2f}, "
            f"but its stored prediction is {stored[largest]:.2f}: the image or the network has changed since then. "
            "Train it again (notebook 2)"
        )


def lungs_of(case: MapCase, xray: np.ndarray, find_lungs: FindLungs) -> np.ndarray | None:
    """Return the (H, W) bool lungs of a case's X-ray.

    They come from the case's mask, else from `find_lungs` (`lungs.masking.LungMasking.mask_of`). None if there is
    neither, or if `find_lungs` gives a reason against its result.
    """
    if case.lung is not None:
        return read_mask(case.lung, xray.shape)
    if find_lungs is None:
        return None
    lungs = find_lungs(xray)
    return lungs.mask if lungs.reason is None else None
