"""Run a notebook of the project in this process: kernels would each load torch anew."""

from pathlib import Path
from typing import NamedTuple

import nbformat
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

PROJECT = Path(__file__).parent.parent


class Shown(NamedTuple):
    """What the cells of a notebook printed, and the data of their other outputs by MIME type."""

    printed: str
    outputs: list[dict[str, object]]

    def of_type(self, kind: str) -> list[object]:
        """Return the outputs of a MIME type."""
        return [data[kind] for data in self.outputs if kind in data]

    @property
    def pictures(self) -> int:
        """The number of figures."""
        return sum(any(kind.startswith("image/") for kind in data) for data in self.outputs)

    @property
    def text(self) -> str:
        """All that can be read."""
        return "\n".join(
            [self.printed, *map(str, self.of_type("text/markdown")), *map(str, self.of_type("text/plain"))]
        )


class _Shell(InteractiveShell):
    def enable_gui(self, gui=None):
        """Do nothing: pictures are data here, no window is opened."""


def run_notebook(name: str, **parameters: object) -> Shown:
    """Run the cells of a notebook at the project's root from top to bottom, in an empty namespace, with `parameters` in
    place of those in its cell; an error in a cell is raised.
    """
    shell = _Shell.instance()
    shell.reset(new_session=False)
    shell.enable_matplotlib("inline")
    printed, outputs = [], []
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
        outputs += [output.data for output in captured.outputs]
        if result.result is not None:
            outputs.append(shell.display_formatter.format(result.result)[0])
    return Shown("".join(printed), outputs)
