#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sets up a bare Debian or Ubuntu host:  bash launch/host_setup.sh [tpu|cuda12|cuda13|cpu] [extra ...]
#
# Finds a Python 3.11 to 3.13, or installs one with apt (as root, or by a sudo that asks no password); makes .venv with
# launch/setup_environment.sh, whose extras may follow; checks that JAX sees the accelerator. Without a kind it goes by
# the drivers. May be repeated. RAPID_PYTHON names the Python to use.
# On a slice of several TPU hosts all must do this at once, as launch/tpu.sh setup does: JAX waits for every host.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CHECK_SECONDS=600 # for the slowest host of a slice to arrive; one host alone needs some 10 s

say() { printf '[host %3ds] %s\n' "$SECONDS" "$*" >&2; }
fail() {
    printf 'host_setup: %s\n' "$*" >&2
    exit 2
}
usage() { sed -n '3,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

detect() { # the kind that this host's drivers are for
    local driver
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || driver='' # one line a GPU
    if [[ -n $driver ]]; then
        if ((${driver%%.*} >= 580)); then printf 'cuda13\n'; else printf 'cuda12\n'; fi # CUDA 13 needs driver 580
    elif compgen -G '/dev/accel[0-9]*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
        printf 'tpu\n'
    else
        printf 'cpu\n'
    fi
}

has_python() { # one that launch/setup_environment.sh will take
    local candidate
    for candidate in ${RAPID_PYTHON:-python3 python3.12 python3.11 python3.13}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
            >/dev/null 2>&1; then
            return
        fi
    done
    return 1
}

ensure_python() {
    local version package apt=(apt-get -q -y -o DPkg::Lock::Timeout=600) # a fresh VM updates itself for minutes
    local wanted="a Python 3.11, 3.12 or 3.13 with the venv module"
    ! has_python || return 0
    [[ -z ${RAPID_PYTHON:-} ]] || fail "expected RAPID_PYTHON to be $wanted, got $RAPID_PYTHON"
    command -v apt-get >/dev/null || fail "expected $wanted, got none, and no apt-get to install it with"
    apt=(env DEBIAN_FRONTEND=noninteractive "${apt[@]}")
    if ((EUID != 0)); then
        sudo -n true 2>/dev/null || fail "expected $wanted, got none; as root: apt-get install python3-venv"
        apt=(sudo -n "${apt[@]}")
    fi
    say "installing Python with apt"
    "${apt[@]}" update >&2 || say "apt-get update failed: trying with the lists there are"
    # python3-venv serves where python3 itself is new enough; Ubuntu 22.04 has 3.10, and python3.11 beside it.
    for package in python3-venv python3.12-venv python3.11-venv python3.13-venv; do
        version=$(apt-cache depends "$package" 2>/dev/null | grep -oE 'python3\.[0-9]+') || continue
        case ${version%%$'\n'*} in python3.1[123]) ;; *) continue ;; esac
        if "${apt[@]}" install "$package" >&2 && has_python; then return; fi
    done
    fail "expected $wanted, got none from apt either: install one and set RAPID_PYTHON"
}

check_accelerator() { # $1: the kind
    local platform=${1%1[23]} seen status=0
    # JAX_PLATFORMS: without it JAX would fall back to the CPU and say so in a warning only.
    seen=$(JAX_PLATFORMS=$platform timeout "$CHECK_SECONDS" "$ROOT/.venv/bin/python" - 2>/dev/null <<'PY'
import sys
try:
    import jax
    here, everywhere = jax.local_devices(), jax.device_count()
except Exception as error:  # plugins raise what they like
    print(" ".join(str(error).split())[:300] or "none")  # an assertion without words: no plugin is installed
    sys.exit(1)
print(f"jax {jax.__version__} sees {len(here)} of {everywhere} devices here: {here[0].device_kind}")
PY
    ) || status=$?
    case $status in
        0) say "$seen" ;;
        124) fail "expected JAX to see $1 devices, got no answer in $CHECK_SECONDS s: do all hosts of the slice ask?" ;;
        *) fail "expected JAX to see $1 devices, got: ${seen:-no start of JAX (exit status $status)}" ;;
    esac
}

main() {
    local kind=${1:-}
    case $kind in
        -h | --help)
            usage
            return
            ;;
        tpu | cuda12 | cuda13 | cpu) shift ;;
        '')
            kind=$(detect)
            say "this host looks like $kind"
            ;;
        *) fail "expected tpu, cuda12, cuda13 or cpu, got '$kind'" ;;
    esac
    ensure_python
    if [[ $kind == cpu ]]; then
        bash "$ROOT/launch/setup_environment.sh" "$@"
    else
        bash "$ROOT/launch/setup_environment.sh" "$kind" "$@"
    fi
    check_accelerator "$kind"
}

main "$@"
