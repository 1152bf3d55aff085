"""Faithfulness and randomisation against closed forms, SciPy and hand-made networks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch import nn
from torch.nn import functional

from evaluation import faithfulness
from evaluation.faithfulness import ClassifiedImages
from evaluation.randomisation import HEAD_LIMIT, random_network, randomised, rank_correlation, verdict
from grad_cam import GradCAM
from inference.trained_networks import ModelCard
from networks import ARCHITECTURES, build_network

SIDE = 28  # blocks of 2 x 2
EVIDENCE = torch.zeros(SIDE, SIDE)
EVIDENCE[7:21, 7:21] = 1  # a quarter of the image
CHECKERS = 1.0 - 2 * ((torch.arange(SIDE)[:, None] + torch.arange(SIDE)) % 2)  # blurring removes this pattern


def checkered(n=3):
    """Return (n, 3, SIDE, SIDE) images of ±1. Their mean is 0, and blurring makes their inner pixels 0."""
    return CHECKERS.expand(n, 3, -1, -1).clone()


def region_network(images):
    """Return probabilities. That of class 1 is the share of the pattern that remains in the region of the evidence."""
    p = ((images[:, 0] * CHECKERS * EVIDENCE).sum(dim=(1, 2)) / EVIDENCE.sum()).clamp(0, 1)
    return torch.stack([1 - p, p], dim=1)


def mean_network(images):
    p = images.mean(dim=(1, 2, 3)).clamp(0, 1)
    return torch.stack([1 - p, p], dim=1)


def conv_network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 4, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.Softmax(1)
        )


def deletion_insertion(network, images, maps, classes, *, steps=16, seed=0):
    subject = ClassifiedImages(network, images, classes, torch.zeros_like(images))
    return faithfulness.deletion_insertion(subject, maps, steps=steps, seed=seed)


def masked_confidence(network, images, maps, classes):
    subject = ClassifiedImages(network, images, classes, torch.zeros_like(images))
    return faithfulness.masked_confidence(subject, maps)


def ones(n=3):
    return torch.ones(n, dtype=torch.long)


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# Deletion and insertion


def test_areas_of_a_linear_network_are_those_of_the_closed_form():
    # The evidence is a quarter of the pixels. If the map names it first, the probability falls (or rises) along a line
    # over the first quarter of the steps. If the map names it last, this happens over the last quarter.
    images = checkered()
    first = deletion_insertion(region_network, images, EVIDENCE.expand(3, -1, -1), ones())
    last = deletion_insertion(region_network, images, 1 - EVIDENCE.expand(3, -1, -1), ones())
    np.testing.assert_allclose(first["deletion"], 0.25 / 2, atol=1e-6)
    np.testing.assert_allclose(last["deletion"], 1 - 0.25 / 2, atol=1e-6)
    np.testing.assert_allclose(first["insertion"], 1 - 0.25 / 2, atol=2e-3)  # 2e-3: what the blur leaves
    np.testing.assert_allclose(last["insertion"], 0.25 / 2, atol=2e-3)


def test_the_probability_is_that_of_the_given_class():
    maps = EVIDENCE.expand(2, -1, -1)
    areas = deletion_insertion(region_network, checkered(2), maps, torch.tensor([0, 1]))
    np.testing.assert_allclose(areas["deletion"], [1 - 0.25 / 2, 0.25 / 2], atol=1e-6)


def test_each_image_has_its_own_map(monkeypatch):
    monkeypatch.setattr(faithfulness, "BATCH", 5)
    maps = torch.stack([EVIDENCE, 1 - EVIDENCE])
    areas = deletion_insertion(region_network, checkered(2), maps, ones(2))
    np.testing.assert_allclose(areas["deletion"], [0.25 / 2, 1 - 0.25 / 2], atol=1e-6)


def test_within_the_map_the_greatest_values_go_first():
    half = EVIDENCE.clone()
    half[:14] = 0
    # All of the evidence is in the lower half. The map is 0.3 there. It is 1 on as many other pixels, deleted first.
    graded = 0.3 * half + half.flip(0)
    images = checkered(1) * half
    areas = deletion_insertion(region_network, images, graded[None], ones(1), steps=32)
    # p stays 0.5 while the first eighth of the pixels is deleted, and falls to 0 during the second eighth.
    assert areas["deletion"] == pytest.approx(0.5 * (1 / 8 + 1 / 16), abs=1e-6)


def test_a_uniform_map_deletes_along_a_straight_line_where_every_pixel_counts_the_same():
    areas = deletion_insertion(mean_network, torch.ones(3, 3, SIDE, SIDE), torch.ones(3, SIDE, SIDE), ones())
    np.testing.assert_allclose(areas["deletion"], 0.5, atol=1e-6)
    np.testing.assert_allclose(areas["insertion"], 1, atol=1e-6)  # the blurred copy of a constant is the constant


def deleted_one_by_one(maps, seed=0):
    """Return (N, 196) the 2 x 2 block that each of 196 steps deletes. Assert that it is one whole block."""
    seen = []

    def network(images):
        seen.append(images[:, 0].clone())
        return mean_network(images)

    deletion_insertion(network, torch.ones(len(maps), 3, SIDE, SIDE), maps, ones(len(maps)), steps=196, seed=seed)
    left = torch.cat(seen)[: 197 * len(maps)].reshape(len(maps), 197, SIDE, SIDE)
    gone = (left[:, :-1] - left[:, 1:]).reshape(len(maps), 196, 14, 2, 14, 2).sum(dim=(3, 5)).flatten(2)
    assert ((gone == 0) | (gone == 4)).all()
    assert (gone.sum(dim=2) == 4).all()
    return gone.argmax(dim=2).numpy()


def test_ties_go_in_whole_blocks_in_a_random_order_that_is_each_images_own():
    order = deleted_one_by_one(torch.ones(8, SIDE, SIDE))
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(196), (8, 1)))
    assert len(np.unique(order, axis=0)) == 8
    # The order is not a sweep: time and place have rank correlation 0 up to chance (standard deviation 1/sqrt(195)).
    swept = [stats.spearmanr(np.arange(196), row).statistic for row in order]
    assert np.abs(swept).max() < 4 / np.sqrt(195)


def test_the_order_of_ties_is_the_same_for_every_map_and_depends_on_the_seed():
    uniform = deleted_one_by_one(torch.ones(2, SIDE, SIDE))
    np.testing.assert_array_equal(uniform, deleted_one_by_one(torch.zeros(2, SIDE, SIDE)))
    np.testing.assert_array_equal(uniform, deleted_one_by_one(torch.ones(5, SIDE, SIDE))[:2])
    rounded = 1 - 1e-7 * noise(2, SIDE, SIDE)
    np.testing.assert_array_equal(uniform, deleted_one_by_one(rounded))
    assert (uniform != deleted_one_by_one(torch.ones(2, SIDE, SIDE), seed=1)).any()


def test_the_zeros_of_a_rectified_map_go_last_and_in_blocks():
    map_ = torch.zeros(SIDE, SIDE)
    map_[:14, :14] = 1  # 49 blocks
    order = deleted_one_by_one(map_[None])[0]
    assert ((order[:49] // 14 < 7) & (order[:49] % 14 < 7)).all()


def test_insertion_starts_from_a_gaussian_of_a_tenth_of_the_side_and_ends_with_the_image(monkeypatch):
    images, seen = noise(2, 3, 24, 40), []

    def network(batch):
        seen.append(batch.clone())
        return mean_network(batch)

    monkeypatch.setattr(faithfulness, "BATCH", 4)
    deletion_insertion(network, images, torch.ones(2, 24, 40), ones(2), steps=1)
    deletion, insertion = (batch.reshape(2, 2, 3, 24, 40) for batch in seen)
    torch.testing.assert_close(deletion[:, 0], images)
    assert (deletion[:, 1] == 0).all()
    torch.testing.assert_close(insertion[:, 1], images)
    # At the edges, SciPy's Gaussian adds zeros. So its result is divided by the weight inside the image.
    options = {"sigma": (0, 0, 2.4, 2.4), "mode": "constant", "truncate": 20}
    expected = ndimage.gaussian_filter(images.numpy(), **options)
    expected /= ndimage.gaussian_filter(np.ones_like(images), **options)
    np.testing.assert_allclose(insertion[:, 0], expected, atol=1e-5)


def test_the_batch_size_changes_nothing(monkeypatch):
    images = torch.randn(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    arguments = (conv_network(), images, noise(5, SIDE, SIDE), torch.tensor([0, 1, 2, 0, 1]))
    scores = deletion_insertion(*arguments) | masked_confidence(*arguments)
    for batch in (1, 7):
        monkeypatch.setattr(faithfulness, "BATCH", batch)
        in_batches = deletion_insertion(*arguments) | masked_confidence(*arguments)
        for name, values in scores.items():
            np.testing.assert_allclose(in_batches[name], values, atol=1e-6)


def test_a_network_that_works_in_place_spoils_neither_images_nor_maps():
    images, maps = noise(3, 3, SIDE, SIDE), noise(3, SIDE, SIDE)
    before = images.clone(), maps.clone()

    def network(batch):
        return mean_network(batch.mul_(0.5))

    deletion_insertion(network, images, maps, ones())
    masked_confidence(network, images, maps, ones())
    assert torch.equal(images, before[0])
    assert torch.equal(maps, before[1])


# Average drop and increase in confidence


def test_average_drop_and_increase_by_hand():
    images = torch.full((3, 3, 4, 4), 0.8)
    maps = torch.stack([torch.ones(4, 4), torch.full((4, 4), 0.5), torch.full((4, 4), 0.5)])
    confidence = masked_confidence(mean_network, images, maps, torch.tensor([1, 1, 0]))
    np.testing.assert_allclose(confidence["probability"], [0.8, 0.8, 0.2], atol=1e-6)
    # The masked images have the probabilities 0.8, 0.4 and 0.6.
    np.testing.assert_allclose(confidence["drop"], [0, 0.5, 0], atol=1e-6)
    np.testing.assert_array_equal(confidence["increase"], [0, 0, 1])


def test_a_probability_of_zero_cannot_drop():
    images = torch.tensor([0.0, 0.5])[:, None, None, None].expand(2, 3, 4, 4)
    confidence = masked_confidence(mean_network, images, torch.zeros(2, 4, 4), ones(2))
    np.testing.assert_array_equal(confidence["drop"], [0, 1])


def test_a_map_on_the_evidence_keeps_the_confidence_and_its_complement_loses_it():
    evidence = masked_confidence(region_network, checkered(), EVIDENCE.expand(3, -1, -1), ones())
    complement = masked_confidence(region_network, checkered(), 1 - EVIDENCE.expand(3, -1, -1), ones())
    np.testing.assert_allclose(evidence["drop"], 0, atol=1e-6)
    np.testing.assert_allclose(complement["drop"], 1, atol=1e-6)


# Random networks


def card_of(architecture, outputs=3):
    classes = tuple(map(str, range(outputs)))
    layer = ARCHITECTURES[architecture].cam_layer
    return ModelCard(architecture, classes, 96, (0.5,) * 3, (0.25,) * 3, layer)


def smooth_images(n=8, side=96):
    """Return (n, 3, side, side) grey images that hardly correlate."""
    coarse = torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return functional.interpolate(coarse, (side, side), mode="bicubic").expand(-1, 3, -1, -1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_random_network_of_any_architecture_sees_its_image(name):
    images = smooth_images()
    network = random_network(card_of(name), images, seed=0)
    seen = []
    network.get_submodule(network.cam_layer).register_forward_hook(
        lambda module, inputs, output: seen.append(output.clone())
    )
    with GradCAM(network, method="eigencam") as cam:
        maps = cam(images, 0)
    (activation,) = seen
    assert maps.logits.isfinite().all()
    assert maps.logits.std(dim=0).min() > 1e-3
    assert not maps.empty.any()
    # Much of the activation, and of the map, differs from image to image.
    assert activation.std(dim=0, correction=0).square().sum() > 0.4 * activation.square().mean(dim=0).sum()
    correlations = np.corrcoef(maps.raw[:, 0].flatten(1).numpy())
    assert correlations[np.triu_indices(len(images), 1)].mean() < 0.9


def test_a_random_network_depends_on_its_seed_alone_and_leaves_the_global_random_state():
    images, before = smooth_images(2), torch.random.get_rng_state()
    first, again, other = (state(random_network(card_of("small_cnn"), images, seed=s)) for s in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if name.endswith("conv.weight"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_random_network_is_drawn_as_its_architecture_draws_its_weights():
    # He et al. 2015: the standard deviation is sqrt(2 / fan-out). The default of a layer is sqrt(1 / (3 * fan-in)).
    network = random_network(card_of("small_cnn"), smooth_images(2), seed=0)
    last = network.features[4].conv.weight.detach()
    assert float(last.std()) == pytest.approx(np.sqrt(2 / (384 * 9)), rel=0.01)
    assert (network.features[4].bn.weight == 1).all()


def test_batch_normalisation_is_of_the_images():
    images = smooth_images()
    network = random_network(card_of("resnet18"), images, seed=0)
    with torch.no_grad():
        first = network.conv1(images)
        torch.testing.assert_close(network.bn1.running_mean, first.mean(dim=(0, 2, 3)), atol=1e-5, rtol=1e-4)
        normalised = network.bn1(first)
    torch.testing.assert_close(normalised.mean(dim=(0, 2, 3)), torch.zeros(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalised.std(dim=(0, 2, 3)), torch.ones(64), atol=1e-2, rtol=0)


def test_a_random_network_has_the_head_of_the_trained_one_and_gradients_in_inference_mode_too():
    card = replace(card_of("lenet5"), hidden_units=(7,), dropout=0.5)
    with torch.inference_mode():
        network = random_network(card, smooth_images(2), seed=0)
    expected = build_network("lenet5", 3, hidden_units=(7,), dropout=0.5).state_dict()
    assert {key: value.shape for key, value in state(network).items()} == {
        key: value.shape for key, value in expected.items()
    }
    assert not any(module.training for module in network.modules())
    network(smooth_images(2)).sum().backward()


# Randomisation


class Scale(nn.Module):
    """A module with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(5 + 3 * torch.randn(4000, 1, 1))

    def forward(self, x):
        return x * self.factor.mean()


class Reversed(nn.Module):
    """A network whose modules are registered from head to stem, but run as stem, norm, scale, head."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 2)
        self.scale = Scale()
        self.norm = nn.BatchNorm2d(6)
        self.stem = nn.Conv2d(3, 6, 3)
        self.cam_layer = "norm"

    def forward(self, x):
        return self.head(self.scale(self.norm(self.stem(x)).relu()).mean(dim=(2, 3)))


EXAMPLE = torch.ones(2, 3, 8, 8)


def changed_everywhere(network, seed):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for parameter in network.parameters():
            parameter.data.add_(torch.randn_like(parameter))
    return network


@pytest.fixture
def trained():
    """Return a network in training mode, the stem frozen."""
    network = changed_everywhere(Reversed(), 3)
    network.norm.running_mean += 3
    network.norm.running_var *= 7
    network.norm.num_batches_tracked += 11
    network.stem.requires_grad_(False)
    return network.train()


@pytest.fixture
def fresh():
    """Return a network whose values all differ from those of the trained one."""
    return changed_everywhere(Reversed(), 4)


def state(network):
    return {key: value.clone() for key, value in network.state_dict().items()}


def changed(network, before):
    return {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}


def test_modules_become_random_in_the_order_in_which_they_run_from_the_last(trained, fresh):
    before = state(trained)
    steps = [(share, changed(network, before)) for share, network in randomised(trained, fresh, EXAMPLE)]
    head, scale = {"head.weight", "head.bias"}, {"scale.factor"}
    norm = {key for key in before if key.startswith("norm.")}
    assert steps == [(0.25, head), (0.5, head | scale), (0.75, head | scale | norm), (1.0, set(before))]


def test_in_the_end_weights_and_running_statistics_are_those_of_the_random_network(trained, fresh):
    expected = state(fresh)
    *_, (_, network) = randomised(trained, fresh, EXAMPLE)
    assert not changed(network, expected)
    assert not changed(fresh, expected)


def test_the_network_given_stays_as_it_is(trained, fresh):
    before = state(trained)
    hooks = len(trained.stem._forward_pre_hooks)
    for _, network in randomised(trained, fresh, EXAMPLE):
        assert not any(module.training for module in network.modules())
        assert [p.requires_grad for p in network.parameters()] == [p.requires_grad for p in trained.parameters()]
        assert network.cam_layer == "norm"
    assert not changed(trained, before)
    assert trained.training
    assert trained.norm.training
    assert len(trained.stem._forward_pre_hooks) == len(network.stem._forward_pre_hooks) == hooks == 0


def small_network(seed):
    return changed_everywhere(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 2)), seed)


def test_stages_that_are_the_same_number_of_modules_come_once():
    trained = small_network(0)
    before = state(trained)
    steps = [(share, changed(network, before)) for share, network in randomised(trained, small_network(1), EXAMPLE)]
    assert steps == [(0.5, {"2.weight", "2.bias"}), (1.0, set(before))]


def test_modules_that_do_not_run_on_the_example_become_random_last():
    trained, fresh = small_network(0), small_network(1)
    for network in (trained, fresh):
        network[0].unused = nn.Linear(1, 1)
    before = state(trained)
    last = {"0.unused.weight", "0.unused.bias"}
    unchanged = [last - changed(network, before) for _, network in randomised(trained, fresh, EXAMPLE)]
    assert unchanged == [last, last, set()]


def test_a_frozen_network_whose_weights_were_loaded_by_assignment_stays_as_it_is():
    weights, expected = conv_network(seed=1).state_dict(), state(conv_network(seed=1))
    network = conv_network().to("meta")
    network.load_state_dict(weights, assign=True)
    *_, (_, copy) = randomised(network.requires_grad_(False), conv_network(seed=2), EXAMPLE)
    assert not changed(network, expected)
    assert changed(copy, expected) == set(expected)


def test_copies_made_in_inference_mode_have_gradients(trained, fresh):
    with torch.inference_mode():
        *_, (_, copy) = randomised(trained, fresh, EXAMPLE)
    copy(EXAMPLE).sum().backward()
    assert copy.head.weight.grad is not None


# Rank correlation and verdict


def test_rank_correlation_is_scipys_with_and_without_ties():
    rng = np.random.default_rng(0)
    maps, others = rng.random((6, 7, 5)), rng.random((6, 7, 5))
    maps[3:], others[3:] = np.maximum(maps[3:] - 0.5, 0), np.round(4 * others[3:]) / 4
    expected = [stats.spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(maps, others, strict=True)]
    correlation = rank_correlation(torch.from_numpy(maps), torch.from_numpy(others))
    np.testing.assert_allclose(correlation, expected, atol=1e-12)


def test_rank_correlation_depends_on_the_order_alone():
    maps = noise(4, 7, 7)
    np.testing.assert_allclose(rank_correlation(maps, maps.exp() * 1e-9), 1)
    np.testing.assert_allclose(rank_correlation(maps, -(maps**3)), -1)


def test_a_constant_map_agrees_with_a_constant_one_only():
    some, zero = noise(1, 7, 7), torch.zeros(1, 7, 7)
    uneven = 1 + 1e-7 * some.double()
    for constant in (zero, torch.ones(1, 7, 7), uneven):
        assert rank_correlation(some, constant) == rank_correlation(constant, some) == [0.0]
        assert rank_correlation(constant, zero) == [1.0]


@pytest.mark.parametrize(
    ("after_head", "after_all", "words"),
    [
        ((0.99, 0.96, 1.0), (0.1, 0.0, 0.2), "does not explain the decision"),
        ((0.6, 0.5, HEAD_LIMIT), (0.7, 0.51, 0.9), "does not explain the model"),
        ((0.6, 0.5, HEAD_LIMIT), (0.3, 0.1, 0.5), "changes with the weights"),
        ((0.75, 0.6, 0.9), (0.3, 0.1, 0.5), "undecided"),
        ((0.2, 0.1, 0.3), (0.5, 0.3, 0.6), "undecided"),
        ((0.2, np.nan, np.nan), (0.1, np.nan, np.nan), "undecided"),  # one patient
    ],
)
def test_verdict_needs_the_whole_interval_on_one_side_of_a_limit(after_head, after_all, words):
    assert verdict(after_head, after_all).endswith(words)


def judged(method, network, images):
    """Return the verdict on a method from its maps of eight randomisations."""
    trained_maps, first, last = method(network, images), [], []
    for seed in range(8):
        stages = [
            rank_correlation(trained_maps, method(random, images))
            for _, random in randomised(network, conv_network(seed=100 + seed), images)
        ]
        first.append(stages[0])
        last.append(stages[-1])
    means = [np.abs(np.concatenate(correlations)) for correlations in (first, last)]
    spread = [2 * values.std() / np.sqrt(len(values)) for values in means]
    return verdict(*[(m.mean(), m.mean() - s, m.mean() + s) for m, s in zip(means, spread, strict=True)])


@torch.no_grad()
def class_activation(network, images):
    """Return the maps of Zhou et al. 2016: the head's weights of class 0 times the activations, rectified."""
    return functional.relu(torch.einsum("nkhw,k->nhw", network[:2](images), network[4].weight[0]))


@torch.no_grad()
def mean_activation(network, images):
    return network[:2](images).mean(dim=1)


def edges(network, images):
    rows, columns = torch.gradient(images.mean(dim=1), dim=(1, 2))
    return rows**2 + columns**2


def test_the_images_own_edges_are_no_explanation_and_class_activation_is_one():
    images = noise(6, 3, 16, 16) - 0.5
    network = conv_network(seed=5)
    assert "does not explain the decision" in judged(edges, network, images)
    assert "does not explain the decision" in judged(mean_activation, network, images)
    assert judged(class_activation, network, images) == "changes with the weights"


def test_a_method_that_looks_at_the_head_but_hardly_at_the_weights_does_not_explain_the_model():
    def nudged_edges(network, images):
        which = int(network[4].weight[0].sum() * 1e4) % images.shape[-1]
        maps = edges(network, images)
        maps[:, :, [which, (which + 1) % images.shape[-1]]] += 1
        return maps

    images = noise(6, 3, 16, 16) - 0.5
    assert "does not explain the model" in judged(nudged_edges, conv_network(seed=5), images)
