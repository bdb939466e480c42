"""SGLang's modules without its CUDA packages: when this is imported `sglang.srt.mem_cache` can be, on a machine without a GPU.

On the way to its host pools SGLang imports the image processing of all models, and with it torchvision, whose usual build is
linked to CUDA. A module of that name, with the one class that is asked for at import, takes its place after transformers has
found out that there is none.
"""

from __future__ import annotations

import sys
from types import ModuleType

from transformers.utils import is_torchvision_available

NAMES = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")

if not is_torchvision_available():
    for name in NAMES:
        sys.modules[name] = ModuleType(name)
        package, _, module = name.rpartition(".")
        if package:
            setattr(sys.modules[package], module, sys.modules[name])
        sys.modules[name].InterpolationMode = type("InterpolationMode", (), {})  # type: ignore[attr-defined]
