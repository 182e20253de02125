#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# All checks of a change:  bash launch/test.sh [pytest arguments]
#
# Style, types and tests, in that order; every step runs, and the exit status is 0 only when every step passed.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BIN=$ROOT/.venv/bin
failed=()
export JAX_PLATFORMS=cpu # a TPU or GPU plugin that is installed is not probed
unset PYTHONDONTWRITEBYTECODE # tests start many processes: each would compile thousands of modules for itself

step() { # name, command ...
    local name=$1 start=$SECONDS
    shift
    if "$@"; then
        printf '[%s] passed in %d s\n' "$name" $((SECONDS - start))
    else
        printf '[%s] FAILED after %d s\n' "$name" $((SECONDS - start))
        failed+=("$name")
    fi
}

cd "$ROOT"
step environment bash launch/setup_environment.sh demo documents evaluate longpo test tpu
[[ ${#failed[@]} -eq 0 ]] || exit 1
step "ruff check" "$BIN/ruff" check .
step "ruff format" "$BIN/ruff" format --check .
step pyright "$BIN/pyright" --project .pyrightconfig.json --pythonpath "$BIN/python"
[[ ${#failed[@]} -eq 0 ]] || printf 'Failed before the tests, which run all the same: %s\n' "${failed[*]}"

# pytest comes last, so that the last line of the output is its own summary.
status=0
"$BIN/python" -m pytest --numprocesses "$(nproc)" --maxprocesses 4 --dist worksteal "$@" || status=$?
[[ ${#failed[@]} -eq 0 ]] || exit 1
exit "$status"
