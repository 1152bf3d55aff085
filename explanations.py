"""What trained networks say of an X-ray, and where in it they look."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from grad_cam import Classes, GradCAM
from maps import scaled
from trained_networks import TrainedNetwork, ensemble_card


class Explanation(NamedTuple):
    """What a trained network, or an ensemble, says of one (H, W) X-ray: (C,) probabilities, the (K,) classes
    that were asked for and their (K, H, W) maps, each scaled to 0–1 or all zero. `peaks`: (K,) the maps' maxima
    before they were scaled; NaN of several networks or layers, which have no scale in common.
    """

    probabilities: np.ndarray
    classes: np.ndarray
    maps: np.ndarray
    peaks: np.ndarray


def explain(
    trained: TrainedNetwork | Sequence[TrainedNetwork],
    xray: np.ndarray,
    classes: Classes = "top",
    *,
    method: str = "gradcam",
    layer: str | Sequence[str] | None = None,
) -> Explanation:
    """Return probabilities and maps, at the X-ray's own size, for one (H, W) uint8 X-ray.

    `method` and `layer` as `GradCAM` takes them; by default the layer of the model card.
    "top" is the class that is decided on: the most probable one that is reported, or the one by the model card's
    thresholds. Of several networks the probabilities are the means, and a map is the mean of the networks' maps,
    each scaled to 0–1, scaled again: each has the same say, however high its raw maps are. Raises ValueError where
    their classes differ, or for a method or layer that is not there.
    """
    members = [trained] if isinstance(trained, TrainedNetwork) else list(trained)
    card = ensemble_card([member.card for member in members])
    inputs = [_input(member, xray) for member in members]
    not_by_logits = bool(card.unreported) if card.multilabel else card.thresholds is not None
    if (len(members) > 1 or not_by_logits) and isinstance(classes, str) and classes == "top":
        with torch.inference_mode():
            said = [m.card.probabilities(m.network(x)).cpu() for m, x in zip(members, inputs, strict=True)]
        mean = torch.stack(said).mean(dim=0)
        classes = int(mean.nan_to_num(-1).argmax() if card.multilabel else card.decide(mean))
    probabilities, maps = [], []
    for member, images in zip(members, inputs, strict=True):
        with cam_of(member, method, layer) as cam:
            found = cam(images, classes)
        probabilities.append(member.card.probabilities(found.logits)[0].cpu())
        maps.append(found.upsampled(xray.shape)[0].cpu())
    single = len(members) == 1 and len(found.layers) == 1
    peaks = found.raw[0].amax(dim=(1, 2)).cpu() if single else torch.full((len(maps[0]),), torch.nan)
    return Explanation(
        torch.stack(probabilities).mean(dim=0).numpy(),
        found.classes[0].cpu().numpy(),
        scaled(torch.stack(maps).mean(dim=0)).numpy(),
        peaks.numpy(),
    )


def cam_of(
    trained: TrainedNetwork, method: str = "gradcam", layer: str | Sequence[str] | None = None
) -> GradCAM:
    """Return the `GradCAM` of a trained network, at the layer of its card unless another is given."""
    card = trained.card
    return GradCAM(trained.network, layer or card.cam_layer, method, multilabel=card.multilabel)


def _input(member: TrainedNetwork, xray: np.ndarray) -> Tensor:
    return member.preprocessing(xray)[None].to(next(member.network.parameters()).device)
