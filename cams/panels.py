"""Panels of X-rays: `draw_*(fig, data) -> fig` fills a Figure or SubFigure.

Images are (H, W) grey, 0 (black) to 255 (white). Figures need `layout="constrained"`, which makes room for labels, and
1.8 inch for each row of X-rays. The caller sets the titles: only the caller knows whether the data are synthetic.
"""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
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

from cams.heatmaps import overlay

RIGHT, WRONG = "#006d4e", "#b3380a"  # green and red that also differ in lightness
MARKS = {True: (" ✓", RIGHT), False: (" ✗", WRONG), None: ("", "0.2")}
LESION, LUNG, BOX = "#ffffff", "#56b4e9", "#f0e442"
COLUMNS = 5  # X-rays in a row: each is large enough in a figure 1000 px wide
Images = Sequence[np.ndarray]  # each (H, W)


class CamPanel(NamedTuple):
    """A map of one X-ray for one class, and the text above it.

    Attributes:
        map: (H, W) in 0..1.
        predicted: the name of the class.
        probability: its probability; NaN if the network does not report it.
        correct: whether the prediction is right; None if the class is not predicted, or not reported.
        image: (H, W) background, such as the X-ray with only the lungs visible; None for the image of the row.
    """

    map: np.ndarray
    predicted: str
    probability: float
    correct: bool | None
    image: np.ndarray | None = None


class CamRow(NamedTuple):
    """One X-ray with its maps.

    Attributes:
        image: (H, W) grey values.
        truth: its true class, or its findings.
        panels: maps of several networks, classes or methods, by name.
        lesion: (H, W) mask to outline, or None.
        lung: (H, W) mask to outline, or None.
        boxes: x, y, width, height of boxes to outline, as fractions of the image.
    """

    image: np.ndarray
    truth: str
    panels: Mapping[str, CamPanel]
    lesion: np.ndarray | None = None
    lung: np.ndarray | None = None
    boxes: Sequence[tuple[float, float, float, float]] = ()


# Notebook 1: the data


def draw_samples(fig: FigureBase, images: Mapping[str, Images]) -> FigureBase:
    """Draw a row of (H, W) images for each class, with its name at the left."""
    axes = fig.subplots(len(images), max(map(len, images.values())), squeeze=False)
    for (name, row), row_axes in zip(images.items(), axes, strict=True):
        _row_label(name, row_axes[0])
        for image, ax in zip_longest(row, row_axes):
            _image(image, ax)
    return fig


def draw_mean_images(fig: FigureBase, means: Mapping[str, np.ndarray]) -> FigureBase:
    """Draw the (H, W) mean image of each class, five in a row, all on one grey scale from darkest to brightest."""
    low, high = np.min(list(means.values())), np.max(list(means.values()))
    axes = _grid(fig, means)
    for ax in axes[: len(means)]:
        ax.images[0].set_clim(low, high)
    fig.colorbar(axes[0].images[0], ax=axes, label="mean grey value", shrink=0.8, aspect=15, pad=0.01)
    return fig


def draw_augmentations(fig: FigureBase, original: np.ndarray, augmented: Images) -> FigureBase:
    """Draw the (H, W) original in a frame, then its augmented versions, five images in a row."""
    axes = _grid(fig, {"original": original} | {f"augmented {i}": image for i, image in enumerate(augmented, start=1)})
    axes[0].spines[:].set(visible=True, color="0.2", linewidth=1.5)
    return fig


def draw_lung_segmentations(
    fig: FigureBase, images: Images, masks: Images, reasons: Sequence[str | None], seen: Images | None
) -> FigureBase:
    """Draw a column for each X-ray: the outlined lungs and, below, what the network sees.

    Args:
        fig: Figure or SubFigure to fill.
        images: (H, W) X-rays.
        masks: their (H, W) lung masks, drawn as outlines.
        reasons: for each mask, why it is not believed (written in red), or None.
        seen: what the networks see, (H, W) each; None if the study does not mask X-rays.
    """
    axes = fig.subplots(1 if seen is None else 2, len(images), squeeze=False)
    for label, ax in zip(("lungs found", "what the network sees"), axes[:, 0], strict=False):
        _row_label(label, ax)
    for image, mask, ax in zip(images, masks, axes[0], strict=True):
        _image(image, ax)
        _outline(mask, ax, color=LUNG, style="solid")
    for image, ax in zip(seen or (), axes[-1], strict=False):
        _image(image, ax)
    for reason, ax in zip(reasons, axes[-1], strict=True):
        if reason is not None:
            words = f"{'not believed' if seen is None else 'kept whole'}: {reason}"
            ax.set_xlabel(fill(words, 20), color=WRONG, fontsize=10)
    return fig


# Notebook 3: the results


def draw_grad_cams(fig: FigureBase, rows: Sequence[CamRow]) -> FigureBase:
    """Draw a row for each X-ray: the original with its true class, then an overlay for each of its maps.

    Above each overlay stands the predicted class with its probability, green with ✓ or red with ✗. Outlines: the lesion
    is white, the lung dashed blue, a box yellow.
    """
    columns = list(rows[0].panels)
    axes = fig.subplots(len(rows), 1 + len(columns), squeeze=False)
    for row, row_axes in zip(rows, axes, strict=True):
        _row_label(row.truth, row_axes[0])
        _image(row.image, row_axes[0])
        _outlines(row, row_axes[0])
        _label_on_top(" ", "0.2", row_axes[0])  # keeps the column titles on one line
        for name, ax in zip(columns, row_axes[1:], strict=True):
            _overlay(row, row.panels[name], ax)
            _label_on_top(*_prediction(row.panels[name]), ax)
    for title, ax in zip(["original", *columns], axes[0], strict=True):
        ax.set_title(title.replace(", ", ",\n"), fontweight="bold")  # a long name gets two lines
    return _with_legends(fig, axes, rows)


def draw_cam_grid(fig: FigureBase, groups: Mapping[str, Sequence[CamRow]]) -> FigureBase:
    """Draw a row of overlays for each group ("false positive", or a finding). Each X-ray has one map.

    Above each overlay stands the predicted class with its probability, green with ✓ or red with ✗, and the truth. An
    empty group says "none in the test images". Outlines: the lesion is white, the lung dashed blue, a box yellow.
    """
    axes = fig.subplots(len(groups), max(1, *map(len, groups.values())), squeeze=False)
    for (name, rows), row_axes in zip(groups.items(), axes, strict=True):
        _row_label(name, row_axes[0])
        for ax in row_axes[len(rows) :]:
            _image(None, ax)
        for row, ax in zip(rows, row_axes, strict=False):
            (panel,) = row.panels.values()
            _overlay(row, panel, ax)
            prediction, color = _prediction(panel)
            ax.set_title(fill(prediction, 22), color=color, fontsize=9, pad=3)
            _label_on_top(fill(f"true: {row.truth}", 22), "0.2", ax, fontsize=9)
        if not rows:
            place = {"transform": row_axes[0].transAxes, "ha": "center", "va": "center"}
            row_axes[0].text(0.5, 0.5, "none in the\ntest images", **place, color="0.35", style="italic")
    return _with_legends(fig, axes, [row for rows in groups.values() for row in rows])


def _overlay(row: CamRow, panel: CamPanel, ax: Axes) -> None:
    """Draw a map over its image, with all outlines. Write "no positive evidence" on an empty map."""
    _image(overlay(row.image if panel.image is None else panel.image, panel.map), ax)
    _outlines(row, ax)
    if not np.any(panel.map):
        box = {"facecolor": "black", "alpha": 0.6, "linewidth": 0}
        ax.text(0.5, 0.05, "no positive evidence", ha="center", color="white", bbox=box, size=9, transform=ax.transAxes)


def _prediction(panel: CamPanel) -> tuple[str, str]:
    """Return the prediction as text, and its colour."""
    probability = "–" if np.isnan(panel.probability) else f"{panel.probability:.2f}"
    mark, color = MARKS[panel.correct]
    return f"{panel.predicted} {probability}{mark}", color


def _label_on_top(text: str, color: str, ax: Axes, *, fontsize: float = 10) -> None:
    """Write a line above a panel, below its title."""
    ax.xaxis.set_label_position("top")
    ax.set_xlabel(text, color=color, fontsize=fontsize)


def _outlines(row: CamRow, ax: Axes) -> None:
    """Draw the outlines of the masks and boxes of an X-ray."""
    _outline(row.lung, ax, color=LUNG, style="dashed")
    _outline(row.lesion, ax, color=LESION, style="solid")
    height, width = row.image.shape
    for x, y, box_width, box_height in row.boxes:
        # The centre of the first pixel is at 0, so the image begins at -0.5.
        corner, size = (x * width - 0.5, y * height - 0.5), (box_width * width, box_height * height)
        box = Rectangle(corner, *size, fill=False, edgecolor=BOX, linewidth=1.3)
        box.set_path_effects([withStroke(linewidth=2.8, foreground="black")])
        ax.add_patch(box)


def _with_legends(fig: FigureBase, axes: np.ndarray, rows: Sequence[CamRow]) -> FigureBase:
    """Add the colour bar of the maps, and name the outlines that are drawn, if any."""
    # The colours are blended with grey, as in the panels.
    ramp = overlay(np.full((1, 256), 127, np.uint8), np.linspace(0, 1, 256)[None])[0] / 255
    label = "evidence (1 = the map's maximum)"
    fig.colorbar(ScalarMappable(cmap=ListedColormap(ramp)), ax=axes, label=label, shrink=0.9, aspect=40, pad=0.02)
    outlines = [
        (any(row.lesion is not None for row in rows), Line2D([], [], color=LESION, label="lesion")),
        (any(row.lung is not None for row in rows), Line2D([], [], color=LUNG, linestyle="--", label="lung")),
        (any(len(row.boxes) for row in rows), Line2D([], [], color=BOX, label="annotated box")),
    ]
    handles = [handle for is_drawn, handle in outlines if is_drawn]
    if handles:
        look = {"facecolor": "0.3", "framealpha": 1, "edgecolor": "none", "labelcolor": "white"}
        fig.legend(handles=handles, loc="outside lower center", ncols=3, **look)
    return fig


def _grid(fig: FigureBase, images: Mapping[str, np.ndarray]) -> np.ndarray:
    """Draw named (H, W) images, five a row, and return their axes. Places after the last image stay empty."""
    columns = min(len(images), COLUMNS)
    axes = fig.subplots(ceil(len(images) / columns), columns, squeeze=False).ravel()
    for (name, image), ax in zip_longest(images.items(), axes, fillvalue=("", None)):
        _image(image, ax)
        ax.set_title(name, fontsize=11)
    return axes


def _image(image: np.ndarray | None, ax: Axes) -> None:
    """Draw an image without ticks, grey values from 0 to 255; None leaves the place empty."""
    ax.set(xticks=[], yticks=[], aspect="equal")
    ax.spines[:].set_visible(False)
    if image is not None:
        ax.imshow(image, cmap="gray", vmin=0, vmax=255)


def _row_label(text: str, ax: Axes) -> None:
    ax.set_ylabel(text.replace(" ", "\n").replace("_", "_\n"), rotation=0, ha="right", va="center", fontsize=11)


def _outline(mask: np.ndarray | None, ax: Axes, *, color: str, style: str) -> None:
    """Draw the closed outline of an (H, W) mask, also along the border of the image."""
    if mask is None or not np.any(mask):
        return
    height, width = mask.shape
    padded = np.pad(np.asarray(mask) != 0, 1).astype(float)
    ax.autoscale(False)  # the padding stays outside
    look = {"colors": color, "linewidths": 1.1, "linestyles": style}
    edge = ax.contour(np.arange(-1, width + 1), np.arange(-1, height + 1), padded, [0.5], **look)
    edge.set_clip_on(False)
    # A black rim makes the thin light line visible on bone, on air and on the overlay.
    edge.set_path_effects([withStroke(linewidth=2.4, foreground="black")])
