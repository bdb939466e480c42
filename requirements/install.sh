#!/usr/bin/env bash
# Puts the pinned, tested versions and tierd itself (editable) into the virtual environment of the checkout.
#
#   requirements/install.sh VENV [LIST...]
#
# LIST is a file here without its .txt; the default is what `make test` needs.
#
# Everything is installed with --no-deps from complete lists, so nothing comes along that is not named there: without an
# NVIDIA GPU no CUDA package is downloaded. With one, torch brings its CUDA libraries and triton, and the lists come after
# it because they pin some of what it brings.
set -euo pipefail

venv=$1
lists=("${@:2}")
[ ${#lists[@]} -gt 0 ] || lists=(torch runtime engine dev)
here=$(cd "$(dirname "$0")" && pwd)
torch=2.13.0
cpu_index=https://download.pytorch.org/whl/cpu

pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

check_python() {
    "$venv/bin/python" -c "import sys; sys.exit(sys.version_info < (3, 11))" && return
    echo "tierd needs Python 3.11 or later, and this is $("$venv/bin/python" --version): make clean," >&2
    echo "then make PYTHON=python3.11 (or later)" >&2
    exit 1
}

install_torch() {
    if [ -e /dev/nvidiactl ] || command -v nvidia-smi >/dev/null; then
        pip install "torch==$torch"
    elif ! pip install --no-deps "torch==$torch+cpu" 2>/dev/null; then
        # The usual index has only wheels that need CUDA; this one has those that do not.
        pip install --no-deps --index-url "$cpu_index" "torch==$torch+cpu"
    fi
}

check_torch() {
    "$venv/bin/python" -c "import torch" && return
    echo "torch $torch was installed but cannot be imported: see the error above. On a machine without an NVIDIA GPU" >&2
    echo "it must be the CPU build: $venv/bin/python -m pip install --no-deps --index-url $cpu_index torch==$torch+cpu" >&2
    exit 1
}

check_python
echo "installing pinned packages into $venv (about 2 GB; a minute or more)" >&2
install_torch
pip install --no-deps $(printf -- "-r $here/%s.txt " "${lists[@]}")
check_torch
pip install --no-deps --no-build-isolation --editable "$here/.."
