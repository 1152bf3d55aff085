"""How to compute is measured once, changes nothing else, and the study has the last word."""

import copy
import json
import time

import pytest
import torch
from torch import nn

from compute import Compute, _ways, measured_compute
from studies import Training

CPU = torch.device("cpu")
SIZE = 16


class Shared(list):
    """A list that stays one and the same when what has it is copied."""

    def __deepcopy__(self, memo):
        return self


class Sleepy(nn.Module):
    """Takes 50 ms more for images in one memory order: channels last, contiguous, or none of them (None)."""

    def __init__(self, slow=None):
        super().__init__()
        layers = [
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.Dropout(0.5),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ]
        self.layers = nn.Sequential(*layers, nn.Linear(4, 2))
        self.slow, self.passes = slow, Shared()  # whether each pass of any copy was in bfloat16

    def forward(self, images):
        self.passes.append(torch.is_autocast_enabled("cpu"))
        if self.slow is not None and images.is_contiguous(memory_format=self.slow):
            time.sleep(0.05)
        return self.layers(images)


def measure(network, kept, size=SIZE, steps=10, **settings):
    training = Training(**({"batch_size": 4, "precision": "fp32"} | settings))
    return measured_compute(network, size, training, CPU, steps=steps, kept=kept, title="Sleepy")


@pytest.fixture
def kept(tmp_path):
    return tmp_path / "runs" / "compute.json"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("order", ["channels_last", "contiguous"])
def test_a_study_that_says_how_is_obeyed_and_nothing_is_measured(kept, capsys, precision, order):
    network = Sleepy()
    found = measure(network, kept, precision=precision, memory_format=order)
    assert found == Compute(precision, order == "channels_last")
    assert capsys.readouterr().out == f"Sleepy: computed in {found}\n"
    assert network.passes == []
    assert not kept.exists()


@pytest.mark.parametrize(
    ("slow", "fast"), [(torch.channels_last, "contiguous"), (torch.contiguous_format, "channels last")]
)
def test_the_faster_memory_order_is_chosen_and_told(kept, capsys, slow, fast):
    found = measure(Sleepy(slow), kept)
    assert found == Compute("fp32", fast == "channels last")
    assert capsys.readouterr().out.startswith(f"Sleepy: computed in fp32, {fast} (4 images: ")


def test_ways_that_are_about_as_fast_do_not_change_with_the_noise_of_the_clock(kept):
    for size in range(SIZE, SIZE + 5):
        assert measure(Sleepy(), kept, size=size) == Compute("fp32", channels_last=True)


def test_what_was_found_is_kept_and_obeyed_by_the_next_call_without_measuring(kept):
    assert not measure(Sleepy(torch.channels_last), kept).channels_last
    content = json.loads(kept.read_text())
    (entry,) = content.values()
    entry["channels_last"] = True
    kept.write_text(json.dumps(content))
    again = Sleepy(torch.channels_last)
    assert measure(again, kept).channels_last
    assert again.passes == []


def test_another_size_or_batch_is_measured_anew_beside_what_is_kept(kept):
    measure(Sleepy(), kept)
    for number, changes in enumerate(({"batch_size": 5}, {"size": SIZE + 1}), start=2):
        network = Sleepy()
        measure(network, kept, **changes)
        assert network.passes
        assert len(json.loads(kept.read_text())) == number


@pytest.mark.parametrize("content", ["", '{"Sleepy', "null", "[1]", "\x00\xff"])
def test_a_damaged_file_is_measured_anew_and_written_over(kept, content):
    kept.parent.mkdir()
    kept.write_text(content, encoding="latin-1")
    assert not measure(Sleepy(torch.channels_last), kept).channels_last
    assert len(json.loads(kept.read_text())) == 1


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_network_and_the_random_numbers_as_they_were(kept, training):
    network = Sleepy().train(training)
    network.layers[1].eval()
    network(torch.rand(2, 3, SIZE, SIZE)).sum().backward()
    before = copy.deepcopy(network.state_dict())
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    modes = [module.training for module in network.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    measure(network, kept)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [module.training for module in network.modules()] == modes
    assert all(map(torch.equal, gradients, (parameter.grad for parameter in network.parameters())))
    assert network.layers[0].weight.is_contiguous()


def test_bf16_is_not_even_timed_on_a_processor_without_units_for_it(kept, capsys, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": False})
    network = Sleepy(torch.channels_last)
    assert measure(network, kept, precision="auto") == Compute("fp32", channels_last=False)
    assert not any(network.passes)
    said = capsys.readouterr().out
    assert said.endswith("; no bf16: this processor has no units for it\n")
    assert said.count("bf16") == 1


def test_on_a_processor_with_units_for_bf16_it_is_timed_in_both_memory_orders(kept, capsys, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert list(map(str, _ways(Training(), CPU))) == [
        "fp32, channels last",
        "fp32, contiguous",
        "bf16, channels last",
        "bf16, contiguous",
    ]
    network = Sleepy(torch.channels_last)
    measure(network, kept, precision="auto")
    assert network.passes.count(True) == network.passes.count(False) > 0
    assert "no units" not in capsys.readouterr().out


# --- compiled or not ---


def compiler(module):
    """Stand for torch.compile: half a second at the first pass, and 50 ms saved in each one after it."""
    quick = copy.deepcopy(module)
    quick.slow, first = None, [0.5]

    def run(images):
        time.sleep(first.pop() if first else 0)
        return quick(images)

    return run


@pytest.mark.parametrize(("steps", "compiled"), [(2, False), (1000, True)])
def test_a_network_is_compiled_only_where_the_steps_save_more_than_compiling_takes(
    kept, capsys, monkeypatch, steps, compiled
):
    monkeypatch.setattr(torch, "compile", compiler)
    options = {"compile": True, "memory_format": "contiguous", "steps": steps}
    found = measure(Sleepy(torch.contiguous_format), kept, **options)
    assert found == Compute("fp32", channels_last=False, compiled=compiled)
    verdict = f"Sleepy: {'compiled' if compiled else 'not compiled'}, compiling takes "
    assert verdict in capsys.readouterr().out
    again = Sleepy(torch.contiguous_format)
    assert measure(again, kept, **options) == found
    assert again.passes == []


def test_a_network_is_not_compiled_where_there_is_no_compiler(kept, capsys, monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    monkeypatch.setattr(config, "force_disable_caches", True)
    assert not measure(Sleepy(), kept, compile=True, steps=10**9).compiled
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("Sleepy: not compiled, torch.compile fails here: ")
    assert "no-such-compiler" in said
    torch._dynamo.reset()


def test_a_compiler_that_gives_up_without_a_word_is_named_by_its_error(kept, capsys, monkeypatch):
    def broken(module):
        raise AssertionError

    monkeypatch.setattr(torch, "compile", broken)
    assert not measure(Sleepy(), kept, compile=True).compiled
    assert capsys.readouterr().out.endswith("torch.compile fails here: AssertionError\n")
