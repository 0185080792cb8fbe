"""A folder that one run has at a time, and that all its processes see."""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path

from fastattn.training.distributed.processes import Processes

NAME = ".lock"


class Lock:
    """A lock of the operating system, which goes with the process, however it ends.

    Args:
        processes: of the run; the first one has the lock for all.
    """

    def __init__(self, folder: Path, processes: Processes) -> None:
        self._folder = folder
        self._processes = processes
        self._file: int | None = None

    def acquire(self) -> None:
        """Lock the folder, which is made if it is not there.

        Raises:
            RuntimeError: another run has it.
            OSError: it cannot be made or written to.
        """
        if not self._processes.leads:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = os.open(self._folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OSError(
                f"checkpoints cannot be written to {self._folder} ({error.strerror}): give a "
                "folder that can be made and written to"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise RuntimeError(
                f"another run is training in {self._folder}: wait for it or stop it, or give "
                "this one a folder of its own"
            ) from None
        self._file = file

    def release(self) -> None:
        """Unlock the folder, as the end of the process does."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def check_shared(self) -> None:
        """Check that all processes see the locked folder. All must call it.

        Raises:
            RuntimeError: on each of them: one sees another folder.
        """
        if self._processes.count == 1:
            return
        word = self._processes.gathered(secrets.token_hex(8))[0]
        if self._file is not None:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, word.encode(), 0)
        self._processes.gathered(None)  # it is written

        def seen() -> None:
            file = self._folder / NAME
            if not file.is_file() or file.read_text(encoding="utf-8") != word:
                raise RuntimeError(
                    f"{self._folder} is not the same folder for all processes: give one on a file "
                    "system that all machines share"
                )

        self._processes.together(seen)
