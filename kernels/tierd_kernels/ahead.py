"""The kernels of the digest, compiled ahead of time: PTX and how it is launched, for a program with a driver and no Triton.

`python -m tierd_kernels.ahead FOLDER` writes there a file of PTX for each kernel, and `digest.json`:

    compiler    whose output it is: another version may write other PTX
    payloads    what the kernels can digest, in bytes: the shortest, and what lengths and addresses are multiples of
    chunk_bytes, sum_bytes      a payload of n bytes has (n - 1) // chunk_bytes sums
    table       the constants that both kernels are given, in hex
    kernels     by file: the kernel's name, threads of a block, bytes of shared memory, `at_once` (chunks or payloads of a
                block), and parameters in their order, each a name and a type of PTX; one without a name is scratch memory

How kernels are launched is read from what the compiler says and wrote, and the same as expected, or nothing is written. PTX for
sm_80 is compiled by the driver for the GPU that is there, any from sm_80 on. Version 7.0 is the lowest that has sm_80, so a
driver of CUDA 11.0 reads it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # before Triton is there: PTX would name the folder that this is in

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tierd_kernels import checksum

CAPABILITY, PTX_VERSION = 80, 70
UNIT_WORDS = 2
"""Payloads start at multiples of so many words, which are read at once."""
POINTERS = {"addresses", "table", "sums", "digests"}
SCRATCH = 2
"""Pointers that Triton adds to every kernel's parameters: its own scratch memory, and a profiler's."""


def main(folder: Path) -> None:
    """Compile both kernels and write all files."""
    folder.mkdir(parents=True, exist_ok=True)
    sum_chunks = write(folder, checksum._sum_chunks, {"CHUNKS": checksum.CHUNKS_AT_ONCE, "UNIT": UNIT_WORDS})
    chain_sums = write(folder, checksum._chain_sums, {"PAYLOADS": checksum.PAYLOADS_AT_ONCE}, num_warps=1)
    about = {
        "compiler": f"triton {triton.__version__}",
        "payloads": {
            "bytes_min": checksum.PAYLOAD_BYTES_MIN,
            "bytes_step": checksum.WORD_BYTES,
            "address_step": UNIT_WORDS * checksum.WORD_BYTES,
        },
        "chunk_bytes": checksum.CHUNK_BYTES,
        "sum_bytes": checksum.LANES * checksum.WORD_BYTES,
        "table": checksum._table(torch.device("cpu")).numpy().tobytes().hex(),
        "kernels": {"sum_chunks": sum_chunks, "chain_sums": chain_sums},
    }
    (folder / "digest.json").write_text(json.dumps(about, indent=1) + "\n")


def write(folder: Path, kernel: Any, constants: dict[str, int], **options: int) -> dict[str, Any]:
    """Compile one kernel and write its PTX; returns how it is launched. Its first constant is what a block does at once."""
    arguments = [name for name in kernel.arg_names if name not in constants]
    signature = {name: "*i64" if name in POINTERS else "i32" for name in arguments} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants)
    target = GPUTarget("cuda", CAPABILITY, 32)
    compiled = triton.compile(source, target=target, options={"ptx_version": PTX_VERSION, **options})
    about, ptx = compiled.metadata, compiled.asm["ptx"]
    assert about.global_scratch_size == about.profile_scratch_size == 0, "it would need scratch memory"
    assert not (about.launch_cooperative_grid or about.launch_pdl) and about.num_ctas == 1, "it would need another launch"
    (name, parameters, threads), *more = re.findall(r"\.visible \.entry (\w+)\((.*?)\)\s*\.reqntid (\d+)\s", ptx, re.DOTALL)
    types = re.findall(r"\.param \.(u\d+)", parameters)
    assert not more and int(threads) == about.num_warps * target.warp_size and about.shared <= 48 << 10
    assert types == ["u64" if name in POINTERS else "u32" for name in arguments] + ["u64"] * SCRATCH, types
    (folder / f"{name.strip('_')}.ptx").write_text(ptx)
    return {
        "name": name,
        "threads": int(threads),
        "shared_bytes": about.shared,
        "at_once": next(iter(constants.values())),
        "parameters": [list(pair) for pair in zip([*arguments, *[""] * SCRATCH], types, strict=True)],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
