"""The cost of Grad-CAM in forward passes of the same network: ours and that of three libraries.

    python benchmarks/cam.py [--networks vgg16,resnet18,densenet121] [--batch 16] [--rounds 10]

The libraries (`pip install grad-cam torchcam captum`) compute maps at the same layer as ours, for one class and for all
14, as their documentation shows. A library that is missing or fails is reported. The networks have random weights, the
images are noise. Each time is divided by the time of an inference forward pass right before it in the same process.
Every round runs all methods in turn. The table shows the medians of these ratios. `--output` is written after each row
and has the seconds too. The memory of the maps is their peak above the peak of a forward pass.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grad_cam import GradCAM
from networks import build_network
from utils import resolve_device, write_whole

CLASSES = 14
Maps = Callable[[Tensor, int], Tensor]  # (N, 3, H, W) images and K: the (N, K, h, w) maps of the first K classes


@contextmanager
def ours(network: nn.Module) -> Iterator[Maps]:
    """Ours: one forward pass and one batched gradient for all classes."""
    with GradCAM(network) as cam:
        yield lambda images, number: cam(images, 0 if number == 1 else "all").raw


@contextmanager
def grad_cam(network: nn.Module) -> Iterator[Maps]:
    """`pytorch_grad_cam`: one call for each class. It always scales each map to 0–1 at the input's size."""
    from pytorch_grad_cam import GradCAM as Theirs
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    cam = Theirs(model=network, target_layers=[network.get_submodule(network.cam_layer)])

    def maps(images: Tensor, number: int) -> Tensor:
        by_class = [cam(images, [ClassifierOutputTarget(k)] * len(images)) for k in range(number)]
        return torch.stack([torch.from_numpy(class_maps) for class_maps in by_class], dim=1)

    try:
        yield maps
    finally:
        # The package's own `with` would hide an IndexError.
        cam.activations_and_grads.release()
        network.zero_grad(set_to_none=True)  # its backward pass fills the weights' gradients


@contextmanager
def torchcam(network: nn.Module) -> Iterator[Maps]:
    """`torchcam`: one forward pass, then one backward pass for each class."""
    from torchcam.methods import GradCAM as Theirs

    with Theirs(network, target_layer=network.cam_layer) as cam:

        def maps(images: Tensor, number: int) -> Tensor:
            scores = network(images)
            by_class = [cam(k, scores, normalized=False, retain_graph=k + 1 < number) for k in range(number)]
            return torch.stack([class_maps for (class_maps,) in by_class], dim=1)

        yield maps


@contextmanager
def captum(network: nn.Module) -> Iterator[Maps]:
    """`captum`: one call for each class."""
    from captum.attr import LayerGradCam

    cam = LayerGradCam(network, network.get_submodule(network.cam_layer))

    def maps(images: Tensor, number: int) -> Tensor:
        # Each result is detached at once, because it holds the graph of a whole pass.
        by_class = [cam.attribute(images, target=k, relu_attributions=True).detach() for k in range(number)]
        return torch.cat(by_class, dim=1)

    yield maps


LIBRARIES = {"grad-cam": grad_cam, "torchcam": torchcam, "captum": captum}
METHODS: dict[str, Callable[[nn.Module], AbstractContextManager[Maps]]] = {"ours": ours, **LIBRARIES}


class Case(NamedTuple):
    """A network in eval mode, a batch of images for it, and the precision of both: fp32 or bf16."""

    name: str
    network: nn.Module
    images: Tensor
    precision: str

    def forward(self) -> Tensor:
        """Return the logits of a forward pass, with which everything is compared."""
        with torch.inference_mode(), self._autocast():
            return self.network(self.images)

    def maps(self, method: Maps, number: int) -> Tensor:
        """Return the maps of the first classes."""
        with self._autocast():
            return method(self.images, number)

    def _autocast(self) -> torch.autocast:
        enabled = self.precision == "bf16"
        return torch.autocast(self.images.device.type, torch.bfloat16, enabled=enabled)


def make_case(name: str, options: argparse.Namespace) -> Case:
    """Return the case to measure. It is the same in every process."""
    torch.manual_seed(0)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = resolve_device(device)
    network = build_network(name, CLASSES).eval().to(device)
    images = torch.randn(options.batch, 3, options.image_size, options.image_size).to(device)
    if device.type == "cuda" and options.precision == "bf16":  # the fast layout for bf16 convolutions
        network, images = (x.to(memory_format=torch.channels_last) for x in (network, images))
    return Case(name, network, images, options.precision)


def min_max(maps: Tensor) -> Tensor:
    """Return (…, h, w) maps, each scaled to 0–1; a constant map becomes zeros."""
    maps = maps.float() - maps.float().amin(dim=(-2, -1), keepdim=True)
    return maps / maps.amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


def disagreements(case: Case, libraries: list[str]) -> list[str]:
    """Return a line for each library that fails, or whose maps (fp32, 0 to 1) differ from ours by more than 1e-4."""
    lines = []
    few = case._replace(images=case.images[:2], precision="fp32")
    for number in (1, CLASSES):
        with ours(few.network) as method:
            expected = few.maps(method, number).cpu()
        for library in libraries:
            try:
                with LIBRARIES[library](few.network) as method:
                    theirs = few.maps(method, number).cpu()
            except Exception as error:  # a library's refusal, of whatever type, is a result
                lines.append(f"{case.name}, {library}: {first_line(error)}")
                continue
            # Maps are also scaled before they are enlarged: otherwise the rounding of a uniform map becomes a picture.
            same_size = functional.interpolate(min_max(expected), size=theirs.shape[2:], mode="bilinear")
            worst = float((min_max(theirs) - min_max(same_size)).abs().max())
            if not worst <= 1e-4:
                lines.append(f"{case.name}, {library}: of {number} classes, a map is {worst:.1e} from ours")
    return lines


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the wall-clock time of some work, until the GPU is done too."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


class Timings(NamedTuple):
    """Seconds of each round and method, those of the forward pass right before it, and errors of libraries."""

    took: dict[str, list[float]]
    forward: dict[str, list[float]]
    failed: dict[str, str]

    @property
    def measured(self) -> set[str]:
        """The methods that were asked for and did not fail."""
        return set(self.took) - set(self.failed)

    def ratio(self, method: str) -> float | None:
        """Return a method's time in forward passes, the median over the rounds; None if there is none."""
        if method not in self.measured:
            return None
        pairs = zip(self.took[method], self.forward[method], strict=True)
        return statistics.median(time / least for time, least in pairs)

    def median(self, method: str) -> float | None:
        """Return the median time of a method; None if there is none."""
        return None if method not in self.measured else statistics.median(self.took[method])


def timings(case: Case, number: int, rounds: dict[str, int]) -> Timings:
    """Return the times of each method in `rounds`, for its number of rounds, after a round that does not count."""
    times = Timings({method: [] for method in rounds}, {method: [] for method in rounds}, {})
    for turn in range(max(rounds.values()) + 1):
        for name in [name for name in rounds if turn <= rounds[name] and name not in times.failed]:
            least = seconds(case.forward, case.images.device)
            try:
                with METHODS[name](case.network) as method:
                    took = seconds(lambda m=method: case.maps(m, number), case.images.device)
            except Exception as error:  # a library's refusal, of whatever type, is a result
                if name == "ours":
                    raise
                times.failed[name] = first_line(error)
                continue
            if turn:
                times.took[name].append(took)
                times.forward[name].append(least)
    return times


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory: of a GPU since the last reset, otherwise of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage: on Linux its ru_maxrss starts at the peak of the parent process, which is higher.
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def map_memory(case: Case, name: str, number: int) -> float:
    """Return the peak memory of the maps above that of forward passes, in MB (10^6 bytes) per image.

    On a CPU the peak is that of the whole process, so the process must do nothing else before.
    """
    device = case.images.device
    with METHODS[name](case.network):
        pass  # its imports do not count
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    case.forward()
    case.forward()
    least = peak_bytes(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with METHODS[name](case.network) as method:
        case.maps(method, number)
        return (peak_bytes(device) - least) / 1e6 / len(case.images)


def map_memory_apart(case: Case, name: str, number: int, options: argparse.Namespace) -> float:
    """Return `map_memory`; on a CPU a new process measures it. Raises RuntimeError if that process fails."""
    if case.images.device.type == "cuda":
        return map_memory(case, name, number)
    command = [sys.executable, __file__, "--networks", case.name, "--batch", str(options.batch)]
    command += ["--image-size", str(options.image_size), "--device", "cpu", "--precision", options.precision]
    command += ["--memory-of", name, "--classes", str(number)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(next(iter(process.stderr.splitlines()[::-1]), f"status {process.returncode}"))
    return float(process.stdout.splitlines()[-1])


def library_rounds(number: int, options: argparse.Namespace) -> int:
    """Return how often libraries are timed: for all classes, where they need a loop, `--library-rounds` times."""
    return options.rounds if number == 1 else options.library_rounds


def record_of(case: Case, number: int, times: Timings, options: argparse.Namespace) -> dict[str, object]:
    """Return the record of a row without memory: medians of seconds and ratios, None for a library that failed."""
    device = case.images.device
    record: dict[str, object] = {"name": f"{case.name}, {'one class' if number == 1 else f'all {number} classes'}"}
    record["forward"] = statistics.median(times.forward["ours"])
    for name in METHODS:
        prefix = "" if name == "ours" else f"{name} "
        record[name] = times.median(name)
        record[f"{prefix}ratio"] = times.ratio(name)
        if device.type == "cuda" and record[name]:
            record[f"{prefix}maps_per_second"] = number * len(case.images) / record[name]
    return record | {
        "rounds": options.rounds,
        "library_rounds": library_rounds(number, options) if options.libraries else 0,
        "batch": options.batch,
        "image_size": options.image_size,
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        "precision": options.precision,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def measured_row(case: Case, number: int, options: argparse.Namespace) -> tuple[dict[str, object], list[str]]:
    """Return the record of a row, and a line for each thing that could not be measured."""
    rounds = {"ours": options.rounds} | dict.fromkeys(options.libraries, library_rounds(number, options))
    times = timings(case, number, rounds)
    record = record_of(case, number, times, options)
    notes = [f"{case.name}, {name}: {error}" for name, error in times.failed.items()]
    for name in [name for name in rounds if name == "ours" or number == 1]:
        key = "memory_mb_per_image" if name == "ours" else f"{name} memory_mb_per_image"
        record[key] = None
        if name not in times.failed:
            try:
                record[key] = map_memory_apart(case, name, number, options)
            except RuntimeError as error:
                notes.append(f"{record['name']}, memory of {name}: {first_line(error)}")
    return record, notes


def table_line(record: dict[str, object]) -> str:
    """Return a row of the table as text. An empty record gives the head of the table."""
    cells = [f"{record.get('name', ''):27}"]
    for name in METHODS:
        ratio = record.get("ratio" if name == "ours" else f"{name} ratio")
        cells.append(f"{name if not record else '-' if ratio is None else f'{ratio:.2f}':>9}")
    for key, title in (("forward", "forward (s)"), ("memory_mb_per_image", "MB an image")):
        value = record.get(key)
        cells.append(f"{title if not record else '-' if value is None else f'{value:.4g}':>12}")
    return " ".join(cells)


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description="Time Grad-CAM in forward passes of the same network.")
    parser.add_argument("--networks", default="vgg16,resnet18,densenet121")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=10, help="of the forward pass and of ours")
    parser.add_argument(
        "--library-rounds", type=int, help="of the libraries' loops over all classes (default: as --rounds)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--no-libraries", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cam.json"))
    # For the processes that measure memory.
    parser.add_argument("--memory-of", choices=tuple(METHODS), help=argparse.SUPPRESS)
    parser.add_argument("--classes", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.library_rounds = options.rounds if options.library_rounds is None else options.library_rounds
    if min(options.rounds, options.library_rounds, options.batch) < 1:
        parser.error("rounds and batch must be at least 1; for ours alone give --no-libraries")
    options.libraries = [] if options.no_libraries else list(LIBRARIES)
    return options


def main() -> None:
    """Measure, print and write."""
    options = parse_arguments()
    if options.memory_of:
        print(map_memory(make_case(options.networks, options), options.memory_of, options.classes))
        return
    records, notes = [], []
    options.output.parent.mkdir(parents=True, exist_ok=True)
    print(table_line({}))
    for name in options.networks.split(","):
        case = make_case(name, options)
        notes += disagreements(case, options.libraries)
        for number in (1, CLASSES):
            record, more = measured_row(case, number, options)
            notes += more
            records.append(record)
            write_whole(options.output, json.dumps(records, indent=1) + "\n")  # after each row, for aborted runs
            print(table_line(record), flush=True)
    for note in dict.fromkeys(notes):
        print(f"note: {note}")


if __name__ == "__main__":
    main()
