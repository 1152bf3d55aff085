"""What notebook 1 shows of a study's images, for studies of every kind: a table of X-rays in, texts, tables and figures
out. A function that has nothing to show returns one line that says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

import plot_utils
from cams.panels import draw_augmentations, draw_lung_segmentations, draw_samples
from datasets import XrayTable
from evaluation.intervals import bootstrap_mean
from lungs.masking import LungMasking
from lungs.segmentation import LungSegmenter, Pair, score_pairs
from networks import architecture
from studies.settings import Study
from utils import Preprocessing, class_counts, derived_generator, label_weights, read_xray

Augment = Callable[..., np.ndarray]  # an `training.augmentation.Augmentation`


def groups_of(table: XrayTable) -> tuple[str, ...]:
    """Return what the labels 0, 1, … stand for: the classes or, where an image may have several findings, the rarest of
    its findings and, last, none.
    """
    return (*table.classes, "No finding") if table.multilabel else table.classes


def kinds_of(table: XrayTable) -> str:
    """Return what the classes of a table are called."""
    return "findings" if table.multilabel else "classes"


def overview(table: XrayTable) -> str:
    """Return how many images there are, and the remarks of their reader."""
    ids = "with patient ids" if table.has_patient_ids else "without patient ids: each image counts as a patient"
    first = f"{len(table):,} images of {len(table.classes)} {kinds_of(table)}, {ids}"
    return "\n".join([first, *table.notes])


def patient_tables(table: XrayTable) -> list[pd.DataFrame | Markdown]:
    """Return the number of patients by class and split, where the data knows its patients."""
    if not table.has_patient_ids:
        return []
    images = table.frame["patient"].value_counts()
    line = f"{len(images):,} patients, the largest with {images.iloc[0]} images; patients by class and split:"
    return [Markdown(line), table.patient_counts()]


def sample_figure(table: XrayTable, *, seed: int) -> Figure:
    """Return up to four training images of each class, of different patients, drawn by `seed`."""
    one_each = table.subset("train").sample(frac=1, random_state=seed).drop_duplicates("patient")
    paths = {groups_of(table)[label]: images.head(4) for label, images in one_each.groupby("label")["path"]}
    size = (9, 2.3 * len(paths)) if len(paths) < 8 else (6, 1.6 * len(paths))
    images = {name: [read_xray(path) for path in of_class] for name, of_class in paths.items()}
    return draw_samples(Figure(figsize=size, layout="constrained"), images)


def size_figure(files: pd.DataFrame, groups: Sequence[str]) -> Figure | Markdown:
    """Return width against height of the images of a `traps.file_table` with a column label."""
    if len(files[["width", "height"]].drop_duplicates()) == 1:
        width, height = files[["width", "height"]].iloc[0]
        return Markdown(f"all are {width} × {height} pixels")
    fig = Figure(figsize=(10, 3.8), layout="constrained")
    sizes = files.assign(**{"class": [groups[label] for label in files["label"]]})
    plot_utils.plot_image_sizes(sizes, fig.subplots())
    return fig


def lungs_seen(study: Study, masking: LungMasking) -> LungMasking | None:
    """Return the masking if the study's networks see X-rays with all but the lungs blackened, else None."""
    return masking if study.preprocessing.lung_model else None


def lung_figure(xrays: Sequence[np.ndarray], masking: LungMasking, lungs: LungMasking | None) -> Figure:
    """Return (H, W) X-rays with the outlines of their lungs and, with `lungs`, what the networks see of them."""
    masks, reasons = zip(*(masking.mask_of(xray) for xray in xrays), strict=True)
    seen = [lungs(xray) for xray in xrays] if lungs else None
    fig = Figure(figsize=(9, 4.8 if lungs else 2.5), layout="constrained")
    return draw_lung_segmentations(fig, xrays, masks, reasons, seen)


def lung_agreement(train: pd.DataFrame, segmenter: LungSegmenter, *, seed: int) -> str:
    """Return the agreement of a lung model with the lung masks of up to 50 images, drawn by `seed`."""
    with_mask = train[train["mask"].notna()].sample(frac=1, random_state=seed).head(50)
    if with_mask.empty:
        return "no lung masks in this data"
    pairs = [Pair(Path(row.path), Path(row.mask), row.patient) for row in with_mask.itertuples()]
    agreement, lines = score_pairs(segmenter, pairs), []
    for name in ("dice", "iou"):
        rng = np.random.default_rng(seed)
        mean = bootstrap_mean(agreement[name].to_numpy(), with_mask["patient"], rng=rng)
        lines.append(f"{name}: {mean} on {len(with_mask)} training images")
    return "\n".join(lines)


def inputs_of(study: Study, augment: Augment) -> str:
    """Return the image size of each network, and the augmentation."""
    sizes = {architecture(name).title: study.training_of(name).image_size for name in study.networks}
    settings = study.augmentation.model_dump()
    augmentation = "none in this study" if augment.views == 1 else settings
    return f"{', '.join(f'{title} {size} px' for title, size in sizes.items())}; augmentation: {augmentation}"


def augmentation_figure(
    study: Study, augment: Augment, xray: np.ndarray, lungs: LungMasking | None
) -> Figure | Markdown:
    """Return an (H, W) X-ray as the networks see it, and nine augmented versions."""
    if augment.views == 1:
        return Markdown("*Networks see every training image as it is.*")
    size = max(study.training_of(name).image_size for name in study.networks)
    original = Preprocessing(size, study.preprocessing.mean, study.preprocessing.std, lungs=lungs).resize(xray)
    draws = augment.draw(9, derived_generator(study.seed, "shown views"))
    augmented = augment(original.expand(9, -1, -1, -1), draws)[:, 0].round().byte().numpy()
    fig = Figure(figsize=(10, 4.4), layout="constrained")
    return draw_augmentations(fig, original[0].numpy(), augmented)


def class_weights(table: XrayTable) -> list[pd.DataFrame | Figure | Markdown]:
    """Return how much each class counts: of several findings the weights in the loss, else how often it is drawn."""
    names = list(table.classes)
    if table.multilabel:
        weights = label_weights(table.targets("train")).T.numpy()
        return [pd.DataFrame(weights, names, ["weight of a negative", "weight of a positive"]).round(3)]
    counts = class_counts(table.subset("train")["label"], len(names)).numpy()
    draws = pd.DataFrame({"as they are": counts, "weighted": counts.sum() / len(names)}, index=names)
    fig = Figure(figsize=(10, 3.4), layout="constrained")
    title = "share of the images drawn (%)"
    shares = 100 * draws / draws.sum()
    plot_utils.plot_bars(shares, fig.subplots(), number="{:.1f}%", title=title, equal_shares=True)
    times = (draws["weighted"] / draws["as they are"]).round(2).to_dict()
    return [Markdown(f"draws of one image an epoch: {times}"), fig]


def probe_labels(table: XrayTable, images: pd.DataFrame) -> tuple[np.ndarray, Sequence[str]]:
    """Return (N,) labels for a probe, and their names: the classes; of several findings whether there is any."""
    if table.multilabel:
        return (images["label"] < len(table.classes)).astype(int).to_numpy(), ("No finding", "any finding")
    return images["label"].to_numpy(), table.classes


def conclusion(table: XrayTable, probes: pd.DataFrame, duplicates: Mapping[str, int]) -> Markdown:
    """Return the lines with which notebook 1 ends; `probes` and `duplicates` as `traps` returns them."""
    shortcuts = [f"{name} (AUC {row.roc_auc:.2f})" for name, row in probes.iterrows() if row.shortcut]
    counts = table.counts().sum(axis=1)[list(table.classes)]
    return Markdown(
        f"- Imbalance: of {len(counts)} {kinds_of(table)} the most frequent has **{counts.max() / counts.min():.1f} "
        f"times** the rarest's images.\n"
        f"- Tells the classes apart without the lungs: **{', '.join(shortcuts) or 'nothing that was tried'}**.\n"
        f"- Images with a near-duplicate in another split: **{duplicates['… in another split']}**."
    )
