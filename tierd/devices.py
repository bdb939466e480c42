"""Names of the places where pages are, in configurations and for clients.

"cpu" is host memory; "cuda:0" is a GPU, by its number among those that a process sees; "cpu:0" is a part of host memory that
stands for a device of that number where there are no GPUs: what is done with several is the same for both.
"""

from __future__ import annotations

import re

from tierd.errors import Invalid

DEVICES_MAX = 16
"""Of one daemon: each adds four bytes to every block in the index, and a tier to every metric."""
NUMBER = "(0|[1-9][0-9]{0,2})"
DEVICES = ("cpu", *(f"{kind}:{NUMBER}(,{kind}:{NUMBER})*" for kind in ("cuda", "cpu")))
"""What may be configured, as regular expressions: GPUs and host memory are not mixed."""
ID_BYTES = 16


def split_devices(names: str) -> list[str]:
    """The devices that "cpu", "cuda:0" or "cuda:0,cuda:1" names; raises ValueError with what it must be."""
    if not re.fullmatch("|".join(DEVICES), names):
        raise ValueError(
            "must be 'cpu', a GPU by its number, such as 'cuda:0', or several with commas, such as 'cuda:0,cuda:1'"
        )
    devices = names.split(",")
    if len(set(devices)) < len(devices) or len(devices) > DEVICES_MAX:
        raise ValueError(f"must name each device once, and at most {DEVICES_MAX}")
    return devices


def tier_names(devices: list[str]) -> list[str]:
    """How the tiers of pages on these devices are called: gpu, and where there are several, gpu0, gpu1."""
    return ["gpu"] if len(devices) == 1 else [f"gpu{name.partition(':')[2]}" for name in devices]


def gpu_number(name: str) -> int | None:
    """The number in "cuda:0", and None for host memory; raises Invalid for anything else."""
    found = re.fullmatch(rf"cpu|(cpu|cuda):{NUMBER}", name)
    if not found:
        raise Invalid(f"device {name!r} must be 'cpu' or a GPU by its number, such as 'cuda:0'")
    return int(found[2]) if found[1] == "cuda" else None


def host_id(name: str) -> bytes:
    """What tells host memory of this name from other devices: nothing for "cpu", 16 bytes for "cpu:0"; a GPU has its UUID."""
    return name.encode().ljust(ID_BYTES, b"\0") if ":" in name else b""


def describe_device(device: bytes) -> str:
    """A device for people, by its 16 bytes or none."""
    if device.startswith(b"cpu:"):
        name = device.rstrip(b"\0").decode("ascii", "replace")
        return f"host memory {name}"
    return f"GPU {device.hex()}" if device else "host memory"
