"""A CSV table that grows by a row at a time, from several processes at once, and that a stopped run goes on with.

Beside `NAME.csv` lie `.NAME.json`, the settings that the rows were made with, and `.NAME.csv.lock`. Every row is
one line of UTF-8: a line that a kill or a full disk has cut short is told by its missing end, and removed.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock


def cell(value: object) -> str:
    """Return what a row holds for a value: its text, on one line, and "" for None."""
    text = "" if value is None else str(value).replace("\n", "\\n").replace("\r", "\\r")
    return text.encode("utf-8", "backslashreplace").decode()  # names of files need not be valid UTF-8


class ResumableTable:
    """The table in the file `path`, with these columns, made with `settings` (whatever JSON holds).

    Nothing is read or written before `resume`.
    """

    def __init__(self, path: Path, columns: Sequence[str], settings: Mapping[str, object]) -> None:
        self.path = path
        self.columns = tuple(columns)
        self._settings = json.dumps({**settings, "columns": self.columns}, indent=1).encode()
        self._sidecar = path.with_name(f".{path.stem}.json")
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))

    def resume(self, keep: Callable[[list[str]], bool]) -> bool:
        """Make the table ready to be appended to: each row that `keep` turns down, and each that is damaged, is
        removed. Return whether a table of other settings was there: it is gone, with all of its rows.

        Raises ValueError where the file is none of ours, OSError where it cannot be read or written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            begun_anew = self._begin()
            with self.path.open("r+b", buffering=0) as file:
                file.truncate(_end_of_last_line(file))
            with self.path.open("rb") as lines:
                header = lines.readline()
                if header and header != _line(self.columns):
                    raise ValueError(
                        f"{self.path} was changed by another program: move it, or give another -o"
                    )
                dropped = {n for n, row in enumerate(self._rows(lines)) if row is None or not keep(row)}
            if dropped or not header:
                self._rewrite_without(dropped)
        return begun_anew

    def append(self, row: Sequence[object]) -> None:
        """Write a row, a cell a column, complete or not at all.

        Raises OSError where it cannot be written, or where another run has begun the table anew.
        """
        line = _line(row)
        with self._lock:
            if not self._is_mine():
                raise OSError(f"another command has begun {self.path} anew: give each its own -o")
            with self.path.open("r+b", buffering=0) as file:
                end = file.seek(_end_of_last_line(file))  # behind it, another process may have died
                file.truncate()
                try:
                    while line:  # a disk that is getting full takes a part
                        line = line[file.write(line) :]
                except BaseException:
                    file.truncate(end)
                    raise

    def _begin(self) -> bool:
        if self.path.exists() and not self._sidecar.exists():
            raise ValueError(f"{self.path} is there and none of ours: move it, or give another -o")
        others = self.path.exists() and not self._is_mine()
        if others:
            self.path.unlink()
        if not self._is_mine():
            _replace(self._sidecar, [self._settings])
        self.path.touch()
        return others

    def _is_mine(self) -> bool:
        return self._sidecar.exists() and self._sidecar.read_bytes() == self._settings

    def _rows(self, lines: Iterable[bytes]) -> Iterator[list[str] | None]:
        for line in lines:
            try:
                row = next(csv.reader([line.decode()]), [])
            except (csv.Error, UnicodeDecodeError):
                row = []
            yield row if len(row) == len(self.columns) else None

    def _rewrite_without(self, dropped: set[int]) -> None:
        with self.path.open("rb") as lines:
            lines.readline()
            kept = (line for number, line in enumerate(lines) if number not in dropped)
            _replace(self.path, (part for lines in ([_line(self.columns)], kept) for part in lines))


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


def _replace(path: Path, parts: Iterable[bytes]) -> None:
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.writelines(parts)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
