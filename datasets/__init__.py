"""Public chest X-ray datasets, each read from a folder on disk into one `XrayTable`."""

from pathlib import Path

from datasets.chestxray14 import read_chestxray14
from datasets.covid_radiography import read_covid_radiography
from datasets.folder import read_folder
from datasets.kermany import read_kermany
from datasets.table import SPLITS, XrayTable, data_fingerprint, refuse_unknown

READERS = {
    "chestxray14": read_chestxray14,
    "covid_radiography": read_covid_radiography,
    "folder": read_folder,
    "kermany": read_kermany,
}


def read_dataset(reader: str, root: Path, **options: object) -> XrayTable:
    """Return the table of the dataset in the folder `root`; its reader in `READERS` gets the `options`.

    Raises FileNotFoundError if the data are not in `root`; the message says how to get them.
    """
    refuse_unknown([reader], READERS, "dataset readers")
    return READERS[reader](Path(root), **options)


__all__ = ["SPLITS", "XrayTable", "data_fingerprint", "read_dataset"]
