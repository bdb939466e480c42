#!/usr/bin/env bash
# The gpu tests and the GPU benchmarks, within 8 minutes: what `make gpu` runs.
#
#   benchmarks/gpu/run.sh [PYTHON [WHEELS]]
#
# With WHEELS, a folder of wheels (torch 2.11 to 2.13 with what it needs, triton 3.6, numpy, xxhash, pytest 9, pytest-timeout,
# hypothesis), nothing is downloaded: a virtual environment of its own takes from there what PYTHON does not have. Where there are
# wheels of aiofiles, msgpack, prometheus-client and uvloop too, the daemon is tested and measured (with kvikio-cu13, libkvikio-cu13,
# rapids-logger, cuda-pathfinder and nvidia-cufile also straight to NVMe), and with accelerate, safetensors, tokenizers and
# transformers an engine; the report says what was left out. Without WHEELS the checkout's own environment is used.
# Exit status: 0 all well, 1 a test or a measurement failed, 3 no GPU, nothing was run.
set -euo pipefail

python=${1:-python3}
wheels=${2:-}
cd "$(dirname "$0")/../.."

if [ ! -e /dev/nvidiactl ]; then
    echo "make gpu: there is no NVIDIA GPU on this machine (no /dev/nvidiactl), so nothing was run and nothing can be claimed" >&2
    exit 3
fi

if [ -n "$wheels" ]; then
    "$python" -m venv --system-site-packages .venv-gpu
    python=.venv-gpu/bin/python
    fetch() { # from the folder, if it cannot be imported
        "$python" -c "import $1" 2>/dev/null || "$python" -m pip install --quiet --no-index --find-links "$wheels" "${1//_/-}"
    }
    for package in torch numpy xxhash pytest pytest_timeout hypothesis; do
        fetch "$package"
    done
    for package in aiofiles msgpack prometheus_client uvloop accelerate safetensors tokenizers transformers; do
        fetch "$package" || true # the report says what lacks
    done
    # The daemon's way to NVMe, without the gigabytes of CUDA that kvikio asks for and torch has.
    "$python" -c "import kvikio" 2>/dev/null ||
        "$python" -m pip install --quiet --no-index --no-deps --find-links "$wheels" \
            kvikio-cu13 libkvikio-cu13 rapids-logger cuda-pathfinder "nvidia-cufile==1.15.1.6" || true
    # torch asks for the triton that it was built with, the kernels for the one that they were tested with.
    "$python" -c "import triton, sys; sys.exit(not triton.__version__.startswith('3.6.'))" 2>/dev/null ||
        "$python" -m pip install --quiet --no-index --no-deps --find-links "$wheels" "triton==3.6.*"
else
    make venv
    python=.venv/bin/python
fi
exec env PYTHONPATH=.:kernels:engine timeout 480 "$python" -m benchmarks.gpu
