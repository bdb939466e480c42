"""GPU kernels for paged KV: copies between pages and slots, attention over pages, quantisation, checksums.

The package stands alone: it needs torch, triton and xxhash, and nothing of tierd. Every operation comes three times with
one signature: `gather_kernel` launches Triton, `gather_twin` says the same in plain torch (the oracle of the tests, and
what runs without a GPU), and `gather` takes the kernel for tensors on a GPU and the twin for all others.

    pages      where an engine keeps KV; `gather`, `scatter`, `store`
    attention  `attend`: decode, and prefill over a cached prefix
    quantize   `quantize`, `dequantize`: MXFP8, MXFP4, NVFP4
    checksum   `digest`: xxh3-64 of many payloads

Nothing here waits for the GPU: kernels go to torch's current stream, and indexes are not checked there.
"""
