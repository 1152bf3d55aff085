"""The formulas of class activation maps.

A: (N, K, h, w) float32, a layer's activation of K channels. G: its gradient ∂y_c/∂A of C logits, (N, C, K, h, w),
or (1 or N, C, K, 1, 1) where it is the same in every place; both taken at one and the same point of the network.
The methods with gradients differ in the weights alone: their map is relu(Σ_k w_k A_k).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor


def grad_cam_weights(activation: Tensor, gradient: Tensor) -> Tensor:
    """Return w_k = mean over places of G_k: Grad-CAM (Selvaraju et al. 2017, ICCV, arXiv:1610.02391)."""
    return gradient.mean(dim=(-2, -1), keepdim=True)


def grad_cam_plus_plus_weights(activation: Tensor, gradient: Tensor) -> Tensor:
    """Return w_k = Σ_ij α relu(G_k), α = G² / (2 G² + G³ Σ_ab A_k): Grad-CAM++ (Chattopadhay et al. 2018, WACV,
    arXiv:1710.11063), of the score exp(y).

    Divided through by G², so no epsilon is needed, which would swamp the small gradients of a layer behind
    pooling. Made for activations that are not negative; before a rectifier the denominator can be negative, which
    would turn evidence for a class into evidence against it: the weight is 0 there.
    """
    total = activation.sum(dim=(-2, -1), keepdim=True)[:, None]
    denominator = 2 + gradient * total
    alpha = torch.where(denominator > 0, 1 / denominator, 0)
    places = activation.shape[-2] * activation.shape[-1]
    return places * (alpha * gradient.relu()).mean(dim=(-2, -1), keepdim=True)


def hires_cam_weights(activation: Tensor, gradient: Tensor) -> Tensor:
    """Return w = G, place by place: HiResCAM (Draelos & Carin 2020, arXiv:2011.08891). Behind pooling and
    one linear layer, and only there, it is Grad-CAM.
    """
    return gradient


def layer_cam_weights(activation: Tensor, gradient: Tensor) -> Tensor:
    """Return w = relu(G), place by place: LayerCAM (Jiang et al. 2021, IEEE TIP 30:5875)."""
    return gradient.relu()


def x_grad_cam_weights(activation: Tensor, gradient: Tensor) -> Tensor:
    """Return w_k = Σ_ij G_k A_k / Σ_ij A_k: XGrad-CAM (Fu et al. 2020, BMVC, arXiv:2008.02312); 0 for a
    channel whose activations sum to 0. Made for activations that are not negative: elsewhere a sum near 0 gives a
    weight beyond measure.
    """
    if gradient.shape[-2:] == (1, 1):
        return gradient  # a mean of G weighted by A, of one value
    total = activation.sum(dim=(-2, -1), keepdim=True)[:, None]
    weighted = (gradient * activation[:, None]).sum(dim=(-2, -1), keepdim=True)
    return torch.where(total == 0, 0, weighted / total)


def eigen_cam_maps(activation: Tensor) -> Tensor:
    """Return (N, h, w) A v, v the first right singular vector of the (h w, K) matrix A: Eigen-CAM (Muhammad &
    Yeasin 2020, IJCNN, arXiv:2008.00299). It knows of no class: where the layer is active, that is all.

    The sign, which a singular vector does not have, is the one that makes the map's sum positive. As in the
    paper A is not centred.
    """
    matrix = activation.flatten(2)  # (N, K, h w)
    _, strengths, places = torch.linalg.svd(matrix, full_matrices=False)
    projection = strengths[:, :1] * places[:, 0]
    sign = torch.where(projection.sum(dim=1, keepdim=True) < 0, -1.0, 1.0)
    return (sign * projection).unflatten(1, activation.shape[2:])


def score_cam_weights(scores: Tensor) -> Tensor:
    """Return softmax over channels of (N, C, K) scores, the logits y_c of the image seen through each channel:
    Score-CAM (Wang et al. 2020, CVPR workshops, arXiv:1910.01279). A baseline's logit, the same
    for every channel, would fall out of the softmax.
    """
    return scores.softmax(dim=-1)


def weighted_maps(activation: Tensor, weights: Tensor) -> Tensor:
    """Return (N, C, h, w) Σ_k w_k A_k for weights of the shape of a gradient, in float32 under autocast too."""
    if weights.shape[-2:] == (1, 1):
        per_channel = weights[..., 0, 0].expand(len(activation), -1, -1)
        with torch.autocast(activation.device.type, enabled=False):
            return (per_channel @ activation.flatten(2)).unflatten(2, activation.shape[2:])
    # Class by class, so that no second array of the gradient's size is made.
    return torch.stack([(one * activation).sum(dim=1) for one in weights.unbind(dim=1)], dim=1)


class Method(NamedTuple):
    """A way to make maps: `needs` says from what; `weights` are a function of A and G."""

    title: str
    needs: Literal["gradient", "activation", "scores"] = "gradient"
    weights: Callable[[Tensor, Tensor], Tensor] | None = None


METHODS: dict[str, Method] = {
    "gradcam": Method("Grad-CAM", weights=grad_cam_weights),
    "gradcam++": Method("Grad-CAM++", weights=grad_cam_plus_plus_weights),
    "hirescam": Method("HiResCAM", weights=hires_cam_weights),
    "layercam": Method("LayerCAM", weights=layer_cam_weights),
    "xgradcam": Method("XGrad-CAM", weights=x_grad_cam_weights),
    "eigencam": Method("Eigen-CAM", needs="activation"),
    "scorecam": Method("Score-CAM", needs="scores"),
}


def cam_method(name: str) -> Method:
    """Return the method of that name. Raises ValueError, naming all, for another one."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
    return METHODS[name]
