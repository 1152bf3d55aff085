"""Every figure of the project: `plot_*(data, ax) -> ax` draws one panel, `draw_*(fig, data) -> fig` fills a
Figure or SubFigure. Those made of X-rays are written in `plot_images` and used from here.

Arrays and tables in, nothing shown, saved or set globally. Give figures `layout="constrained"`, which makes
room for labels, and a height that fits what is in them: 0.2 inch a bar or dot, 1.8 inch a row of X-rays.
Images are (H, W) grey, 0 (black) to 255 (white). Titles are the caller's: only the caller knows whether the
data are synthetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import FigureBase
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from metrics import MACRO
from plot_images import (
    RIGHT,
    WRONG,
    CamPanel,
    CamRow,
    CamSample,
    draw_augmentations,
    draw_cam_grid,
    draw_grad_cams,
    draw_lung_segmentations,
    draw_mean_images,
    draw_samples,
)

__all__ = [
    "RIGHT",
    "WRONG",
    "CamPanel",
    "CamRow",
    "CamSample",
    "draw_augmentations",
    "draw_cam_grid",
    "draw_grad_cams",
    "draw_learning_curves",
    "draw_lung_segmentations",
    "draw_mean_images",
    "draw_samples",
    "draw_score_and_minutes",
    "palette",
    "plot_auc_by_label",
    "plot_class_counts",
    "plot_comparison",
    "plot_confusion",
    "plot_draws",
    "plot_embedding",
    "plot_image_sizes",
    "plot_intensities",
    "plot_randomisation",
    "plot_reliability",
    "plot_roc",
    "plot_seeds",
    "plot_threshold_tradeoff",
]

MARKERS = "osD^vPX<"  # beside the colours, for prints without them
LINES = ("-", "--", "-.", (0, (1, 1)))
SMALL = 8.5  # points; the smallest print that is readable in a notebook 1000 px wide
FEW = 5  # classes whose names fit side by side under a panel, and whose lines stay apart in it
FEW_IMAGES = 10  # in a bin: the share of so few that are right says nothing of a network
PHASE = {"color": "0.25", "linewidth": 1.0, "linestyle": (0, (1, 2))}  # the line at a change of phase
# Seaborn's colour-blind-safe colours without its light pink and yellow, too pale for lines on white; in their
# place two dark ones of Paul Tol's "muted" (SRON technical note EPS 09-002).
COLORS = [sns.color_palette("colorblind")[i] for i in (0, 1, 2, 3, 4, 5, 9, 7)]
COLORS += sns.color_palette(["#332288", "#882255"])


def palette(names: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """Return a colour-blind-safe colour a name, by position: the same list of names gets the same colours in
    every figure. From the eleventh on they repeat: lines and markers then differ (`_styles`).
    """
    return dict(zip(names, sns.color_palette(COLORS, len(names)), strict=True))


class _Style(NamedTuple):
    color: tuple[float, float, float]
    line: str | tuple
    marker: str


def _styles(names: Sequence[str]) -> dict[str, _Style]:
    """Return a colour, a kind of line and a marker a name, by position; among 40 names no two have the same
    colour and line, nor the same colour and marker.
    """
    return {
        name: _Style(color, LINES[(i + i // len(COLORS)) % len(LINES)], MARKERS[i % len(MARKERS)])
        for i, (name, color) in enumerate(palette(names).items())
    }


# Notebook 1: the data


def plot_class_counts(counts: pd.DataFrame, ax: Axes) -> Axes:
    """Draw grouped bars with their numbers: `counts` has a row a class, a column a split. Bars lie down where
    there are many classes.
    """
    value_axis = _grouped_bars(counts, ax, label="{:,.0f}", title="images")
    value_axis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    value_axis.set_major_formatter("{x:,.0f}")
    _legend_beside(ax)
    return ax


def plot_draws(draws: pd.DataFrame, ax: Axes) -> Axes:
    """Draw how often each class is drawn: a row a class, a column a way of sampling, entries counts, shown as
    shares of the column. Bars lie down where there are many classes.
    """
    value_axis = _grouped_bars(
        100 * draws / draws.sum(), ax, label="{:.1f}%", title="share of the images drawn"
    )
    line = ax.axhline if value_axis is ax.yaxis else ax.axvline
    line(100 / len(draws), color="0.3", linestyle="--", linewidth=1, label="equal shares", zorder=3)
    _legend_beside(ax, last="equal shares")
    value_axis.set_major_formatter(PercentFormatter(decimals=0))
    return ax


def plot_image_sizes(sizes: pd.DataFrame, ax: Axes) -> Axes:
    """Draw width against height: `sizes` has a row an image, columns width, height, class; a marker's area is
    its number of images.
    """
    counts = sizes.groupby(["class", "width", "height"], sort=False).size()
    classes = list(dict.fromkeys(sizes["class"]))
    for name, style in _styles(classes).items():
        own = counts[name]
        width, height = own.index.get_level_values("width"), own.index.get_level_values("height")
        areas = np.maximum(500 * own.to_numpy() / counts.max(), 12)
        label = f"{name}: {own.sum():,} images, {len(own):,} size{'s' * (len(own) > 1)}"
        # Hollow, each class with a shape of its own: where all images are of one size, all classes remain
        # visible.
        ax.scatter(
            width,
            height,
            s=areas,
            marker=style.marker,
            facecolor=(*style.color, 0.12),
            edgecolor=style.color,
            label=label,
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
    """Draw, a class, the mean over images of (N, B) grey-value densities, up to five classes with the
    inter-quartile band; `edges` are (B + 1,).
    """
    centres = (edges[:-1] + edges[1:]) / 2
    many = len(histograms) > FEW
    for name, style in _styles(list(histograms)).items():
        densities = np.asarray(histograms[name])
        if not many:
            low, high = np.percentile(densities, [25, 75], axis=0)
            ax.fill_between(centres, low, high, color=style.color, alpha=0.15, linewidth=0)
        label = f"{name} (n = {len(densities):,})"
        ax.plot(centres, densities.mean(axis=0), color=style.color, linestyle=style.line, label=label)
    ax.set(xlabel="grey value (0 = black, 255 = white)", ylabel="density", xlim=(edges[0], edges[-1]))
    ax.set_ylim(bottom=0)
    _legend_beside(ax, title="line: mean" if many else "line: mean\nband: middle half of images")
    return ax


# Notebook 2: the training


def draw_learning_curves(
    fig: FigureBase,
    histories: Mapping[str, pd.DataFrame],
    *,
    best_epochs: Mapping[str, int],
    score: str = "accuracy",
) -> FigureBase:
    """Draw loss (left) and `score`, "accuracy" or "auc" (right), by epoch, a colour a network, training
    dashed, validation solid.

    Histories have columns epoch, train_loss, val_loss, train_<score>, val_<score>. The star marks the epoch
    whose weights were kept, `best_epochs` by network. Where a `phase` column changes, a thin vertical line
    stands between the epochs.
    """
    axes = fig.subplots(1, 2)
    titles = {"accuracy": "accuracy", "auc": "mean area under the ROC curve"}
    for ax, figure, title in zip(axes, ("loss", score), ("loss", titles[score]), strict=True):
        for name, color in palette(list(histories)).items():
            _learning_curve(histories[name], figure, ax, color=color, best_epoch=best_epochs[name])
        ax.set(xlabel="epoch", ylabel=title)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlim(0.5, max(history["epoch"].max() for history in histories.values()) + 0.5)
        ax.grid(alpha=0.3)
    changes = set().union(*(_phase_changes(history) for history in histories.values()))
    for ax in axes:
        for change in sorted(changes):
            ax.axvline(change, **PHASE, zorder=0)
    handles = _learning_curve_handles(list(histories), phases=bool(changes))
    # Under the panels: inside, it would hide the curves' ends.
    fig.legend(handles=handles, loc="outside lower center", ncols=_columns(handles, fig), frameon=False)
    return fig


def _learning_curve(history: pd.DataFrame, figure: str, ax: Axes, *, color: tuple, best_epoch: int) -> None:
    epochs = history["epoch"]
    alone = {"marker": "o", "markersize": 4} if len(epochs) == 1 else {}  # a line needs two points
    ax.plot(epochs, history[f"train_{figure}"], "--", color=color, linewidth=1.2, **alone)
    ax.plot(epochs, history[f"val_{figure}"], "-", color=color, linewidth=2)
    (best,) = history.loc[epochs == best_epoch, f"val_{figure}"]
    ax.plot(best_epoch, best, "*", color=color, markersize=15, markeredgecolor="black")


def _phase_changes(history: pd.DataFrame) -> set[float]:
    """Return the places between two epochs where the phase changes."""
    if "phase" not in history:
        return set()
    changed = history["phase"].ne(history["phase"].shift()).to_numpy()[1:]
    epochs = history["epoch"].to_numpy(float)
    return set(((epochs[:-1] + epochs[1:]) / 2)[changed].tolist())


def _learning_curve_handles(networks: Sequence[str], *, phases: bool) -> list[Line2D]:
    star = {"marker": "*", "markersize": 13, "markeredgecolor": "black", "linestyle": ""}
    handles = [
        Line2D([], [], color=color, linewidth=2, label=name) for name, color in palette(networks).items()
    ]
    handles += [
        Line2D([], [], color="0.3", linestyle="--", linewidth=1.2, label="training"),
        Line2D([], [], color="0.3", linewidth=2, label="validation"),
        Line2D([], [], color="0.8", label="kept epoch", **star),
    ]
    if phases:
        handles.append(Line2D([], [], **PHASE, label="change of phase"))
    return handles


def _columns(handles: Sequence[Line2D], fig: FigureBase) -> int:
    """Return how many columns of a legend fit a figure, six at most."""
    longest = max(len(handle.get_label()) for handle in handles)
    # In points: a letter is about 6 wide, the line before the name and the space after it six letters.
    fit = fig.bbox.width / fig.dpi * 72 / (6 * (longest + 6))
    return max(1, min(int(fit), 6, len(handles)))


def draw_score_and_minutes(fig: FigureBase, table: pd.DataFrame, *, score: str = "accuracy") -> FigureBase:
    """Draw horizontal bars, a row a network in the table's order: its `score` with the interval (left)
    and the minutes that its training took (right).

    `table` has columns network, estimate, low, high, minutes; the score and its ends in 0..1. NaN ends: no
    whiskers; NaN minutes: not known.
    """
    left, right = fig.subplots(1, 2, sharey=True)
    rows = np.arange(len(table))
    colors = list(palette(list(table["network"])).values())
    estimate = table["estimate"]
    reach = np.maximum([estimate - table["low"], table["high"] - estimate], 0)
    left.barh(rows, estimate, color=colors, height=0.65)
    left.errorbar(estimate, rows, xerr=reach, fmt="none", ecolor="black", capsize=3, linewidth=1.2)
    right.barh(rows, table["minutes"].fillna(0), color=colors, height=0.65)
    ends = np.fmax(estimate, table["high"])
    for ax, at, texts in (
        (left, ends, [f"{value:.1%}" for value in estimate]),
        (right, table["minutes"].fillna(0), [_minutes(value) for value in table["minutes"]]),
    ):
        for row, (end, text) in enumerate(zip(at, texts, strict=True)):
            _note(text, (end, row), ax)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", alpha=0.3)
        ax.set_axisbelow(True)
    left.set_yticks(rows, list(table["network"]))
    left.set_ylim(len(table) - 0.4, -0.6)
    # To 100 % and room for the number of a network that is always right.
    left.set(xlabel=f"{score} and its interval", xlim=(0, 1.2), xticks=np.linspace(0, 1, 6))
    left.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    right.set_xlabel("minutes of training")
    right.xaxis.set_major_locator(MaxNLocator(4))
    right.set_xlim(0, max(1e-3, 1.25 * np.nanmax([0, *table["minutes"]])))
    return fig


def _minutes(value: float) -> str:
    if np.isnan(value):
        return "not known"
    if value < 1:
        return f"{60 * value:.0f} s"
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"


# Notebook 3: the results


def plot_confusion(counts: np.ndarray, classes: Sequence[str], ax: Axes) -> Axes:
    """Draw (C, C) counts, row = true class, column = predicted; as shade and, up to eight classes, in small
    print, the share of the row (of the true class).
    """
    counts = np.asarray(counts)
    support = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, support, out=np.zeros(counts.shape), where=support > 0)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    many = len(classes) > FEW
    crowded = len(classes) > 8
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if share[row, column] > 0.55 else "black"
        percent = f"{share[row, column]:.1%}" if support[row, 0] else "–"
        lines = [(f"{count}", SMALL, 0)] if crowded else [(f"{count}", 12, 5), (percent, SMALL, -10)]
        for text, size, rise in lines:
            place = {"xytext": (0, rise), "textcoords": "offset points", "ha": "center", "va": "center"}
            ax.annotate(text, (column, row), **place, color=color, fontsize=size)
    ticks = np.arange(len(classes))
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    # Broken at blanks, so that few long names need neither slant nor small print.
    ax.set_xticks(
        ticks, [name.replace(" ", " " if many else "\n") for name in classes], **slanted if many else {}
    )
    between = " " if many else "\n"
    ax.set_yticks(
        ticks, [f"{name}{between}(n = {n})" for name, n in zip(classes, support[:, 0], strict=True)]
    )
    ax.set_xticks(ticks[:-1] + 0.5, minor=True)
    ax.set_yticks(ticks[:-1] + 0.5, minor=True)
    ax.grid(which="minor", color="0.85", linewidth=0.8)
    ax.tick_params(which="both", length=0)
    ax.set(xlabel="predicted class", ylabel="true class")
    return ax


def plot_roc(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray, float]], ax: Axes, *, mean: bool = False
) -> Axes:
    """Draw (false positive rate, true positive rate, area) by class, with the diagonal of chance; areas are
    in the legend, which stands beside the axes where there are many classes.

    With `mean` also the mean of the curves at each false positive rate (vertical averaging: Fawcett 2006,
    Pattern Recognition Letters 27:861), in black; its area is the mean of theirs.
    """
    ax.plot([0, 1], [0, 1], color="0.5", linestyle=":", linewidth=1, label="chance (0.500)", zorder=1)
    many = len(curves) > FEW
    for name, style in _styles(list(curves)).items():
        false_positive_rate, true_positive_rate, area = curves[name]
        label = f"{name} (no images)" if np.isnan(area) else f"{name} ({area:.3f})"
        line = {"color": style.color, "linestyle": style.line, "linewidth": 1.4 if many else 2}
        ax.plot(false_positive_rate, true_positive_rate, **line, label=label)
    known = [curve for curve in curves.values() if len(curve[0])]
    if mean and known:
        rates = np.linspace(0, 1, 501)
        heights = np.mean([np.interp(rates, x, y) for x, y, _ in known], axis=0)
        label = f"mean ({np.mean([area for *_, area in known]):.3f})"
        ax.plot(rates, heights, color="black", linewidth=2.5, label=label)
    ax.set(
        xlim=(-0.01, 1.01),
        ylim=(-0.01, 1.01),
        aspect="equal",
        xlabel="false positive rate (1 − specificity)",
        ylabel="true positive rate (recall)",
    )
    title = "class (area)"
    if many:
        _legend_beside(ax, title=title, last="chance (0.500)")
        return ax
    handles, labels = ax.get_legend_handles_labels()
    order = [*range(1, len(labels)), 0]
    listed = [handles[i] for i in order], [labels[i] for i in order]
    ax.legend(*listed, title=title, loc="lower right", framealpha=0.9)
    return ax


def plot_auc_by_label(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the area under the ROC curve as dots with whiskers, a row a label, the largest on top.

    `table` is one of `metrics.bootstrap_scores`: columns class, metric, estimate, low, high; of it the
    roc_auc are drawn. The dashed line at 0.5 is chance; the macro row is the mean, a line with the band of
    its interval. Labels without an area stand below, without a dot.
    """
    areas = table[table["metric"] == "roc_auc"].set_index("class")[["estimate", "low", "high"]]
    mean = areas.loc[MACRO]
    areas = areas.drop(index=MACRO).sort_values("estimate", ascending=False, kind="stable")
    rows = np.arange(len(areas))
    color, mean_color = COLORS[0], COLORS[3]
    reach = np.maximum([areas["estimate"] - areas["low"], areas["high"] - areas["estimate"]], 0)
    ax.axvline(0.5, color="0.4", linestyle="--", linewidth=1.2, label="chance (0.500)")
    ax.axvspan(mean["low"], mean["high"], color=mean_color, alpha=0.15, linewidth=0)
    ax.axvline(mean["estimate"], color=mean_color, linewidth=1.5, label=f"mean ({mean['estimate']:.3f})")
    ax.errorbar(areas["estimate"], rows, xerr=reach, fmt="o", color=color, capsize=3, markersize=6)
    for row, area in enumerate(areas.itertuples()):
        known = not np.isnan(area.estimate)
        _note(
            f"{area.estimate:.3f}" if known else "no area",
            (np.fmax(area.estimate, area.high) if known else 0.5, row),
            ax,
        )
    ax.set_yticks(rows, list(areas.index))
    ax.set_ylim(len(areas) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", alpha=0.3)
    ax.margins(x=0.1)
    ax.set_xlabel("area under the ROC curve (dot) and its interval (whiskers)")
    _legend_beside(ax)
    return ax


def plot_threshold_tradeoff(
    points: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray, float]],
    ax: Axes,
    *,
    chosen: float | None = None,
) -> Axes:
    """Draw precision (solid) and recall (dashed) over the decision threshold.

    `points` are by label those of `metrics.precision_recall_points`: thresholds, precision, recall, average
    precision. Several labels are thin lines, and thick is their mean: at thresholds above every probability
    of a label its recall is 0, and its precision, of nothing, is left out. `chosen` is marked by a vertical
    line. Where no label has points, a text says so.
    """
    known = {name: each for name, each in points.items() if len(each[0])}
    if not known:
        ax.text(0.5, 0.5, "no label has both kinds of images", ha="center", va="center")
        ax.set_axis_off()
        return ax
    grid = np.linspace(0, 1, 501)
    precision = np.array([_at_thresholds(grid, t, p, beyond=np.nan) for t, p, *_ in known.values()])
    recall = np.array([_at_thresholds(grid, t, r, beyond=0.0) for t, _, r, _ in known.values()])
    several = len(points) > 1
    for values, style, color, name in (
        (precision, "-", COLORS[0], "precision"),
        (recall, "--", COLORS[3], "recall"),
    ):
        if several:
            ax.plot(grid, values.T, style, color=color, linewidth=0.7, alpha=0.45)
        some = ~np.isnan(values).all(axis=0)
        label = f"{name}, mean of {len(known)} labels" if several else name
        ax.plot(
            grid[some], np.nanmean(values[:, some], axis=0), style, color=color, linewidth=2.8, label=label
        )
    if several:
        ax.plot([], [], color="0.5", linewidth=0.7, label="a label")
    if chosen is not None:
        ax.axvline(
            chosen, color="black", linestyle="-.", linewidth=1.3, label=f"chosen threshold ({chosen:.2f})"
        )
    ax.set(xlim=(0, 1), ylim=(-0.02, 1.02), xlabel="decision threshold", ylabel="precision, recall")
    ax.grid(alpha=0.3)
    _legend_beside(ax)
    return ax


def _at_thresholds(
    grid: np.ndarray, thresholds: np.ndarray, values: np.ndarray, *, beyond: float
) -> np.ndarray:
    """Return what holds at each threshold of a grid: the value of the next one at which a decision changes,
    `beyond` above the last.
    """
    return np.append(values, beyond)[np.searchsorted(thresholds, grid, side="left")]


def plot_comparison(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw dots with whiskers from low to high: `table` has columns network, metric, estimate, low, high.

    Metrics from top to bottom and networks within them, in the table's order. NaN ends: a dot without
    whiskers.
    """
    metrics, networks = (list(dict.fromkeys(table[column])) for column in ("metric", "network"))
    step = 0.7 / len(networks)
    for i, (name, style) in enumerate(_styles(networks).items()):
        own = table[table["network"] == name]
        offset = (i - (len(networks) - 1) / 2) * step
        y = np.array([metrics.index(metric) for metric in own["metric"]]) + offset
        # A percentile interval may, rarely, lie beside its estimate: no negative whiskers.
        reach = np.maximum([own["estimate"] - own["low"], own["high"] - own["estimate"]], 0)
        dots = {"fmt": style.marker, "color": style.color, "markersize": 6}
        ax.errorbar(own["estimate"], y, xerr=reach, **dots, capsize=3, label=name)
        for at, estimate, high in zip(y, own["estimate"], own["high"], strict=True):
            if not np.isnan(estimate):
                _note(f"{estimate:.3f}", (np.fmax(estimate, high), at), ax)
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


def plot_seeds(scores: pd.Series, intervals: pd.DataFrame, ax: Axes) -> Axes:
    """Draw a dot a seed and their mean as a line, and below them the interval of the first seed: what another
    training changes above what other patients would.

    `scores` has the levels network and seed, `intervals` a row a network with estimate, low, high; networks
    from top to bottom. Over the line stand mean and standard deviation (n - 1).
    """
    by_network = scores.groupby(level="network", sort=False)
    means, networks = by_network.mean(), list(scores.index.unique("network"))
    rows, first = np.arange(len(networks)), intervals.loc[networks]
    # A height a seed, so that equal scores do not hide one another.
    steps = (by_network.cumcount() + 0.5) / by_network.transform("size")
    heights = scores.index.get_level_values("network").map(networks.index) - 0.4 + 0.4 * steps
    ax.vlines(
        means,
        rows - 0.4,
        rows,
        color=COLORS[0],
        linewidth=2,
        label="mean of the seeds\n(± standard deviation)",
    )
    ax.plot(scores, heights, "o", color=COLORS[0], markersize=6, alpha=0.8, label="one seed")
    reach = np.maximum([first["estimate"] - first["low"], first["high"] - first["estimate"]], 0)
    bars = {"fmt": "s", "color": COLORS[3], "markersize": 6, "capsize": 3}
    ax.errorbar(
        first["estimate"], rows + 0.2, xerr=reach, **bars, label="first seed, its interval\nover patients"
    )
    for row, (name, own) in enumerate(by_network):
        above = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        text = f"mean {means[name]:.3f} ± {own.std():.3f}"
        ax.annotate(text, (means[name], row - 0.4), **above, fontsize=SMALL)
    ax.set_yticks(range(len(networks)), networks)
    ax.set_ylim(len(networks) - 0.55, -0.7)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", alpha=0.3)
    ax.margins(x=0.12)
    _legend_beside(ax)
    return ax


def plot_reliability(tables: Mapping[str, pd.DataFrame], ax: Axes) -> Axes:
    """Draw accuracy against confidence: by name, tables with columns confidence, accuracy, count; a marker's
    area is its share of images. Bins of fewer than `FEW_IMAGES` are hollow, and no line leads to them.

    Below the diagonal a network is over-confident.
    """
    ax.plot([0, 1], [0, 1], color="0.5", linestyle=":", linewidth=1, zorder=1)
    ax.annotate("over-confident", (0.97, 0.04), ha="right", color="0.35", style="italic")
    ax.annotate("under-confident", (0.03, 0.93), ha="left", color="0.35", style="italic")
    for name, style in _styles(list(tables)).items():
        filled = tables[name][tables[name]["count"] > 0]
        areas = np.maximum(250 * filled["count"] / filled["count"].sum(), 10)
        enough = filled["count"] >= FEW_IMAGES
        joined = filled[enough]
        ax.plot(joined["confidence"], joined["accuracy"], color=style.color, linewidth=1.5)
        faces = [(*style.color, 0.65) if solid else "none" for solid in enough]
        dots = {"marker": style.marker, "facecolors": faces, "edgecolors": [style.color], "label": name}
        ax.scatter(filled["confidence"], filled["accuracy"], s=areas, **dots)
    ax.set(xlim=(0, 1.04), ylim=(0, 1.04), aspect="equal")
    ax.set(
        xlabel="confidence (probability of the predicted class)", ylabel="accuracy (share of them correct)"
    )
    legend = _legend_beside(ax, title=f"marker area: share of images\nhollow: fewer than {FEW_IMAGES} images")
    for handle in legend.legend_handles:
        handle.set(sizes=[45], facecolor=handle.get_edgecolor())
    return ax


def plot_randomisation(correlations: pd.DataFrame, ax: Axes) -> Axes:
    """Draw how far maps stay the same while a network is made random from the top down: `correlations` as in
    `cam_scores.MapScores.randomised`, columns map, share and agreement; a line a method, the means.

    A line that stays at 1 is of a method that shows what is in the image, not what the network has learnt.
    """
    ax.axhline(0, color="0.5", linestyle=":", linewidth=1, zorder=1)
    means = correlations.groupby(["map", "share"], sort=False)["agreement"].mean().unstack("map", sort=False)
    means = means.sort_index()
    # Evenly spaced: the head is one layer of a hundred, and the step that matters most.
    steps = ["nothing", "the head", *(f"{share:.0%}" for share in means.index[1:])]
    for name, style in _styles(list(means)).items():
        dots = {"color": style.color, "marker": style.marker, "markersize": 7, "alpha": 0.8}
        ax.plot(range(len(steps)), [1, *means[name]], **dots, label=name)
    ax.set(ylim=(0, 1.04), xlabel="layers that are random, from the head down")
    ax.set_xticks(range(len(steps)), steps)
    ax.set_ylabel("agreement with the trained network's\nmap (absolute rank correlation)")
    _legend_beside(ax)
    return ax


def plot_embedding(points: np.ndarray, labels: np.ndarray, classes: Sequence[str], ax: Axes) -> Axes:
    """Draw (N, 2) points of `metrics.tsne` by their (N,) class indices, a colour and a marker a class.

    No numbers at the axes: only who is near whom means something.
    """
    labels = np.asarray(labels)
    for i, (name, style) in enumerate(_styles(list(classes)).items()):
        own = points[labels == i]
        ax.scatter(
            *own.T,
            s=24,
            marker=style.marker,
            color=style.color,
            alpha=0.75,
            edgecolor="white",
            linewidth=0.4,
            label=f"{name} (n = {len(own):,})",
        )
    ax.set(xticks=[], yticks=[], aspect="equal")
    legend = _legend_beside(ax)
    for handle in legend.legend_handles:
        handle.set(sizes=[45], alpha=1)
    return ax


def _grouped_bars(table: pd.DataFrame, ax: Axes, *, label: str, title: str) -> Axis:
    """Draw a group a row and a bar a column, each with its number; return the axis of the values.

    Bars stand for few rows with short names, else they lie, the first row on top.
    """
    names = [str(name) for name in table.index]
    lying = len(names) > FEW or sum(map(len, names)) > 70
    width = 0.84 / len(table.columns)
    for i, (name, color) in enumerate(palette(list(table.columns)).items()):
        at = np.arange(len(table)) + (i - (len(table.columns) - 1) / 2) * width
        bar = ax.barh if lying else ax.bar
        bars = bar(at, table[name], 0.94 * width, color=color, label=name)
        ax.bar_label(bars, labels=[label.format(value) for value in table[name]], padding=2, fontsize=SMALL)
    if lying:
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
    else:
        ax.set_xticks(range(len(names)), names)
    ax.tick_params(axis="y" if lying else "x", length=0)
    ax.margins(**{"x" if lying else "y": 0.12})
    ax.spines[["top", "right"]].set_visible(False)
    value_axis = ax.xaxis if lying else ax.yaxis
    value_axis.set_label_text(title)
    return value_axis


def _note(text: str, at: tuple[float, float], ax: Axes) -> None:
    """Write in small print to the right of a point."""
    place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
    ax.annotate(text, at, **place, fontsize=SMALL)


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
