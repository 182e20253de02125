#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One worker's part of launch/tpu.sh, which calls this over ssh on every worker of a slice at once:
#
#   tpu_worker.sh state
#   tpu_worker.sh install WORKERS ARCHIVE [extra ...]
#   tpu_worker.sh start WORKERS COORDINATOR RUN RESTARTS COMMAND [argument ...]
#   tpu_worker.sh tail LINES [follow]
#   tpu_worker.sh stop SECONDS [RUN]
#
# WORKERS: the internal addresses of all workers, commas between, in the order of the workers' numbers. An answer is one
# line "rapid-worker ADDRESSES WORD ...", which tpu.sh counts. Logs, lock and process id are in ~/rapid_runs.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
RUNS=$HOME/rapid_runs
RESTART_WAIT=15 # seconds until a restart: by then the other workers' processes have noticed, and the port is free again
TEMPFAIL=75     # EX_TEMPFAIL of sysexits.h: the program saved and asks to be started again
NUMBER_URL=http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number

answer() { printf 'rapid-worker %s %s\n' "$(hostname -I | tr ' ' ,)" "$*"; }
refuse() { # never with status 255, which gcloud takes for a broken connection: it would run the command again
    answer "refused: $*"
    exit 1
}
note() { printf '[rapid %s] %s\n' "$(date -u +%FT%TZ)" "$*"; }

# Whoever is going holds the lock through file descriptor 9, its child processes too: it ends with the last of them.
going() { # is a run or a setup going?
    flock -n 9 || return 0
    flock -u 9
    return 1
}
name_of_run() { cat "$RUNS/run" 2>/dev/null || printf 'a run'; }

number_among() { # this worker's number: the place of one of its own addresses in $1, which needs no metadata server
    local all number own
    own=$(hostname -I)
    IFS=, read -ra all <<<"$1"
    for number in "${!all[@]}"; do
        if [[ " $own " == *" ${all[number]} "* ]]; then
            printf '%s\n' "$number"
            return
        fi
    done
    return 1
}

state() {
    if going; then
        answer "running $(name_of_run)"
    elif [[ -f $RUNS/checkout ]]; then
        answer "idle $(<"$RUNS/checkout")"
    else
        answer bare
    fi
}

install_checkout() { # WORKERS ARCHIVE [extra ...]
    local number archive=$HOME/$2 status=0
    number=$(number_among "$1") || refuse "none of this host's addresses is in the slice's list $1"
    shift 2
    flock -n 9 || refuse "$(name_of_run) is going"
    printf 'setup\n' >"$RUNS/run"
    rm -f "$RUNS/checkout"
    cd "$ROOT"
    if [[ -f $RUNS/files ]]; then # what the last copy brought and this one may lack; what runs wrote here stays
        xargs -d '\n' rm -f -- <"$RUNS/files"
    fi
    tar -xzf "$archive"
    tar -tzf "$archive" | sed '/\/$/d' >"$RUNS/files"
    bash launch/host_setup.sh tpu "$@" 9>&- 2>&1 </dev/null | sed -u "s/^/[worker $number] /" || status=$?
    if ((status)); then
        answer "failed: host_setup.sh ended with exit status $status"
        exit 1
    fi
    sha256sum <"$archive" | cut -c 1-12 >"$RUNS/checkout"
    answer "ready $(<"$RUNS/checkout")"
}

set_environment() { # NUMBER COUNT COORDINATOR: what JAX needs, beside RAPID_RUN_TOKEN, which tpu.sh gives to start
    local name
    # Left behind by a preempted job of several slices: JAX would wait for the slices that are gone.
    for name in "${!MEGASCALE_@}"; do unset "$name"; done
    unset JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES JAX_PROCESS_ID
    if (($2 > 1)); then                     # a single process needs no coordinator
        export JAX_COORDINATOR_ADDRESS=$3   # where process 0 listens; JAX's own choice of port is blocked in places
        export JAX_NUM_PROCESSES=$2         # one process a worker
        export JAX_PROCESS_ID=$1            # the worker's number, as libtpu numbers the hosts
    fi
    export JAX_PLATFORMS=tpu,cpu            # a TPU that does not come up is an error, not a slow run on the CPU
    export PYTHONUNBUFFERED=1               # lines are in the log when they are printed
    export PATH=$ROOT/.venv/bin:$PATH       # rapid and python are the checkout's
}

start() { # WORKERS COORDINATOR RUN RESTARTS COMMAND [argument ...]
    local workers=$1 coordinator=$2 run=$3 restarts=$4 number claimed count log
    shift 4
    number=$(number_among "$workers") || refuse "none of this host's addresses is in the slice's list $workers"
    claimed=$(curl -sf -m 5 -H 'Metadata-Flavor: Google' "$NUMBER_URL" 2>/dev/null) || claimed=$number
    [[ $claimed == "$number" ]] || refuse "number $number by its address, but $claimed by metadata, as libtpu has it"
    count=$(tr , '\n' <<<"$workers" | wc -l)
    log=$RUNS/$run.worker-$number.log
    if ! flock -n 9; then
        # A connection that broke after the start: gcloud sent the same command again.
        [[ $(name_of_run) == "$run" ]] || refuse "$(name_of_run) is going"
        answer "started $log"
        return
    fi
    printf '%s\n' "$run" >"$RUNS/run"
    rm -f "$RUNS/pid"
    # A session of its own: the end of the ssh connection does not reach it, and stop reaches all of it.
    setsid bash "$ROOT/launch/tpu_worker.sh" supervise "$number" "$count" "$coordinator" "$restarts" "$@" \
        </dev/null >"$log" 2>&1 &
    ln -sfn "$log" "$RUNS/latest.log"
    until [[ -s $log ]] || ! kill -0 $! 2>/dev/null; do sleep 0.05; done
    [[ -s $log ]] || refuse "nothing started"
    answer "started $log"
}

supervise() { # NUMBER COUNT COORDINATOR RESTARTS COMMAND [argument ...]; the leader of the run's session
    local number=$1 count=$2 coordinator=$3 restarts=$4 restarted=0 status stopping=
    shift 4
    trap 'stopping=yes' TERM # comes to the whole process group; bash obeys when the command has ended
    trap 'rm -f "$RUNS/pid"' EXIT
    printf '%s\n' $$ >"$RUNS/pid"
    set_environment "$number" "$count" "$coordinator"
    cd "$ROOT"
    while true; do
        note "worker $number of $count starts:$(printf ' %q' "$@")"
        status=0
        env -- "$@" || status=$? # env: a program, not a function or builtin of this shell; NAME=value may come first
        note "ended with exit status $status"
        # 128 and more: killed or aborted, which is what the others, ending with 75, have lost.
        if [[ -n $stopping ]] || ((status != TEMPFAIL && status < 128)); then break; fi
        if ((restarted == restarts)); then
            note "no restart: $restarted of $restarts are used"
            break
        fi
        restarted=$((restarted + 1))
        note "restart $restarted of $restarts in $RESTART_WAIT s"
        sleep "$RESTART_WAIT" || true # SIGTERM ends the sleep too
        [[ -z $stopping ]] || break
    done
    [[ -z $stopping ]] || note "stopped"
    exit "$status"
}

tail_log() { # LINES [follow]
    local log number pid options=(-n "$1")
    if [[ ! -e $RUNS/latest.log ]]; then
        printf '[%s] nothing has run here\n' "$(hostname)"
        return
    fi
    log=$(readlink -f "$RUNS/latest.log")
    number=${log##*worker-}
    if [[ ${2:-} == follow ]] && going && pid=$(cat "$RUNS/pid" 2>/dev/null); then
        options+=(-f "--pid=$pid") # ends with the run
    fi
    exec 9>&- # a reader of the log is no run
    tail "${options[@]}" "$log" | sed -u "s/^/[worker ${number%.log}] /"
}

stop() { # SECONDS [RUN]: only that run, when one is named
    local pid run
    if flock -n 9; then
        answer "stopped (nothing was going)"
        return
    fi
    run=$(name_of_run)
    if [[ -n ${2:-} && $run != "$2" ]]; then
        answer "stopped ($2 is not going; $run is)"
        return
    fi
    pid=$(cat "$RUNS/pid" 2>/dev/null) || refuse "$run has no process id yet"
    kill -TERM -- "-$pid" 2>/dev/null || true
    if flock -w "$1" 9; then
        answer "stopped $run"
        return
    fi
    kill -KILL -- "-$pid" 2>/dev/null || true
    flock -w 10 9 || refuse "processes of $run live on outside its group: fuser -v $RUNS/lock shows them"
    answer "stopped $run with SIGKILL, $1 s after SIGTERM"
}

main() {
    local verb=${1:-}
    mkdir -p "$RUNS"
    [[ $verb == supervise ]] || exec 9>>"$RUNS/lock" # supervise has it from start
    shift || true
    case $verb in
        state) state ;;
        install) install_checkout "$@" ;;
        start) start "$@" ;;
        supervise) supervise "$@" ;;
        tail) tail_log "$@" ;;
        stop) stop "$@" ;;
        *) refuse "expected state, install, start, tail or stop, got '$verb'" ;;
    esac
}

main "$@"
exit
