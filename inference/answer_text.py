"""The text that the command line prints about one X-ray."""

import math

from cams.methods import METHODS


def text_of(record: dict[str, object]) -> str:
    """Return the text of a record of `inference.answers.answer`.

    Its lines: the image; the classes from the most probable one on, with their decision thresholds; what is
    predicted; remarks; the maps.
    """
    width = max(len(name) for name in record["probabilities"])
    lines = [record["image"]]
    lines += [f"  {name:<{width}}  {_probability(name, record)}" for name in _ranked(record)]
    if "findings" in record:
        findings = ", ".join(record["findings"]) or "none"
        limit = "their thresholds" if "thresholds" in record else "probabilities of at least 0.5"
        lines.append(f"  Findings: {findings} (by {limit}; these probabilities are not calibrated)")
    elif "thresholds" in record:
        lines.append(f"  Predicted: {record['predicted']} ({_reason(record)})")
    if "lungs" in record:
        lines.append(f"  Lungs: {record['lungs']}")
    title = METHODS[record["method"]].title
    title += f" ({' + '.join(record['layers'])})" if "layers" in record else ""
    for entry in record["maps"]:
        subject = "of no class" if entry["label"] is None else f"for {entry['label']}"
        lines.append(f"  {title} {subject}{_notes(entry, record)}: {entry['overlay']}")
    return "\n".join(lines)


def _ranked(record: dict[str, object]) -> list[str]:
    """Return the classes from the most probable one on; classes without a probability are last."""
    probabilities = record["probabilities"]
    return sorted(probabilities, key=lambda n: math.inf if probabilities[n] is None else -probabilities[n])


def _probability(name: str, record: dict[str, object]) -> str:
    """Return a class's probability and its decision threshold, or why it has none."""
    probability, thresholds = record["probabilities"][name], record.get("thresholds")
    if probability is None:
        return "–      (not reported: all of the training images have it, or none)"
    if thresholds is None or ("predicted" in record and thresholds[name] is None):
        return f"{probability:.3f}"
    if thresholds[name] is None:
        return f"{probability:.3f}  (no decision: all of the validation images have it, or none)"
    probability, threshold = _distinct(probability, thresholds[name])
    return f"{probability}  (decision threshold {threshold})"


def _reason(record: dict[str, object]) -> str:
    """Return which comparison with a threshold decided on the predicted class, see `inference.decisions.decide`."""
    *_, (name, threshold) = ((n, t) for n, t in record["thresholds"].items() if t is not None)
    probability, threshold = _distinct(record["probabilities"][name], threshold)
    comparison = "reaches" if name == record["predicted"] else "is below"
    return f"{name}'s probability {probability} {comparison} its decision threshold {threshold}"


def _distinct(probability: float, threshold: float) -> tuple[str, str]:
    """Return both with three digits, or with as many more as show that they differ."""
    pairs = [(f"{probability:.{digits}f}", f"{threshold:.{digits}f}") for digits in range(3, 30)]
    return next((pair for pair in pairs if pair[0] != pair[1]), pairs[0])


def _notes(entry: dict[str, object], record: dict[str, object]) -> str:
    """Return what is said of a map: that it is empty, its share inside the lungs, the number of its boxes."""
    if entry["empty"]:
        reason = "; it is predicted because its decision threshold is low" if _by_threshold(entry, record) else ""
        return f" (empty: nothing in the image speaks for it{reason})"
    notes = ""
    if entry.get("in_lungs") is not None:
        notes += f", {100 * entry['in_lungs']:.0f} % of it inside the lungs"
    if "boxes" in entry:
        number = len(entry["boxes"])
        notes += f", {number} region{'s' * (number != 1)} above {record['boxes_above']:g} of its maximum"
    return notes


def _by_threshold(entry: dict[str, object], record: dict[str, object]) -> bool:
    """Return whether a map's class is predicted although the network considers it unlikely."""
    label = entry["label"]
    if "findings" in record:
        return label in record["findings"] and record["probabilities"][label] < 0.5
    return label == record["predicted"] != _ranked(record)[0]
