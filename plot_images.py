"""The figures that are made of X-rays: `draw_*(fig, data) -> fig` fills a Figure or SubFigure.

Part of `plot_utils`, which says what holds for every figure and from where these are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from textwrap import fill
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from heatmaps import overlay

RIGHT, WRONG = "#006d4e", "#b3380a"  # green and red that also differ in lightness
LESION, LUNG, BOX = "#ffffff", "#56b4e9", "#f0e442"
COLUMNS = 5  # X-rays in a row of a figure 1000 px wide, each large enough to be read


class CamPanel(NamedTuple):
    """What one network made of one image: an (H, W) map in 0..1, the class it predicted and that class's
    probability.

    `image` is the background where it is not the row's (the X-ray with all but the lungs blackened), `title`
    the line over the panel in place of the predicted class (for the map of another class than that).
    """

    map: np.ndarray
    predicted: str
    probability: float
    image: np.ndarray | None = None
    title: str | None = None


class CamRow(NamedTuple):
    """One image of `draw_grad_cams`, a panel a column. Optional are (H, W) masks to outline, and boxes (x, y, width,
    height) as fractions of the image.
    """

    image: np.ndarray
    truth: str
    panels: Mapping[str, CamPanel]
    lesion: np.ndarray | None = None
    lung: np.ndarray | None = None
    boxes: Sequence[tuple[float, float, float, float]] = ()


class CamSample(NamedTuple):
    """One image of `draw_cam_grid`: an (H, W) map in 0..1 of the class `predicted`, with its probability.

    Optional are (H, W) masks to outline, boxes (x, y, width, height) as fractions of the image, and whether
    the prediction is right where that is not the equality of `predicted` and `truth` (several labels).
    """

    image: np.ndarray
    map: np.ndarray
    predicted: str
    truth: str
    probability: float
    lesion: np.ndarray | None = None
    lung: np.ndarray | None = None
    boxes: Sequence[tuple[float, float, float, float]] = ()
    correct: bool | None = None


# Notebook 1: the data


def draw_samples(fig: FigureBase, images: Mapping[str, Sequence[np.ndarray]]) -> FigureBase:
    """Draw a row of images a class, named at its left; `images` holds (H, W) images by class."""
    columns = max(len(row) for row in images.values())
    axes = fig.subplots(len(images), columns, squeeze=False)
    for (name, row), row_axes in zip(images.items(), axes, strict=True):
        _row_label(name, row_axes[0])
        for i, ax in enumerate(row_axes):
            _image(row[i] if i < len(row) else None, ax)
    return fig


def draw_mean_images(fig: FigureBase, means: Mapping[str, np.ndarray]) -> FigureBase:
    """Draw (H, W) mean images by class, five a row, on one grey scale with a bar: the darkest to the
    brightest value of all.
    """
    low = min(mean.min() for mean in means.values())
    high = max(mean.max() for mean in means.values())
    axes = _grid(fig, len(means))
    for (name, mean), ax in zip(means.items(), axes, strict=False):
        _image(mean, ax, low=low, high=high)
        ax.set_title(name, fontsize=11)
    fig.colorbar(axes[0].images[0], ax=axes, label="mean grey value", shrink=0.8, aspect=15, pad=0.01)
    return fig


def draw_augmentations(fig: FigureBase, original: np.ndarray, augmented: Sequence[np.ndarray]) -> FigureBase:
    """Draw the (H, W) original, framed, and its augmented versions after it, five images a row."""
    axes = _grid(fig, 1 + len(augmented))
    for i, (image, ax) in enumerate(zip([original, *augmented], axes, strict=False)):
        _image(image, ax)
        ax.set_title(f"augmented {i}" if i else "original", fontsize=11)
    for spine in axes[0].spines.values():
        spine.set(visible=True, color="0.2", linewidth=1.5)
    return fig


def draw_lung_segmentations(
    fig: FigureBase,
    images: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    reasons: Sequence[str | None],
    seen: Sequence[np.ndarray] | None,
) -> FigureBase:
    """Draw a column an X-ray: the (H, W) image with the outline of its lung mask and, below it, the image that the
    network sees, None where no network of the study sees masked X-rays; in red why a mask is not believed.
    """
    axes = fig.subplots(1 if seen is None else 2, len(images), squeeze=False)
    for label, ax in zip(("lungs found", "what the network sees"), axes[:, 0], strict=False):
        _row_label(label, ax)
    for i, (image, mask, reason, column) in enumerate(zip(images, masks, reasons, axes.T, strict=True)):
        _image(image, column[0])
        _outline(mask, column[0], color=LUNG, style="solid")
        if seen is not None:
            _image(seen[i], column[1])
        if reason is not None:
            words = f"{'not believed' if seen is None else 'kept whole'}: {reason}"
            column[-1].set_xlabel(fill(words, 20), color=WRONG, fontsize=10)
    return fig


# Notebook 3: the results


def draw_grad_cams(fig: FigureBase, rows: Sequence[CamRow]) -> FigureBase:
    """Draw a row an image: the original with its true class, then an overlay a column: a network, a class, a
    method, with and without segmentation, as the panels' names say.

    Over each overlay what the network predicted and how probable, green with ✓ or red with ✗, or the
    panel's own title. Outlines: lesion white, lung blue dashed, box yellow.
    """
    columns = list(rows[0].panels)
    axes = fig.subplots(len(rows), 1 + len(columns), squeeze=False)
    for row, row_axes in zip(rows, axes, strict=True):
        _row_label(row.truth, row_axes[0])
        _image(row.image, row_axes[0])
        row_axes[0].xaxis.set_label_position("top")
        row_axes[0].set_xlabel(" ", fontsize=10)  # holds the place, so that the column titles line up
        for name, ax in zip(columns, row_axes[1:], strict=True):
            panel = row.panels[name]
            _evidence(row.image if panel.image is None else panel.image, panel.map, ax)
            # On top of the panel and under the title, which in the first row names the column.
            ax.xaxis.set_label_position("top")
            if panel.title is not None:
                ax.set_xlabel(panel.title, color="0.2", fontsize=10)
                continue
            correct = panel.predicted == row.truth
            text = _prediction(panel.predicted, panel.probability, correct)
            ax.set_xlabel(text, color=RIGHT if correct else WRONG, fontsize=10)
        for ax in row_axes:
            _outlines(row, ax)
    for title, ax in zip(["original", *columns], axes[0], strict=True):
        ax.set_title(title.replace(", ", ",\n"), fontweight="bold")  # long names would overlap
    _evidence_bar(fig, axes)
    _outline_legend(fig, rows)
    return fig


def draw_cam_grid(fig: FigureBase, groups: Mapping[str, Sequence[CamSample]]) -> FigureBase:
    """Draw a row of overlays a group ("false positive", or a finding), at most five in each.

    Over each overlay what the network predicted and how probable, green with ✓ or red with ✗, and what is
    true. A group without samples says so. Outlines: lesion white, lung blue dashed, box yellow.
    """
    columns = min(max(1, *(len(samples) for samples in groups.values())), COLUMNS)
    axes = fig.subplots(len(groups), columns, squeeze=False)
    for (name, samples), row_axes in zip(groups.items(), axes, strict=True):
        _row_label(name, row_axes[0])
        for ax in row_axes[len(samples) :]:
            _image(None, ax)
        for sample, ax in zip(samples, row_axes, strict=False):
            _cam_sample(sample, ax)
        if not samples:
            row_axes[0].text(
                0.5,
                0.5,
                "none in the\ntest images",
                transform=row_axes[0].transAxes,
                ha="center",
                va="center",
                color="0.35",
                style="italic",
            )
    _evidence_bar(fig, axes)
    _outline_legend(fig, [sample for samples in groups.values() for sample in samples[:columns]])
    return fig


def _cam_sample(sample: CamSample, ax: Axes) -> None:
    _evidence(sample.image, sample.map, ax)
    correct = sample.predicted == sample.truth if sample.correct is None else sample.correct
    said = _prediction(sample.predicted, sample.probability, correct)
    ax.set_title(fill(said, 22), color=RIGHT if correct else WRONG, fontsize=9, pad=3)
    ax.xaxis.set_label_position("top")  # under the title, which makes room for it
    ax.set_xlabel(fill(f"true: {sample.truth}", 22), color="0.2", fontsize=9)
    _outlines(sample, ax)


def _outlines(shown: CamRow | CamSample, ax: Axes) -> None:
    _outline(shown.lung, ax, color=LUNG, style="dashed")
    _outline(shown.lesion, ax, color=LESION, style="solid")
    height, width = shown.image.shape
    for x, y, box_width, box_height in shown.boxes:
        # Pixel centres are at whole numbers: the image begins at -0.5.
        corner = (x * width - 0.5, y * height - 0.5)
        box = Rectangle(
            corner, box_width * width, box_height * height, fill=False, edgecolor=BOX, linewidth=1.3
        )
        box.set_path_effects([withStroke(linewidth=2.8, foreground="black")])
        ax.add_patch(box)


def _prediction(predicted: str, probability: float, correct: bool) -> str:
    return f"{predicted} {probability:.2f} {'✓' if correct else '✗'}"


def _evidence(image: np.ndarray, map_: np.ndarray, ax: Axes) -> None:
    """Draw a map over an image, and say so where the map is empty."""
    _image(overlay(image, map_), ax)
    if not np.any(map_):
        box = {"facecolor": "black", "alpha": 0.6, "linewidth": 0}
        where = {"transform": ax.transAxes, "ha": "center"}
        ax.text(0.5, 0.05, "no positive evidence", **where, color="white", bbox=box, fontsize=9)


def _evidence_bar(fig: FigureBase, axes: np.ndarray) -> None:
    # The bar shows the blended colours, over mid grey: those that the panels show.
    ramp = overlay(np.full((1, 256), 127, np.uint8), np.linspace(0, 1, 256)[None])[0] / 255
    label = "evidence (1 = the map's maximum)"
    fig.colorbar(
        ScalarMappable(cmap=ListedColormap(ramp)), ax=axes, label=label, shrink=0.9, aspect=40, pad=0.02
    )


def _grid(fig: FigureBase, count: int) -> np.ndarray:
    """Return the axes of at least `count` places, five a row; those that are left over stay empty."""
    columns = min(count, COLUMNS)
    axes = fig.subplots(ceil(count / columns), columns, squeeze=False).ravel()
    for ax in axes[count:]:
        _image(None, ax)
    return axes


def _image(image: np.ndarray | None, ax: Axes, *, low: float = 0, high: float = 255) -> None:
    """Draw an image without ticks, grey values from low to high; None leaves the place empty."""
    ax.set(xticks=[], yticks=[], aspect="equal")
    ax.spines[:].set_visible(False)
    if image is not None:
        ax.imshow(image, cmap="gray", vmin=low, vmax=high)


def _row_label(text: str, ax: Axes) -> None:
    broken = text.replace(" ", "\n").replace("_", "_\n")
    ax.set_ylabel(broken, rotation=0, ha="right", va="center", fontsize=11)


def _outline(mask: np.ndarray | None, ax: Axes, *, color: str, style: str) -> None:
    """Draw the edge of an (H, W) mask, closed also where the mask meets the image's edge."""
    if mask is None or not np.any(mask):
        return
    height, width = mask.shape
    padded = np.pad(np.asarray(mask) != 0, 1).astype(float)
    limits = ax.get_xlim(), ax.get_ylim()
    edge = ax.contour(
        np.arange(-1, width + 1),
        np.arange(-1, height + 1),
        padded,
        [0.5],
        colors=color,
        linewidths=1.1,
        linestyles=style,
    )
    edge.set_clip_on(False)
    # Thin lines in light colours, on black rims: seen on bone, on air and on the overlay.
    edge.set_path_effects([withStroke(linewidth=2.4, foreground="black")])
    ax.set(xlim=limits[0], ylim=limits[1])


def _outline_legend(fig: FigureBase, shown: Iterable[CamRow | CamSample]) -> None:
    """Name the outlines that are drawn, if any."""
    shown = list(shown)
    handles = []
    if any(item.lesion is not None for item in shown):
        handles.append(Line2D([], [], color=LESION, label="lesion"))
    if any(item.lung is not None for item in shown):
        handles.append(Line2D([], [], color=LUNG, linestyle="--", label="lung"))
    if any(len(item.boxes) for item in shown):
        handles.append(Line2D([], [], color=BOX, label="annotated box"))
    if handles:
        where = {"loc": "outside lower center", "ncols": 3}
        fig.legend(
            handles=handles, **where, facecolor="0.3", framealpha=1, edgecolor="none", labelcolor="white"
        )
