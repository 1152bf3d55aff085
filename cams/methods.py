"""The formulas of class activation maps.

- A, `activation`: (N, K, h, w) float32, a layer's output of K channels.
- G, `gradient`: (N, C, K, h, w) float32, the gradient ∂y_c/∂A of C logits, taken at the same point as A.
- w, the weights: (N, C, K, 1, 1) for each channel, or (N, C, K, h, w) for each channel and place.

The map of a method with gradients is relu(Σ_k w_k A_k). These methods differ only in the weights.
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

    Numerator and denominator are divided by G², so no epsilon is needed. An epsilon would be larger than the small
    gradients of a layer before pooling. The method assumes activations that are not negative. With negative ones, the
    denominator can be negative, which would turn evidence for a class into evidence against it. α is then 0.
    """
    total = activation.sum(dim=(-2, -1), keepdim=True)[:, None]
    denominator = 2 + gradient * total
    alpha = torch.where(denominator > 0, 1 / denominator, 0)
    places = activation.shape[-2] * activation.shape[-1]
    return places * (alpha * gradient.relu()).mean(dim=(-2, -1), keepdim=True)


def hires_cam_weights(activation: Tensor, gradient: Tensor) -> Tensor:
    """Return w = G at each place: HiResCAM (Draelos & Carin 2020, arXiv:2011.08891).

    It equals Grad-CAM if global average pooling follows the layer: the gradient is then the same at every place.
    """
    return gradient


def layer_cam_weights(activation: Tensor, gradient: Tensor) -> Tensor:
    """Return w = relu(G) at each place: LayerCAM (Jiang et al. 2021, IEEE TIP 30:5875)."""
    return gradient.relu()


def x_grad_cam_weights(activation: Tensor, gradient: Tensor) -> Tensor:
    """Return w_k = Σ_ij G_k A_k / Σ_ij A_k: XGrad-CAM (Fu et al. 2020, BMVC, arXiv:2008.02312).

    The weight of a channel is 0 if its activations sum to 0. The method assumes activations that are not negative. With
    negative ones, the sum can be near 0 and the weight extremely large.
    """
    total = activation.sum(dim=(-2, -1), keepdim=True)[:, None]
    weighted = (gradient * activation[:, None]).sum(dim=(-2, -1), keepdim=True)
    return torch.where(total == 0, 0, weighted / total)


def eigen_cam_maps(activation: Tensor) -> Tensor:
    """Return (N, h, w) maps A v: Eigen-CAM (Muhammad & Yeasin 2020, IJCNN, arXiv:2008.00299). The vector v is the
    first right singular vector of the (h w, K) matrix A.

    The map shows where the layer is active, for no class in particular. The sign of a singular vector is arbitrary;
    here the sum of the map is positive. As in the paper, A is not centred.
    """
    matrix = activation.flatten(2)  # (N, K, h w)
    _, strengths, places = torch.linalg.svd(matrix, full_matrices=False)
    projection = strengths[:, :1] * places[:, 0]
    sign = torch.where(projection.sum(dim=1, keepdim=True) < 0, -1.0, 1.0)
    return (sign * projection).unflatten(1, activation.shape[2:])


def weighted_maps(activation: Tensor, weights: Tensor) -> Tensor:
    """Return (N, C, h, w) maps Σ_k w_k A_k, in float32 even under autocast."""
    if weights.shape[-2:] == (1, 1):
        with torch.autocast(activation.device.type, enabled=False):
            return (weights[..., 0, 0] @ activation.flatten(2)).unflatten(2, activation.shape[2:])
    # One class at a time: a product for all classes at once would need as much memory as the gradient.
    return torch.stack([(one * activation).sum(dim=1) for one in weights.unbind(dim=1)], dim=1)


class Method(NamedTuple):
    """A method that makes maps.

    Attributes:
        title: the name in tables and figures.
        needs: what the map is computed from: gradients, the activation alone, or the scores of masked images.
        weights: the weights as a function of A and G, for a method with gradients.
    """

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
    """Return the method with this name. Raises ValueError, which lists all methods, for an unknown one."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
    return METHODS[name]
