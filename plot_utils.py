"""Charts: `plot_*(data, ax) -> ax` draws one panel, `draw_*(fig, data) -> fig` fills a Figure or SubFigure.

Numbers in, Axes out: nothing is computed from predictions, shown, saved or set globally. Figures need
`layout="constrained"`, which makes room for labels and legends, and a height that fits their content: 0.2 inch for each
bar or dot. Titles are the caller's: only the caller knows whether the data are synthetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

MARKERS = "osD^vPX<"  # beside the colours, for prints without them
LINES = ("-", "--", "-.", (0, (1, 1)))
SMALL = 8.5  # points; the smallest print that is readable in a notebook 1000 px wide
FEW = 5  # classes whose names fit side by side under a panel
FEW_IMAGES = 10  # a bin with fewer images says little about calibration
CHANCE = {"color": "0.5", "linestyle": ":", "linewidth": 1, "zorder": 1}
PHASE = {"color": "0.25", "linestyle": (0, (1, 2)), "linewidth": 1}
STAR = {"marker": "*", "markersize": 14, "markeredgecolor": "black", "linestyle": ""}
# Seaborn's colour-blind-safe colours. Two dark ones of Paul Tol's "muted" (SRON technical note EPS 09-002) replace its
# light pink and yellow, which are too pale for lines on white.
COLORS = [sns.color_palette("colorblind")[i] for i in (0, 1, 2, 3, 4, 5, 9, 7)]
COLORS += sns.color_palette(["#332288", "#882255"])
BLUE, RED = COLORS[0], COLORS[3]


def palette(names: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """Return a colour for each name, by position: the same list of names has the same colours in every figure.

    Colours repeat from the eleventh name on; lines and markers then differ (see `styles`).
    """
    return dict(zip(names, sns.color_palette(COLORS, len(names)), strict=True))


def styles(names: Sequence[str]) -> dict[str, dict[str, object]]:
    """Return a colour, a line style and a marker for each name, by position. Up to 40 names, no two have the same
    colour and line, and no two the same colour and marker.
    """
    lines = [LINES[(i + i // len(COLORS)) % len(LINES)] for i in range(len(names))]
    return {
        name: {"color": color, "linestyle": lines[i], "marker": MARKERS[i % len(MARKERS)]}
        for i, (name, color) in enumerate(palette(names).items())
    }


# Notebook 1: the data


def plot_bars(table: pd.DataFrame, ax: Axes, *, number: str, title: str, equal_shares: bool = False) -> Axes:
    """Draw a group of bars for each row of a table. They are horizontal, the first row on top, where the names of the
    rows do not fit side by side.

    `number` is the format of the number at each bar, `title` that of the axis of values; `equal_shares` draws a dashed
    line where all rows of a table of percentages would be equal.
    """
    horizontal = len(table) > FEW or sum(map(len, table.index)) > 70
    colors = palette(list(table.columns))
    table.plot(kind="barh" if horizontal else "bar", ax=ax, color=colors, width=0.84, rot=0, edgecolor="white")
    for bars in ax.containers:
        ax.bar_label(bars, fmt=number, padding=2, fontsize=SMALL)
    names_axis, value_axis = (ax.yaxis, ax.xaxis) if horizontal else (ax.xaxis, ax.yaxis)
    names_axis.set_inverted(horizontal)
    names_axis.set_tick_params(length=0)
    names_axis.set_label_text("")
    value_axis.set(label_text=title, major_locator=MaxNLocator(integer=True, nbins=6))
    value_axis.set_major_formatter("{x:,.0f}")
    if equal_shares:
        line = ax.axvline if horizontal else ax.axhline
        line(100 / len(table), color="0.3", linestyle="--", linewidth=1, zorder=3, label="equal shares")
    ax.margins(**{"x" if horizontal else "y": 0.12})
    ax.spines[["top", "right"]].set_visible(False)
    legend_beside(ax)
    return ax


def plot_image_sizes(sizes: pd.DataFrame, ax: Axes) -> Axes:
    """Draw width against height; `sizes` has a row for each image and the columns width, height and class. The area of
    a marker is its number of images.
    """
    counts = sizes.groupby(["class", "width", "height"], sort=False).size()
    for name, style in styles(list(dict.fromkeys(sizes["class"]))).items():
        of_class = counts[name].rename("images").reset_index()
        images, number = of_class["images"], len(of_class)
        # Hollow markers of different shapes: all classes stay visible where they have the same sizes.
        look = {"facecolor": (*style["color"], 0.12), "edgecolor": style["color"], "marker": style["marker"]}
        label = f"{name}: {images.sum():,} images, {number:,} size{'s' * (number > 1)}"
        areas = np.maximum(500 * images / counts.max(), 12)
        ax.scatter(of_class["width"], of_class["height"], areas, **look, label=label)
    ax.axline((0, 0), slope=1, color="0.6", linestyle=":", linewidth=1, zorder=0, label="square")
    right, top = 1.15 * sizes[["width", "height"]].max()
    ax.set(xlim=(0, right), ylim=(0, top), xlabel="width (pixels)", ylabel="height (pixels)")
    legend = legend_beside(ax, title="marker area: number of images")
    for handle in legend.legend_handles[:-1]:
        handle.set_sizes([40])
    return ax


def plot_intensities(histograms: Mapping[str, np.ndarray], edges: np.ndarray, ax: Axes) -> Axes:
    """Draw the mean histogram of each class and, up to five classes, the band of its middle half of images.

    `histograms` are (N, B) densities of grey values, a row for each image, by class; `edges` are the (B + 1,) grey
    values between the bins.
    """
    centres = (edges[:-1] + edges[1:]) / 2
    bands = len(histograms) <= FEW
    for name, style in styles(list(histograms)).items():
        densities = histograms[name]
        if bands:
            low, high = np.percentile(densities, [25, 75], axis=0)
            ax.fill_between(centres, low, high, color=style["color"], alpha=0.15, linewidth=0)
        label = f"{name} (n = {len(densities):,})"
        ax.plot(centres, densities.mean(axis=0), **style | {"marker": None}, label=label)
    ax.set(xlabel="grey value (0 = black, 255 = white)", ylabel="density", xlim=(edges[0], edges[-1]))
    ax.set_ylim(bottom=0)
    legend_beside(ax, title="line: mean\nband: middle half of images" if bands else "line: mean")
    return ax


# Notebook 2: the training


def draw_learning_curves(
    fig: FigureBase, histories: Mapping[str, pd.DataFrame], *, best_epochs: Mapping[str, int], score: str
) -> FigureBase:
    """Draw the loss (left) and a score (right) by epoch: training dashed, validation solid, a star at the kept epoch,
    and a thin vertical line where the phase of a training changes.

    Args:
        fig: Figure or SubFigure to fill.
        histories: by network, a row for each epoch; columns epoch, phase, and train_ and val_ loss and score.
        best_epochs: by network, the epoch whose weights were kept.
        score: "accuracy" or "auc", as in the columns.
    """
    colors = palette(list(histories))
    phases = [history.groupby("phase")["epoch"].min() for history in histories.values()]
    changes = {epoch - 0.5 for first_epochs in phases for epoch in first_epochs.iloc[1:]}
    for ax, measure in zip(fig.subplots(1, 2), ("loss", score), strict=True):
        for name, history in histories.items():
            by_epoch = history.set_index("epoch")
            marker = "o" if len(by_epoch) == 1 else None  # a line needs two points
            ax.plot(by_epoch[f"train_{measure}"], "--", color=colors[name], lw=1.2, marker=marker)
            ax.plot(by_epoch[f"val_{measure}"], "-", color=colors[name], lw=2)
            best = best_epochs[name]
            ax.plot(best, by_epoch.loc[best, f"val_{measure}"], color=colors[name], **STAR)
        for change in changes:
            ax.axvline(change, **PHASE, zorder=0)
        ax.set(xlabel="epoch", ylabel="mean area under the ROC curve" if measure == "auc" else measure)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlim(0.5, max(history["epoch"].max() for history in histories.values()) + 0.5)
        ax.grid(alpha=0.3)
    handles = [Line2D([], [], color=color, lw=2, label=name) for name, color in colors.items()]
    handles.append(Line2D([], [], color="0.3", linestyle="--", lw=1.2, label="training"))
    handles.append(Line2D([], [], color="0.3", lw=2, label="validation"))
    handles.append(Line2D([], [], color="0.8", **STAR, label="kept epoch"))
    handles += [Line2D([], [], **PHASE, label="change of phase")] * bool(changes)
    fig.legend(handles=handles, loc="outside right upper", frameon=False)
    return fig


# Notebook 3: the results


def draw_score_and_minutes(fig: FigureBase, table: pd.DataFrame, *, score: str) -> FigureBase:
    """Draw horizontal bars in the table's order: the score of each network with its interval (left) and the minutes
    that its training took (right). `table` has the columns network, estimate, low, high (0 to 1; NaN ends: no whiskers)
    and minutes.
    """
    left, right = fig.subplots(1, 2, sharey=True)
    bars = {"color": list(palette(list(table["network"])).values()), "height": 0.65}
    rows, whiskers = range(len(table)), {"xerr": _reach(table), "capsize": 3}
    by_score = left.barh(rows, table["estimate"], **whiskers, **bars)
    by_minutes = right.barh(rows, table["minutes"], **bars)
    left.bar_label(by_score, [f"{value:.1%}" for value in table["estimate"]], padding=5, fontsize=SMALL)
    right.bar_label(by_minutes, [_minutes(value) for value in table["minutes"]], padding=5, fontsize=SMALL)
    for ax in (left, right):
        _name_rows(list(table["network"]), ax)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_axisbelow(True)
    # The axis ends beyond 100 %: the number of a network that is always right needs room.
    left.set(xlabel=f"{score} and its interval", xlim=(0, 1.2), xticks=np.linspace(0, 1, 6))
    left.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    right.set(xlabel="minutes of training", xlim=(0, max(1e-3, 1.25 * table["minutes"].max())))
    right.xaxis.set_major_locator(MaxNLocator(4))
    return fig


def _minutes(value: float) -> str:
    return f"{60 * value:.0f} s" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def plot_confusion(counts: np.ndarray, classes: Sequence[str], ax: Axes) -> Axes:
    """Draw (C, C) counts, row = true class, column = predicted class. The shade, and the small print up to eight
    classes, is the share of the true class.
    """
    support = counts.sum(axis=1)
    shares = counts / np.maximum(support, 1)[:, None]
    texts = counts.astype(str).astype(object)
    if len(classes) <= 8:
        texts += [[f"\n{share:.1%}" if sum(row) else "\n–" for share in row] for row in shares]
    many, gap = len(classes) > FEW, " " if len(classes) > FEW else "\n"
    names = [name.replace(" ", gap) for name in classes]
    rows = [f"{name}{gap}(n = {n})" for name, n in zip(classes, support, strict=True)]
    look = {"cmap": "Blues", "vmin": 0, "vmax": 1, "cbar": False, "square": True, "linewidths": 0.5}
    text = {"annot": texts, "fmt": "", "annot_kws": {"fontsize": SMALL if many else 10}}
    sns.heatmap(shares, xticklabels=names, yticklabels=rows, **text, **look, linecolor="0.85", ax=ax)
    for label in ax.get_xticklabels():
        label.set(rotation=45 if many else 0, ha="right" if many else "center", rotation_mode="anchor")
    ax.tick_params(axis="y", labelrotation=0)
    ax.tick_params(length=0)
    ax.set(xlabel="predicted class", ylabel="true class")
    return ax


def plot_roc(curves: Mapping[str, tuple[np.ndarray, np.ndarray, float]], ax: Axes) -> Axes:
    """Draw the ROC curve of each class and the diagonal of chance; the areas are in the legend, which stands beside the
    axes where there are more than five classes. `curves` has false positive rates, true positive rates and the area,
    NaN where there is nothing to tell apart, by class.
    """
    many = len(curves) > FEW
    for name, style in styles(list(curves)).items():
        *rates, area = curves[name]
        label = f"{name} (no images)" if np.isnan(area) else f"{name} ({area:.3f})"
        ax.plot(*rates, **style | {"marker": None}, lw=1.4 if many else 2, label=label)
    ax.plot([0, 1], [0, 1], **CHANCE, label="chance (0.500)")
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    ax.set(xlabel="false positive rate (1 − specificity)", ylabel="true positive rate (recall)")
    if many:
        legend_beside(ax, title="class (area)")
    else:
        ax.legend(title="class (area)", loc="lower right", framealpha=0.9)
    return ax


def plot_auc_by_label(areas: pd.DataFrame, mean: pd.Series, ax: Axes) -> Axes:
    """Draw areas under the ROC curve as dots with whiskers, the largest on top. A dashed line marks chance, a solid
    line with a band the mean and its interval.

    `areas` has a row for each label and, like `mean`, the columns estimate, low and high. Labels without an area stand
    below, without a dot.
    """
    areas = areas.sort_values("estimate", ascending=False, kind="stable")
    ax.axvline(0.5, color="0.4", linestyle="--", linewidth=1.2, label="chance (0.500)")
    ax.axvspan(mean["low"], mean["high"], color=RED, alpha=0.15, linewidth=0)
    ax.axvline(mean["estimate"], color=RED, linewidth=1.5, label=f"mean ({mean['estimate']:.3f})")
    rows = np.arange(len(areas))
    _interval_dots(areas, rows, ax, fmt="o", color=BLUE)
    for row in rows[areas["estimate"].isna()]:
        _note("no area", (0.5, row), ax)
    _name_rows(list(areas.index), ax)
    ax.set_xlabel("area under the ROC curve (dot) and its interval (whiskers)")
    legend_beside(ax)
    return ax


def plot_threshold_tradeoff(points: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray, float]], ax: Axes) -> Axes:
    """Draw precision (solid) and recall (dashed) over the decision threshold: a thin line for each label, and their
    means as thick lines. Above the largest probability of a label its recall is 0 and it has no precision.

    `points` has ascending thresholds, precision and recall at each, and the average precision, by label.
    """
    grid = np.linspace(0, 1, 501)
    for column, name, beyond, look in (
        (1, "precision", np.nan, {"color": BLUE, "linestyle": "-"}),
        (2, "recall", 0, {"color": RED, "linestyle": "--"}),
    ):
        # At a threshold between two of a label's own, decisions are those at the next larger one.
        curves = [pd.Series(p[column], p[0]).reindex(grid, method="bfill") for p in points.values()]
        by_label = pd.concat(curves, axis=1).fillna(beyond)
        ax.plot(by_label, **look, linewidth=0.7, alpha=0.45)
        ax.plot(by_label.mean(axis=1), **look, linewidth=2.8, label=f"{name}, mean of {len(points)} labels")
    ax.plot([], [], color="0.5", linewidth=0.7, label="a label")
    ax.set(xlim=(0, 1), ylim=(-0.02, 1.02), xlabel="decision threshold", ylabel="precision, recall")
    ax.grid(alpha=0.3)
    legend_beside(ax)
    return ax


def plot_comparison(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw dots with whiskers: `table` has the columns network, metric, estimate, low and high. Metrics stand from top
    to bottom and networks within them, in the table's order.
    """
    metrics = list(dict.fromkeys(table["metric"]))
    networks = styles(list(dict.fromkeys(table["network"])))
    offsets = (np.arange(len(networks)) - (len(networks) - 1) / 2) * 0.7 / len(networks)
    for offset, (name, style) in zip(offsets, networks.items(), strict=True):
        of_network = table[table["network"] == name]
        heights = of_network["metric"].map(metrics.index) + offset
        _interval_dots(of_network, heights, ax, **style | {"linestyle": ""}, label=name)
    for between in range(1, len(metrics)):
        ax.axhline(between - 0.5, color="0.85", linewidth=0.8)
    _name_rows([metric.replace("_", " ") for metric in metrics], ax)
    ax.set_xlabel("score (marker) and its interval (whiskers)")
    legend_beside(ax)
    return ax


def plot_seeds(scores: pd.Series, intervals: pd.DataFrame, ax: Axes) -> Axes:
    """Draw a dot for each seed and their mean as a line. Below them stands the interval of the first seed: what other
    patients would change, under what another training changes.

    `scores` has a score for each network and seed, the levels of its index; `intervals` has estimate, low and high of
    the first seed, by network.
    """
    spread = scores.groupby(level="network", sort=False).agg(["mean", "std"])
    rows = np.arange(len(spread))
    line = {"color": BLUE, "linewidth": 2, "label": "mean of the seeds\n(± standard deviation)"}
    ax.vlines(spread["mean"], rows - 0.4, rows, **line)
    for row, (name, (mean, std)) in enumerate(spread.iterrows()):
        of_network = scores[name]
        # Each seed has a height of its own: equal scores do not hide one another.
        heights = row - 0.4 + 0.4 * (np.arange(len(of_network)) + 0.5) / len(of_network)
        ax.plot(of_network, heights, "o", color=BLUE, alpha=0.8, label=None if row else "one seed")
        place = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center"}
        ax.annotate(f"mean {mean:.3f} ± {std:.3f}", (mean, row - 0.4), **place, fontsize=SMALL)
    first = {"fmt": "s", "color": RED, "label": "first seed, its interval\nover patients"}
    _interval_dots(intervals.loc[spread.index], rows + 0.2, ax, numbers=False, **first)
    _name_rows(list(spread.index), ax)
    legend_beside(ax)
    return ax


def plot_reliability(tables: Mapping[str, pd.DataFrame], ax: Axes) -> Axes:
    """Draw accuracy against confidence; `tables` of bins have the columns confidence, accuracy and count. The area of a
    marker is its share of images; bins of fewer than `FEW_IMAGES` are hollow and not joined by the line.

    Below the diagonal a network is over-confident.
    """
    ax.plot([0, 1], [0, 1], **CHANCE)
    ax.annotate("over-confident", (0.97, 0.04), ha="right", color="0.35", style="italic")
    ax.annotate("under-confident", (0.03, 0.93), ha="left", color="0.35", style="italic")
    for name, style in styles(list(tables)).items():
        filled = tables[name][tables[name]["count"] > 0]
        enough = filled["count"] >= FEW_IMAGES
        line = {"color": style["color"], "linewidth": 1.5, "label": "_line"}
        ax.plot("confidence", "accuracy", data=filled[enough], **line)
        faces = [(*style["color"], 0.65) if solid else "none" for solid in enough]
        look = {"marker": style["marker"], "facecolors": faces, "edgecolors": [style["color"]]}
        areas = np.maximum(250 * filled["count"] / filled["count"].sum(), 10)
        ax.scatter(filled["confidence"], filled["accuracy"], areas, **look, label=name)
    ax.set(xlim=(0, 1.04), ylim=(0, 1.04), aspect="equal")
    ax.set_xlabel("confidence (probability of the predicted class)")
    ax.set_ylabel("accuracy (share of them correct)")
    legend = legend_beside(ax, title=f"marker area: share of images\nhollow: fewer than {FEW_IMAGES} images")
    for handle in legend.legend_handles:
        handle.set(sizes=[45], facecolor=handle.get_edgecolor())
    return ax


# Parts of several charts


def _interval_dots(
    table: pd.DataFrame, heights: np.ndarray, ax: Axes, *, numbers: bool = True, **style: object
) -> None:
    """Draw the estimates of a table as dots, with whiskers from low to high where these are not NaN, and write them
    beside.
    """
    ax.errorbar(table["estimate"], heights, xerr=_reach(table), capsize=3, markersize=6, **style)
    ends = np.fmax(table["estimate"], table["high"])
    for estimate, end, height in zip(table["estimate"], ends, heights, strict=True):
        if numbers and not np.isnan(estimate):
            _note(f"{estimate:.3f}", (end, height), ax)


def _reach(table: pd.DataFrame) -> np.ndarray:
    """Return (2, N) lengths of whiskers, 0 where a percentile interval, as may happen, lies beside its estimate."""
    return np.maximum([table["estimate"] - table["low"], table["high"] - table["estimate"]], 0)


def _name_rows(names: Sequence[str], ax: Axes) -> None:
    """Name the rows of a chart, the first on top, and leave room for numbers at its sides."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.7)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", alpha=0.3)
    ax.margins(x=0.12)


def _note(text: str, point: tuple[float, float], ax: Axes) -> None:
    """Write in small print to the right of a point."""
    ax.annotate(text, point, xytext=(6, 0), textcoords="offset points", va="center", fontsize=SMALL)


def legend_beside(ax: Axes, *, title: str | None = None) -> Legend:
    """Add a legend to the right of the axes, where it covers no data."""
    return ax.legend(title=title, alignment="left", loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
