"""The probabilities and the maps that trained networks give for an X-ray."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cams.maps import scaled
from grad_cam import Classes, GradCAM
from inference.trained_networks import ModelCard, TrainedNetwork, ensemble_card


class Explanation(NamedTuple):
    """The answer of a trained network, or of an ensemble, for one (H, W) X-ray."""

    probabilities: np.ndarray  # (C,)
    classes: np.ndarray  # (K,) indices of the classes that the maps are of
    maps: np.ndarray  # (K, H, W), each 0 to 1, or all zero
    peaks: np.ndarray  # (K,) the raw maps' maxima; NaN for several networks or layers, which have no common scale


def explain(
    trained: TrainedNetwork | Sequence[TrainedNetwork],
    xray: np.ndarray,
    classes: Classes = "top",
    *,
    method: str = "gradcam",
    layer: str | Sequence[str] | None = None,
) -> Explanation:
    """Return the probabilities and the maps, at the X-ray's own size.

    The probabilities of several networks are averaged. Each map is scaled to 0–1. Then the maps are averaged and
    scaled again. So each network has the same influence, whatever the scale of its raw maps.

    Args:
        trained: A network, or several with the same classes.
        xray: (H, W) uint8.
        classes: As `GradCAM` takes them. "top" is the class that the thresholds of the model card choose; for several
            labels, the most probable reported one.
        method: As `GradCAM` takes it.
        layer: As `GradCAM` takes it (default: the model card's layer).

    Raises:
        ValueError: The networks' classes differ, or the method or layer does not exist.
    """
    members = [trained] if isinstance(trained, TrainedNetwork) else list(trained)
    card = ensemble_card([member.card for member in members])
    inputs = [(member, member.preprocessing(xray)[None].to(member.device)) for member in members]
    if isinstance(classes, str) and classes == "top":
        classes = _decided_class(card, inputs)
    probabilities, maps = [], []
    for member, images in inputs:
        with cam_of(member, method, layer) as cam:
            result = cam(images, classes)
        probabilities.append(member.card.probabilities(result.logits)[0].cpu())
        maps.append(result.upsampled(xray.shape)[0].cpu())
    one_scale = len(members) == 1 and len(result.layers) == 1
    peaks = result.raw[0].amax(dim=(1, 2)).cpu() if one_scale else torch.full((len(maps[0]),), torch.nan)
    mean_probabilities, mean_maps = (torch.stack(values).mean(dim=0) for values in (probabilities, maps))
    indices = result.classes[0].cpu()
    return Explanation(*(t.numpy() for t in (mean_probabilities, indices, scaled(mean_maps), peaks)))


def _decided_class(card: ModelCard, inputs: Sequence[tuple[TrainedNetwork, Tensor]]) -> int | str:
    """Return the predicted class, or "top" for one network whose highest logit decides (saves a forward pass)."""
    if len(inputs) == 1 and not (card.unreported if card.multilabel else card.thresholds):
        return "top"
    with torch.inference_mode():
        mean = torch.stack([m.card.probabilities(m.network(images)).cpu() for m, images in inputs]).mean(dim=0)
    return int(mean.nan_to_num(-1).argmax() if card.multilabel else card.decide(mean))


def cam_of(trained: TrainedNetwork, method: str = "gradcam", layer: str | Sequence[str] | None = None) -> GradCAM:
    """Return the `GradCAM` of a trained network, by default at the layer of its card."""
    card = trained.card
    return GradCAM(trained.network, layer or card.cam_layer, method, multilabel=card.multilabel)
