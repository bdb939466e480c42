"""What tests of kernels share: where they run. Without a GPU that is Triton's interpreter, on tensors in host memory."""

from __future__ import annotations

import os
from typing import Any

import pytest
import triton.runtime.interpreter as interpreter

# NumPy 2.4 refuses to make a number of an array with one element, which is what the interpreter of Triton 3.6 has for every
# scalar: `range` with a bound that was loaded or passed needs this.
patch_tensor = interpreter._patch_lang_tensor


def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
    """As the interpreter does, and scalars are numbers again."""
    patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = patch_tensor_and_index


@pytest.fixture(scope="session", params=[pytest.param("cpu", id="interpreted"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the tensors of a test live, and so where its kernels run."""
    if request.param == "cpu" and "TRITON_INTERPRET" not in os.environ:
        pytest.skip("kernels are defined for the GPU here, not for the interpreter")
    name: str = request.param
    return name
