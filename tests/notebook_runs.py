"""Run notebooks in the process of the tests, because a kernel would load torch again for each notebook."""

from pathlib import Path
from typing import NamedTuple

import nbformat
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from lungs.segmentation import save_segmenter
from training.lung_model import PHANTOM_TRAINING, phantom_segmenter, untrained_segmenter

PROJECT = Path(__file__).parent.parent


class Outputs(NamedTuple):
    """The outputs of all cells of a notebook: the printed text, and the data of each other output by MIME type."""

    printed: str
    displayed: list[dict[str, object]]

    def of_type(self, kind: str) -> list[object]:
        """Return the outputs of a MIME type."""
        return [data[kind] for data in self.displayed if kind in data]

    @property
    def pictures(self) -> int:
        """The number of figures."""
        return sum(any(kind.startswith("image/") for kind in data) for data in self.displayed)

    @property
    def text(self) -> str:
        """All text outputs."""
        return "\n".join(
            [self.printed, *map(str, self.of_type("text/markdown")), *map(str, self.of_type("text/plain"))]
        )


class _Shell(InteractiveShell):
    def enable_gui(self, gui=None):
        """Open no window."""


def run_notebook(name: str, **parameters: object) -> Outputs:
    """Return the outputs of a notebook, run from top to bottom with `parameters` in place of its own.

    Raises the error of the first cell that fails.
    """
    shell = _Shell.instance()
    shell.reset(new_session=False)
    shell.enable_matplotlib("inline")
    printed, displayed = [], []
    for cell in nbformat.read(PROJECT / f"{name}.ipynb", as_version=4).cells:
        if cell.cell_type != "code":
            continue
        source = cell.source
        if "parameters" in cell.metadata.get("tags", []):
            source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
        with capture_output() as captured:
            result = shell.run_cell(source)
        result.raise_error()
        printed.append(captured.stdout)
        displayed += [output.data for output in captured.outputs]
        if result.result is not None:
            displayed.append(shell.display_formatter.format(result.result)[0])
    return Outputs("".join(printed), displayed)


def write_lung_model(folder: Path, *, phantoms: int, epochs: int) -> None:
    """Train a lung model on small phantoms and save it. Otherwise notebook 1 would train one for half a minute."""
    training = PHANTOM_TRAINING.model_copy(update={"image_size": 64, "epochs": epochs})
    save_segmenter(folder, phantom_segmenter(untrained_segmenter(), phantoms, training))
