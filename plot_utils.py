"""Charts: `plot_*(data, ax) -> ax` draws one panel, `draw_*(fig, data) -> fig` fills a Figure or SubFigure.

These functions only draw numbers that they are given. They compute no metrics, show and save nothing and change no
global setting. Figures need `layout="constrained"`, which makes room for labels and legends, and 0.2 inch of height for
each bar or dot. The caller sets the titles, because only the caller knows whether the data are synthetic.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

MARKERS = "osD^vPX<"  # for black-and-white prints
LINES = ("-", "--", "-.", (0, (1, 1)))
SMALL = 8.5  # points; the smallest readable text in a notebook 1000 px wide
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
    """Return a colour for each name, by position. The same list of names has the same colours in every figure.

    Colours repeat after ten names; `styles` adds different lines and markers.
    """
    return dict(zip(names, sns.color_palette(COLORS, len(names)), strict=True))


def styles(names: Sequence[str]) -> dict[str, dict[str, object]]:
    """Return a colour, a line style and a marker for each name, by position. Up to 40 names differ in colour or
    line, and also in colour or marker.
    """
    looks = {}
    for i, (name, color) in enumerate(palette(names).items()):
        line = LINES[(i + i // len(COLORS)) % len(LINES)]
        looks[name] = {"color": color, "linestyle": line, "marker": MARKERS[i % len(MARKERS)]}
    return looks


# Notebook 1: the data


def plot_bars(table: pd.DataFrame, ax: Axes, *, number: str, title: str, equal_shares: bool = False) -> Axes:
    """Draw a group of bars for each row of a table. If the names of the rows do not fit side by side, the bars are
    horizontal, with the first row on top.

    Args:
        table: the values; a row for each group, a column for each colour.
        ax: Axes to fill.
        number: the format of the number at each bar.
        title: the title of the axis of values.
        equal_shares: draw a dashed line at 100 % / number of rows, for a table of percentages.
    """
    horizontal = len(table) > FEW or sum(map(len, table.index)) > 70
    colors = palette(list(table.columns))
    table.plot(kind="barh" if horizontal else "bar", ax=ax, color=colors, width=0.84, rot=0, edgecolor="white")
    for bars in ax.containers:
        ax.bar_label(bars, fmt=number, padding=2, fontsize=SMALL)
    names_axis, value_axis = (ax.yaxis, ax.xaxis) if horizontal else (ax.xaxis, ax.yaxis)
    names_axis.set(inverted=horizontal, label_text="")
    names_axis.set_tick_params(length=0)
    value_axis.set(label_text=title, major_locator=MaxNLocator(integer=True, nbins=6), major_formatter="{x:,.0f}")
    if equal_shares:
        line = ax.axvline if horizontal else ax.axhline
        line(100 / len(table), color="0.3", linestyle="--", linewidth=1, zorder=3, label="equal shares")
    ax.margins(**{"x" if horizontal else "y": 0.12})
    ax.spines[["top", "right"]].set_visible(False)
    legend_beside(ax)
    return ax


def plot_image_sizes(sizes: pd.DataFrame, ax: Axes) -> Axes:
    """Draw width against height. `sizes` has a row for each image and the columns width, height and class. The area of
    a marker shows the number of images of this size.
    """
    counts = sizes.groupby(["class", "width", "height"], sort=False).size()
    for name, style in styles(list(dict.fromkeys(sizes["class"]))).items():
        of_class = counts[name].rename("images").reset_index()
        areas = np.maximum(500 * of_class["images"] / counts.max(), 12)
        # Markers are hollow and differ in shape, so classes with the same sizes all stay visible.
        look = {"facecolor": (*style["color"], 0.12), "edgecolor": style["color"], "marker": style["marker"]}
        label = f"{name}: {of_class['images'].sum():,} images, {len(of_class):,} size{'s' * (len(of_class) > 1)}"
        ax.scatter(of_class["width"], of_class["height"], areas, **look, label=label)
    ax.axline((0, 0), slope=1, color="0.6", linestyle=":", linewidth=1, zorder=0, label="square")
    right, top = 1.15 * sizes[["width", "height"]].max()
    ax.set(xlim=(0, right), ylim=(0, top), xlabel="width (pixels)", ylabel="height (pixels)")
    legend = legend_beside(ax, title="marker area: number of images")
    for handle in legend.legend_handles[:-1]:
        handle.set_sizes([40])
    return ax


def plot_intensities(histograms: Mapping[str, np.ndarray], edges: np.ndarray, ax: Axes) -> Axes:
    """Draw the mean histogram of each class and, for up to five classes, the band of its middle half of images.

    Args:
        histograms: by class, (N, B) densities of grey values, a row for each image.
        edges: (B + 1,) grey values between the bins, 0 to 255.
        ax: Axes to fill.
    """
    centres = (edges[:-1] + edges[1:]) / 2
    bands = len(histograms) <= FEW
    for name, style in styles(list(histograms)).items():
        densities = histograms[name]
        if bands:
            quartiles = np.percentile(densities, [25, 75], axis=0)
            ax.fill_between(centres, *quartiles, color=style["color"], alpha=0.15, linewidth=0)
        label = f"{name} (n = {len(densities):,})"
        ax.plot(centres, densities.mean(axis=0), **style | {"marker": None}, label=label)
    ax.set(xlabel="grey value (0 = black, 255 = white)", ylabel="density", xlim=edges[[0, -1]], ylim=(0, None))
    legend_beside(ax, title="line: mean\nband: middle half of images" if bands else "line: mean")
    return ax


# Notebook 2: the training


def draw_learning_curves(
    fig: FigureBase, histories: Mapping[str, pd.DataFrame], *, best_epochs: Mapping[str, int]
) -> FigureBase:
    """Draw the loss (left) and a score (right) by epoch. Training is dashed, validation is solid. A star marks the kept
    epoch. A thin vertical line marks a change of phase.

    Args:
        fig: Figure or SubFigure to fill.
        histories: by network, a row for each epoch; columns epoch, phase, and train_ and val_ loss and score. The
            score is "accuracy" or "auc".
        best_epochs: by network, the epoch whose weights were kept.
    """
    colors = palette(list(histories))
    changes = {first - 0.5 for history in histories.values() for first in history["epoch"][history["phase"].diff() > 0]}
    score = "auc" if any("val_auc" in history for history in histories.values()) else "accuracy"
    for ax, measure in zip(fig.subplots(1, 2), ("loss", score), strict=True):
        for name, history in histories.items():
            by_epoch = history.set_index("epoch")
            marker = "o" if len(by_epoch) == 1 else None  # a line needs two points
            ax.plot(by_epoch[f"train_{measure}"], "--", color=colors[name], lw=1.2, marker=marker)
            ax.plot(by_epoch[f"val_{measure}"], "-", color=colors[name], lw=2)
            ax.plot(best_epochs[name], by_epoch.loc[best_epochs[name], f"val_{measure}"], color=colors[name], **STAR)
        for change in changes:
            ax.axvline(change, **PHASE, zorder=0)
        ax.set(xlabel="epoch", ylabel="mean area under the ROC curve" if measure == "auc" else measure)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlim(0.5, max(history["epoch"].max() for history in histories.values()) + 0.5)
        ax.grid(alpha=0.3)
    handles = [Line2D([], [], color=color, lw=2, label=name) for name, color in colors.items()]
    training = Line2D([], [], color="0.3", linestyle="--", lw=1.2, label="training")
    validation = Line2D([], [], color="0.3", lw=2, label="validation")
    handles += [training, validation, Line2D([], [], color="0.8", **STAR, label="kept epoch")]
    handles += [Line2D([], [], **PHASE, label="change of phase")] * bool(changes)
    fig.legend(handles=handles, loc="outside right upper", frameon=False)
    return fig


# Notebook 3: the results


def draw_score_and_minutes(fig: FigureBase, table: pd.DataFrame, *, score: str) -> FigureBase:
    """Draw the score of each network with its interval (left) and the minutes of its training (right) as horizontal
    bars, in the order of the table.

    `table` has the columns network, estimate, low, high and minutes. Scores are 0 to 1. If low and high are NaN,
    no whiskers are drawn.
    """
    left, right = fig.subplots(1, 2, sharey=True)
    bars = {"color": list(palette(list(table["network"])).values()), "height": 0.65}
    by_score = left, "estimate", "{:.1%}".format, {"xerr": _reach(table), "capsize": 3}
    for ax, column, number, whiskers in (by_score, (right, "minutes", _minutes, {})):
        drawn = ax.barh(range(len(table)), table[column], **whiskers, **bars)
        ax.bar_label(drawn, table[column].map(number), padding=5, fontsize=SMALL)
        _name_rows(list(table["network"]), ax)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_axisbelow(True)
    # The axis ends beyond 100 %, because the number of a perfect network needs room.
    left.set(xlabel=f"{score} and its interval", xlim=(0, 1.2), xticks=np.linspace(0, 1, 6))
    left.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    right.set(xlabel="minutes of training", xlim=(0, max(1e-3, 1.25 * table["minutes"].max())))
    right.xaxis.set_major_locator(MaxNLocator(4))
    return fig


def _minutes(value: float) -> str:
    return f"{60 * value:.0f} s" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def plot_confusion(counts: np.ndarray, classes: Sequence[str], ax: Axes) -> Axes:
    """Draw (C, C) counts, row = true class, column = predicted class. The shade is the share of the true class. For up
    to eight classes, the share is also written below the count.
    """
    support = counts.sum(axis=1)
    shares = counts / np.maximum(support, 1)[:, None]
    texts = counts.astype(str).astype(object)
    if len(classes) <= 8:
        texts += [[f"\n{share:.1%}" if sum(row) else "\n–" for share in row] for row in shares]
    gap, rotation, align = (" ", 45, "right") if len(classes) > FEW else ("\n", 0, "center")
    names = [name.replace(" ", gap) for name in classes]
    rows = [f"{name}{gap}(n = {n})" for name, n in zip(classes, support, strict=True)]
    look = {"cmap": "Blues", "vmin": 0, "vmax": 1, "cbar": False, "square": True, "linewidths": 0.5}
    text = {"annot": texts, "fmt": "", "annot_kws": {"fontsize": SMALL if len(classes) > FEW else 10}}
    sns.heatmap(shares, **text, **look, linecolor="0.85", ax=ax)
    ax.set_xticks(ax.get_xticks(), names, rotation=rotation, ha=align, rotation_mode="anchor")
    ax.set_yticks(ax.get_yticks(), rows, rotation=0)
    ax.tick_params(length=0)
    ax.set(xlabel="predicted class", ylabel="true class")
    return ax


def plot_roc(curves: Mapping[str, tuple[np.ndarray, np.ndarray, float]], ax: Axes) -> Axes:
    """Draw the ROC curve of each class and the diagonal of chance. The legend has the areas. For more than five
    classes it is beside the axes.

    `curves` has, by class, the false positive rates, the true positive rates and the area. The area is NaN if all
    images belong to the class, or none.
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
    """Draw areas under the ROC curve as dots with whiskers, the largest on top. A dashed line marks chance; a solid
    line with a band marks the mean and its interval.

    `areas` has a row for each label; it and `mean` have estimate, low and high. Labels without an area are at the
    bottom, without a dot.
    """
    areas = areas.sort_values("estimate", ascending=False, kind="stable")
    rows = np.arange(len(areas))
    ax.axvline(0.5, color="0.4", linestyle="--", linewidth=1.2, label="chance (0.500)")
    ax.axvspan(mean["low"], mean["high"], color=RED, alpha=0.15, linewidth=0)
    ax.axvline(mean["estimate"], color=RED, linewidth=1.5, label=f"mean ({mean['estimate']:.3f})")
    _interval_dots(areas, rows, ax, fmt="o", color=BLUE)
    for row in rows[areas["estimate"].isna()]:
        _note("no area", (0.5, row), ax)
    _name_rows(list(areas.index), ax)
    ax.set_xlabel("area under the ROC curve (dot) and its interval (whiskers)")
    legend_beside(ax)
    return ax


def plot_threshold_tradeoff(points: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], ax: Axes) -> Axes:
    """Draw precision (solid) and recall (dashed) over the decision threshold: a thin line for each label, and their
    means as thick lines. Above the largest probability of a label, its recall is 0 and its precision is not drawn.

    `points` has, by label, ascending thresholds, and the precision and the recall at each.
    """
    grid = np.linspace(0, 1, 501)
    precision = 1, "precision", np.nan, {"color": BLUE, "linestyle": "-"}
    for column, name, beyond, look in (precision, (2, "recall", 0, {"color": RED, "linestyle": "--"})):
        # Between two thresholds of a label, the decisions are those at the larger one.
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
    """Draw dots with whiskers. `table` has the columns network, metric, estimate, low and high. Metrics, and
    the networks within each metric, have the table's order from top to bottom.
    """
    metrics = table["metric"].unique().tolist()
    networks = styles(table["network"].unique())
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
    """Draw a dot for each seed and their mean as a line. The interval of the first seed is below them. So the spread
    over trainings can be compared with the spread over patients.

    The index of `scores` has the levels network and seed. `intervals` has, by network, estimate, low and high of the
    first seed.
    """
    spread = scores.groupby(level="network", sort=False).agg(["mean", "std"])
    rows = np.arange(len(spread))
    ax.vlines(spread["mean"], rows - 0.4, rows, color=BLUE, lw=2, label="mean of the seeds\n(± standard deviation)")
    for row, (name, (mean, std)) in enumerate(spread.iterrows()):
        # Each seed has its own height, so that equal scores do not hide one another.
        heights = row - 0.4 + 0.4 * (np.arange(len(scores[name])) + 0.5) / len(scores[name])
        ax.plot(scores[name], heights, "o", color=BLUE, alpha=0.8, label=None if row else "one seed")
        place = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center"}
        ax.annotate(f"mean {mean:.3f} ± {std:.3f}", (mean, row - 0.4), **place, fontsize=SMALL)
    label = "first seed, its interval\nover patients"
    _whiskers(intervals.loc[spread.index], rows + 0.2, ax, fmt="s", color=RED, label=label)
    _name_rows(list(spread.index), ax)
    legend_beside(ax)
    return ax


def plot_reliability(tables: Mapping[str, pd.DataFrame], ax: Axes) -> Axes:
    """Draw accuracy against confidence. The area of a marker shows the bin's share of the images. Bins of fewer than
    `FEW_IMAGES` images are hollow and not part of the line. Below the diagonal a network is over-confident.

    `tables` has, by network, a row for each bin with the columns confidence, accuracy and count.
    """
    ax.plot([0, 1], [0, 1], **CHANCE)
    ax.annotate("over-confident", (0.97, 0.04), ha="right", color="0.35", style="italic")
    ax.annotate("under-confident", (0.03, 0.93), ha="left", color="0.35", style="italic")
    for name, style in styles(list(tables)).items():
        filled = tables[name][tables[name]["count"] > 0]
        enough = filled["count"] >= FEW_IMAGES
        ax.plot("confidence", "accuracy", data=filled[enough], color=style["color"], linewidth=1.5, label="_line")
        faces = [(*style["color"], 0.65) if solid else "none" for solid in enough]
        look = {"marker": style["marker"], "facecolors": faces, "edgecolors": [style["color"]]}
        areas = np.maximum(250 * filled["count"] / filled["count"].sum(), 10)
        ax.scatter(filled["confidence"], filled["accuracy"], areas, **look, label=name)
    labels = {"xlabel": "confidence (probability of the predicted class)", "ylabel": "accuracy (share of them correct)"}
    ax.set(xlim=(0, 1.04), ylim=(0, 1.04), aspect="equal", **labels)
    legend = legend_beside(ax, title=f"marker area: share of images\nhollow: fewer than {FEW_IMAGES} images")
    for handle in legend.legend_handles:
        handle.set(sizes=[45], facecolor=handle.get_edgecolor())
    return ax


# Parts of several charts


def _interval_dots(table: pd.DataFrame, heights: np.ndarray, ax: Axes, **style: object) -> None:
    """Draw the dots of `_whiskers`, with the estimate beside each dot."""
    _whiskers(table, heights, ax, **style)
    ends = np.fmax(table["estimate"], table["high"])
    for estimate, end, height in zip(table["estimate"], ends, heights, strict=True):
        if not np.isnan(estimate):
            _note(f"{estimate:.3f}", (end, height), ax)


def _whiskers(table: pd.DataFrame, heights: np.ndarray, ax: Axes, **style: object) -> None:
    """Draw the estimates of a table as dots, with whiskers from low to high where these are not NaN."""
    ax.errorbar(table["estimate"], heights, xerr=_reach(table), capsize=3, markersize=6, **style)


def _reach(table: pd.DataFrame) -> np.ndarray:
    """Return (2, N) lengths of whiskers. A length is 0 if the estimate lies outside its percentile interval."""
    return np.maximum([table["estimate"] - table["low"], table["high"] - table["estimate"]], 0)


def _name_rows(names: Sequence[str], ax: Axes) -> None:
    """Name the rows of a chart, with the first on top. Leave room for numbers on both sides."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.7)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", alpha=0.3)
    ax.margins(x=0.12)


def _note(text: str, point: tuple[float, float], ax: Axes) -> None:
    """Write a small note to the right of a point."""
    ax.annotate(text, point, xytext=(6, 0), textcoords="offset points", va="center", fontsize=SMALL)


def legend_beside(ax: Axes, *, title: str | None = None) -> Legend:
    """Add a legend to the right of the axes, where it covers no data."""
    return ax.legend(title=title, alignment="left", loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
