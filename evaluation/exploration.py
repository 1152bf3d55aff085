"""The texts, tables and figures of notebook 1, for every kind of study.

If a study has nothing to show, a function returns one line that says why.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure
from torch import Tensor

import plot_utils
from cams.panels import draw_augmentations, draw_lung_segmentations, draw_samples
from datasets import XrayTable
from evaluation.intervals import bootstrap_mean
from lungs.masking import LungMasking
from lungs.segmentation import LungSegmenter, Pair, score_pairs
from networks import architecture
from studies.settings import IMAGENET_MEAN, IMAGENET_STD, Study
from utils import Preprocessing, class_counts, derived_generator, label_weights, read_xray

Augment = Callable[..., Tensor]  # a `training.augmentation.Augmentation`


def groups_of(table: XrayTable) -> tuple[str, ...]:
    """Return the name of each label: the classes and, for several findings, "No finding" as the last one."""
    return (*table.classes, "No finding") if table.multilabel else table.classes


def overview(table: XrayTable) -> str:
    """Return the number of images and of classes, and the table's notes."""
    ids = "with patient ids" if table.has_patient_ids else "without patient ids: each image counts as a patient"
    kinds = "findings" if table.multilabel else "classes"
    return "\n".join([f"{len(table):,} images of {len(table.classes)} {kinds}, {ids}", *table.notes])


def patient_tables(table: XrayTable) -> list[pd.DataFrame | Markdown]:
    """Return the number of patients by class and split; an empty list if the data has no patient ids."""
    if not table.has_patient_ids:
        return []
    images = table.frame["patient"].value_counts()
    line = f"{len(images):,} patients, the largest with {images.iloc[0]} images; patients by class and split:"
    return [Markdown(line), table.counts("patient")]


def sample_figure(table: XrayTable, *, seed: int) -> Figure:
    """Return up to four training images of each class, of different patients, drawn by `seed`."""
    one_each = table.subset("train").sample(frac=1, random_state=seed).drop_duplicates("patient")
    paths, groups = one_each.groupby("label")["path"], groups_of(table)
    images = {groups[label]: [read_xray(path) for path in of_class.head(4)] for label, of_class in paths}
    size = (9, 2.3 * len(images)) if len(images) < 8 else (6, 1.6 * len(images))
    return draw_samples(Figure(figsize=size, layout="constrained"), images)


def size_figure(files: pd.DataFrame, groups: Sequence[str]) -> Figure | Markdown:
    """Return width against height of the images of a `traps.file_table` with a column label."""
    sizes = files[["width", "height"]].drop_duplicates().to_numpy()
    if len(sizes) == 1:
        return Markdown("all are {} × {} pixels".format(*sizes[0]))
    fig = Figure(figsize=(10, 3.8), layout="constrained")
    plot_utils.plot_image_sizes(files.assign(**{"class": [groups[label] for label in files["label"]]}), fig.subplots())
    return fig


def lung_figure(paths: Sequence[str], masking: LungMasking, lungs: LungMasking | None) -> Figure:
    """Return X-rays with the outlines of their lungs and, if networks see the `lungs` only, the networks' input."""
    xrays = [read_xray(path) for path in paths]
    masks, reasons = zip(*(masking.mask_of(xray) for xray in xrays), strict=True)
    seen = [lungs(xray) for xray in xrays] if lungs else None
    fig = Figure(figsize=(9, 4.8 if lungs else 2.5), layout="constrained")
    return draw_lung_segmentations(fig, xrays, masks, reasons, seen)


def lung_agreement(train: pd.DataFrame, segmenter: LungSegmenter, *, seed: int) -> str:
    """Return how well a lung model agrees with the lung masks of up to 50 images, drawn by `seed`."""
    with_mask = train[train["mask"].notna()].sample(frac=1, random_state=seed).head(50)
    if with_mask.empty:
        return "no lung masks in this data"
    pairs = [Pair(Path(row.path), Path(row.mask), row.patient) for row in with_mask.itertuples()]
    agreement, lines = score_pairs(segmenter, pairs), []
    for name in ("dice", "iou"):
        mean = bootstrap_mean(agreement[name].to_numpy(), with_mask["patient"], rng=np.random.default_rng(seed))
        lines.append(f"{name}: {mean} on {len(with_mask)} training images")
    return "\n".join(lines)


def inputs_of(study: Study, augment: Augment) -> str:
    """Return the image size of each network, and the augmentation."""
    sizes = ", ".join(f"{architecture(name).title} {study.training_of(name).image_size} px" for name in study.networks)
    return f"{sizes}; augmentation: {'none in this study' if augment.views == 1 else study.augmentation.model_dump()}"


def augmentation_figure(study: Study, augment: Augment, path: str, lungs: LungMasking | None) -> Figure | Markdown:
    """Return an X-ray as the networks see it, and nine augmented versions of it."""
    if augment.views == 1:
        return Markdown("*Networks see every training image as it is.*")
    size = max(study.training_of(name).image_size for name in study.networks)
    preprocessing = Preprocessing(size, IMAGENET_MEAN, IMAGENET_STD, lungs=lungs)
    original = preprocessing.resize(read_xray(path))
    draws = augment.draw(9, derived_generator(study.seed, "shown views"))
    augmented = augment(original.expand(9, -1, -1, -1), draws)[:, 0].round().byte().numpy()
    return draw_augmentations(Figure(figsize=(10, 4.4), layout="constrained"), original[0].numpy(), augmented)


def class_weights(table: XrayTable) -> list[pd.DataFrame | Figure | Markdown]:
    """Return how often each class is drawn or, for several findings, the weights of each finding in the loss."""
    names = list(table.classes)
    if table.multilabel:
        weights = label_weights(table.targets("train")).T.numpy()
        return [pd.DataFrame(weights, names, ["weight of a negative", "weight of a positive"]).round(3)]
    counts = class_counts(table.subset("train")["label"], len(names)).numpy()
    draws = pd.DataFrame({"as they are": counts, "weighted": counts.sum() / len(names)}, index=names)
    fig = Figure(figsize=(10, 3.4), layout="constrained")
    words = {"number": "{:.1f}%", "title": "share of the images drawn (%)"}
    plot_utils.plot_bars(100 * draws / draws.sum(), fig.subplots(), **words, equal_shares=True)
    times = (draws["weighted"] / draws["as they are"]).round(2).to_dict()
    return [Markdown(f"number of times that an image is drawn in an epoch: {times}"), fig]


def probe_labels(table: XrayTable, images: pd.DataFrame) -> tuple[np.ndarray, Sequence[str]]:
    """Return (N,) labels for a probe, and their names: the classes; for several findings, any finding or none."""
    if table.multilabel:
        return (images["label"] < len(table.classes)).astype(int).to_numpy(), ("No finding", "any finding")
    return images["label"].to_numpy(), table.classes


def conclusion(table: XrayTable, probes: pd.DataFrame, duplicates: Mapping[str, int]) -> Markdown:
    """Return the last lines of notebook 1. `probes` and `duplicates` are tables of `traps`."""
    shortcuts = [f"{name} (AUC {row.roc_auc:.2f})" for name, row in probes.iterrows() if row.shortcut]
    counts = table.counts().sum(axis=1)[list(table.classes)]
    kinds = "findings" if table.multilabel else "classes"
    return Markdown(
        f"- Imbalance: the most frequent of {len(counts)} {kinds} has **{counts.max() / counts.min():.1f} times** "
        f"as many images as the rarest.\n"
        f"- Shortcuts (what tells the classes apart without the lungs): **{', '.join(shortcuts) or 'none found'}**.\n"
        f"- Images with a near-duplicate in another split: **{duplicates['… in another split']}**."
    )
