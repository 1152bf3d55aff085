"""Public chest X-ray datasets, each read from a folder on disk into one `XrayTable`."""

from collections.abc import Callable
from pathlib import Path

from datasets import chestxray14, covid_radiography, folder, kermany
from datasets.table import SPLITS, XrayTable, data_fingerprint

Reader = Callable[..., XrayTable]

READERS: dict[str, Reader] = {
    "chestxray14": chestxray14.read_chestxray14,
    "covid_radiography": covid_radiography.read_covid_radiography,
    "folder": folder.read_folder,
    "kermany": kermany.read_kermany,
}


def read_dataset(reader: str, root: Path, **options: object) -> XrayTable:
    """Read the dataset in the folder `root` with a reader of `READERS`; `options` go to that reader.

    Raises FileNotFoundError, with the way to get the data, where `root` does not hold it.
    """
    if reader not in READERS:
        raise ValueError(f"unknown dataset reader {reader!r}: choose one of {', '.join(READERS)}")
    return READERS[reader](Path(root), **options)


__all__ = ["READERS", "SPLITS", "XrayTable", "data_fingerprint", "read_dataset"]
