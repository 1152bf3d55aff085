"""How a network is computed on the machine at hand: in bfloat16 or not, in which memory order, compiled or not."""

import copy
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor, nn

from checkpoints import write_whole
from studies import Training

ROUNDS = 3
# A way that is not faster by so much, in every round, is not taken: what a noisy clock decides would be decided
# otherwise the next time, and the same seed would give other last digits.
GAIN = 1.2
IMAGES = 8


@dataclass(frozen=True)
class Compute:
    """`precision`: "fp32" or "bf16" (autocast); `channels_last`: the memory order; `compiled`: by torch.compile."""

    precision: str = "fp32"
    channels_last: bool = True
    compiled: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory order of images and convolutions."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self, device: torch.device) -> dict[str, object]:
        """Return the arguments of `torch.autocast`."""
        return {"device_type": device.type, "dtype": torch.bfloat16, "enabled": self.precision == "bf16"}

    def __str__(self) -> str:
        order = "channels last" if self.channels_last else "contiguous"
        return ", ".join([self.precision, order, *(["compiled"] if self.compiled else [])])


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return "bf16" or "fp32" for "auto": bf16 where the device has units for it, since emulation is slower
    than fp32 (measured at half the speed on a processor with AVX-512 but without AVX512-BF16).
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return "bf16" if any(able.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16")) else "fp32"
    return "fp32"


def usual_compute(training: Training, device: torch.device) -> Compute:
    """Return how to compute without measuring: as the study says, else as most machines like it best."""
    return Compute(resolve_precision(training.precision, device), training.memory_format != "contiguous")


def measured_compute(
    network: nn.Module,
    image_size: int,
    training: Training,
    device: torch.device,
    *,
    steps: int,
    kept: Path,
    title: str,
) -> Compute:
    """Return the fastest way to train a network on this machine, of those that the study leaves open.

    A few training steps are timed, in turns, on a copy of the network. What was found is kept in the file `kept`, so
    that the next training, and one that goes on after it was broken off, compute in the same way to the last digit.
    Compiling, where the study asks for it, has to save more in `steps` steps than it costs. Says what it found.
    """
    ways = list(_ways(training, device))
    if len(ways) == 1 and not training.compile:
        _say(title, ways[0], training, "")
        return ways[0]
    key = "; ".join(
        [
            title,
            f"{image_size} px, batches of {training.batch_size}",
            *(str(way) for way in ways),
            _machine(device),
        ]
        + ([f"compile for {steps} steps"] if training.compile else [])
    )
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.with_name(f".{kept.name}.lock")):  # two that measure at once would measure each other
        found = _read(kept)
        if key in found:
            _say(title, Compute(**found[key]), training, ", as measured before")
        else:
            found[key] = asdict(_best(network, ways, image_size, training, device, steps=steps, title=title))
            write_whole(kept, json.dumps(found, indent=2))
    return Compute(**found[key])


def _best(
    network: nn.Module,
    ways: list[Compute],
    image_size: int,
    training: Training,
    device: torch.device,
    *,
    steps: int,
    title: str,
) -> Compute:
    """Time the ways, say which is taken and why, and return it."""
    with torch.random.fork_rng():
        seconds = _timed(network, ways, image_size, training, device)
        best = ways[0]
        for way in ways[1:]:
            if all(before > GAIN * after for before, after in zip(seconds[best], seconds[way], strict=True)):
                best = way
        why = ", ".join(f"{way} {1000 * statistics.median(took):.0f} ms" for way, took in seconds.items())
        _say(
            title,
            best,
            training,
            f" ({min(IMAGES, training.batch_size)} images: {why})" if len(ways) > 1 else "",
        )
        if training.compile:
            best = _compiled_if_it_pays(network, best, image_size, training, device, steps=steps, title=title)
    return best


def _ways(training: Training, device: torch.device) -> Iterator[Compute]:
    """Yield what may be chosen from, the most usual first."""
    precisions = [training.precision]
    if training.precision == "auto":
        # Without units for it, bf16 is known to be slower.
        precisions = list(dict.fromkeys(["fp32", resolve_precision("auto", device)]))
    orders = {"auto": (True, False), "channels_last": (True,), "contiguous": (False,)}[training.memory_format]
    for precision in precisions:
        for order in orders:
            yield Compute(precision, order)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _machine(device: torch.device) -> str:
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return f"{device.type} {chip}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _read(kept: Path) -> dict[str, dict[str, object]]:
    try:
        found = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _timed(
    network: nn.Module, ways: list[Compute], image_size: int, training: Training, device: torch.device
) -> dict[Compute, list[float]]:
    """Return the seconds of training steps, each way; the ways take turns."""
    steps = {way: _step(network, way, image_size, training, device) for way in ways}
    took: dict[Compute, list[float]] = {way: [] for way in ways}
    for number in range(ROUNDS + 1):
        for way, step in steps.items():
            seconds = step()
            if number:  # the first of each is for warming up
                took[way].append(seconds)
    return took


def _step(
    network: nn.Module, way: Compute, image_size: int, training: Training, device: torch.device
) -> Callable[[], float]:
    module = copy.deepcopy(network).to(device, memory_format=way.memory_format)
    run = torch.compile(module) if way.compiled else module
    number = min(IMAGES, training.batch_size)
    images = torch.rand(number, 3, image_size, image_size, device=device)
    images = images.contiguous(memory_format=way.memory_format)

    def step() -> float:
        _wait(device)
        started = time.perf_counter()
        with torch.autocast(**way.autocast(device)):
            output: Tensor = run(images)
        output.float().square().mean().backward()
        _wait(device)
        return time.perf_counter() - started

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _compiled_if_it_pays(
    network: nn.Module,
    way: Compute,
    image_size: int,
    training: Training,
    device: torch.device,
    *,
    steps: int,
    title: str,
) -> Compute:
    compiled = replace(way, compiled=True)
    try:
        plain, quick = (_step(network, each, image_size, training, device) for each in (way, compiled))
        cost = quick()
        took = [(plain(), quick()) for _ in range(ROUNDS)]
    except Exception as error:  # a compiler that is not there or gives up has many ways to say so
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"{title}: not compiled, torch.compile fails here: {why}")
        return way
    before, after = (statistics.median(times) for times in zip(*took, strict=True))
    saved = steps * (before - after) * math.ceil(training.batch_size / IMAGES)
    verdict = f"compiling takes {cost:.0f} s and saves {max(saved, 0):.0f} s in {steps} steps"
    print(f"{title}: {'compiled' if saved > cost else 'not compiled'}, {verdict}")
    return compiled if saved > cost else way


def _say(title: str, way: Compute, training: Training, why: str) -> None:
    fallback = ""
    if training.precision == "auto" and way.precision == "fp32":
        fallback = "; no bf16: this processor has no units for it" if " bf16" not in why else ""
    print(f"{title}: computed in {way}{why}{fallback}")
