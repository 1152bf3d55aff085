"""A CSV table that grows by a row at a time, from several processes at once, and that a stopped run goes on with.

Beside `NAME.csv` lie `.NAME.json`, the settings that the rows were made with, `.NAME.csv.lock`, held while a row is
written, and for each process at work a `.NAME.csv.LAUNCH.PROCESS.run`, held until it ends. Every row is one line of
UTF-8: a line that a kill or a full disk has cut short is told by its missing end, and removed.
"""

import csv
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from utils import remove_unfinished, write_whole


def cell(value: object) -> str:
    r"""Return what a row holds for a value: its text, on one line, and "" for None.

    A backslash becomes `\\`, a line break `\n` or `\r`, and a byte of a file's name that is no UTF-8 `\udc…`, so no
    two texts have one cell.
    """
    text = "" if value is None else str(value)
    for character, escaped in (("\\", "\\\\"), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(character, escaped)
    return text.encode("utf-8", "backslashreplace").decode()


class ResumableTable:
    """The table in the file `path`, with these columns, made with `settings` (whatever JSON holds).

    The processes of one `launch`, each with a number of its own, write to it together; any other command is
    refused meanwhile. Nothing is read or written before `resume`.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[str],
        settings: Mapping[str, object],
        *,
        launch: str,
        process: int = 0,
    ) -> None:
        self.path = path
        self.columns = tuple(columns)
        self._settings = json.dumps({**settings, "columns": self.columns}, indent=1).encode()
        self._sidecar = path.with_name(f".{path.stem}.json")
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        self._launch = f".{path.name}.{launch}."
        self._at_work = path.with_name(f"{self._launch}{process}.run")
        self._working = FileLock(self._at_work)

    def resume(self, keep: Callable[[list[str]], bool]) -> Path | None:
        """Make the table ready to be appended to, until `close`: each row that `keep` turns down, and each that is
        damaged, is removed. Return the new name of a table of other settings that was there, if there was one.

        Raises ValueError where another command is at work on the table, or where the file is none of ours; OSError
        where it cannot be read or written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self._join()
            try:
                set_aside = self._begin()
                self._keep_rows(keep)
            except BaseException:
                self.close()
                raise
        return set_aside

    def append(self, row: Sequence[object]) -> None:
        """Write a row, a cell a column, complete or not at all. Raises OSError where it cannot be written."""
        line = _line(row)
        with self._lock, self.path.open("r+b", buffering=0) as file:
            end = file.seek(_end_of_last_line(file))  # behind it, another process may have died
            file.truncate()
            try:
                while line:  # a disk that is getting full takes a part
                    line = line[file.write(line) :]
            except BaseException:
                file.truncate(end)
                raise

    def close(self) -> None:
        """Let other commands have the table."""
        with self._lock:
            self._working.release()
            self._at_work.unlink(missing_ok=True)

    def _join(self) -> None:
        """Say that this process is at work. Raises ValueError where a process of another launch is."""
        alone = True
        for other in self.path.parent.glob(f".{self.path.name}.*.run"):
            try:
                with FileLock(other, timeout=0):
                    pass
            except Timeout:
                if other == self._at_work or not other.name.startswith(self._launch):
                    raise ValueError(
                        f"another command is at work on {self.path}: wait for it, or give another -o"
                    ) from None
                alone = False
            else:
                other.unlink(missing_ok=True)  # its process was killed
        if alone:
            # Other commands may be writing masks or single overlays there, each in seconds.
            remove_unfinished(self.path.parent, older_than=3600)
        self._working.acquire(timeout=0)

    def _begin(self) -> Path | None:
        if self.path.exists() and not self._sidecar.exists():
            raise ValueError(f"{self.path} is there and none of ours: move it, or give another -o")
        if self._sidecar.exists() and self._sidecar.read_bytes() == self._settings:
            self.path.touch()
            return None
        set_aside = None
        if self.path.exists():
            names = (self.path.with_stem(f"{self.path.stem}-{number}") for number in itertools.count(1))
            set_aside = self.path.rename(next(name for name in names if not os.path.lexists(name)))
        write_whole(self._sidecar, self._settings)
        self.path.touch()
        return set_aside

    def _keep_rows(self, keep: Callable[[list[str]], bool]) -> None:
        with self.path.open("r+b", buffering=0) as file:
            header = _line(self.columns)
            # A part of the header is what a kill or a full disk may have left.
            if not header.startswith(file.readline(len(header) + 1)):
                raise ValueError(f"{self.path} was changed by another program: move it, or give another -o")
            file.truncate(_end_of_last_line(file))
        with self.path.open("rb") as file:
            lines = file.readlines()
        rows = zip(lines[1:], self._rows(lines[1:]), strict=True)
        kept = [header, *(line for line, row in rows if row is not None and keep(row))]
        if kept != lines:
            write_whole(self.path, b"".join(kept))

    def _rows(self, lines: Iterable[bytes]) -> Iterator[list[str] | None]:
        for line in lines:
            try:
                row = next(csv.reader([line.decode()]), [])
            except (csv.Error, UnicodeDecodeError):
                row = []
            yield row if len(row) == len(self.columns) else None


def _line(cells: Sequence[object]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow([cell(value) for value in cells])
    return text.getvalue().encode()


def _end_of_last_line(file: BinaryIO) -> int:
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 4096)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
