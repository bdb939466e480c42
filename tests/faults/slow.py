"""`tierd` on a disk that cannot keep up: every payload that is written takes a while.

`python -m tests.faults.slow SECONDS serve ...`
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from tierd.cli import main


def slow_down(seconds: float) -> None:
    """Make each write of a block wait, in its own thread."""
    write = os.pwritev

    def slowly(*arguments: Any) -> int:
        time.sleep(seconds)
        return write(*arguments)

    os.pwritev = slowly


if __name__ == "__main__":
    slow_down(float(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
