#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Every kernel for NVIDIA GPUs, compiled on this machine's, and the product on it:  bash launch/test_gpu.sh [pytest arguments]
#
# To be run before a change of a kernel, a cache or decoding counts as done. Takes some minutes on one H100 or H200.
# RAPID_GPU_PYTHON: a Python that has JAX for CUDA and what the tests need; else .venv is made with the extra cuda13.
# LongPO's training is tested where TensorFlow (extra longpo) is installed; the end of the output says so where it is not.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
python=${RAPID_GPU_PYTHON:-}
if [[ -z $python ]]; then
    bash launch/setup_environment.sh cuda13 test
    python=$ROOT/.venv/bin/python
fi
export JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
if ! "$python" -c 'import jax; jax.devices("gpu")' 2>/dev/null; then
    printf 'test_gpu: expected an NVIDIA GPU that JAX for CUDA can use from %s, got none\n' "$python" >&2
    exit 2
fi
"$python" -c 'import jax; print("jax", jax.__version__, "on", jax.devices("gpu")[0].device_kind)'
# Plugins that happen to be installed would warn, and a warning is a failure.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 OMP_NUM_THREADS=2
# A worker for each file: the product's tests share two processes that take as long as many kernels.
exec "$python" -m pytest -p xdist tests/gpu tests/attention/test_kernels.py --numprocesses 6 --dist loadfile "$@"
