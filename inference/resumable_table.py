"""A CSV table that grows row by row. A later run of the same command continues it.

Several processes may write to the table at once. Three kinds of hidden files lie beside `NAME.csv`:

- `.NAME.json`: the settings that the rows were made with
- `.NAME.csv.lock`: locked while a process changes the table
- `.NAME.csv.GROUP.PROCESS.run`: locked as long as this process works. Processes that share the work are a group;
  its name is made of their number and the settings.

Every row is one line of UTF-8. A line without an end was cut by a kill or a full disk; it is removed.
"""

import csv
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from utils import remove_unfinished, write_whole

ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", "\r": r"\r"})


def cell(value: object) -> str:
    r"""Return the text of a value in a row, on one line; "" for None.

    A backslash becomes `\\`, a line break `\n` or `\r`. A byte of a file's name that is not UTF-8 becomes `\udc…`. So
    different texts have different cells.
    """
    text = "" if value is None else str(value).translate(ESCAPES)
    return text.encode("utf-8", "backslashreplace").decode()


class Share(NamedTuple):
    """The number of this process (`index`, from 0) and of all processes (`of`); each takes every `of`-th image."""

    index: int
    of: int


class ResumableTable:
    """A table in a file. The processes that share the work on the same settings write to it together.

    Nothing is read or written before `resume`. Every other command is refused until `close`.

    Args:
        path: The CSV file.
        columns: Names of the columns.
        settings: What the rows depend on, in types that JSON has.
        share: This process's share of the work.

    Attributes:
        set_aside: After `resume`, the new name of an older table that was made with other settings, else None.
    """

    def __init__(self, path: Path, columns: Sequence[str], settings: Mapping[str, object], share: Share) -> None:
        from filelock import FileLock  # imported here: the answer to one X-ray needs no table

        self.path = path
        self.columns = tuple(columns)
        self.set_aside: Path | None = None
        self._settings = json.dumps({**settings, "columns": self.columns}, indent=1).encode()
        self._settings_file = path.with_name(f".{path.stem}.json")
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        self._group = f".{path.name}.{share.of}-{hashlib.sha256(self._settings).hexdigest()[:16]}."
        self._run_file = path.with_name(f"{self._group}{share.index}.run")
        self._run_lock = FileLock(self._run_file)

    def resume(self, keep: Callable[[list[str]], bool]) -> None:
        """Open the table for `append`; damaged rows, and rows that `keep` returns False for, are removed.

        Raises:
            ValueError: Another command works on the table, or another program wrote the file.
            OSError: The table cannot be read or written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self._refuse_other_commands()
            self._run_lock.acquire(timeout=0)
            try:
                # Younger files may belong to other commands that are writing masks or overlays into this folder.
                remove_unfinished(self.path.parent, older_than=3600)
                self._begin()
                self._rewrite(keep)
            except BaseException:
                self.close()
                raise

    def append(self, row: Sequence[object]) -> None:
        """Write a row, one value a column, completely or not at all. Raises OSError where the disk is full."""
        line = _line(row)
        with self._lock, self.path.open("r+b", buffering=0) as file:
            end = _remove_unfinished_line(file)  # a killed process may have left one
            try:
                while line:  # an almost full disk takes only a part of the line
                    line = line[file.write(line) :]
            except BaseException:
                file.truncate(end)
                raise

    def close(self) -> None:
        """Let other commands use the table."""
        with self._lock:
            self._run_lock.release()
            self._run_file.unlink(missing_ok=True)

    def _refuse_other_commands(self) -> None:
        from filelock import FileLock, Timeout

        for file in self.path.parent.glob(f".{self.path.name}.*.run"):
            try:
                with FileLock(file, timeout=0):
                    pass
                file.unlink(missing_ok=True)  # its process was killed
            except Timeout:
                if file == self._run_file or not file.name.startswith(self._group):
                    message = f"another command is at work on {self.path}: wait for it, or give another -o"
                    raise ValueError(message) from None

    def _begin(self) -> None:
        """Write the settings; rename an old table that was made with other settings."""
        if self._settings_file.exists():
            if self._settings_file.read_bytes() == self._settings:
                return
            if self.path.exists():
                names = (self.path.with_stem(f"{self.path.stem}-{number}") for number in itertools.count(1))
                self.set_aside = self.path.rename(next(n for n in names if not os.path.lexists(n)))
        elif self.path.exists():
            raise ValueError(f"{self.path} exists and is not of this program: move it, or give another -o")
        write_whole(self._settings_file, self._settings)

    def _rewrite(self, keep: Callable[[list[str]], bool]) -> None:
        header = _line(self.columns)
        content = self.path.read_bytes() if self.path.exists() else b""
        # A kill or a full disk may have left a part of the header.
        if not header.startswith(content[: len(header)]):
            raise ValueError(f"{self.path} was changed by another program: move it, or give another -o")
        lines = content[len(header) :].split(b"\n")[:-1]  # the last part has no line end: it is cut, or empty
        rows = ((line + b"\n", _cells(line)) for line in lines)
        whole = header + b"".join(line for line, row in rows if len(row) == len(self.columns) and keep(row))
        if whole != content:
            write_whole(self.path, whole)


def _line(row: Sequence[object]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow([cell(value) for value in row])
    return text.getvalue().encode()


def _cells(line: bytes) -> list[str]:
    """Return the cells of a line; none where the line is damaged."""
    try:
        return next(csv.reader([line.decode()]), [])
    except (csv.Error, UnicodeDecodeError):
        return []


def _remove_unfinished_line(file: BinaryIO) -> int:
    """Cut the file after its last line end, and return its length."""
    end = file.seek(-1, os.SEEK_END) + 1
    if file.read(1) != b"\n":
        file.seek(0)
        end = file.read().rfind(b"\n") + 1
        file.truncate(end)
    return file.seek(end)
