"""Where class activation maps can be wrong without an error: in-place operations, compiled and autocast networks,
unusual heads.
"""

import copy
import resource
import sys

import pytest
import torch
from torch import nn
from torchvision import models

from cams.methods import METHODS, eigen_cam_maps
from grad_cam import GradCAM
from networks import build_network

WITH_GRADIENTS = [name for name, method in METHODS.items() if method.needs == "gradient"]


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return build_network("resnet18", 4).eval()


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return build_network("small_cnn", 3).eval()


@pytest.fixture(scope="module")
def narrow():
    """A network of few channels, because Score-CAM runs it once for each channel."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 12, 3), nn.ReLU(),
        nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 3),
    )  # fmt: skip
    network.cam_layer = "4"
    return network.eval()


def plain_maps(model, layer, images, method="gradcam"):
    """Return (N, C, h, w) maps from the graph of the whole network and one gradient for each class.

    The activation is copied before an in-place operation can change it.
    """
    recorded = {}
    hook = model.get_submodule(layer).register_forward_hook(
        lambda module, inputs, output: recorded.update(a=output.clone()) or recorded["a"].clone()
    )
    with torch.enable_grad():
        logits = model(images)
    hook.remove()
    a = recorded["a"]
    maps = []
    for column in logits.T:
        (g,) = torch.autograd.grad(column.sum(), a, retain_graph=True)
        weights = METHODS[method].weights(a.detach(), g[:, None])[:, 0]
        maps.append((weights * a.detach()).sum(1).relu())
    return torch.stack(maps, 1)


def torchvision_model(name):
    model = models.get_model(name, weights=None, num_classes=4).eval()
    if name == "vgg11":  # its own head has 120 million weights, which are slow to draw
        model.classifier = nn.Linear(512 * 7 * 7, 4)
    return model


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("densenet121", "features"),  # torchvision's forward() applies a ReLU to its output in place
        ("vgg11", "features.18"),  # a convolution in front of an in-place ReLU
        ("resnet18", "layer4.1.bn2"),  # += shortcut, then an in-place ReLU
        ("resnet18", "layer3"),  # before a whole block
        ("resnet18", "relu"),
    ],
)
@pytest.mark.parametrize("method", ["gradcam", "hirescam"])
def test_activation_and_gradient_are_taken_at_one_point_despite_in_place_operations(name, layer, method, images):
    torch.manual_seed(0)
    model = torchvision_model(name)
    expected = plain_maps(model, layer, images, method)
    with GradCAM(model, layer, method) as cam:
        result = cam(images, "all").raw
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


class Head(nn.Module):
    """A trunk whose (N, 4, h, w) activation goes through a given head."""

    def __init__(self, head, *parts):
        super().__init__()
        self.trunk = nn.Conv2d(3, 4, 3, padding=1)
        self.head = head
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        return self.head(self, self.trunk(x))


HEADS = {
    "mean and linear": Head(lambda m, a: m.parts[0](a.mean((2, 3))), nn.Linear(4, 3)),
    "one output": Head(lambda m, a: m.parts[0](a.mean((2, 3))), nn.Linear(4, 1)),
    "rectifier": Head(lambda m, a: m.parts[0](a.relu().mean((2, 3))), nn.Linear(4, 3)),
    "two layers": Head(lambda m, a: m.parts[1](m.parts[0](a.mean((2, 3)))), nn.Linear(4, 4), nn.Linear(4, 3)),
    "part of the places": Head(lambda m, a: m.parts[0](a[:, :, 2:].mean((2, 3))), nn.Linear(4, 3)),
    "maximum": Head(lambda m, a: m.parts[0](a.amax((2, 3))), nn.Linear(4, 3)),
    "each channel on its own": Head(
        lambda m, a: m.parts[0](a.mean((2, 3)).view(-1, 1)).view(len(a), -1), nn.Linear(1, 3)
    ),
    "used twice": Head(lambda m, a: m.parts[0](a.mean((2, 3))) * a.mean((1, 2, 3))[:, None], nn.Linear(4, 3)),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("method", WITH_GRADIENTS)
def test_maps_are_those_of_the_plain_gradient_whatever_the_head(head, method):
    torch.manual_seed(0)
    model = HEADS[head].eval()
    images = torch.randn(2, 3, 6, 5)
    expected = plain_maps(model, "trunk", images, method)
    if head == "one output":  # the logits are (-z/2, z/2), and Grad-CAM++ is not linear in z
        if method == "gradcam++":
            return
        expected = expected / 2
    with GradCAM(model, "trunk", method) as cam:
        result = cam(images, "all").raw
        result = result[:, 1:] if head == "one output" else result
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)


def test_gradients_of_all_classes_take_one_batched_call(monkeypatch):
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
    for name, model in HEADS.items():
        calls.clear()
        with GradCAM(model.eval(), "trunk") as cam:
            cam(torch.randn(2, 3, 6, 5), "all")
        assert len(calls) == 1, name


def test_many_gradients_are_taken_in_parts_with_the_same_result(small, images, monkeypatch):
    with GradCAM(small, "features.2.relu", "hirescam") as cam:
        whole = cam(images, "all").raw
        monkeypatch.setattr("grad_cam.GRADIENT_BYTES", 1)
        torch.testing.assert_close(cam(images, "all").raw, whole, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("network", ["resnet", "narrow"])
def test_autocast_gives_the_same_maps_in_float32_but_for_rounding(network, dtype, images, request):
    model = request.getfixturevalue(network)
    with GradCAM(model) as cam:
        expected = cam(images, "all")
        with torch.autocast("cpu", dtype=dtype):
            result = cam(images, "all")
            assert torch.is_autocast_enabled("cpu")
    assert result.raw.dtype == result.logits.dtype == torch.float32
    assert (result.raw - expected.raw).abs().max() < 0.05 * expected.raw.amax()


def test_a_training_step_in_the_same_autocast_still_has_gradients(images):
    # Autocast caches the weights that it casts. Weights that were cast without a graph have no gradient.
    torch.manual_seed(0)
    model = build_network("small_cnn", 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with GradCAM(model) as cam:
            cam(images)
        loss = model(images).float().square().sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_networks_have_the_maps_of_the_network_that_was_compiled(in_place, images):
    torch.manual_seed(0)
    model = build_network("small_cnn", 3).eval()
    with GradCAM(model, method="layercam") as cam:
        expected = cam(images, "all").raw
    compiled = model
    if in_place:
        model.compile(backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(images)  # compiled before any hook is registered
    with GradCAM(compiled, method="layercam") as cam:
        torch.testing.assert_close(cam(images, "all").raw, expected)
    with GradCAM(compiled, "features.2.relu") as cam:
        assert cam(images).raw.shape[2:] == (8, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_memory_is_flat_over_200_calls(method):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 2)
    )
    images = torch.randn(4, 3, 48, 48)  # If each call kept one activation, all together would have 59 MB.
    with GradCAM(model, "1", method) as cam:
        for _ in range(20):
            cam(images, "all")
        before = peak_megabytes()
        for _ in range(200):
            cam(images, "all")
    assert peak_megabytes() - before < 20


def peak_megabytes():
    """Return the largest memory use of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_works_in_every_mode_and_leaves_nothing_behind(method, narrow, images):
    narrow.train()
    try:
        with torch.inference_mode(), GradCAM(narrow, method=method) as cam:
            inside = cam(images, "all").raw.clone()
        assert narrow.training
        assert not any(m._forward_hooks or m._backward_hooks for m in narrow.modules())
        assert all(parameter.grad is None for parameter in narrow.parameters())
        with GradCAM(narrow, method=method) as cam:
            outside = cam(images, "all")
        torch.testing.assert_close(outside.raw, inside)
        assert not outside.raw.requires_grad
        assert not outside.logits.requires_grad
    finally:
        narrow.eval()


@pytest.mark.parametrize("method", METHODS)
def test_maps_of_a_batch_are_those_of_its_images_and_of_single_classes(method, narrow, images):
    with GradCAM(narrow, method=method) as cam:
        every = cam(images, "all").raw
        alone = torch.cat([cam(image[None], "all").raw for image in images])
        each = torch.stack([cam(images, index).raw[:, 0] for index in range(3)], 1)
        pairs = cam(images, [[2, 0], [1, 1]]).raw
    torch.testing.assert_close(every, alone, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(every, each, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(pairs[0], every[0, [2, 0]], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(pairs[1], every[1, [1, 1]], rtol=1e-4, atol=1e-6)


class NotBatched(torch.autograd.Function):
    """Doubles its input. Its backward pass reads values of the gradient, which a batched call cannot do."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient if gradient.abs().sum() > 0 else torch.zeros_like(gradient)


def test_gradients_that_cannot_be_batched_are_computed_class_by_class():
    torch.manual_seed(0)
    model = Head(lambda m, a: m.parts[0](NotBatched.apply(a).amax((2, 3))), nn.Linear(4, 3)).eval()
    images = torch.randn(2, 3, 6, 5)
    with GradCAM(model, "trunk") as cam:
        torch.testing.assert_close(cam(images, "all").raw, plain_maps(model, "trunk", images))


def without_graph(m, a):
    with torch.no_grad():
        pooled = a.mean((2, 3))
    return m.parts[0](pooled)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (without_graph, "no gradient comes from the output to 'trunk'"),
        (lambda m, a: m.parts[0](a.detach().amax((2, 3))), "no gradient comes from the output to 'trunk'"),
        (lambda m, a: m.parts[0](torch.ones(len(a), 4)), "no gradient comes from the output to 'trunk'"),
        (lambda m, a: (m.parts[0](a.mean((2, 3))),), "returns tuple and not"),
        (lambda m, a: a.mean((2, 3), keepdim=True), r"returns \(2, 4, 1, 1\) and not"),
        (lambda m, a: m.parts[0](a.mean((2, 3))).mean(0, keepdim=True), "2 images are 2 at layer 'trunk' and 1"),
    ],
)
def test_networks_that_cannot_be_explained_are_refused_with_the_reason(head, message):
    model = Head(head, nn.Linear(4, 3)).eval()
    with GradCAM(model, "trunk") as cam, pytest.raises(ValueError, match=message):
        cam(torch.randn(2, 3, 6, 5))
    assert torch.is_grad_enabled()


def test_a_network_that_is_put_into_train_mode_inside_is_refused(narrow, images):
    with GradCAM(narrow) as cam:
        narrow.train()
        with pytest.raises(RuntimeError, match="leave it in eval mode"):
            cam(images)
    assert not narrow.training


def test_score_cam_of_a_network_in_half_precision(narrow, images):
    with GradCAM(narrow, method="scorecam") as cam:
        expected = cam(images, 1).raw
    half = copy.deepcopy(narrow).bfloat16()
    with GradCAM(half, method="scorecam") as cam:
        result = cam(images.bfloat16(), 1).raw
    assert (result - expected).abs().max() < 0.05 * expected.max()


def test_damaged_weights_are_an_error_for_every_method(narrow, images):
    damaged = copy.deepcopy(narrow)
    with torch.no_grad():
        damaged[0].weight.fill_(torch.nan)
    for method in METHODS:
        with GradCAM(damaged, method=method) as cam, pytest.raises(ValueError, match="not finite"):
            cam(images)


def test_cells_without_padding_lie_at_the_same_places_for_0_and_valid():
    for padding in (0, "valid"):
        model = nn.Sequential(
            nn.Conv2d(3, 2, 9, padding=padding), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
        )
        with GradCAM(model, "1") as cam:
            assert cam(torch.randn(1, 3, 32, 32)).layers[0].grid.rows == (4, 1, 32)


def test_eigen_cam_of_signed_activations_has_the_sign_of_its_sum():
    # One channel: the sum is positive, but the entry with the largest magnitude is negative.
    activation = torch.ones(1, 1, 3, 3)
    activation[0, 0, 1, 1] = -6.0
    result = eigen_cam_maps(activation)
    assert result.sum() > 0
    torch.testing.assert_close(result[0], activation[0, 0])
    torch.testing.assert_close(eigen_cam_maps(activation.abs())[0], activation[0, 0].abs())


def test_grad_cam_plus_plus_never_turns_evidence_for_into_evidence_against():
    activation = torch.full((1, 1, 2, 2), -1.0)
    gradient = torch.ones(1, 1, 1, 2, 2)  # 2 + 1 * -4 is negative
    assert METHODS["gradcam++"].weights(activation, gradient).item() == 0
    assert METHODS["gradcam++"].weights(-activation, gradient).item() == pytest.approx(4 / (2 + 4))


def test_more_classes_than_images_and_wrong_methods_are_refused(small, images):
    with GradCAM(small) as cam, pytest.raises(ValueError, match="for 2 images"):
        cam(images, [0, 1, 2])
    with pytest.raises(ValueError, match="unknown method 'gradcamm': choose from gradcam,"):
        GradCAM(small, method="gradcamm")
    with pytest.raises(ValueError, match=r"no layer 'features\.9'"):
        GradCAM(small, ["features.4.relu", "features.9"])


class ChannelsLast(nn.Module):
    """Cells of 8 x 8 pixels whose channels come last, as in a Swin transformer, then first again."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 8, stride=8)
        self.mixed = nn.Sequential(nn.Linear(12, 10), nn.ReLU())
        self.moved = nn.Identity()
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        x = self.mixed(self.patches(x).permute(0, 2, 3, 1))
        return self.head(self.moved(x.permute(0, 3, 1, 2)).mean(dim=(2, 3)))


@pytest.mark.parametrize("size", [(64, 64), (48, 64)])
def test_a_layer_whose_channels_come_last_is_refused_and_the_next_one_is_not(size):
    torch.manual_seed(0)
    network, images = ChannelsLast().eval(), torch.randn(2, 3, *size)
    rows, columns = size[0] // 8, size[1] // 8
    with GradCAM(network, "mixed") as cam, pytest.raises(ValueError, match="channels last") as error:
        cam(images)
    assert f"'mixed' gives (2, {rows}, {columns}, 10)" in str(error.value)
    with GradCAM(network, "moved") as cam:
        assert cam(images, "all").raw.shape == (2, 3, rows, columns)


@pytest.mark.slow
def test_a_swin_transformer_is_explained_after_its_permutation():
    torch.manual_seed(0)
    network, images = models.swin_t(weights=None).eval(), torch.randn(1, 3, 64, 64)
    for layer in ("features", "features.1", "features.3", "norm"):
        with GradCAM(network, layer) as cam, pytest.raises(ValueError, match="'permute'"):
            cam(images)
    with GradCAM(network, "permute") as cam:
        maps = cam(images, [[3, 5]])
    with torch.no_grad():
        activation = network.permute(network.norm(network.features(images)))
    expected = torch.einsum("ck,nkhw->nchw", network.head.weight[[3, 5]], activation).relu() / 4
    torch.testing.assert_close(maps.raw, expected.detach(), rtol=1e-4, atol=1e-6)


def test_several_methods_share_a_pass_and_have_the_maps_of_each_alone(narrow, images):
    expected = {}
    for method in METHODS:
        with GradCAM(narrow, method=method) as cam:
            expected[method] = cam(images, "all")
    passes = []
    hook = narrow.register_forward_hook(lambda *_: passes.append(1))
    with GradCAM(narrow) as cam:
        result = cam.by_method([name for name in METHODS if name != "scorecam"], images, "all")
        assert len(passes) == 1
        result |= cam.by_method(["scorecam"], images, "all")
    hook.remove()
    for method, maps in result.items():
        torch.testing.assert_close(maps.raw, expected[method].raw)
        torch.testing.assert_close(maps.logits, expected[method].logits)


def test_several_layers_have_the_maps_of_each_alone_and_are_fused_by_the_maximum(resnet, images):
    with GradCAM(resnet, ["layer3", "layer4"], "layercam") as cam:
        both = cam(images, "all")
    single = []
    for layer, result in zip(("layer3", "layer4"), both.layers, strict=True):
        with GradCAM(resnet, layer, "layercam") as cam:
            single.append(cam(images, "all"))
        torch.testing.assert_close(result.raw, single[-1].raw, rtol=1e-4, atol=1e-7)
        assert result.grid == single[-1].layers[0].grid
    expected = torch.maximum(*[one.upsampled((50, 40)) for one in single])
    torch.testing.assert_close(both.upsampled((50, 40)), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="no raw scale in common"):
        _ = both.raw
    assert torch.equal(both.empty, single[0].empty & single[1].empty)


def test_three_methods_agree_before_pooling_and_a_linear_layer(resnet, images):
    # The gradient is then the same at every place, so its means and weighted means are equal (Draelos & Carin 2020).
    result = {}
    for method in ("gradcam", "hirescam", "xgradcam"):
        with GradCAM(resnet, method=method) as cam:
            result[method] = cam(images, "all").raw
    torch.testing.assert_close(result["hirescam"], result["gradcam"])
    torch.testing.assert_close(result["xgradcam"], result["gradcam"])


def test_hires_cam_of_a_linear_head_adds_up_to_the_logit():
    # Draelos & Carin 2020: before one linear layer, the sum of gradient times activation is the logit minus the bias.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 2, bias=False)).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.abs_()  # so that nothing is negative and the ReLU changes nothing
        model[0].bias.zero_()
    with GradCAM(model, "0", "hirescam") as cam:
        maps = cam(torch.rand(2, 3, 6, 6), "all")
    torch.testing.assert_close(maps.raw.sum((2, 3)), maps.logits, rtol=1e-5, atol=1e-6)


def test_score_cam_weighs_channels_by_the_logits_of_masked_images():
    # The two channels are the left and the right half of the image. Class 0 sums the left one, class 1 the right one.
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Identity()
            self.weight = nn.Parameter(torch.eye(2) * 40)

        def forward(self, x):
            left = torch.zeros_like(x[:, :1])
            left[..., : x.shape[-1] // 2] = 1
            activation = self.layer(torch.cat([left, 1 - left], 1) * x[:, :1])
            return activation.mean((2, 3)) @ self.weight

    with GradCAM(Halves(), "layer", "scorecam") as cam:
        maps = cam(torch.ones(1, 3, 4, 8), "all").raw[0]
    softmax = torch.tensor([20.0, 0.0]).softmax(0)  # the mean of half an image of ones, times 40
    for map_, inside in zip(maps, (maps[0, :, :4], maps[1, :, 4:]), strict=True):
        torch.testing.assert_close(inside, torch.full((4, 4), float(softmax[0])))
        assert float(map_.sum() - inside.sum()) == pytest.approx(16 * float(softmax[1]), abs=1e-6)
