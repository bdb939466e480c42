"""What all tests share: no settings of the caller's, reproducible examples, and sockets with short paths."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.cuda.build import build
from tests.results import Results

HAS_GPU = os.path.exists("/dev/nvidiactl")
if not HAS_GPU:
    # Before anything imports triton: without a GPU, kernels are defined for Triton's interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

OTHERS = ("TIERD_", "XDG_", "NOTIFY_SOCKET", "LISTEN_", "WATCHDOG_", "RUNTIME_DIRECTORY", "STATE_DIRECTORY")
"""Variables of the user's, or of the unit that the tests run in."""

settings.register_profile("tierd", derandomize=True, deadline=None, database=None, print_blob=True)
settings.load_profile("tierd")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--results FILE`."""
    parser.addoption("--results", type=Path, metavar="FILE", help="write there what passed, and what was measured")


def pytest_configure(config: pytest.Config) -> None:
    """Collect results, whether or not they are wanted."""
    config.pluginmanager.register(Results(config.getoption("--results")), "results")


@pytest.fixture
def results(request: pytest.FixtureRequest) -> Results:
    """Where a test notes its figures."""
    plugin = request.config.pluginmanager.get_plugin("results")
    assert isinstance(plugin, Results)
    return plugin


@pytest.fixture(autouse=True, scope="session")
def own_environment() -> None:
    """Tests, and the processes that they start, see no configuration of the user's."""
    for name in [name for name in os.environ if name.startswith(OTHERS)]:
        del os.environ[name]


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """Processes that tests start can be interrupted, also where a shell started the tests in its background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that emulates a GPU and its driver; see tests/cuda."""
    return build(tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name within the 107 bytes that the kernel allows."""
    path = Path(tempfile.mkdtemp(prefix="tierd-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
