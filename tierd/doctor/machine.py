"""A machine as its files under a root describe it: /proc, /sys, /dev, /run. Reading never fails: what is absent is empty."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mount:
    """A mounted file system: `device` is "major:minor"."""

    point: Path
    kind: str
    source: str
    device: str
    options: frozenset[str]


class Machine:
    """The machine below `root`."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        """Where an absolute path of that machine is."""
        return self.root / name.lstrip("/")

    def exists(self, name: str) -> bool:
        """Whether there is such a file or directory."""
        return self.path(name).exists()

    def text(self, name: str) -> str:
        """A file's text without blanks around it; empty when it cannot be read."""
        try:
            return self.path(name).read_text(errors="replace").strip()
        except OSError:
            return ""

    def number(self, name: str) -> int | None:
        """The whole number in a file, if there is one."""
        text = self.text(name)
        return int(text) if text.lstrip("-").isdigit() else None

    def names(self, folder: str) -> list[str]:
        """The names in a directory, sorted."""
        try:
            return sorted(os.listdir(self.path(folder)))
        except OSError:
            return []

    def memory(self, key: str) -> int:
        """A line of /proc/meminfo in bytes (or a count, where the line has no unit); 0 when it is not there."""
        for line in self.text("/proc/meminfo").splitlines():
            name, _, value = line.partition(":")
            if name == key:
                number, *unit = value.split()
                return int(number) << (10 if unit else 0)
        return 0

    def chosen(self, name: str) -> str:
        """Of a file like "always [madvise] never" the word in brackets."""
        return next((word.strip("[]") for word in self.text(name).split() if word.startswith("[")), "")

    def mount(self, folder: Path) -> Mount | None:
        """The file system that a directory is on, by /proc/self/mountinfo; the last mounted of the deepest wins."""
        found: Mount | None = None
        for line in self.text("/proc/self/mountinfo").splitlines():
            left, _, right = line.partition(" - ")
            fields, rest = left.split(), right.split()
            if len(fields) < 6 or len(rest) < 3:
                continue
            point = Path(fields[4].replace("\\040", " "))
            if folder.is_relative_to(point) and (found is None or len(point.parts) >= len(found.point.parts)):
                options = frozenset(fields[5].split(",")) | frozenset(rest[2].split(","))
                found = Mount(point, rest[0], rest[1], fields[2], options)
        return found

    def disks(self, device: str) -> list[str]:
        """The names of the block devices below a mounted one, it itself first: partition, mapper, disk."""
        block = self._block(device)
        if not block:
            return []
        found, stack = [], [block]
        while stack:
            name = stack.pop(0)
            found.append(name)
            folder = f"/sys/class/block/{name}"
            stack += self.names(f"{folder}/slaves")
            if self.exists(f"{folder}/partition"):
                whole = self.path(folder).resolve().parent.name
                stack += [whole] if whole and whole not in found else []
        return found

    def numa_node(self, folder: str) -> int | None:
        """The NUMA node of a device's directory in /sys; None when it has none or there is only one."""
        node = self.number(f"{folder}/numa_node")
        return None if node is None or node < 0 else node

    def _block(self, device: str) -> str:
        at = self.path(f"/sys/dev/block/{device}")
        return at.resolve().name if at.exists() else ""
