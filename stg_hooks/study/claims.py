"""Share work between processes, on one machine or many, through nothing but a common folder.

A claim is a file `<name>.<number>`, made with O_EXCL, so that one process alone can make it, and touched every few
seconds while its owner works. The highest number counts. Where the owner is gone, the next number is free to make; so
one process alone can take a claim over, too, and nothing is renamed or replaced that another process could have made in
the meantime.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Claim:
    """One process's right to do a piece of work, for as long as it holds it."""

    def __init__(self, file: Path, token: str, beat: float) -> None:
        """Start the heartbeat of a claim that has been made.

        Args:
            file: the claim's file.
            token: what tells it from others in the same place.
            beat: seconds between two touches of the file.
        """
        self.file = file
        self._token = token
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, args=(beat,), daemon=True)
        self._thread.start()

    def _keep(self, beat: float) -> None:
        while not self._ended.wait(beat):
            with contextlib.suppress(OSError):  # a network drive may be away for a moment
                os.utime(self.file)

    @property
    def holds(self) -> bool:
        """Whether it is still ours: a process that stands still for too long is replaced by another."""
        newest = _newest(self.file.parent, self.file.name.rpartition(".")[0])
        return newest == self.file and _read(self.file).get("token") == self._token

    def release(self) -> None:
        """End it, and clear away what is left of claims that were taken over."""
        self._ended.set()
        self._thread.join()
        if not self.holds:
            return
        name = self.file.name.rpartition(".")[0]
        for file in _all(self.file.parent, name):  # the lowest first, so that the highest counts until the end
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(folder: Path, name: str, stale_after: float) -> Iterator[Claim | None]:
    """Claim a piece of work within a `with`.

    Args:
        folder: where the claims of all processes lie.
        name: the piece of work.
        stale_after: seconds without a sign of life after which a claim is taken over. That its owner has ended is
            known at once if it ran on this machine.

    Returns:
        A context manager that gives the claim, or `None` where another process has it.
    """
    claim = _make(folder, name, stale_after)
    try:
        yield claim
    finally:
        if claim is not None:
            claim.release()


def is_claimed(folder: Path, name: str, stale_after: float) -> bool:
    """Tell whether a process is doing a piece of work."""
    newest = _newest(folder, name)
    return newest is not None and not _is_stale(newest, stale_after)


def _make(folder: Path, name: str, stale_after: float) -> Claim | None:
    folder.mkdir(parents=True, exist_ok=True)
    newest = _newest(folder, name)
    if newest is not None and not _is_stale(newest, stale_after):
        return None
    number = 0 if newest is None else _number(newest) + 1
    file, token = folder / f"{name}.{number}", uuid.uuid4().hex
    try:
        with file.open("x", encoding="utf-8") as opened:  # "x" is O_EXCL
            json.dump({"place": _place(), "pid": os.getpid(), "token": token}, opened)
    except FileExistsError:
        return None
    return Claim(file, token, min(stale_after / 6, 30.0))


def _is_stale(file: Path, stale_after: float) -> bool:
    owner = _read(file)
    if owner.get("place") == _place() and not _is_alive(owner["pid"]):
        return True
    try:
        return _now(file.parent) - file.stat().st_mtime > stale_after
    except FileNotFoundError:  # released in this moment: the work is done
        return False


def _now(folder: Path) -> float:
    """Tell the time by the clock that stamps the files in a folder, which may be another machine's."""
    probe = folder / f".clock-{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        probe.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    if os.name != "posix":  # there, asking with signal 0 would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _place() -> str:
    """Name where process numbers mean the same: the machine, and the container on it."""
    with contextlib.suppress(OSError):
        return f"{platform.node()} {Path('/proc/self/ns/pid').readlink()}"
    return platform.node()


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # made in this moment, or released
        return {}
    return found if isinstance(found, dict) else {}


def _number(file: Path) -> int:
    return int(file.name.rpartition(".")[2])


def _all(folder: Path, name: str) -> list[Path]:
    found = [entry for entry in folder.iterdir() if entry.name.rpartition(".")[0] == name]
    return sorted((file for file in found if file.name.rpartition(".")[2].isdecimal()), key=_number)


def _newest(folder: Path, name: str) -> Path | None:
    found = _all(folder, name)
    return found[-1] if found else None
