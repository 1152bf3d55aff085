"""Every figure of the project: `plot_*(data, ax) -> ax` draws one panel, `draw_*(fig, data) -> fig` fills a
Figure or SubFigure.

Arrays and tables in, nothing shown, saved or set globally. Give figures `layout="constrained"`, which makes
room for labels. Images are (H, W) grey, 0 (black) to 255 (white). Titles are the caller's: only the caller
knows whether the data are synthetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import FigureBase
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter

from grad_cam import overlay

MARKERS = "osD^vPX*"  # beside the colours, for prints without them
SMALL = 8.5  # points; the smallest print that is readable in a notebook 1000 px wide
RIGHT, WRONG = "#006d4e", "#b3380a"  # green and red that also differ in lightness
LESION, LUNG = "#ffffff", "#56b4e9"


class CamPanel(NamedTuple):
    """What one network made of one image: an (H, W) map in 0..1, the class it predicted and that class's
    probability.
    """

    map: np.ndarray
    predicted: str
    probability: float


class CamRow(NamedTuple):
    """One image of `draw_grad_cams`, a panel a network, and optional (H, W) masks to outline."""

    image: np.ndarray
    truth: str
    panels: Mapping[str, CamPanel]
    lesion: np.ndarray | None = None
    lung: np.ndarray | None = None


def palette(names: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """Return a colour-blind-safe colour a name, by position: the same list of names gets the same colours in
    every figure.
    """
    return dict(zip(names, sns.color_palette("colorblind", len(names)), strict=True))


# Notebook 1: the data


def plot_class_counts(counts: pd.DataFrame, ax: Axes) -> Axes:
    """Draw grouped bars with their numbers: `counts` has a row a class, a column a split."""
    _grouped_bars(counts, ax, label="{:,.0f}")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.set_ylabel("images")
    _legend_beside(ax)
    return ax


def plot_draws(draws: pd.DataFrame, ax: Axes) -> Axes:
    """Draw how often each class is drawn: a row a class, a column a way of sampling, entries counts, shown as
    shares of the column.
    """
    _grouped_bars(100 * draws / draws.sum(), ax, label="{:.1f}%")
    ax.axhline(100 / len(draws), color="0.3", linestyle="--", linewidth=1, label="equal shares", zorder=3)
    _legend_beside(ax, last="equal shares")
    ax.set_ylabel("share of the images drawn")
    ax.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    return ax


def plot_image_sizes(sizes: pd.DataFrame, ax: Axes) -> Axes:
    """Draw width against height: `sizes` has a row an image, columns width, height, class; a marker's area is
    its number of images.
    """
    counts = sizes.groupby(["class", "width", "height"], sort=False).size()
    classes = list(dict.fromkeys(sizes["class"]))
    for (name, color), marker in zip(palette(classes).items(), cycle(MARKERS), strict=False):
        own = counts[name]
        width, height = own.index.get_level_values("width"), own.index.get_level_values("height")
        areas = np.maximum(500 * own.to_numpy() / counts.max(), 12)
        label = f"{name}: {own.sum():,} images, {len(own):,} size{'s' * (len(own) > 1)}"
        # Hollow, each class with a shape of its own: where all images are of one size, all classes remain
        # visible.
        ax.scatter(
            width, height, s=areas, marker=marker, facecolor=(*color, 0.12), edgecolor=color, label=label
        )
    reach = 1.15 * sizes[["width", "height"]].max()
    ax.axline((0, 0), slope=1, color="0.6", linestyle=":", linewidth=1, zorder=0, label="square")
    ax.set(
        xlim=(0, reach["width"]), ylim=(0, reach["height"]), xlabel="width (pixels)", ylabel="height (pixels)"
    )
    legend = _legend_beside(ax, title="marker area: number of images", last="square")
    for handle in legend.legend_handles[:-1]:
        handle.set_sizes([40])
    return ax


def plot_intensities(histograms: Mapping[str, np.ndarray], edges: np.ndarray, ax: Axes) -> Axes:
    """Draw, a class, the mean over images of (N, B) grey-value densities, with the inter-quartile band;
    `edges` are (B + 1,).
    """
    centres = (edges[:-1] + edges[1:]) / 2
    for (name, color), style in zip(
        palette(list(histograms)).items(), cycle(["-", "--", "-.", ":"]), strict=False
    ):
        densities = np.asarray(histograms[name])
        low, high = np.percentile(densities, [25, 75], axis=0)
        ax.fill_between(centres, low, high, color=color, alpha=0.15, linewidth=0)
        ax.plot(centres, densities.mean(axis=0), style, color=color, label=f"{name} (n = {len(densities):,})")
    ax.set(xlabel="grey value (0 = black, 255 = white)", ylabel="density", xlim=(edges[0], edges[-1]))
    ax.set_ylim(bottom=0)
    _legend_beside(ax, title="line: mean\nband: middle half of images")
    return ax


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
    """Draw (H, W) mean images by class side by side, on one grey scale with a bar: the darkest to the
    brightest value of all.
    """
    low = min(mean.min() for mean in means.values())
    high = max(mean.max() for mean in means.values())
    axes = fig.subplots(1, len(means), squeeze=False)[0]
    for (name, mean), ax in zip(means.items(), axes, strict=True):
        _image(mean, ax, low=low, high=high)
        ax.set_title(name)
    fig.colorbar(axes[0].images[0], ax=axes, label="mean grey value", shrink=0.8, aspect=15, pad=0.01)
    return fig


def draw_augmentations(
    fig: FigureBase, originals: Sequence[np.ndarray], augmented: Sequence[Sequence[np.ndarray]]
) -> FigureBase:
    """Draw a row an image: the (H, W) original at the left, then its K augmented versions."""
    columns = max(len(row) for row in augmented)
    axes = fig.subplots(len(originals), 1 + columns, squeeze=False)
    for original, versions, row_axes in zip(originals, augmented, axes, strict=True):
        for i, ax in enumerate(row_axes[1:]):
            _image(versions[i] if i < len(versions) else None, ax)
        _image(original, row_axes[0])
        for spine in row_axes[0].spines.values():
            spine.set(visible=True, color="0.2", linewidth=1.5)
    axes[0, 0].set_title("original")
    for i, ax in enumerate(axes[0, 1:], start=1):
        ax.set_title(f"augmented {i}")
    return fig


# Notebook 2: the training


def draw_learning_curves(
    fig: FigureBase,
    histories: Mapping[str, pd.DataFrame],
    *,
    score: str = "accuracy",
    best_by: str = "val_loss",
) -> FigureBase:
    """Draw loss (left) and `score` (right) by epoch, a colour a network, training dashed, validation solid.

    Histories have columns epoch, train_loss, val_loss, train_<score>, val_<score>. The star marks each
    network's best epoch: the first with the highest `best_by`, or the lowest if that is a loss.
    """
    axes = fig.subplots(1, 2)
    colors = palette(list(histories))
    for name, history in histories.items():
        column = history[best_by]
        best = history.loc[column.idxmin() if best_by.endswith("loss") else column.idxmax()]
        for ax, figure in zip(axes, ("loss", score), strict=True):
            ax.plot(history["epoch"], history[f"train_{figure}"], "--", color=colors[name], linewidth=1.2)
            ax.plot(
                history["epoch"], history[f"val_{figure}"], "-", color=colors[name], linewidth=2, label=name
            )
            ax.plot(
                best["epoch"],
                best[f"val_{figure}"],
                "*",
                color=colors[name],
                markersize=15,
                markeredgecolor="black",
            )
    for ax, label in zip(axes, ("loss (cross-entropy)", score), strict=True):
        ax.set(xlabel="epoch", ylabel=label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.3)
    handles = [Line2D([], [], color=color, linewidth=2, label=name) for name, color in colors.items()]
    handles += [
        Line2D([], [], color="0.3", linestyle="--", linewidth=1.2, label="training"),
        Line2D([], [], color="0.3", linewidth=2, label="validation"),
        Line2D(
            [],
            [],
            color="0.8",
            marker="*",
            markersize=13,
            markeredgecolor="black",
            linestyle="",
            label="best epoch",
        ),
    ]
    # Under the panels: inside, it would hide the curves' ends.
    fig.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False)
    return fig


# Notebook 3: the results


def plot_confusion(counts: np.ndarray, classes: Sequence[str], ax: Axes) -> Axes:
    """Draw (C, C) counts, row = true class, column = predicted; in small print and as shade, the share of the
    row (of the true class).
    """
    counts = np.asarray(counts)
    support = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, support, out=np.zeros(counts.shape), where=support > 0)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if share[row, column] > 0.55 else "black"
        percent = f"{share[row, column]:.1%}" if support[row, 0] else "–"
        for text, size, rise in ((f"{count}", 12, 5), (percent, SMALL, -10)):
            ax.annotate(
                text,
                (column, row),
                xytext=(0, rise),
                textcoords="offset points",
                ha="center",
                va="center",
                color=color,
                fontsize=size,
            )
    ticks = np.arange(len(classes))
    # Broken at blanks, so that long names need neither slant nor small print.
    ax.set_xticks(ticks, [name.replace(" ", "\n") for name in classes])
    ax.set_yticks(ticks, [f"{name}\n(n = {n})" for name, n in zip(classes, support[:, 0], strict=True)])
    ax.set_xticks(ticks[:-1] + 0.5, minor=True)
    ax.set_yticks(ticks[:-1] + 0.5, minor=True)
    ax.grid(which="minor", color="0.85", linewidth=0.8)
    ax.tick_params(which="both", length=0)
    ax.set(xlabel="predicted class", ylabel="true class")
    return ax


def plot_roc(curves: Mapping[str, tuple[np.ndarray, np.ndarray, float]], ax: Axes) -> Axes:
    """Draw (false positive rate, true positive rate, area) by class, with the diagonal of chance."""
    ax.plot([0, 1], [0, 1], color="0.5", linestyle=":", linewidth=1, label="chance (0.500)", zorder=1)
    for (name, color), style in zip(
        palette(list(curves)).items(), cycle(["-", "--", "-.", (0, (1, 1))]), strict=False
    ):
        false_positive_rate, true_positive_rate, area = curves[name]
        label = f"{name} (no images)" if np.isnan(area) else f"{name} ({area:.3f})"
        ax.plot(
            false_positive_rate, true_positive_rate, color=color, linestyle=style, linewidth=2, label=label
        )
    ax.set(
        xlim=(-0.01, 1.01),
        ylim=(-0.01, 1.01),
        aspect="equal",
        xlabel="false positive rate (1 − specificity)",
        ylabel="true positive rate (recall)",
    )
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(
        handles[1:] + handles[:1],
        labels[1:] + labels[:1],
        title="class (area)",
        loc="lower right",
        framealpha=0.9,
    )
    return ax


def plot_comparison(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw dots with whiskers from low to high: `table` has columns network, metric, estimate, low, high.

    Metrics from top to bottom and networks within them, in the table's order. NaN ends: a dot without
    whiskers.
    """
    metrics, networks = (list(dict.fromkeys(table[column])) for column in ("metric", "network"))
    step = 0.7 / len(networks)
    for i, (name, color) in enumerate(palette(networks).items()):
        own = table[table["network"] == name]
        y = (
            np.array([metrics.index(metric) for metric in own["metric"]])
            + (i - (len(networks) - 1) / 2) * step
        )
        # A percentile interval may, rarely, lie beside its estimate: no negative whiskers.
        reach = np.maximum([own["estimate"] - own["low"], own["high"] - own["estimate"]], 0)
        marker = MARKERS[i % len(MARKERS)]
        ax.errorbar(
            own["estimate"], y, xerr=reach, fmt=marker, color=color, capsize=3, markersize=6, label=name
        )
        for at, estimate, high in zip(y, own["estimate"], own["high"], strict=True):
            ax.annotate(
                f"{estimate:.3f}",
                (np.nanmax([estimate, high]), at),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=SMALL,
            )
    for between in range(1, len(metrics)):
        ax.axhline(between - 0.5, color="0.85", linewidth=0.8)
    ax.set_yticks(range(len(metrics)), [metric.replace("_", " ") for metric in metrics])
    ax.set_ylim(len(metrics) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", alpha=0.3)
    ax.margins(x=0.12)
    ax.set_xlabel("score (marker) and its interval (whiskers)")
    _legend_beside(ax)
    return ax


def plot_reliability(tables: Mapping[str, pd.DataFrame], ax: Axes) -> Axes:
    """Draw accuracy against confidence: by name, tables with columns confidence, accuracy, count; a marker's
    area is its share of images.

    Below the diagonal a network is over-confident.
    """
    ax.plot([0, 1], [0, 1], color="0.5", linestyle=":", linewidth=1, zorder=1)
    ax.annotate("over-confident", (0.97, 0.04), ha="right", color="0.35", style="italic")
    ax.annotate("under-confident", (0.03, 0.93), ha="left", color="0.35", style="italic")
    for (name, color), marker in zip(palette(list(tables)).items(), cycle(MARKERS), strict=False):
        filled = tables[name][tables[name]["count"] > 0]
        areas = np.maximum(250 * filled["count"] / filled["count"].sum(), 10)
        ax.plot(filled["confidence"], filled["accuracy"], color=color, linewidth=1.5)
        ax.scatter(
            filled["confidence"],
            filled["accuracy"],
            s=areas,
            marker=marker,
            color=color,
            alpha=0.65,
            label=name,
        )
    ax.set(xlim=(0, 1.04), ylim=(0, 1.04), aspect="equal")
    ax.set(
        xlabel="confidence (probability of the predicted class)", ylabel="accuracy (share of them correct)"
    )
    legend = _legend_beside(ax, title="marker area: share of images")
    for handle in legend.legend_handles:
        handle.set_sizes([45])
    return ax


def draw_grad_cams(fig: FigureBase, rows: Sequence[CamRow]) -> FigureBase:
    """Draw a row an image: the original with its true class, then a network's overlay a column.

    Over each overlay what the network predicted and how probable, green with ✓ or red with ✗. Outlines:
    lesion white, lung blue dashed.
    """
    networks = list(rows[0].panels)
    axes = fig.subplots(len(rows), 1 + len(networks), squeeze=False)
    for row, row_axes in zip(rows, axes, strict=True):
        _row_label(row.truth, row_axes[0])
        _image(row.image, row_axes[0])
        row_axes[0].xaxis.set_label_position("top")
        row_axes[0].set_xlabel(" ", fontsize=10)  # holds the place, so that the column titles line up
        for name, ax in zip(networks, row_axes[1:], strict=True):
            panel = row.panels[name]
            _image(overlay(row.image, panel.map), ax)
            correct = panel.predicted == row.truth
            text = f"{panel.predicted} {panel.probability:.2f} {'✓' if correct else '✗'}"
            # On top of the panel and under the title, which in the first row names the network.
            ax.xaxis.set_label_position("top")
            ax.set_xlabel(text, color=RIGHT if correct else WRONG, fontsize=10)
            if not np.any(panel.map):
                box = {"facecolor": "black", "alpha": 0.6, "linewidth": 0}
                ax.text(
                    0.5,
                    0.05,
                    "no positive evidence",
                    transform=ax.transAxes,
                    ha="center",
                    color="white",
                    bbox=box,
                )
        for ax in row_axes:
            _outline(row.lung, ax, color=LUNG, style="dashed")
            _outline(row.lesion, ax, color=LESION, style="solid")
    for title, ax in zip(["original", *networks], axes[0], strict=True):
        ax.set_title(title, fontweight="bold")
    # The bar shows the blended colours, over mid grey: those that the panels show.
    ramp = overlay(np.full((1, 256), 127, np.uint8), np.linspace(0, 1, 256)[None])[0] / 255
    label = "Grad-CAM (1 = the map's maximum)"
    fig.colorbar(
        ScalarMappable(cmap=ListedColormap(ramp)), ax=axes, label=label, shrink=0.9, aspect=40, pad=0.02
    )
    _outline_legend(fig, rows)
    return fig


def _grouped_bars(table: pd.DataFrame, ax: Axes, *, label: str) -> None:
    """Draw a group a row and a bar a column, each with its number."""
    width = 0.84 / len(table.columns)
    for i, (name, color) in enumerate(palette(list(table.columns)).items()):
        x = np.arange(len(table)) + (i - (len(table.columns) - 1) / 2) * width
        bars = ax.bar(x, table[name], width=0.94 * width, color=color, label=name)
        ax.bar_label(bars, labels=[label.format(value) for value in table[name]], padding=2, fontsize=SMALL)
    ax.set_xticks(range(len(table)), table.index)
    ax.tick_params(axis="x", length=0)
    ax.margins(y=0.12)
    ax.spines[["top", "right"]].set_visible(False)


def _image(image: np.ndarray | None, ax: Axes, *, low: float = 0, high: float = 255) -> None:
    """Draw an image without ticks, grey values from low to high; None leaves the place empty."""
    ax.set(xticks=[], yticks=[], aspect="equal")
    ax.spines[:].set_visible(False)
    if image is not None:
        ax.imshow(image, cmap="gray", vmin=low, vmax=high)


def _row_label(text: str, ax: Axes) -> None:
    ax.set_ylabel(text.replace(" ", "\n"), rotation=0, ha="right", va="center", fontsize=11)


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


def _outline_legend(fig: FigureBase, rows: Sequence[CamRow]) -> None:
    """Name the outlines that are drawn, if any."""
    handles = []
    if any(row.lesion is not None for row in rows):
        handles.append(Line2D([], [], color=LESION, label="lesion"))
    if any(row.lung is not None for row in rows):
        handles.append(Line2D([], [], color=LUNG, linestyle="--", label="lung"))
    if handles:
        where = {"loc": "outside lower center", "ncols": 2}
        fig.legend(
            handles=handles, **where, facecolor="0.3", framealpha=1, edgecolor="none", labelcolor="white"
        )


def _legend_beside(ax: Axes, *, title: str | None = None, last: str | None = None) -> Legend:
    """Name what is drawn to the right of the axes, where no data can lie under it; the label `last` comes
    last.
    """
    handles, labels = ax.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] == last)
    return ax.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        title=title,
        alignment="left",
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
    )
