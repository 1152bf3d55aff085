"""Claims about what plot_utils.py draws, read back from the figures."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import plot_utils
from heatmaps import overlay
from metrics import precision_recall_points

CLASSES = ["COVID-19", "Lung Opacity", "Normal", "Viral Pneumonia"]
NETWORKS = ["vgg16", "resnet18", "densenet121"]


@pytest.fixture
def fig():
    return Figure(figsize=(9, 5), layout="constrained")


@pytest.fixture
def ax(fig):
    return fig.subplots()


def grey(seed=0, size=24):
    return np.random.default_rng(seed).integers(256, size=(size, size), dtype=np.uint8)


def legend_texts(legend):
    return [text.get_text() for text in legend.get_texts()]


FINDINGS = ["Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia"]
FINDINGS += [
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
]
EIGHT = [f"a_network_of_long_name_{i}" for i in range(8)]


def inside_figure(fig):
    """Return whether, once laid out, no label or legend lies outside of the figure (1 pixel of rounding allowed)."""
    canvas = FigureCanvasAgg(fig)
    # The second time, since the layout settles axes of a fixed aspect only then.
    canvas.draw()
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [artist.get_tightbbox(renderer) for artist in (*fig.axes, *fig.legends, *fig.texts)]
    width, height = fig.bbox.width, fig.bbox.height
    return all(b.x0 >= -1 and b.y0 >= -1 and b.x1 <= width + 1 and b.y1 <= height + 1 for b in boxes)


def test_importing_leaves_matplotlibs_settings_alone():
    code = "import matplotlib as m; before = dict(m.rcParams); import plot_utils; assert dict(m.rcParams) == before"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_keeps_its_colour_in_every_figure_with_the_same_names():
    colors = plot_utils.palette(NETWORKS)
    assert list(colors) == NETWORKS
    assert len(set(colors.values())) == len(NETWORKS)
    assert colors == plot_utils.palette(NETWORKS)


def test_fourteen_names_differ_in_colour_or_line_and_in_colour_or_marker():
    styles = plot_utils._styles(FINDINGS)
    assert len({(style.color, style.line) for style in styles.values()}) == 14
    assert len({(style.color, style.marker) for style in styles.values()}) == 14
    assert {name: style.color for name, style in styles.items()} == plot_utils.palette(FINDINGS)


# Notebook 1


def test_sample_grid_has_a_row_a_class_on_the_fixed_grey_scale(fig):
    images = {name: [grey(10 * i + j) for j in range(3)] for i, name in enumerate(CLASSES)}
    assert plot_utils.draw_samples(fig, images) is fig
    axes = np.reshape(fig.axes, (4, 3))
    assert [row[0].get_ylabel().replace("\n", " ") for row in axes] == CLASSES
    for i, name in enumerate(CLASSES):
        for j in range(3):
            (drawn,) = axes[i, j].images
            assert np.array_equal(drawn.get_array(), images[name][j])
            assert drawn.get_clim() == (0, 255)
            assert axes[i, j].get_aspect() == 1
    assert inside_figure(fig)


def test_a_class_with_fewer_samples_leaves_places_empty(fig):
    plot_utils.draw_samples(fig, {"Normal": [grey()] * 3, "COVID-19": [grey()]})
    assert [len(ax.images) for ax in fig.axes] == [1, 1, 1, 1, 0, 0]


def test_class_counts_are_the_heights_and_the_numbers_of_the_bars(fig, ax):
    counts = pd.DataFrame({"train": [10, 20, 3000, 4], "test": [1, 2, 3, 0]}, index=CLASSES)
    assert plot_utils.plot_class_counts(counts, ax) is ax
    for split, bars in zip(counts.columns, ax.containers, strict=True):
        assert [bar.get_height() for bar in bars] == counts[split].to_list()
    assert [t.get_text() for t in ax.texts] == ["10", "20", "3,000", "4", "1", "2", "3", "0"]
    assert [t.get_text() for t in ax.get_xticklabels()] == CLASSES
    assert legend_texts(ax.get_legend()) == ["train", "test"]
    assert inside_figure(fig)


def test_counts_of_a_few_images_have_whole_numbers_at_the_axis(fig, ax):
    plot_utils.plot_class_counts(pd.DataFrame({"test": [1, 2]}, index=CLASSES[:2]), ax)
    fig.canvas.draw()
    assert all(tick == round(tick) for tick in ax.get_yticks())


def test_draws_are_shares_of_each_way_of_sampling(ax):
    draws = pd.DataFrame({"as they come": [10, 30], "weighted": [500, 500]}, index=CLASSES[:2])
    plot_utils.plot_draws(draws, ax)
    heights = [[bar.get_height() for bar in bars] for bars in ax.containers]
    assert heights == [[25, 75], [50, 50]]
    assert list(ax.lines[0].get_ydata()) == [50, 50]


def test_bars_of_many_classes_lie_with_the_first_on_top():
    fig = Figure(figsize=(9, 8), layout="constrained")
    ax = fig.subplots()
    counts = pd.DataFrame({"train": range(100, 114), "test": range(14)}, index=FINDINGS)
    plot_utils.plot_class_counts(counts, ax)
    for split, bars in zip(counts.columns, ax.containers, strict=True):
        assert [bar.get_width() for bar in bars] == counts[split].to_list()
    assert [t.get_text() for t in ax.get_yticklabels()] == FINDINGS
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    assert ax.get_xlabel() == "images"
    assert inside_figure(fig)
    again = fig.add_subplot()
    plot_utils.plot_draws(counts, again)
    equal = [line for line in again.lines if line.get_label() == "equal shares"]
    assert equal[0].get_xdata() == pytest.approx([100 / 14] * 2)


def test_image_sizes_are_drawn_once_each_with_areas_in_proportion(fig, ax):
    sizes = pd.DataFrame(
        [(300, 200, "Normal")] * 40 + [(500, 600, "Normal")] * 10 + [(300, 200, "COVID-19")] * 20,
        columns=["width", "height", "class"],
    )
    plot_utils.plot_image_sizes(sizes, ax)
    normal, covid = ax.collections
    points = {
        tuple(xy): area for xy, area in zip(normal.get_offsets().tolist(), normal.get_sizes(), strict=True)
    }
    assert points[300, 200] == pytest.approx(4 * points[500, 600])
    assert covid.get_offsets().tolist() == [[300, 200]]
    assert covid.get_sizes()[0] == pytest.approx(points[300, 200] / 2)
    assert legend_texts(ax.get_legend()) == [
        "Normal: 50 images, 2 sizes",
        "COVID-19: 20 images, 1 size",
        "square",
    ]
    assert ax.get_xlim()[0] == ax.get_ylim()[0] == 0
    assert inside_figure(fig)


def test_intensity_lines_are_means_over_images_and_bands_quartiles(ax):
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


def test_mean_images_share_one_grey_scale(fig):
    means = {name: np.full((8, 8), 40.0 * i) + np.eye(8) for i, name in enumerate(CLASSES)}
    plot_utils.draw_mean_images(fig, means)
    panels = fig.axes[:4]
    assert [ax.get_title() for ax in panels] == CLASSES
    assert {ax.images[0].get_clim() for ax in panels} == {(0, 121)}


def test_augmentations_follow_their_original_five_a_row(fig):
    images = [grey(i) for i in range(8)]
    plot_utils.draw_augmentations(fig, images[0], images[1:])
    axes = np.reshape(fig.axes, (2, 5))
    for ax, image in zip(axes.flat, images, strict=False):
        assert np.array_equal(ax.images[0].get_array(), image)
    assert [ax.get_title() for ax in axes[0, :2]] == ["original", "augmented 1"]
    assert all(not ax.images and not ax.spines["left"].get_visible() for ax in axes[1, 3:])
    assert inside_figure(fig)


def test_lungs_are_outlined_above_what_the_network_sees_and_failures_are_told_in_red(fig):
    mask = np.zeros((24, 24), dtype=bool)
    mask[4:20, 3:9] = True
    images = [grey(i) for i in range(3)]
    seen = [images[0] * mask, images[1] * mask, images[2]]
    plot_utils.draw_lung_segmentations(
        fig, images, [mask, mask, 0 * mask], [None, None, "one lung only"], seen
    )
    above, below = np.reshape(fig.axes, (2, 3))
    for i in range(3):
        assert np.array_equal(above[i].images[0].get_array(), images[i])
        assert np.array_equal(below[i].images[0].get_array(), seen[i])
    assert [len(ax.collections) for ax in above] == [1, 1, 0]
    told = [ax.get_xlabel().replace("\n", " ") for ax in below]
    assert told == ["", "", "kept whole: one lung only"]
    assert to_hex(below[2].xaxis.label.get_color()) == plot_utils.WRONG
    assert inside_figure(fig)


def test_lungs_of_a_study_that_masks_none_are_drawn_without_what_no_network_sees(fig):
    mask = np.zeros((24, 24), bool)
    mask[4:20, 3:9] = True
    plot_utils.draw_lung_segmentations(fig, [grey(0), grey(1)], [mask, mask], [None, "one lung only"], None)
    assert len(fig.axes) == 2
    assert [ax.get_ylabel() for ax in fig.axes] == ["lungs\nfound", ""]
    assert [ax.get_xlabel().replace("\n", " ") for ax in fig.axes] == ["", "not believed: one lung only"]
    assert inside_figure(fig)


# Notebook 2


def histories():
    rng = np.random.default_rng(0)
    columns = ["train_loss", "train_accuracy", "val_loss", "val_accuracy"]
    made = {name: pd.DataFrame(rng.random((6, 4)), columns=columns) for name in NETWORKS}
    return {name: history.assign(epoch=np.arange(1, 7)) for name, history in made.items()}


def test_learning_curves_hold_the_histories_values(fig):
    tables = histories()
    kept = dict(zip(NETWORKS, (2, 6, 1), strict=True))
    plot_utils.draw_learning_curves(fig, tables, best_epochs=kept)
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
            assert star.get_xdata()[0] == kept[name]
            assert star.get_ydata()[0] == history[f"val_{figure}"][kept[name] - 1]
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
    plot_utils.draw_learning_curves(
        fig, dict.fromkeys(EIGHT, history), score="auc", best_epochs=dict.fromkeys(EIGHT, 4)
    )
    for ax in fig.axes:
        stars = [line for line in ax.lines if line.get_marker() == "*"]
        assert [star.get_xdata()[0] for star in stars] == [4] * 8
        assert [list(line.get_xdata()) for line in ax.lines[24:]] == [[2.5, 2.5]]
    assert legend_texts(fig.legends[0])[-1] == "change of phase"
    assert inside_figure(fig)


def test_learning_curves_of_one_phase_have_no_line_of_change(fig):
    tables = {name: history.assign(phase=1) for name, history in histories().items()}
    plot_utils.draw_learning_curves(fig, tables, best_epochs=dict.fromkeys(NETWORKS, 1))
    assert len(fig.axes[0].lines) == 9
    assert "change of phase" not in legend_texts(fig.legends[0])


def test_scores_and_minutes_are_bars_side_by_side(fig):
    table = pd.DataFrame(
        {
            "network": EIGHT,
            "estimate": np.linspace(0.7, 1, 8),
            "low": [np.nan, *np.linspace(0.65, 0.98, 7)],
            "high": [np.nan, *np.linspace(0.8, 1, 7)],
            "minutes": [np.nan, 0.4, 3.25, 12, 45, 130, 700, 1200],
        }
    )
    plot_utils.draw_score_and_minutes(fig, table)
    left, right = fig.axes
    assert [bar.get_width() for bar in left.patches] == pytest.approx(table["estimate"].to_list())
    assert [bar.get_width() for bar in right.patches] == [0, *table["minutes"][1:]]
    ends = [segment[:, 0].tolist() for segment in left.collections[0].get_segments() if len(segment)]
    np.testing.assert_allclose(ends, table[["low", "high"]].dropna())
    written = [t.get_text() for t in right.texts]
    assert written == ["not known", "24 s", "3.2", "12", "45", "130", "700", "1,200"]
    assert [t.get_text() for t in left.get_yticklabels()] == EIGHT
    assert left.get_ylim()[0] > left.get_ylim()[1]
    assert inside_figure(fig)


def test_grids_also_fill_a_part_of_a_figure(fig):
    left, right = fig.subfigures(1, 2)
    kept = dict.fromkeys(NETWORKS, 1)
    assert plot_utils.draw_learning_curves(left, histories(), best_epochs=kept) is left
    plot_utils.draw_samples(right, {"Normal": [grey()]})
    fig.canvas.draw()
    assert len(left.axes) == 2
    assert len(right.axes) == 1


# Notebook 3


def test_confusion_texts_equal_the_counts_and_row_i_is_the_true_class(fig, ax):
    counts = np.arange(16).reshape(4, 4) ** 2
    counts[1] = 0
    plot_utils.plot_confusion(counts, CLASSES, ax)
    written = {}
    for text in ax.texts:
        column, row = text.xy
        written.setdefault((row, column), []).append(text.get_text())
    for row in range(4):
        for column in range(4):
            total = counts[row].sum()
            percent = f"{counts[row, column] / total:.1%}" if total else "–"
            assert written[row, column] == [str(counts[row, column]), percent]
    assert ax.get_ylabel() == "true class"
    assert ax.get_xlabel() == "predicted class"
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        f"{name}\n(n = {n})" for name, n in zip(CLASSES, counts.sum(axis=1), strict=True)
    ]
    assert [t.get_text().replace("\n", " ") for t in ax.get_xticklabels()] == CLASSES
    # Row 0 is on top, as in the array.
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
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
    chance, normal, _ = ax.lines
    np.testing.assert_array_equal(chance.get_xdata(), chance.get_ydata())
    np.testing.assert_array_equal(normal.get_xdata(), rates[0])
    np.testing.assert_array_equal(normal.get_ydata(), rates[1])


def test_roc_curves_of_fourteen_labels_have_their_legend_beside_and_a_mean_between(fig, ax):
    heights = np.linspace(0.5, 0.95, 13)
    rates = np.array([0, 0.2, 1])
    curves = {
        name: (rates, np.array([0, height, 1]), height)
        for name, height in zip(FINDINGS, heights, strict=False)
    }
    curves["Hernia"] = (np.empty(0), np.empty(0), np.nan)
    plot_utils.plot_roc(curves, ax, mean=True)
    mean = ax.lines[-1]
    at = np.interp(0.2, mean.get_xdata(), mean.get_ydata())
    assert at == pytest.approx(heights.mean())
    texts = legend_texts(ax.get_legend())
    assert texts[-3:] == ["Hernia (no images)", f"mean ({heights.mean():.3f})", "chance (0.500)"]
    assert len(texts) == 16
    assert inside_figure(fig)
    axes_right = ax.get_window_extent().x1
    assert ax.get_legend().get_window_extent().x0 > axes_right


def test_areas_by_label_are_sorted_around_chance_and_their_mean(fig, ax):
    rows = [
        ("Mass", "roc_auc", 0.6, 0.45, 0.7),
        ("Mass", "f1", 0.1, 0.0, 0.2),
        ("Hernia", "roc_auc", np.nan, np.nan, np.nan),
        ("Pleural_Thickening", "roc_auc", 0.8, 0.75, 0.85),
        ("macro", "roc_auc", 0.7, 0.65, 0.74),
        ("macro", "accuracy", 0.9, 0.9, 0.9),
    ]
    table = pd.DataFrame(rows, columns=["class", "metric", "estimate", "low", "high"])
    plot_utils.plot_auc_by_label(table, ax)
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


def lines_by_label(ax):
    return {line.get_label(): line for line in ax.lines}


def test_precision_and_recall_are_read_off_at_any_threshold(fig, ax):
    rng = np.random.default_rng(0)
    truth, p = rng.random(200) < 0.4, rng.random(200)
    targets = truth.astype(int)
    points = precision_recall_points(targets, np.stack([1 - p, p], axis=1), 1)
    plot_utils.plot_threshold_tradeoff({"Pneumonia": points}, ax, chosen=0.31)
    lines = lines_by_label(ax)
    for threshold in (0.1, 0.4, 0.73, 0.9):
        at = round(threshold * 500)
        called = p >= threshold
        assert lines["precision"].get_ydata()[at] == pytest.approx(truth[called].mean())
        assert lines["recall"].get_ydata()[at] == pytest.approx(called[truth].mean())
    assert (lines["precision"].get_linestyle(), lines["recall"].get_linestyle()) == ("-", "--")
    assert list(lines["chosen threshold (0.31)"].get_xdata()) == [0.31, 0.31]
    assert inside_figure(fig)


def test_precision_and_recall_of_several_labels_are_thin_and_their_mean_is_thick(fig, ax):
    points = {
        "Mass": (np.array([0.2, 0.6]), np.array([0.5, 1.0]), np.array([1.0, 0.5]), 0.75),
        "Edema": (np.array([0.1, 0.3]), np.array([0.3, 0.4]), np.array([1.0, 0.9]), 0.4),
        "Hernia": (np.empty(0), np.empty(0), np.empty(0), np.nan),
    }
    plot_utils.plot_threshold_tradeoff(points, ax)
    lines = lines_by_label(ax)
    precision, recall = (lines[f"{name}, mean of 2 labels"] for name in ("precision", "recall"))
    assert precision.get_linewidth() > 2 * ax.lines[0].get_linewidth()
    # At 0.5 Edema is never predicted: its recall is 0, its precision is left out.
    for line, expected in ((precision, {0.15: 0.45, 0.5: 1.0}), (recall, {0.15: 0.95, 0.5: 0.25})):
        for threshold, value in expected.items():
            assert np.interp(threshold, line.get_xdata(), line.get_ydata()) == pytest.approx(value)
    assert precision.get_xdata()[-1] == pytest.approx(0.6)
    assert recall.get_xdata()[-1] == 1
    assert inside_figure(fig)


@pytest.mark.parametrize(
    "points", [{}, {"Hernia": (np.empty(0),) * 3 + (np.nan,)}, dict.fromkeys("ab", (np.empty(0),) * 3 + (0,))]
)
def test_precision_and_recall_of_no_label_are_a_text(fig, ax, points):
    plot_utils.plot_threshold_tradeoff(points, ax)
    assert [text.get_text() for text in ax.texts] == ["no label has both kinds of images"]
    assert inside_figure(fig)


def test_embedding_has_a_colour_and_marker_a_class_and_no_numbers(fig, ax):
    points = np.random.default_rng(0).normal(size=(140, 2))
    labels = np.arange(140) % 14
    plot_utils.plot_embedding(points, labels, FINDINGS, ax)
    for i, drawn in enumerate(ax.collections):
        np.testing.assert_array_equal(drawn.get_offsets(), points[labels == i])
    assert not len(ax.get_xticks())
    assert not len(ax.get_yticks())
    assert ax.get_aspect() == 1
    assert legend_texts(ax.get_legend())[0] == "Atelectasis (n = 10)"
    assert inside_figure(fig)


def test_comparison_of_eight_networks_fits():
    fig = Figure(figsize=(10, 9), layout="constrained")
    ax = fig.subplots()
    rows = [(n, m, 0.8, 0.7, 0.85) for n in EIGHT for m in ("accuracy", "recall", "f1", "roc_auc")]
    plot_utils.plot_comparison(
        pd.DataFrame(rows, columns=["network", "metric", "estimate", "low", "high"]), ax
    )
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
        own = table[table["network"] == name]
        markers, _, (whiskers,) = container
        np.testing.assert_allclose(markers.get_xdata().astype(float), own["estimate"])
        drawn = np.array([segment[:, 0] for segment in whiskers.get_segments() if len(segment)])
        np.testing.assert_allclose(drawn, own[["low", "high"]].dropna())
    assert [t.get_text() for t in ax.get_yticklabels()] == ["accuracy", "recall"]
    assert [t.get_text() for t in ax.texts] == ["0.800", "0.600", "0.900", "0.700"]
    assert inside_figure(fig)


def test_seeds_are_dots_around_their_mean_above_the_first_ones_interval(fig, ax):
    scores = pd.Series(
        [0.8, 0.9, 0.9, 0.7, 0.6],
        pd.MultiIndex.from_tuples(
            [("vgg16", 0), ("vgg16", 1), ("vgg16", 2), ("resnet18", 0), ("resnet18", 3)],
            names=["network", "seed"],
        ),
    )
    first = pd.DataFrame(
        {"estimate": [0.7, 0.5, 0.8], "low": [0.6, 0.4, np.nan], "high": [0.75, 0.6, np.nan]},
        index=["resnet18", "an ensemble", "vgg16"],
    )
    assert plot_utils.plot_seeds(scores, first, ax) is ax
    assert [text.get_text() for text in ax.get_yticklabels()] == ["vgg16", "resnet18"]
    dots = ax.lines[0].get_xydata()
    np.testing.assert_allclose(dots[:, 0], scores)
    assert (np.round(dots[:, 1] + 0.2) == [0, 0, 0, 1, 1]).all()
    assert len({tuple(dot) for dot in dots.tolist()}) == 5  # equal scores do not hide one another
    means, whiskers = (drawn.get_segments() for drawn in ax.collections)
    np.testing.assert_allclose([segment[0, 0] for segment in means], [2.6 / 3, 0.65])
    np.testing.assert_allclose([s[:, 0] for s in whiskers if len(s)], [[0.6, 0.75]])
    assert [text.get_text() for text in ax.texts] == ["mean 0.867 ± 0.058", "mean 0.650 ± 0.071"]
    assert [text.xy[0] for text in ax.texts] == pytest.approx(
        [2.6 / 3, 0.65]
    )  # at the line that they tell of
    assert inside_figure(fig)


def test_reliability_points_are_the_filled_bins(ax):
    table = pd.DataFrame(
        {"confidence": [np.nan, 0.5, 0.9], "accuracy": [np.nan, 0.4, 0.95], "count": [0, 10, 30]}
    )
    plot_utils.plot_reliability({"vgg16": table}, ax)
    (points,) = ax.collections
    assert points.get_offsets().tolist() == [[0.5, 0.4], [0.9, 0.95]]
    small, large = points.get_sizes()
    assert large == pytest.approx(3 * small)


def test_line_of_reliability_leaves_out_bins_of_few_images(ax):
    table = pd.DataFrame(
        {
            "confidence": [0.2, 0.4, 0.6, 0.8, 0.95],
            "accuracy": [0, 0.5, 1, 0.7, 0.9],
            "count": [1, 20, 9, 10, 99],
        }
    )
    plot_utils.plot_reliability({"vgg16": table}, ax)
    np.testing.assert_array_equal(ax.lines[1].get_xydata(), [[0.4, 0.5], [0.8, 0.7], [0.95, 0.9]])
    (points,) = ax.collections
    assert len(points.get_offsets()) == 5  # all are shown
    assert (points.get_facecolors()[:, 3] > 0).tolist() == [False, True, False, True, True]
    assert "hollow: fewer than 10 images" in ax.get_legend().get_title().get_text()


def cam_rows(**masks):
    map_ = np.zeros((24, 24))
    map_[6:12, 6:12] = 1
    panels = {
        "vgg16": plot_utils.CamPanel(map_, "Normal", 0.9),
        "resnet18": plot_utils.CamPanel(np.zeros((24, 24)), "COVID-19", 0.6),
    }
    return [
        plot_utils.CamRow(grey(i), truth, panels, **masks) for i, truth in enumerate(["Normal", "COVID-19"])
    ]


def test_cam_panels_say_what_was_predicted_and_mark_right_and_wrong_twice(fig):
    rows = cam_rows()
    plot_utils.draw_grad_cams(fig, rows)
    axes = np.reshape(fig.axes[:6], (2, 3))
    assert [ax.get_title() for ax in axes[0]] == ["original", "vgg16", "resnet18"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["Normal", "COVID-19"]
    labels = [[ax.xaxis.label.get_text() for ax in row[1:]] for row in axes]
    assert labels == [["Normal 0.90 ✓", "COVID-19 0.60 ✗"], ["Normal 0.90 ✗", "COVID-19 0.60 ✓"]]
    colors = [[to_hex(ax.xaxis.label.get_color()) for ax in row[1:]] for row in axes]
    assert colors == [[plot_utils.RIGHT, plot_utils.WRONG], [plot_utils.WRONG, plot_utils.RIGHT]]
    np.testing.assert_array_equal(axes[1, 0].images[0].get_array(), rows[1].image)
    expected = overlay(rows[1].image, rows[1].panels["vgg16"].map)
    np.testing.assert_array_equal(axes[1, 1].images[0].get_array(), expected)
    assert len(fig.axes) == 7
    assert inside_figure(fig)


def test_a_map_without_positive_evidence_says_so(fig):
    plot_utils.draw_grad_cams(fig, cam_rows())
    notes = [[t.get_text() for t in ax.texts] for ax in fig.axes[:3]]
    assert notes == [[], [], ["no positive evidence"]]


def test_outlines_follow_the_masks_and_are_named(fig):
    lesion = np.zeros((24, 24), dtype=bool)
    lesion[3:8, 10:20] = True
    # A mask that meets the image's edge is outlined there too.
    plot_utils.draw_grad_cams(fig, cam_rows(lesion=lesion, lung=np.ones((24, 24))))
    lung, drawn = fig.axes[1].collections
    corners = np.concatenate([path.vertices for path in drawn.get_paths()])
    assert corners.min(axis=0).tolist() == [9.5, 2.5]
    assert corners.max(axis=0).tolist() == [19.5, 7.5]
    edge = np.concatenate([path.vertices for path in lung.get_paths()])
    assert (edge.min(), edge.max()) == (-0.5, 23.5)
    assert fig.axes[1].get_xlim() == (-0.5, 23.5)
    assert legend_texts(fig.legends[0]) == ["lesion", "lung"]


def test_masks_that_are_empty_or_missing_draw_nothing(fig):
    plot_utils.draw_grad_cams(fig, cam_rows(lesion=np.zeros((24, 24))))
    assert all(not ax.collections for ax in fig.axes[:6])


def test_a_panel_may_have_a_background_and_a_title_of_its_own(fig):
    map_ = np.full((24, 24), 0.5)
    masked = grey(5)
    panels = {
        "other class": plot_utils.CamPanel(map_, "Normal", 0.9, title="COVID-19 0.10"),
        "lungs only": plot_utils.CamPanel(map_, "Normal", 0.8, image=masked),
    }
    plot_utils.draw_grad_cams(fig, [plot_utils.CamRow(grey(), "Normal", panels)])
    _, other, lungs = fig.axes[:3]
    assert other.get_xlabel() == "COVID-19 0.10"
    assert to_hex(other.xaxis.label.get_color()) not in (plot_utils.RIGHT, plot_utils.WRONG)
    np.testing.assert_array_equal(other.images[0].get_array(), overlay(grey(), map_))
    assert lungs.get_xlabel() == "Normal 0.80 ✓"
    np.testing.assert_array_equal(lungs.images[0].get_array(), overlay(masked, map_))


def cam_sample(predicted="Pneumonia", truth="Pneumonia", **more):
    map_ = np.zeros((24, 24))
    map_[6:12, 6:12] = 1
    return plot_utils.CamSample(grey(), map_, predicted, truth, 0.7, **more)


def test_cam_grid_has_a_row_a_group_and_says_where_there_is_nothing():
    fig = Figure(figsize=(10, 7), layout="constrained")
    box = (0.25, 0.5, 0.25, 0.125)
    groups = {
        "true positive": [cam_sample(boxes=[box])] * 6,
        "false positive": [cam_sample(truth="Normal")],
        "false negative": [],
    }
    plot_utils.draw_cam_grid(fig, groups)
    axes = np.reshape(fig.axes[:15], (3, 5))
    assert [[len(ax.images) for ax in row] for row in axes] == [[1] * 5, [1, 0, 0, 0, 0], [0] * 5]
    assert [row[0].get_ylabel().replace("\n", " ") for row in axes] == list(groups)
    np.testing.assert_array_equal(axes[0, 0].images[0].get_array(), overlay(grey(), cam_sample().map))
    right, wrong = axes[:2, 0]
    assert (right.get_title(), right.get_xlabel()) == ("Pneumonia 0.70 ✓", "true: Pneumonia")
    assert (wrong.get_title(), wrong.get_xlabel()) == ("Pneumonia 0.70 ✗", "true: Normal")
    assert [to_hex(ax.title.get_color()) for ax in (right, wrong)] == [plot_utils.RIGHT, plot_utils.WRONG]
    assert [t.get_text().replace("\n", " ") for t in axes[2, 0].texts] == ["none in the test images"]
    (drawn,) = right.patches
    assert drawn.get_bbox().bounds == pytest.approx((5.5, 11.5, 6, 3))
    assert legend_texts(fig.legends[0]) == ["annotated box"]
    assert inside_figure(fig)


def test_cam_grid_of_findings_is_told_what_is_correct_and_marks_empty_maps():
    fig = Figure(figsize=(10, 7), layout="constrained")
    truth = "Effusion, Infiltration, Pleural_Thickening"
    found = cam_sample("Pleural_Thickening", truth, correct=True)
    groups = {
        "Pleural_Thickening": [found] * 4,
        "Mass": [cam_sample("Mass", truth)._replace(map=np.zeros((24, 24)))],
    }
    plot_utils.draw_cam_grid(fig, groups)
    assert fig.axes[0].get_title().replace("\n", " ") == "Pleural_Thickening 0.70 ✓"
    assert [t.get_text() for t in fig.axes[4].texts] == ["no positive evidence"]
    assert not fig.legends
    assert inside_figure(fig)


def test_a_grid_without_any_sample_is_drawn(fig):
    plot_utils.draw_cam_grid(fig, {"false positive": [], "false negative": []})
    assert [ax.texts[0].get_text() for ax in fig.axes[:2]] == ["none in the\ntest images"] * 2


def test_randomisation_begins_at_one_and_goes_through_the_means(ax):
    rows = [
        ("a", 0.1, 0.2),
        ("a", 0.1, 0.4),
        ("a", 1.0, 0.5),
        ("a", 1.0, np.nan),
        ("b", 1.0, 0.9),
        ("b", 0.1, 1.0),
    ]
    plot_utils.plot_randomisation(pd.DataFrame(rows, columns=["map", "share", "agreement"]), ax)
    lines = {line.get_label(): line.get_ydata() for line in ax.lines}
    np.testing.assert_allclose(lines["a"], [1, 0.3, 0.5])
    np.testing.assert_allclose(lines["b"], [1, 1, 0.9])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["nothing", "the head", "100%"]


def test_rows_mark_annotated_boxes_and_name_them(fig):
    image = np.full((50, 100), 90, np.uint8)
    panels = {"LayerCAM": plot_utils.CamPanel(np.zeros((50, 100)), "Mass", 0.4)}
    row = plot_utils.CamRow(image, "Mass", panels, boxes=[(0.1, 0.2, 0.3, 0.4)])
    plot_utils.draw_grad_cams(fig, [row])
    original, overlaid = fig.axes[:2]
    for ax in (original, overlaid):
        (box,) = [patch for patch in ax.patches if patch.get_width() > 1]
        assert (*box.get_xy(), box.get_width(), box.get_height()) == pytest.approx((9.5, 9.5, 30, 20))
    assert [text.get_text() for text in fig.legends[0].texts] == ["annotated box"]
