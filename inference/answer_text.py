"""The text that the command line prints about one X-ray."""

import math

from cams.methods import METHODS


def text_of(record: dict[str, object]) -> str:
    """Return the text of a record of `inference.answers.answer`.

    Its lines: the image; the classes from the most probable one on, with their decision thresholds; the prediction;
    remarks; the maps. Classes without a probability come last.
    """
    probabilities = record["probabilities"]
    width = max(map(len, probabilities))
    ranked = sorted(probabilities, key=lambda n: math.inf if probabilities[n] is None else -probabilities[n])
    lines = [record["image"], *(f"  {name:<{width}}  {_probability(name, record)}" for name in ranked)]
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


def _probability(name: str, record: dict[str, object]) -> str:
    """Return a class's probability and its decision threshold, or why it has none."""
    probability, threshold = record["probabilities"][name], record.get("thresholds", {}).get(name)
    if probability is None:
        return "–      (not reported: all of the training images have it, or none)"
    if threshold is not None:
        probability, threshold = _distinct(probability, threshold)
        return f"{probability}  (decision threshold {threshold})"
    undecided = "findings" in record and "thresholds" in record
    note = "  (no decision: all of the validation images have it, or none)" if undecided else ""
    return f"{probability:.3f}{note}"


def _reason(record: dict[str, object]) -> str:
    """Return the threshold comparison that decided on the predicted class, see `inference.decisions.decide`."""
    *_, (name, threshold) = ((n, t) for n, t in record["thresholds"].items() if t is not None)
    probability, threshold = _distinct(record["probabilities"][name], threshold)
    comparison = "reaches" if name == record["predicted"] else "is below"
    return f"{name}'s probability {probability} {comparison} its decision threshold {threshold}"


def _distinct(probability: float, threshold: float) -> tuple[str, str]:
    """Return both with three digits, or with as many more as are needed to show that they differ."""
    pairs = [(f"{probability:.{digits}f}", f"{threshold:.{digits}f}") for digits in range(3, 30)]
    return next((pair for pair in pairs if pair[0] != pair[1]), pairs[0])


def _notes(entry: dict[str, object], record: dict[str, object]) -> str:
    """Return the remarks on a map: that it is empty, its share inside the lungs, the number of its boxes."""
    if entry["empty"]:
        label, predicted = entry["label"], record.get("findings", [record.get("predicted")])
        by_threshold = "thresholds" in record and label in predicted and record["probabilities"][label] < 0.5
        reason = "; it is predicted because its decision threshold is low" if by_threshold else ""
        return f" (empty: nothing in the image speaks for it{reason})"
    notes = ""
    if entry.get("in_lungs") is not None:
        notes = f", {100 * entry['in_lungs']:.0f} % of it inside the lungs"
    if "boxes" in entry:
        number = len(entry["boxes"])
        notes += f", {number} region{'s' * (number != 1)} above {record['boxes_above']:g} of its maximum"
    return notes
