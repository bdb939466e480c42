"""The state directory: where segment files live, and the lock that keeps a second daemon out."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from tierd.errors import Busy, Invalid
from tierd.layout import Namespace
from tierd.tiers.io import IoEngine
from tierd.tiers.nvme import DIRECTORY, SLOTS, UNFINISHED, FileSegment


@dataclass(frozen=True)
class Opened:
    """What was found on disk: segments to scan, and the files that were removed, each with the reason."""

    segments: list[FileSegment]
    removed: list[tuple[Path, str]]


class StateDirectory:
    """A directory tree that belongs to this process until `close`; raises Busy with the pid of the one that has it.

    `nvme_path` is where segment files are, `<path>/nvme` by default; one that is elsewhere is locked too.
    """

    def __init__(self, path: Path, nvme_path: Path | None = None) -> None:
        self.path, self.nvme_path = path, nvme_path or path / "nvme"
        self._locks: list[int] = []
        try:
            for folder in (self.path, self.nvme_path):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._locks.append(_lock(self.path))
            if not self.nvme_path.resolve().is_relative_to(self.path.resolve()):
                self._locks.append(_lock(self.nvme_path))
        except OSError as error:
            self.close()
            raise Invalid(f"state directory {self.path} cannot be used: {error}; choose another one") from error
        except Busy:
            self.close()
            raise

    def folder(self, namespace: Namespace) -> Path:
        """Where a namespace's segment files are."""
        return folder_of(self.nvme_path, namespace)

    def open_segments(self, io: IoEngine) -> Opened:
        """Open all segments, and remove unfinished, foreign and damaged ones: they are a cache.

        Blocks for reading every directory. Raises Busy when the process has too few descriptors for them.
        """
        opened = Opened([], [])
        for path in sorted(self.nvme_path.glob(f"*/*{UNFINISHED}")):
            self._remove(path, "unfinished", opened)
        for path in sorted(self.nvme_path.glob(f"*/*{DIRECTORY}")):
            try:
                segment = FileSegment.open(path, io)
            except Invalid as error:
                self._remove(path, str(error), opened)
                continue
            if path.parent != self.folder(segment.header.namespace):
                segment.close()
                self._remove(path, "in another namespace's folder", opened)
                continue
            opened.segments.append(segment)
        for path in sorted(self.nvme_path.glob(f"*/*{SLOTS}")):
            if not path.with_suffix(DIRECTORY).exists():
                self._remove(path, "without a directory", opened)
        return opened

    def close(self) -> None:
        """Let another daemon have the directory."""
        while self._locks:
            os.close(self._locks.pop())

    @staticmethod
    def _remove(path: Path, reason: str, opened: Opened) -> None:
        try:
            path.unlink()
        except OSError as error:
            reason = f"{reason}; could not be removed: {error}"
        opened.removed.append((path, reason))


def folder_of(nvme_path: Path, namespace: Namespace) -> Path:
    """Where a namespace's segment files are below `nvme_path`."""
    return nvme_path / namespace.id.hex()[:16]


def _lock(folder: Path) -> int:
    """Take the folder's lock and leave our pid in it, for whoever is refused."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise Busy(
            f"{folder} is used by the tierd with pid {owner}: stop that one, or give this one another state directory"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
    return descriptor
