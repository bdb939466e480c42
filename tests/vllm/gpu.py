"""A GPU that is not there: the emulated driver's streams, which are behind, and kernels that run when it is their turn.

The pages are tensors in host memory, which the emulated copy engines take for a GPU's; kernels are tierd's own, interpreted.
So what a copy does not wait for has not happened yet: it finds, or destroys, what was there before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from threading import local
from typing import Any

import pytest
import torch

from tierd.client.pinned import CopyEngines, Ticket
from tierd.driver import LIBRARY
from tierd_engine.connectors.vllm.pages import runs_of, views_of
from tierd_engine.device import DevicePages, Lane
from tierd_kernels.pages import Pages, gather_kernel, scatter_kernel

Kernel = Callable[[], object]


class Gpu:
    """One of the emulated devices, with the streams of an engine's worker."""

    def __init__(self, number: int) -> None:
        self.engines = CopyEngines(number)
        self._computing, *self._copying = (100 * number + stream for stream in (1, 2, 3))

    def compute(self, kernel: Kernel) -> None:
        """Give it to the stream on which the engine computes."""
        launch(self.engines, self._computing, kernel)

    def ticket(self) -> Ticket:
        """All that the engine has given its stream."""
        return Ticket(self.engines, self._computing)

    def pages(self, caches: dict[str, torch.Tensor]) -> DevicePages:
        """The tensors that vLLM registers, as the pages of this device."""
        runs = [run for name, cache in caches.items() for run in runs_of(name, cache, len(cache), cache[0].numel() * 4)]
        return DevicePages(Pages(views_of(runs), parts=1), self.engines, self._copying, lambda: self._computing)


# -- kernels in the order of their stream ------------------------------------------------------------------------------

_numbers, _kernels = count(1), dict[int, Kernel]()
problems: list[BaseException] = []
"""What kernels raised, which no caller of the driver hears of."""
_current = local()


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _run(number: int) -> None:
    try:
        _kernels.pop(number)()
    except BaseException as error:
        problems.append(error)


def launch(engines: CopyEngines, stream: int, kernel: Kernel) -> None:
    """Put a kernel behind what the stream was given before."""
    number = next(_numbers)
    _kernels[number] = kernel
    with engines:
        code = ctypes.CDLL(LIBRARY).cuLaunchHostFunc(ctypes.c_void_p(stream), _run, ctypes.c_void_p(number))
    assert code == 0, code


def emulate_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a lane, as within `torch.cuda.stream`, kernels go to its stream: the same ones, in the interpreter."""

    @contextmanager
    def current(lane: Lane) -> Iterator[None]:
        _current.stream = lane.stream
        yield

    def later(kernel: Callable[..., object]) -> Callable[..., None]:
        def call(*given: Any) -> None:
            launch(CopyEngines(_current.stream // 100), _current.stream, lambda: kernel(*given))

        return call

    monkeypatch.setattr(Lane, "current", current)
    monkeypatch.setattr("tierd_engine.device.gather", later(gather_kernel))
    monkeypatch.setattr("tierd_engine.device.scatter", later(scatter_kernel))
