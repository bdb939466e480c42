"""Daemons for tests with SGLang's own modules, which `make test-sglang` runs; elsewhere they are skipped."""

from __future__ import annotations

from importlib.util import find_spec

from tests.daemon.conftest import make, start  # noqa: F401

if find_spec("sglang") is not None:
    import tests.sglang.sglang_on_cpu  # noqa: F401
