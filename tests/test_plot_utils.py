"""Claims about what plot_utils.py draws, read back from the figures."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from figure_claims import inside_figure, legend_texts
from matplotlib.figure import Figure

import plot_utils

CLASSES = ["COVID-19", "Lung Opacity", "Normal", "Viral Pneumonia"]
NETWORKS = ["vgg16", "resnet18", "densenet121"]


@pytest.fixture
def fig():
    return Figure(figsize=(9, 5), layout="constrained")


@pytest.fixture
def ax(fig):
    return fig.subplots()


def lines_by_label(ax):
    return {line.get_label(): line for line in ax.lines}


FINDINGS = ["Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia"]
FINDINGS += ["Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"]
EIGHT = [f"a_network_of_long_name_{i}" for i in range(8)]


@pytest.mark.slow
def test_import_does_not_change_the_settings_of_matplotlib():
    code = "import matplotlib as m; before = dict(m.rcParams); import plot_utils; assert dict(m.rcParams) == before"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_same_names_have_the_same_colours_in_every_figure():
    colors = plot_utils.palette(NETWORKS)
    assert list(colors) == NETWORKS
    assert len(set(colors.values())) == len(NETWORKS)
    assert colors == plot_utils.palette(NETWORKS)


def test_fourteen_names_differ_in_colour_or_line_and_in_colour_or_marker():
    styles = plot_utils.styles(FINDINGS)
    assert len({(style["color"], style["linestyle"]) for style in styles.values()}) == 14
    assert len({(style["color"], style["marker"]) for style in styles.values()}) == 14
    assert {name: style["color"] for name, style in styles.items()} == plot_utils.palette(FINDINGS)


# Notebook 1


def test_class_counts_are_the_heights_and_the_numbers_of_the_bars(fig, ax):
    counts = pd.DataFrame({"train": [10, 20, 3000, 4], "test": [1, 2, 3, 0]}, index=CLASSES)
    assert plot_utils.plot_bars(counts, ax, number="{:,.0f}", title="images") is ax
    for split, bars in zip(counts.columns, ax.containers, strict=True):
        assert [bar.get_height() for bar in bars] == counts[split].to_list()
    assert [t.get_text() for t in ax.texts] == ["10", "20", "3,000", "4", "1", "2", "3", "0"]
    assert [t.get_text() for t in ax.get_xticklabels()] == CLASSES
    assert legend_texts(ax.get_legend()) == ["train", "test"]
    assert inside_figure(fig)


def test_axis_of_counts_has_whole_numbers(fig, ax):
    counts = pd.DataFrame({"test": [1, 2]}, index=CLASSES[:2])
    plot_utils.plot_bars(counts, ax, number="{:,.0f}", title="images")
    fig.canvas.draw()
    assert all(tick == round(tick) for tick in ax.get_yticks())


def test_a_line_marks_equal_shares(ax):
    shares = pd.DataFrame({"as they come": [25.0, 75], "weighted": [50.0, 50]}, index=CLASSES[:2])
    plot_utils.plot_bars(shares, ax, number="{:.1f}%", title="share", equal_shares=True)
    assert [text.get_text() for text in ax.texts] == ["25.0%", "75.0%", "50.0%", "50.0%"]
    assert list(lines_by_label(ax)["equal shares"].get_ydata()) == [50, 50]


def test_bars_of_many_classes_are_horizontal_with_the_first_on_top():
    fig = Figure(figsize=(9, 8), layout="constrained")
    ax = fig.subplots()
    counts = pd.DataFrame({"train": range(100, 114), "test": range(14)}, index=FINDINGS)
    plot_utils.plot_bars(counts, ax, number="{:,.0f}", title="images")
    for split, bars in zip(counts.columns, ax.containers, strict=True):
        assert [bar.get_width() for bar in bars] == counts[split].to_list()
    assert [t.get_text() for t in ax.get_yticklabels()] == FINDINGS
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    assert ax.get_xlabel() == "images"
    assert inside_figure(fig)
    again = fig.add_subplot()
    plot_utils.plot_bars(counts, again, number="{:.0f}", title="share", equal_shares=True)
    assert lines_by_label(again)["equal shares"].get_xdata() == pytest.approx([100 / 14] * 2)


def test_each_image_size_is_one_marker_with_an_area_in_proportion(fig, ax):
    sizes = pd.DataFrame(
        [(300, 200, "Normal")] * 40 + [(500, 600, "Normal")] * 10 + [(300, 200, "COVID-19")] * 20,
        columns=["width", "height", "class"],
    )
    plot_utils.plot_image_sizes(sizes, ax)
    normal, covid = ax.collections
    points = {tuple(xy): area for xy, area in zip(normal.get_offsets().tolist(), normal.get_sizes(), strict=True)}
    assert points[300, 200] == pytest.approx(4 * points[500, 600])
    assert covid.get_offsets().tolist() == [[300, 200]]
    assert covid.get_sizes()[0] == pytest.approx(points[300, 200] / 2)
    assert legend_texts(ax.get_legend()) == ["Normal: 50 images, 2 sizes", "COVID-19: 20 images, 1 size", "square"]
    assert ax.get_xlim()[0] == ax.get_ylim()[0] == 0
    assert inside_figure(fig)


def test_intensity_lines_are_means_and_bands_are_quartiles_over_images(ax):
    edges = np.linspace(0, 255, 6)
    densities = np.random.default_rng(0).random((9, 5))
    plot_utils.plot_intensities({"Normal": densities, "COVID-19": densities + 1}, edges, ax)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), densities.mean(axis=0))
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [25.5, 76.5, 127.5, 178.5, 229.5])
    corners = ax.collections[0].get_paths()[0].vertices
    low, high = np.percentile(densities[:, 0], [25, 75])
    at_first = corners[np.isclose(corners[:, 0], 25.5), 1]
    assert (at_first.min(), at_first.max()) == pytest.approx((low, high))


def test_intensities_of_many_classes_are_lines_without_bands(fig, ax):
    histograms = {name: np.random.default_rng(0).random((3, 5)) for name in FINDINGS}
    plot_utils.plot_intensities(histograms, np.linspace(0, 255, 6), ax)
    assert len(ax.lines) == 14
    assert not ax.collections
    assert inside_figure(fig)


# Notebook 2


def histories():
    rng = np.random.default_rng(0)
    columns = ["train_loss", "train_accuracy", "val_loss", "val_accuracy"]
    tables = {name: pd.DataFrame(rng.random((6, 4)), columns=columns) for name in NETWORKS}
    return {name: history.assign(epoch=np.arange(1, 7), phase=1) for name, history in tables.items()}


def test_learning_curves_have_the_values_of_the_histories(fig):
    tables = histories()
    best_epochs = dict(zip(NETWORKS, (2, 6, 1), strict=True))
    plot_utils.draw_learning_curves(fig, tables, best_epochs=best_epochs)
    colors = plot_utils.palette(NETWORKS)
    for ax, figure in zip(fig.axes, ("loss", "accuracy"), strict=True):
        lines = np.reshape(ax.lines, (3, 3))
        for name, (train, val, star) in zip(NETWORKS, lines, strict=True):
            history = tables[name]
            np.testing.assert_array_equal(train.get_ydata(), history[f"train_{figure}"])
            np.testing.assert_array_equal(val.get_ydata(), history[f"val_{figure}"])
            np.testing.assert_array_equal(val.get_xdata(), history["epoch"])
            assert (train.get_linestyle(), val.get_linestyle()) == ("--", "-")
            assert train.get_color() == val.get_color() == colors[name]
            assert star.get_xdata()[0] == best_epochs[name]
            assert star.get_ydata()[0] == history[f"val_{figure}"][best_epochs[name] - 1]
    assert legend_texts(fig.legends[0])[:3] == NETWORKS
    assert inside_figure(fig)


def test_learning_curves_of_eight_networks_show_auc_and_where_the_phase_changes(fig):
    history = pd.DataFrame(
        {
            "epoch": [1, 2, 3, 4],
            "phase": [1, 1, 2, 2],
            "train_loss": [4.0, 3, 2, 1],
            "val_loss": [4.0, 3, 2, 3],
            "train_auc": [0.5, 0.6, 0.7, 0.8],
            "val_auc": [0.5, 0.6, np.nan, 0.7],
        }
    )
    plot_utils.draw_learning_curves(fig, dict.fromkeys(EIGHT, history), best_epochs=dict.fromkeys(EIGHT, 4))
    for ax in fig.axes:
        stars = [line for line in ax.lines if line.get_marker() == "*"]
        assert [star.get_xdata()[0] for star in stars] == [4] * 8
        assert [list(line.get_xdata()) for line in ax.lines[24:]] == [[2.5, 2.5]]
    assert legend_texts(fig.legends[0])[-1] == "change of phase"
    assert inside_figure(fig)


def test_learning_curves_of_one_phase_have_no_phase_line(fig):
    best_epochs = dict.fromkeys(NETWORKS, 1)
    plot_utils.draw_learning_curves(fig, histories(), best_epochs=best_epochs)
    assert len(fig.axes[0].lines) == 9
    assert "change of phase" not in legend_texts(fig.legends[0])


def test_scores_and_minutes_are_bars_side_by_side(fig):
    table = pd.DataFrame(
        {
            "network": EIGHT,
            "estimate": np.linspace(0.7, 1, 8),
            "low": [np.nan, *np.linspace(0.65, 0.98, 7)],
            "high": [np.nan, *np.linspace(0.8, 1, 7)],
            "minutes": [0, 0.4, 3.25, 12, 45, 130, 700, 1200],
        }
    )
    plot_utils.draw_score_and_minutes(fig, table, score="accuracy")
    left, right = fig.axes
    assert [bar.get_width() for bar in left.patches] == pytest.approx(table["estimate"].to_list())
    assert [bar.get_width() for bar in right.patches] == table["minutes"].to_list()
    ends = [segment[:, 0].tolist() for segment in left.collections[0].get_segments() if len(segment)]
    np.testing.assert_allclose(ends, table[["low", "high"]].dropna())
    minutes = [t.get_text() for t in right.texts]
    assert minutes == ["0 s", "24 s", "3.2", "12", "45", "130", "700", "1,200"]
    assert [t.get_text() for t in left.get_yticklabels()] == EIGHT
    assert left.get_ylim()[0] > left.get_ylim()[1]
    assert inside_figure(fig)


# Notebook 3


def test_confusion_texts_are_the_counts_and_rows_are_true_classes(fig, ax):
    counts = np.arange(16).reshape(4, 4) ** 2
    counts[1] = 0
    plot_utils.plot_confusion(counts, CLASSES, ax)
    totals = counts.sum(axis=1, keepdims=True).repeat(4, axis=1)
    expected = [
        f"{count}\n{count / total:.1%}" if total else f"{count}\n–"
        for count, total in zip(counts.ravel(), totals.ravel(), strict=True)
    ]
    assert [text.get_text() for text in ax.texts] == expected
    assert [text.get_position() for text in ax.texts[:5]] == [
        (0.5, 0.5),
        (1.5, 0.5),
        (2.5, 0.5),
        (3.5, 0.5),
        (0.5, 1.5),
    ]
    assert ax.get_ylabel() == "true class"
    assert ax.get_xlabel() == "predicted class"
    rows = [f"{name}\n(n = {n})" for name, n in zip(CLASSES, counts.sum(axis=1), strict=True)]
    assert [t.get_text() for t in ax.get_yticklabels()] == rows
    assert [t.get_text().replace("\n", " ") for t in ax.get_xticklabels()] == CLASSES
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # row 0 is on top
    assert inside_figure(fig)


def test_confusion_of_many_classes_keeps_the_counts_and_slants_the_names():
    fig = Figure(figsize=(10, 9), layout="constrained")
    ax = fig.subplots()
    counts = np.arange(196).reshape(14, 14) ** 2
    plot_utils.plot_confusion(counts, FINDINGS, ax)
    assert [text.get_text() for text in ax.texts] == [str(count) for count in counts.ravel()]
    assert {label.get_rotation() for label in ax.get_xticklabels()} == {45}
    assert inside_figure(fig)


def test_roc_curves_have_their_area_in_the_legend_and_chance_beside_them(ax):
    rates = (np.array([0, 0.2, 1]), np.array([0, 0.9, 1]))
    curves = {"Normal": (*rates, 0.8512), "COVID-19": (np.empty(0), np.empty(0), np.nan)}
    plot_utils.plot_roc(curves, ax)
    texts = legend_texts(ax.get_legend())
    assert texts == ["Normal (0.851)", "COVID-19 (no images)", "chance (0.500)"]
    normal, _, chance = ax.lines
    np.testing.assert_array_equal(chance.get_xdata(), chance.get_ydata())
    np.testing.assert_array_equal(normal.get_xdata(), rates[0])
    np.testing.assert_array_equal(normal.get_ydata(), rates[1])


def test_roc_curves_of_fourteen_labels_have_their_legend_beside(fig, ax):
    rates = (np.array([0, 0.2, 1]), np.array([0, 0.7, 1]))
    curves = {name: (*rates, 0.75) for name in FINDINGS[:-1]} | {"Hernia": (np.empty(0), np.empty(0), np.nan)}
    plot_utils.plot_roc(curves, ax)
    texts = legend_texts(ax.get_legend())
    assert texts[-2:] == ["Hernia (no images)", "chance (0.500)"]
    assert len(texts) == 15
    assert inside_figure(fig)
    assert ax.get_legend().get_window_extent().x0 > ax.get_window_extent().x1


def test_areas_by_label_are_sorted_around_chance_and_their_mean(fig, ax):
    areas = pd.DataFrame(
        {"estimate": [0.6, np.nan, 0.8], "low": [0.45, np.nan, 0.75], "high": [0.7, np.nan, 0.85]},
        index=["Mass", "Hernia", "Pleural_Thickening"],
    )
    plot_utils.plot_auc_by_label(areas, pd.Series({"estimate": 0.7, "low": 0.65, "high": 0.74}), ax)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["Pleural_Thickening", "Mass", "Hernia"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    dots, _, (whiskers,) = ax.containers[0]
    np.testing.assert_allclose(dots.get_xdata().astype(float), [0.8, 0.6, np.nan])
    drawn = [segment[:, 0].tolist() for segment in whiskers.get_segments() if len(segment)]
    np.testing.assert_allclose(drawn[:2], [[0.75, 0.85], [0.45, 0.7]])
    assert [line.get_xdata()[0] for line in ax.lines[:2]] == [0.5, 0.7]
    assert [t.get_text() for t in ax.texts] == ["0.800", "0.600", "no area"]
    assert legend_texts(ax.get_legend()) == ["chance (0.500)", "mean (0.700)"]
    assert inside_figure(fig)


def test_precision_and_recall_of_several_labels_are_thin_and_their_mean_is_thick(fig, ax):
    points = {
        "Mass": (np.array([0.2, 0.6]), np.array([0.5, 1.0]), np.array([1.0, 0.5])),
        "Edema": (np.array([0.1, 0.3]), np.array([0.3, 0.4]), np.array([1.0, 0.9])),
    }
    plot_utils.plot_threshold_tradeoff(points, ax)
    lines = lines_by_label(ax)
    precision, recall = (lines[f"{name}, mean of 2 labels"] for name in ("precision", "recall"))
    assert (precision.get_linestyle(), recall.get_linestyle()) == ("-", "--")
    assert precision.get_linewidth() > 2 * ax.lines[0].get_linewidth()
    # At 0.5 Edema is never predicted: its recall is 0, and it has no precision.
    for line, expected in ((precision, {0.15: 0.45, 0.5: 1.0}), (recall, {0.15: 0.95, 0.5: 0.25})):
        for threshold, value in expected.items():
            assert np.interp(threshold, line.get_xdata(), line.get_ydata()) == pytest.approx(value)
    last = precision.get_xdata()[np.isfinite(precision.get_ydata())][-1]
    assert last == pytest.approx(0.6)  # above it, no image is predicted to have a label
    assert recall.get_xdata()[-1] == 1
    assert inside_figure(fig)


def test_comparison_of_eight_networks_fits():
    fig = Figure(figsize=(10, 9), layout="constrained")
    ax = fig.subplots()
    rows = [(n, m, 0.8, 0.7, 0.85) for n in EIGHT for m in ("accuracy", "recall", "f1", "roc_auc")]
    plot_utils.plot_comparison(pd.DataFrame(rows, columns=["network", "metric", "estimate", "low", "high"]), ax)
    heights = np.sort([text.xy[1] for text in ax.texts])
    gap = np.diff(heights).min() * ax.get_window_extent().height / 4
    assert gap > plot_utils.SMALL
    assert legend_texts(ax.get_legend()) == EIGHT
    assert inside_figure(fig)


def test_whiskers_reach_from_low_to_high_and_a_missing_interval_is_a_bare_dot(fig, ax):
    rows = [
        ("vgg16", "accuracy", 0.8, 0.7, 0.85),
        ("resnet18", "accuracy", 0.9, 0.88, 0.95),
        ("vgg16", "recall", 0.6, np.nan, np.nan),
        ("resnet18", "recall", 0.7, 0.6, 0.8),
    ]
    table = pd.DataFrame(rows, columns=["network", "metric", "estimate", "low", "high"])
    plot_utils.plot_comparison(table, ax)
    for name, container in zip(["vgg16", "resnet18"], ax.containers, strict=True):
        of_network = table[table["network"] == name]
        markers, _, (whiskers,) = container
        np.testing.assert_allclose(markers.get_xdata().astype(float), of_network["estimate"])
        drawn = np.array([segment[:, 0] for segment in whiskers.get_segments() if len(segment)])
        np.testing.assert_allclose(drawn, of_network[["low", "high"]].dropna())
    assert [t.get_text() for t in ax.get_yticklabels()] == ["accuracy", "recall"]
    assert [t.get_text() for t in ax.texts] == ["0.800", "0.600", "0.900", "0.700"]
    assert inside_figure(fig)


def test_seeds_are_dots_around_their_mean_above_the_interval_of_the_first_seed(fig, ax):
    scores = pd.Series(
        [0.8, 0.9, 0.9, 0.7, 0.6],
        pd.MultiIndex.from_tuples(
            [("vgg16", 0), ("vgg16", 1), ("vgg16", 2), ("resnet18", 0), ("resnet18", 3)], names=["network", "seed"]
        ),
    )
    first = pd.DataFrame(
        {"estimate": [0.7, 0.5, 0.8], "low": [0.6, 0.4, np.nan], "high": [0.75, 0.6, np.nan]},
        index=["resnet18", "an ensemble", "vgg16"],
    )
    assert plot_utils.plot_seeds(scores, first, ax) is ax
    assert [text.get_text() for text in ax.get_yticklabels()] == ["vgg16", "resnet18"]
    dots = np.concatenate([line.get_xydata() for line in ax.lines if line.get_marker() == "o"])
    np.testing.assert_allclose(dots[:, 0], scores)
    assert (np.round(dots[:, 1] + 0.2) == [0, 0, 0, 1, 1]).all()
    assert len({tuple(dot) for dot in dots.tolist()}) == 5  # dots of equal scores do not overlap
    means, whiskers = (drawn.get_segments() for drawn in ax.collections)
    np.testing.assert_allclose([segment[0, 0] for segment in means], [2.6 / 3, 0.65])
    np.testing.assert_allclose([s[:, 0] for s in whiskers if len(s)], [[0.6, 0.75]])
    assert [text.get_text() for text in ax.texts] == ["mean 0.867 ± 0.058", "mean 0.650 ± 0.071"]
    assert [text.xy[0] for text in ax.texts] == pytest.approx([2.6 / 3, 0.65])  # beside the line of the mean
    assert inside_figure(fig)


def test_reliability_points_are_the_filled_bins(ax):
    table = pd.DataFrame({"confidence": [np.nan, 0.5, 0.9], "accuracy": [np.nan, 0.4, 0.95], "count": [0, 10, 30]})
    plot_utils.plot_reliability({"vgg16": table}, ax)
    (points,) = ax.collections
    assert points.get_offsets().tolist() == [[0.5, 0.4], [0.9, 0.95]]
    small, large = points.get_sizes()
    assert large == pytest.approx(3 * small)


def test_reliability_line_leaves_out_bins_of_few_images(ax):
    table = pd.DataFrame(
        {"confidence": [0.2, 0.4, 0.6, 0.8, 0.95], "accuracy": [0, 0.5, 1, 0.7, 0.9], "count": [1, 20, 9, 10, 99]}
    )
    plot_utils.plot_reliability({"vgg16": table}, ax)
    np.testing.assert_array_equal(ax.lines[1].get_xydata(), [[0.4, 0.5], [0.8, 0.7], [0.95, 0.9]])
    (points,) = ax.collections
    assert len(points.get_offsets()) == 5  # all are shown
    assert (points.get_facecolors()[:, 3] > 0).tolist() == [False, True, False, True, True]
    assert "hollow: fewer than 10 images" in ax.get_legend().get_title().get_text()
