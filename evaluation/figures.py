"""The charts of notebook 3, from `report.Results`. Without a chart, a function returns a line that says why."""

import pandas as pd
from IPython.display import Markdown
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import plot_utils
from evaluation import metrics
from evaluation.calibration import expected_calibration_error, reliability_table
from evaluation.map_report import NO_MAPS, MapReport
from evaluation.report import Results
from evaluation.runs import seed_scores
from inference.trained_networks import embeddings_of

CONFIDENCE_BINS = 10
MOST_EMBEDDED = 600  # test images


def _panel(width: float, height: float, title: str = "") -> tuple[Figure, Axes]:
    fig = Figure(figsize=(width, height), layout="constrained")
    ax = fig.subplots()
    ax.set_title(title)
    return fig, ax


def confusion(results: Results) -> Figure | Markdown:
    """Return the confusion matrices of every network: above on the training images, below on the test images."""
    if results.table.multilabel:
        return Markdown("*Several findings an image: one cannot be mistaken for another, see below.*")
    runs, classes = results.runs, results.table.classes
    fig = Figure(figsize=(3.9 * len(runs), 7.2), layout="constrained")
    for split, axes in zip(("train", "test"), fig.subplots(2, len(runs), squeeze=False), strict=True):
        for (title, run), ax in zip(runs.items(), axes, strict=True):
            predictions = run.predictions(split)
            counts = metrics.confusion_counts(predictions.targets, predictions.predicted, len(classes))
            plot_utils.plot_confusion(counts, classes, ax).set_title(f"{title}, {split}")
    return fig


def seeds(results: Results) -> Figure | None:
    """Return a chart of the scores over seeds and the intervals over patients; None if no network has several seeds."""
    if not results.repeated:
        return None
    fig, ax = _panel(9, 1.4 + 0.8 * len(results.repeated))
    plot_utils.plot_seeds(seed_scores(results.repeated)[results.headline], results.headlines, ax)
    ax.set_xlabel(f"test {results.headline}")
    return fig


def roc(results: Results) -> Figure:
    """Return the ROC curves of every network. With two classes, only the positive one is drawn."""
    classes = results.table.classes
    shown = range(len(classes)) if results.positive is None else [results.positive]
    width = (3.8 if len(classes) <= plot_utils.FEW else 8.5) * len(results.runs)
    fig = Figure(figsize=(width, 4.6), layout="constrained")
    for title, ax in zip(results.runs, fig.subplots(1, len(results.runs), squeeze=False)[0], strict=True):
        test = results.test[title]
        curves = {classes[i]: metrics.roc_points(test.targets, test.probabilities, i) for i in shown}
        plot_utils.plot_roc(curves, ax).set_title(title)
    return fig


def findings(results: Results) -> list[Figure | pd.DataFrame | Markdown]:
    """Return the areas under the ROC curve of several findings, a summary, and precision and recall by threshold."""
    if not results.table.multilabel:
        return [Markdown("*One class an image: see the curves above.*")]
    scores, test = results.scores[results.scores["network"] == results.example], results.test[results.example]
    areas = scores[scores["metric"] == "roc_auc"].set_index("class")
    fig, ax = _panel(9, 5, results.example)
    plot_utils.plot_auc_by_label(areas.drop(index=metrics.MACRO), areas.loc[metrics.MACRO], ax)
    summary = metrics.auc_summary(scores).to_frame("AUC over the findings").round(4)
    curve_of, classes = metrics.precision_recall_points, results.table.classes
    points = {name: curve_of(test.targets, test.probabilities, i) for i, name in enumerate(classes)}
    curves = {name: curve for name, curve in points.items() if len(curve.thresholds)}
    if not curves:
        return [fig, summary, Markdown("*No finding has test images both with it and without it.*")]
    tradeoff, ax = _panel(9, 4.6, results.example)
    plot_utils.plot_threshold_tradeoff(curves, ax)
    return [fig, summary, tradeoff]


def reliability(results: Results) -> Figure | Markdown:
    """Return accuracy against confidence for all networks and ensembles."""
    if results.table.multilabel:
        return Markdown("*Several findings an image: their probabilities are not calibrated.*")
    tables = {}
    for title, test in results.test.items():
        error = expected_calibration_error(test.targets, test.probabilities, bins=CONFIDENCE_BINS)
        tables[f"{title}, ECE {error:.3f}"] = reliability_table(test.targets, test.probabilities, bins=CONFIDENCE_BINS)
    fig, ax = _panel(9, 5)
    plot_utils.plot_reliability(tables, ax)
    return fig


def randomisation(results: Results, maps: MapReport) -> Figure | Markdown:
    """Return a chart: how well the example's maps agree with those of networks made random from the head down."""
    if results.example not in maps.scored:
        return NO_MAPS
    fig, ax = _panel(9, 4.2, f"{results.example}, {results.study.maps.faithful} test images")
    agreement = maps.scored[results.example].randomised.groupby(["map", "share"], sort=False)["agreement"]
    means = agreement.mean().unstack("map", sort=False).sort_index()
    # Steps are evenly spaced. On an axis of shares, the head would lie too close to "nothing".
    steps = ["nothing", "the head", *(f"{share:.0%}" for share in means.index[1:])]
    for name, style in plot_utils.styles(list(means)).items():
        ax.plot(steps, [1, *means[name]], **style | {"linestyle": "-"}, markersize=7, alpha=0.8, label=name)
    words = "agreement with the trained network's\nmap (absolute rank correlation)"
    ax.set(ylim=(0, 1.04), xlabel="layers that are random, from the head down", ylabel=words)
    plot_utils.legend_beside(ax)
    return fig


def embedding(results: Results) -> Figure | Markdown:
    """Return a t-SNE chart of the inputs of the example's last layer, for test images."""
    if results.table.multilabel:
        return Markdown("*Several findings an image: it belongs to no single class.*")
    test, seed = results.table.subset("test"), results.study.seed
    images = test.sample(min(len(test), MOST_EMBEDDED), random_state=seed)
    embeddings = embeddings_of(results.networks[results.example], images["path"])
    points, silhouette = metrics.tsne(embeddings, seed=seed), metrics.silhouette(embeddings, images["label"].to_numpy())
    fig, ax = _panel(8, 5.2, f"{results.example}: {len(images)} test images, silhouette {silhouette:.3f}")
    for i, (name, style) in enumerate(plot_utils.styles(results.table.classes).items()):
        of_class = points[images["label"] == i]
        look = {"color": style["color"], "marker": style["marker"], "edgecolor": "white", "linewidth": 0.4}
        ax.scatter(*of_class.T, s=30, alpha=0.75, **look, label=f"{name} (n = {len(of_class):,})")
    ax.set(xticks=[], yticks=[], aspect="equal")  # no numbers, because the distances mean nothing
    plot_utils.legend_beside(ax)
    return fig
