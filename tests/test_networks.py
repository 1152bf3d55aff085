"""Networks: built right, started right, saved and loaded without a change."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from networks import (
    ARCHITECTURES,
    ModelCard,
    add_batch_norm,
    build_network,
    fold_batch_norm,
    load_network,
    parameter_count,
    resolve_device,
    run_folder,
    save_network,
)
from studies import IMAGENET_MEAN, IMAGENET_STD

# Parameters for 1,000 classes as torchvision documents them, and the input width of the last layer.
PUBLISHED = {"vgg16": (138_357_544, 4096), "resnet18": (11_689_512, 512), "densenet121": (7_978_856, 1024)}


def card(architecture="resnet18", **fields):
    values = {
        "architecture": architecture,
        "classes": ("a", "b", "c"),
        "image_size": 32,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "cam_layer": ARCHITECTURES[architecture].cam_layer,
    }
    return ModelCard(**(values | fields))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameter_count_is_the_published_one_less_the_old_head_plus_the_new(name):
    with torch.device("meta"):
        network = build_network(name, 4)
    published, width = PUBLISHED[name]
    assert parameter_count(network) == published - 1000 * (width + 1) + 4 * (width + 1)


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_network_computes_what_torchvisions_computes(name):
    torch.manual_seed(0)
    network = build_network(name, 4).eval()
    theirs = models.get_model(name, num_classes=4).eval()
    theirs.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network(images), theirs(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_layer_for_grad_cam_comes_after_the_last_relu(name):
    network = build_network(name, 4).eval()
    kept = {}
    network.get_submodule(network.cam_layer).register_forward_hook(lambda m, i, o: kept.update(o=o.clone()))
    with torch.no_grad():
        logits = network(torch.randn(1, 3, 64, 64))
        pooled = kept["o"].mean((2, 3))
        torch.testing.assert_close(network.get_submodule(ARCHITECTURES[name].head)(pooled), logits)
    assert kept["o"].min() >= 0


def test_cam_layer_of_vgg16_is_its_last_relu():
    with torch.device("meta"):
        network = build_network("vgg16", 4)
    relus = [name for name, m in network.features.named_modules() if isinstance(m, nn.ReLU)]
    assert network.cam_layer == f"features.{relus[-1]}" == "features.29"


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    return checkpoints


def old_densenet_name(key):
    for part in ("norm1", "norm2", "conv1", "conv2"):
        key = key.replace(f".{part}.", f".{part[:-1]}.{part[-1]}.") if "denselayer" in key else key
    return key


@pytest.mark.parametrize(
    ("name", "file"), [("resnet18", "resnet18-f37072fd.pth"), ("densenet121", "densenet121-a639ec97.pth")]
)
def test_imagenet_weights_come_from_torchvisions_cache(torch_home, name, file):
    torch.manual_seed(1)
    state = models.get_model(name).state_dict()
    # The published DenseNet file has the module names of torchvision's first versions.
    torch.save({old_densenet_name(key): value for key, value in state.items()}, torch_home / file)
    network = build_network(name, 3, weights="imagenet")
    head = ARCHITECTURES[name].head
    for key, value in network.state_dict().items():
        if not key.startswith(f"{head}."):
            assert torch.equal(value, state[key]), key
    assert network.get_submodule(head).out_features == 3


def test_missing_imagenet_weights_name_file_folder_and_alternatives(torch_home, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(FileNotFoundError) as caught:
        build_network("resnet18", 3, weights="imagenet")
    for part in ("resnet18-f37072fd.pth", str(torch_home), "--weights none", "--weights FILE"):
        assert part in str(caught.value)


def test_damaged_cache_is_named_and_pickled_code_is_not_run(torch_home, tmp_path):
    (torch_home / "resnet18-f37072fd.pth").write_bytes(b"half a download")
    with pytest.raises(ValueError, match=r"resnet18-f37072fd\.pth is damaged, delete it"):
        build_network("resnet18", 3, weights="imagenet")
    torch.save({"fc.weight": ModelCard}, tmp_path / "code.pth")  # a class needs a pickle import
    with pytest.raises(ValueError, match="holds no readable weights"):
        build_network("resnet18", 3, weights=str(tmp_path / "code.pth"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_file_gives_the_trunk_and_the_head_where_it_fits(tmp_path, suffix):
    torch.manual_seed(0)
    source = build_network("resnet18", 3)
    path = tmp_path / f"w{suffix}"
    save_file(source.state_dict(), path) if suffix == ".safetensors" else torch.save(
        source.state_dict(), path
    )
    same = build_network("resnet18", 3, weights=str(path))
    assert all(
        torch.equal(a, b)
        for a, b in zip(source.state_dict().values(), same.state_dict().values(), strict=True)
    )
    other = build_network("resnet18", 5, weights=str(path))
    assert torch.equal(other.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    assert other.fc.out_features == 5


def test_weights_of_another_architecture_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(nn.Linear(3, 3).state_dict(), path)
    with pytest.raises(ValueError, match="are not of a ResNet-18"):
        build_network("resnet18", 3, weights=str(path))
    with pytest.raises(FileNotFoundError, match="no weights file"):
        build_network("resnet18", 3, weights=str(tmp_path / "gone.pth"))
    with pytest.raises(ValueError, match="choose from vgg16, resnet18, densenet121"):
        build_network("alexnet", 3)


def test_folded_batch_norm_leaves_an_ordinary_vgg16_with_the_same_outputs():
    torch.manual_seed(0)
    network = build_network("vgg16", 3, dropout=0)
    names = list(network.state_dict())
    add_batch_norm(network)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == 13
    for _ in range(3):  # moves the running statistics away from 0 and 1
        network.train()(torch.randn(4, 3, 32, 32) * 2 + 1)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = network.eval()(images)
        fold_batch_norm(network)
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
    assert list(network.state_dict()) == names
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def test_residual_gain_is_the_scale_at_the_end_of_each_residual_block():
    for gain in (1.0, 0.3):
        network = build_network("resnet18", 3, residual_gain=gain)
        blocks = [module for module in network.modules() if isinstance(module, models.resnet.BasicBlock)]
        assert len(blocks) == 8
        assert all((block.bn2.weight == gain).all() and (block.bn1.weight == 1).all() for block in blocks)


def test_saved_network_comes_back_the_same_frozen_and_in_eval_mode(tmp_path):
    torch.manual_seed(0)
    network = build_network("resnet18", 3)
    network(torch.randn(4, 3, 32, 32))  # moves the running statistics, which must be saved too
    written = card(temperature=1.7, origin={"seed": 5}, validation={"loss": 0.25})
    save_network(tmp_path / "run", network, written)
    loaded, read = load_network(tmp_path / "run")
    assert read == written
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), network.eval()(images))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["model.json", "model.safetensors"]


def test_probabilities_are_softmax_of_logits_over_temperature():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    expected = np.exp([1.0, 0.5, 0.0]) / np.exp([1.0, 0.5, 0.0]).sum()
    np.testing.assert_allclose(card(temperature=2.0).probabilities(logits)[0].numpy(), expected, rtol=1e-6)


def test_incomplete_and_damaged_run_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="run notebook 2"):
        load_network(tmp_path)
    network = build_network("resnet18", 3)
    save_network(tmp_path, network, card())
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00 not tensors")
    with pytest.raises(ValueError, match=r"damaged or not of this model\.json"):
        load_network(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load_network(tmp_path)
    for text in ("{", "[]", json.dumps({"architecture": "resnet18"})):
        (tmp_path / "model.json").write_text(text)
        with pytest.raises(ValueError, match="not a model card"):
            load_network(tmp_path)


def test_run_folder_is_found_by_study_and_network(tmp_path):
    folder = tmp_path / "demo" / "resnet18"
    folder.mkdir(parents=True)
    (folder / "model.json").write_text("{}")
    assert run_folder("demo/resnet18", tmp_path) == folder
    assert run_folder(folder) == folder
    with pytest.raises(FileNotFoundError, match="there are demo/resnet18"):
        run_folder("demo/vgg16", tmp_path)


def test_unknown_device_is_refused():
    assert resolve_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "gpu"):
        with pytest.raises(ValueError, match="try --device cpu"):
            resolve_device(name)
