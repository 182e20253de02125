#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A Cloud TPU slice, one command for all of its workers:  bash launch/tpu.sh COMMAND NAME [option ...] [-- ...]
#
#   create NAME   makes the slice: --accelerator-type v5p-32, or --topology v5p:2x2x4 as the planner writes it; --spot;
#                 --queued waits in the queue [--valid-until-duration 6h] [--no-wait]; --runtime-version VERSION;
#                 what follows -- goes to gcloud
#   setup NAME    copies the files that git tracks to ~/rapid_jax on every worker and runs launch/host_setup.sh tpu on
#                 all of them at once; what follows -- are more extras
#   push [NAME] FROM TO    copies a folder (--file: one file) from here to gs://...; with NAME from here or gs://... to
#                 every worker: TO is then a path on the slice, below ~/rapid_jax unless it begins with /
#   fetch [NAME] FROM TO   the other way: from gs://... to here; with NAME from worker 0 (--worker I) to here or there
#   run NAME -- PROGRAM ...   starts PROGRAM on every worker, detached, in ~/rapid_jax with .venv/bin on PATH;
#                 --bucket gs://BUCKET/PATH: the run of longpo, instead of a folder on the slice's disks;
#                 --restarts N: again when it exits with 75 (it saved, or lost a peer) or is killed, N times;
#                 --coordinator HOST:PORT, or :PORT (default: worker 0, port 8476)
#   tail NAME     follows the last run's log of every worker; --lines N (20), --no-follow, --worker I
#   stop NAME     ends the run: SIGTERM, after --grace S seconds (60) SIGKILL
#   delete NAME   asks first, unless --yes; --queued for a request that has no slice yet
#
# All take --zone, --project (default: gcloud's settings) and --dry-run (prints the commands and runs none); those that
# use ssh take --internal-ip. setup and run first ask every worker: JAX would wait for an absent one for ever.
# Needs gcloud; setup of several workers needs the key in the ssh agent: ssh-add ~/.ssh/google_compute_engine
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PORT=8476    # Google's firewall opens it between workers; JAX's own default, 8482 since 0.8.1, is closed in places
POLL=20      # seconds between two looks at a queued request
ARCHIVE=rapid_jax.tar.gz
WORKER='bash rapid_jax/launch/tpu_worker.sh'
SHAPES_2D="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
SHAPES_3D="2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16 16x16x24"
declare -A OPTIONS=(
    [create]="accelerator-type= topology= runtime-version= spot queued valid-until-duration= no-wait"
    [setup]="internal-ip"
    [push]="file internal-ip"
    [fetch]="file worker= internal-ip"
    [run]="bucket= restarts= coordinator= internal-ip"
    [tail]="lines= no-follow worker= internal-ip"
    [stop]="grace= internal-ip"
    [delete]="queued yes"
)
VERB='' NAME=''
declare -A OPTION=() # what was given: OPTION[zone]=us-east5-a, OPTION[spot]=yes
NAMES=()             # what stood between: a slice's name, or what push and fetch copy
REST=()              # what followed --
WORKERS=()           # internal addresses, in the order of the workers' numbers
ANSWER=()            # what each worker said last, by number
REMOTE=()            # options of gcloud's ssh and scp

say() { printf 'tpu: %s\n' "$*" >&2; }
fail() {
    printf 'tpu: %s\n' "$*" >&2
    exit 2
}
usage() { sed -n '3,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
dry() { [[ -n ${OPTION[dry-run]:-} ]]; }
joined() { # the arguments with commas between
    local IFS=,
    printf '%s' "$*"
}
quoted() { # the arguments as any shell reads them back
    local argument escaped="'\\''" words=()
    for argument in "$@"; do
        [[ $argument =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || argument="'${argument//"'"/"$escaped"}'"
        words+=("$argument")
    done
    printf '%s' "${words[*]}"
}

read_arguments() {
    local allowed name names
    VERB=${1:-}
    [[ -n ${OPTIONS[${VERB:-none}]:-} ]] ||
        fail "expected a command create, setup, push, fetch, run, tail, stop or delete, got '$VERB'"
    shift
    allowed=" ${OPTIONS[$VERB]} zone= project= dry-run "
    while (($#)); do
        name=${1#--}
        name=${name%%=*}
        if [[ $1 == -- ]]; then
            REST=("${@:2}")
            break
        elif [[ $1 == --*=* && $allowed == *" $name= "* ]]; then
            OPTION[$name]=${1#*=}
        elif [[ $1 == --* && $allowed == *" $name= "* ]]; then
            [[ $# -gt 1 && $2 != --* ]] || fail "$VERB: expected a value after $1, got none"
            OPTION[$name]=$2
            shift
        elif [[ $1 == "--$name" && $allowed == *" $name "* ]]; then
            OPTION[$name]=yes
        elif [[ $1 == -* ]]; then
            read -ra names <<<"$allowed"
            fail "$VERB: expected an option out of ${names[*]/#/--}, got '$1'"
        else
            NAMES+=("$1")
        fi
        shift
    done
    check_names
}

check_names() { # sets NAME and REMOTE; leaves FROM and TO of push and fetch in NAMES
    if [[ $VERB == push || $VERB == fetch ]]; then
        ((${#NAMES[@]} == 2 || ${#NAMES[@]} == 3)) ||
            fail "$VERB: expected FROM TO, or a slice's name before them, got ${#NAMES[@]} words"
        [[ $VERB == push ]] || OPTION[worker]=$(whole_number worker 0)
        if ((${#NAMES[@]} == 3)); then
            NAME=${NAMES[0]}
            NAMES=("${NAMES[@]:1}")
        fi
    else
        ((${#NAMES[@]} < 2)) ||
            fail "$VERB: expected one name, got '${NAMES[0]}' and '${NAMES[1]}' (a program comes after --)"
        NAME=${NAMES[0]:-}
    fi
    [[ -z $NAME && ($VERB == push || $VERB == fetch) || $NAME =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
        fail "$VERB: expected a slice's name of lower-case letters, digits and hyphens, got '$NAME'"
    [[ $VERB == create || $VERB == setup || $VERB == run || ${#REST[@]} == 0 ]] ||
        fail "$VERB: expected nothing after --, got '${REST[*]}'"
    REMOTE=("--worker=${OPTION[worker]:-all}" ${OPTION[internal-ip]:+--internal-ip})
}

whole_number() { # option, default
    local value=${OPTION[$1]:-$2}
    [[ $value =~ ^[0-9]{1,6}$ ]] || fail "$VERB: expected a whole number for --$1, got '$value'"
    printf '%s' "$value"
}

cloud() { # gcloud compute tpus ..., with the user's zone and project
    local command=(gcloud compute tpus "$@")
    [[ -z ${OPTION[zone]:-} ]] || command+=("--zone=${OPTION[zone]}")
    [[ -z ${OPTION[project]:-} ]] || command+=("--project=${OPTION[project]}")
    if dry; then printf '%s\n' "$(quoted "${command[@]}")"; else "${command[@]}" </dev/null; fi
}

on_workers() { # runs the shell command $1 on every worker, at once
    # ConnectTimeout: gcloud tries ten times, and a host that is gone would take minutes each time.
    cloud tpu-vm ssh "$NAME" "${REMOTE[@]}" --ssh-flag=-oConnectTimeout=15 "--command=$1"
}

find_workers() {
    local found state describe=(tpu-vm describe "$NAME" '--format=value(state,networkEndpoints[].ipAddress)')
    if dry; then
        cloud "${describe[@]}"
        WORKERS=(ADDRESS_0 ADDRESS_1)
        return
    fi
    found=$(cloud "${describe[@]}") || fail "$VERB: gcloud knows no slice $NAME here: see its message above"
    state=${found%%[[:space:]]*}
    [[ $state == READY ]] || fail "$VERB: expected $NAME in state READY, got ${state:-no state}"
    mapfile -t WORKERS < <(grep -oE '[0-9]+(\.[0-9]+){3}' <<<"$found")
    ((${#WORKERS[@]})) || fail "$VERB: expected network endpoints of $NAME, got none"
}

ask() { # runs the shell command $1 on every worker and notes what each answers; other lines are passed on
    local line addresses text number
    ANSWER=()
    if dry; then
        on_workers "$1"
        return
    fi
    while IFS= read -r line; do
        if [[ $line != "rapid-worker "* ]]; then
            printf '%s\n' "$line"
            continue
        fi
        read -r _ addresses text <<<"$line"
        for number in "${!WORKERS[@]}"; do
            [[ ,$addresses, != *",${WORKERS[number]},"* ]] || ANSWER[number]=$text
        done
    done < <(on_workers "$1")
}

ask_state() { # a worker without a checkout cannot answer by tpu_worker.sh, and is present all the same
    # shellcheck disable=SC2016 # the worker expands this
    ask "$WORKER"' state 2>/dev/null || echo "rapid-worker $(hostname -I | tr " " ,) bare"'
}

complaint() { # what differs from: every worker answered, and with a word that matches $1
    local number missing=() other=()
    ! dry || return 0
    for number in "${!WORKERS[@]}"; do
        if [[ -z ${ANSWER[number]:-} ]]; then
            missing+=(" worker $number (${WORKERS[number]})")
        elif [[ ! ${ANSWER[number]} =~ ^($1)( |$) ]]; then
            other+=(" worker $number ${ANSWER[number]}")
        fi
    done
    if ((${#missing[@]})); then
        printf 'expected answers of %d workers, got %d; missing:%s' \
            ${#WORKERS[@]} ${#ANSWER[@]} "$(joined "${missing[@]}")"
    elif ((${#other[@]})); then
        printf 'expected %s on every worker, got:%s' "${1//|/ or }" "$(joined "${other[@]}")"
    fi
}

expect() {
    local problem
    problem=$(complaint "$1")
    [[ -z $problem ]] || fail "$VERB: $NAME: $problem${2:+: $2}"
}

choose_type() { # sets TYPE and RUNTIME
    local topology=${OPTION[topology]:-} family shape shapes=$SHAPES_2D cores=1
    TYPE=${OPTION[accelerator-type]:-} RUNTIME=${OPTION[runtime-version]:-}
    [[ ${TYPE:+given} != "${topology:+given}" ]] || fail "create: expected either --accelerator-type or --topology"
    if [[ -n $topology ]]; then
        family=${topology%%:*} shape=${topology#*:}
        case $family in
            v4 | v5p) shapes=$SHAPES_3D cores=2 ;; # the type's number counts TensorCores, and a chip of these has two
            v5e | v6e) ;;
            *) fail "create: expected a topology v4:, v5p:, v5e: or v6e:SHAPE, got '$topology'" ;;
        esac
        # Another shape of as many chips has the same type, and would be made in the shape of this list.
        [[ " $shapes " == *" $shape "* ]] || fail "create: expected a $family shape among $shapes, got '$shape'"
        TYPE=${family/v5e/v5litepod}-$((cores * ${shape//x/*}))
    fi
    case $RUNTIME/$TYPE in
        ?*/*) ;;
        /v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
        /v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
        /v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
        /v[234]-*) RUNTIME=tpu-ubuntu2204-base ;;
        *) fail "create: expected --runtime-version for '$TYPE': v2 to v4, v5litepod, v5p and v6e have a default" ;;
    esac
}

create_slice() {
    local TYPE RUNTIME until=${OPTION[valid-until-duration]:-} options=()
    choose_type
    options=("--accelerator-type=$TYPE" ${OPTION[spot]:+--spot})
    if [[ -z ${OPTION[queued]:-} ]]; then
        [[ -z $until${OPTION[no-wait]:-} ]] || fail "create: expected --queued with --valid-until-duration or --no-wait"
        cloud tpu-vm create "$NAME" "${options[@]}" "--version=$RUNTIME" "${REST[@]}"
        return
    fi
    options+=("--runtime-version=$RUNTIME" "--node-id=$NAME" ${until:+"--valid-until-duration=$until"})
    cloud queued-resources create "$NAME" "${options[@]}" "${REST[@]}"
    [[ -n ${OPTION[no-wait]:-} ]] || wait_for_queue
}

wait_for_queue() { # the request stays in the queue when this is interrupted
    local state before='' describe=(queued-resources describe "$NAME" '--format=value(state.state)')
    if dry; then
        cloud "${describe[@]}"
        return
    fi
    while true; do
        state=$(cloud "${describe[@]}") || fail "create: the state of the request $NAME is not to be had"
        [[ $state == "$before" ]] || say "$NAME is $state"
        before=$state
        case $state in
            ACTIVE) return ;;
            FAILED | SUSPENDING | SUSPENDED | DELETING)
                fail "create: expected $NAME to become ACTIVE, got $state (delete $NAME --queued removes the request)"
                ;;
        esac
        sleep "$POLL"
    done
}

storage() { # gcloud storage cp or rsync from $1 to $2, here
    local command=("${COPY[@]}" "$1" "$2")
    if dry; then printf '%s\n' "$(quoted "${command[@]}")"; else "${command[@]}" </dev/null; fi
}

on_slice() { # a path as the workers' shell, which starts in the home folder, has it
    if [[ $1 == /* ]]; then printf '%s' "$1"; else printf 'rapid_jax/%s' "$1"; fi
}

scp_slice() { # FROM TO PARENT: scp puts a folder into an existing one; into its parent it comes as itself, again too
    local from=$1 to=$2 recurse=()
    [[ -n ${OPTION[file]:-} ]] || to=$3 recurse=(--recurse)
    cloud tpu-vm scp "$from" "$to" "${recurse[@]}" "${REMOTE[@]}"
}

check_transfer() { # FROM TO; what is copied is here, in a bucket or on the slice $NAME
    local kind='a folder' test=-d
    case $VERB/${NAME:+slice}/$1/$2 in
        push//gs://*) fail "push: expected a folder here, got $1 (fetch copies from a bucket to here)" ;;
        push//*/gs://* | fetch//gs://*) ;;
        push//*) fail "push: expected gs://... to copy to, or a slice's name before $1, got '$2'" ;;
        fetch//*) fail "fetch: expected gs://... to copy from, or a slice's name before it, got '$1'" ;;
        push/slice/*/gs://*) fail "push: expected a path on the slice, got $2 (which takes no slice's name)" ;;
        fetch/slice/gs://*) fail "fetch: expected a path on the slice, got $1 (which takes no slice's name)" ;;
    esac
    [[ $1 != gs://* || $2 != gs://* ]] || fail "$VERB: expected one place in a bucket, got two"
    [[ -z ${OPTION[file]:-} ]] || kind='a file' test=-f
    [[ $kind == 'a file' || -z $NAME || $1$2 == *gs://* || ${1##*/} == "${2##*/}" ]] ||
        fail "$VERB: expected folders of one name, got '${1##*/}' and '${2##*/}' (a bucket takes any)"
    [[ $VERB == fetch || $1 == gs://* ]] || dry || test "$test" "$1" || fail "push: expected $kind here, got $1"
}

transfer() { # push and fetch
    local from=${NAMES[0]%/} to=${NAMES[1]%/} path folder COPY=(gcloud storage rsync --recursive)
    check_transfer "$from" "$to"
    [[ -z ${OPTION[file]:-} ]] || COPY=(gcloud storage cp)
    if [[ $VERB == push ]]; then path=$(on_slice "$to"); else path=$(on_slice "$from"); fi
    folder=${path%/*} # of what is copied, on the slice or, for fetch, here
    case $VERB/${NAME:+slice}/$from/$to in
        push//*) storage "$from" "$to" ;;
        push/slice/gs://*)
            [[ -n ${OPTION[file]:-} ]] || folder=$path # rsync wants the folder itself
            on_workers "mkdir -p $(quoted "$folder") && $(quoted "${COPY[@]}" "$from" "$path")"
            ;;
        push/slice/*)
            on_workers "mkdir -p $(quoted "$folder")" && scp_slice "$from" "$NAME:$path" "$NAME:$folder/"
            ;;
        fetch/slice/*/gs://*) on_workers "$(quoted "${COPY[@]}" "$path" "$to")" ;;
        fetch/*)
            folder=$(dirname "$to")
            [[ -n $NAME || -n ${OPTION[file]:-} ]] || folder=$to
            dry || mkdir -p "$folder" || return 1
            if [[ -n $NAME ]]; then scp_slice "$NAME:$path" "$to" "$folder/"; else storage "$from" "$to"; fi
            ;;
    esac || fail "$VERB: the copy failed: see the message above"
}

setup_slice() {
    local changed untracked
    find_workers
    ask_state
    expect 'idle|bare' "stop ends a run"
    if dry; then
        printf '%s\n' "$(quoted git -C "$ROOT" stash create)" \
            "$(quoted git -C "$ROOT" archive --format=tar.gz "--output=$ARCHIVE" COMMIT)"
        cloud tpu-vm scp "$ARCHIVE" "$NAME:$ARCHIVE" "${REMOTE[@]}"
    else
        SCRATCH=$(mktemp -d)
        trap 'rm -rf "$SCRATCH"' EXIT
        # A commit of the tracked files as they are, on no branch; nothing where they are as in HEAD.
        changed=$(git -C "$ROOT" stash create) || fail "setup: expected a git checkout at $ROOT"
        git -C "$ROOT" archive --format=tar.gz "--output=$SCRATCH/$ARCHIVE" "${changed:-HEAD}"
        untracked=$(git -C "$ROOT" ls-files --others --exclude-standard | wc -l)
        ((untracked == 0)) || say "files that git does not track and that are not copied: $untracked"
        cloud tpu-vm scp "$SCRATCH/$ARCHIVE" "$NAME:$ARCHIVE" "${REMOTE[@]}" || fail "setup: the copy failed"
    fi
    ask "mkdir -p rapid_jax && tar -xzf $ARCHIVE -C rapid_jax launch/tpu_worker.sh && $WORKER install $(
        quoted "$(joined "${WORKERS[@]}")" "$ARCHIVE" "${REST[@]}"
    )"
    expect ready
    dry || say "$NAME is ready: ${#WORKERS[@]} workers"
}

add_bucket() { # what longpo writes goes to the bucket: a slice's hosts share no disk, and a preempted one loses its own
    local bucket=${OPTION[bucket]%/} program="${REST[0]} ${REST[1]:-}"
    [[ $bucket =~ ^gs://[a-z0-9][a-z0-9._-]+[a-z0-9](/[^[:space:]]*)?$ ]] ||
        fail "run: expected --bucket gs://BUCKET/PATH, got '$bucket'"
    case $program in
        "longpo "pairs | "longpo "reference | "longpo "train | "longpo "export | "longpo "round | "longpo "rounds) ;;
        *) fail "run: --bucket is the run of longpo pairs, reference, train, export, round or rounds, got '$program'" ;;
    esac
    REST+=(--set "run=$bucket")
}

run_program() {
    local restarts run problem workers token coordinator=${OPTION[coordinator]:-:$PORT}
    ((${#REST[@]})) || fail "run: expected a program after --, got none"
    [[ -z ${OPTION[bucket]:-} ]] || add_bucket
    restarts=$(whole_number restarts 0)
    [[ $coordinator =~ ^[^:]*:[0-9]{1,5}$ ]] ||
        fail "run: expected --coordinator HOST:PORT or :PORT, got '$coordinator'"
    find_workers
    ask_state
    expect idle "setup makes it idle, stop ends a run"
    [[ $(printf '%s\n' "${ANSWER[@]}" | sort -u | wc -l) == 1 ]] ||
        fail "run: $NAME: expected one checkout on all workers, got several: run setup"
    workers=$(joined "${WORKERS[@]}")
    [[ $coordinator != :* ]] || coordinator=${WORKERS[0]}$coordinator
    run=$(date -u +%Y%m%d-%H%M%S)
    # What the run's processes know each other by; nobody else who reaches the coordinator's port takes a place.
    token=$(od -An -N 16 -t x1 /dev/urandom | tr -d ' \n')
    ! dry || run=RUN token=TOKEN
    ask "RAPID_RUN_TOKEN=$token $WORKER start $(quoted "$workers" "$coordinator" "$run" "$restarts" "${REST[@]}")"
    problem=$(complaint started)
    if [[ -n $problem ]]; then # those that did start would wait for the others
        ask "$WORKER stop 10 $run"
        fail "run: $NAME: $problem; what had started was told to stop"
    fi
    dry || say "$run runs on ${#WORKERS[@]} workers, coordinator $coordinator; bash launch/tpu.sh tail $NAME follows it"
}

tail_logs() {
    local lines follow=' follow'
    lines=$(whole_number lines 20)
    [[ -z ${OPTION[worker]:-} ]] || whole_number worker 0 >/dev/null
    [[ -z ${OPTION[no-follow]:-} ]] || follow=''
    on_workers "$WORKER tail $lines$follow"
}

stop_run() {
    local grace number
    grace=$(whole_number grace 60)
    find_workers
    ask "$WORKER stop $grace"
    for number in "${!ANSWER[@]}"; do say "worker $number: ${ANSWER[number]}"; done
    expect stopped
}

delete_slice() {
    local owner reply what=(tpu-vm delete "$NAME" --quiet)
    # A slice of a queued request goes with its request, or the request would stay behind.
    if [[ -n ${OPTION[queued]:-} ]]; then
        what=(queued-resources delete "$NAME" --force --quiet)
    elif ! dry; then
        owner=$(cloud tpu-vm describe "$NAME" '--format=value(queuedResource)') ||
            fail "delete: gcloud knows no slice $NAME here: see its message above"
        [[ -z $owner ]] || what=(queued-resources delete "${owner##*/}" --force --quiet)
    fi
    if [[ -z ${OPTION[yes]:-} ]] && ! dry; then
        read -r -p "Delete $NAME with everything on its disks? [y/N] " reply || true
        [[ ${reply:-} == [yY]* ]] || fail "delete: expected y or --yes, got '${reply:-}': nothing deleted"
    fi
    cloud "${what[@]}"
}

main() {
    if [[ " ${1:-} ${2:-} " == *" --help "* || ${1:-} == -h ]]; then
        usage
        return
    fi
    read_arguments "$@"
    dry || command -v gcloud >/dev/null || fail "expected gcloud (the Google Cloud CLI) on PATH, got none"
    case $VERB in
        create) create_slice ;;
        setup) setup_slice ;;
        push | fetch) transfer ;;
        run) run_program ;;
        tail) tail_logs ;;
        stop) stop_run ;;
        delete) delete_slice ;;
    esac
}

main "$@"
