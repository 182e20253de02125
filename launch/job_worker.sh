#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One process of a job, on a host where an engine started it:  bash launch/job_worker.sh PROGRAM [argument ...]
#
# Tells JAX who the others are and becomes PROGRAM; the engine sees its exit status and starts the job again. The
# numbers are libtpu's own: TPU_WORKER_ID and TPU_WORKER_HOSTNAMES, which GKE gives to its pods, or the metadata of a
# TPU VM (SkyPilot, Compute Engine). RAPID_JOB_HOSTS (launch/job.py) says how many hosts there must be.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PORT=8476
METADATA=http://metadata.google.internal/computeMetadata/v1/instance/attributes

fail() {
    printf 'job_worker: %s\n' "$*" >&2
    exit 2
}

attribute() { curl -sf -m 5 --retry 2 -H 'Metadata-Flavor: Google' "$METADATA/$1" 2>/dev/null; }

main() {
    local hosts number addresses=() address name expected=${RAPID_JOB_HOSTS:-}
    (($#)) || fail "expected a program, got none"
    if [[ -n ${TPU_WORKER_HOSTNAMES:-} ]]; then
        hosts=$TPU_WORKER_HOSTNAMES number=${TPU_WORKER_ID:-}
    elif [[ $expected == 1 ]]; then
        hosts=localhost number=0
    elif hosts=$(attribute worker-network-endpoints) && [[ -n $hosts ]]; then
        number=$(attribute agent-worker-number || attribute worker-id) || number='' # the second on Compute Engine
    else
        fail "expected TPU_WORKER_HOSTNAMES (GKE) or a TPU VM's metadata, got neither: who are the other hosts?"
    fi
    IFS=, read -ra addresses <<<"$hosts"
    address=${addresses[0]##*:} # metadata has names, or NAME:ID:ADDRESS
    [[ -z $expected || ${#addresses[@]} == "$expected" ]] ||
        fail "expected $expected hosts, got ${#addresses[@]}: $hosts"
    [[ $number =~ ^[0-9]{1,5}$ && $number -lt ${#addresses[@]} ]] ||
        fail "expected this host's number below ${#addresses[@]}, got '$number'"
    for name in "${!MEGASCALE_@}"; do unset "$name"; done # one slice: JAX would wait for others
    unset JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES JAX_PROCESS_ID
    if ((${#addresses[@]} > 1)); then # a single process needs no coordinator
        export JAX_COORDINATOR_ADDRESS=$address:$PORT JAX_NUM_PROCESSES=${#addresses[@]} JAX_PROCESS_ID=$number
    fi
    export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu} # a TPU that does not come up is an error, not a slow run on the CPU
    export PYTHONUNBUFFERED=1
    export PATH=$ROOT/.venv/bin:$PATH
    cd "$ROOT"
    exec env -- "$@"
}

main "$@"
exit
