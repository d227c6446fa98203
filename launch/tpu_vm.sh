#!/usr/bin/env bash
# A run on a Cloud TPU slice: one process of `python -m scir_jax.train` on every host.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat << 'HELP'
usage: launch/tpu_vm.sh COMMAND [options] [-- train options]

commands
  create    request the slice (a queued resource) and wait until it is ACTIVE; again, it goes on waiting
  install   copy the last commit of this checkout to every worker, with a virtual environment
  start     mount the shared file system and start the run on every worker, detached
  status    the state of the slice and of the run on every worker
  logs      follow the log of worker 0, or of --worker N
  stop      ask the run on every worker to save and exit, and wait until it has
  resume    whatever is missing of: request (a lost slice is deleted first), install, start; with --watch until the end
  delete    give the slice back

options; a variable in the environment or in --env-file does the same, an option wins over both
  --name NAME              TPU_NAME       of the slice and of the queued resource (required)
  --zone ZONE              TPU_ZONE       (required)
  --project PROJECT        TPU_PROJECT    default: gcloud's own
  --accelerator-type TYPE  TPU_TYPE       v5litepod-16, v6e-8, v5p-32, ... (create, resume)
  --runtime-version NAME   TPU_RUNTIME    default by type: tpu-ubuntu2204-base up to v4, v2-alpha-tpuv5-lite,
                                          v2-alpha-tpuv5 (v5p), v2-alpha-tpuv6e, v2-alpha-tpu7-ubuntu2404
  --spot                   TPU_SPOT=1     cheaper, may be taken away at any time; default: on demand
  --create-flag=FLAG                      a flag more for gcloud's create, --create-flag=--network=N; repeatable
  --repository URL         TPU_REPOSITORY install from there instead of from this checkout
  --revision NAME          TPU_REVISION   its branch, tag or commit; default: HEAD
  --directory DIR          TPU_DIRECTORY  on the workers, below the home directory; default: scir_jax
  --mount COMMAND          TPU_MOUNT      run on every worker before each start; it must not mind a second time
  --env NAME=VALUE                        set for the run, such as HF_TOKEN=...; repeatable
  --worker N                              whose log (logs); default: 0
  --internal-ip            TPU_INTERNAL=1 reach the workers by their internal addresses
  --watch                                 resume: again after every preemption or crash, until the run ends
  --retries N              TPU_RETRIES    crashes and failed requests that resume tolerates; default: 10
  --poll SECONDS           TPU_POLL       between two looks at the slice; default: 30
  --timeout SECONDS        TPU_TIMEOUT    for the slice to become ACTIVE, for stop to save; default: 86400
  --env-file FILE                         lines like TPU_NAME=my-slice, read by bash
  --dry-run                               print the commands, run none of them
  --help

The workers share nothing by themselves: run.directory and the model are in a bucket (gs://BUCKET/...), which needs no
--mount, or on a file system that all of them mount, given by absolute paths. For NFS (a Filestore share, say):
  --mount 'mountpoint -q /shared || { sudo apt-get -qy install nfs-common && sudo mkdir -p /shared &&
           sudo mount -t nfs 10.0.0.2:/share /shared; }'

A run ends with 0; 2 (bad input), 3 (disk full) and 5 (it diverged), which need you; or 143 after `stop`. Anything
else, and a slice that was taken away, is what `resume --watch` is for: the same command goes on where the run was, to
the bit.
It runs where you start it; stopping it leaves the run alone. With several hosts gcloud wants your key in the agent:
ssh-add ~/.ssh/google_compute_engine

example
  launch/tpu_vm.sh resume --watch --name scir --zone us-east5-a --accelerator-type v6e-16 --spot \
      --mount 'mountpoint -q /shared || sudo mount -t nfs 10.0.0.2:/share /shared' \
      -- --config mistral-7b --model /shared/mistral --prompts /shared/prompts.jsonl --run /shared/runs/mistral-7b
  launch/tpu_vm.sh logs --name scir --zone us-east5-a        # likewise status, stop, delete
HELP
}

commands='create install start status logs stop resume delete'
arguments=("$@")
for ((i = 0; i < $#; i++)); do
    case ${arguments[i]} in
        --) break ;;
        --env-file) env_file=${arguments[i + 1]-} ;;
        --env-file=*) env_file=${arguments[i]#*=} ;;
        *) continue ;;
    esac
    [[ -f ${env_file:-} ]] || die "--env-file ${env_file:-}: no such file"
    [[ $env_file == */* ]] || env_file=./$env_file
    # shellcheck source=/dev/null
    source "$env_file" || die "--env-file $env_file: bash could not read it"
done
name=${TPU_NAME:-} zone=${TPU_ZONE:-} project=${TPU_PROJECT:-} accelerator_type=${TPU_TYPE:-}
runtime_version=${TPU_RUNTIME:-} spot=${TPU_SPOT:-} create_flag=() repository=${TPU_REPOSITORY:-}
revision=${TPU_REVISION:-HEAD} directory=${TPU_DIRECTORY:-scir_jax} mount=${TPU_MOUNT:-true} env=()
worker=0 internal_ip=${TPU_INTERNAL:-} watch='' retries=${TPU_RETRIES:-10} poll=${TPU_POLL:-30}
timeout=${TPU_TIMEOUT:-86400}
parse_options "name zone project accelerator-type runtime-version repository revision directory mount worker retries \
    poll timeout env-file" 'create-flag env' 'spot internal-ip watch dry-run' "$@"

((${#words[@]} > 0)) || die "no command; one of: $commands"
command=${words[0]}
# shellcheck disable=SC2086
[[ " $commands " == *" $command "* ]] || die "unknown command $command$(nearest '' "$command" $commands)"
((${#words[@]} == 1)) || die "${words[1]}: unexpected; options of the training come after --"
[[ -n $name ]] || die "$command needs --name NAME"
[[ -n $zone ]] || die "$command needs --zone ZONE"
if [[ $command == start || $command == resume ]]; then
    ((${#train[@]} > 0)) || die "$command needs the options of the training after --, such as -- --config FILE"
else
    ((${#train[@]} == 0)) || die "$command takes no options of the training"
fi
if [[ $command == create || $command == resume ]]; then
    [[ -n $accelerator_type ]] || die "$command needs --accelerator-type TYPE"
    [[ -n $runtime_version ]] || case $accelerator_type in
        v[234]-*) runtime_version=tpu-ubuntu2204-base ;;
        v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
        v5p-*) runtime_version=v2-alpha-tpuv5 ;;
        v6e-*) runtime_version=v2-alpha-tpuv6e ;;
        tpu7x-*) runtime_version=v2-alpha-tpu7-ubuntu2404 ;;
        v5e-*) die "--accelerator-type $accelerator_type: Google calls it v5litepod-${accelerator_type#v5e-}" ;;
        *) die "--accelerator-type $accelerator_type: unknown type, give --runtime-version too" ;;
    esac
fi
whole_number retries "$retries" 0
whole_number timeout "$timeout" 1
[[ $poll =~ ^[0-9]+([.][0-9]+)?$ ]] || die "--poll $poll: expected seconds"
require gcloud "install the Google Cloud CLI and run 'gcloud auth login'"

place=("--zone=$zone" ${project:+"--project=$project"})
here=$(quote "$directory")
archive=$root/build/$name.tar.gz

# --- the slice ---

request() {
    run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${place[@]}" \
        --accelerator-type="$accelerator_type" --runtime-version="$runtime_version" ${spot:+--spot} \
        ${create_flag[@]+"${create_flag[@]}"} --quiet
}

release() { # --force: an ACTIVE one too, with its workers
    run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

describe() {
    run gcloud compute tpus queued-resources describe "$name" "${place[@]}" '--format=value(state.state)'
}

# ABSENT, UNKNOWN when gcloud cannot tell, or Google's name of the state.
slice_state() {
    local answer
    describe 2> /dev/null && return
    answer=$(describe 2>&1) || true
    if [[ $answer == *NOT_FOUND* ]]; then
        echo ABSENT
    else
        printf '%s\n' "$answer" >&2
        echo UNKNOWN
    fi
}

create() {
    local state before=''
    if [[ -n $dry_run ]]; then
        request
        describe
        return
    fi
    while :; do
        state=$(slice_state)
        [[ $state == "$before" ]] || say "$name: $state"
        case $state in
            ACTIVE) return ;;
            ABSENT) request ;;
            UNKNOWN) [[ -n $before ]] || exit 1 ;;
            FAILED | SUSPENDED) fail "$name is $state: resume requests it anew" ;;
        esac
        before=$state
        ((SECONDS < timeout)) || break
        sleep "$poll"
    done
    fail "$name is still $state after $timeout s; it stays in the queue: create goes on waiting, delete gives it up"
}

# --- the workers ---

on_workers() { # WHICH SHELL-COMMAND
    run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" ${internal_ip:+--internal-ip} \
        --quiet --command="$2"
}

pack() {
    [[ -z $repository ]] || return 0
    require git "install it, or give --repository URL"
    if [[ -z $dry_run ]]; then
        local changes
        changes=$(git -C "$root" status --porcelain --untracked-files=no) ||
            die "$root is no git checkout: give --repository URL"
        [[ -z $changes ]] || die "$root has uncommitted changes, which would not be installed: commit or stash them"
    fi
    run mkdir -p "$root/build"
    run git -C "$root" archive --format=tar.gz --output="$archive" HEAD
}

install() {
    if [[ -n $repository ]]; then
        on_workers all "{ [ -d $here/.git ] || git clone -q $(quote "$repository") $here; } && cd $here &&
git fetch -q origin $(quote "$revision") && git checkout -q --detach FETCH_HEAD && bash launch/worker.sh install"
    else
        run gcloud compute tpus tpu-vm scp "$archive" "$name:scir_jax.tar.gz" "${place[@]}" --worker=all \
            ${internal_ip:+--internal-ip} --quiet || return
        on_workers all "mkdir -p $here && tar -xzf scir_jax.tar.gz -C $here && bash $here/launch/worker.sh install"
    fi
}

ask() {
    on_workers all "bash $here/launch/worker.sh status 2> /dev/null || echo worker \$(hostname): not installed"
}

# One line per worker; fails if one does not answer.
answers_of_workers() {
    ask | tr -d '\r' | grep '^worker '
}

launch() {
    on_workers all "bash $here/launch/worker.sh start $(quote "$mount" env ${env[@]+"${env[@]}"} \
        .venv/bin/python -m scir_jax.train "${train[@]}" --run.distributed true)"
}

start() {
    local answers
    if [[ -n $dry_run ]]; then
        ask
    else
        answers=$(answers_of_workers) || fail "the workers of $name do not answer; see status"
        [[ $answers != *'not installed'* ]] || fail "$name has workers without the program: run install first"
        [[ $answers != *': running'* ]] || fail "a run is on already on $name: stop it first, or follow it with logs"
    fi
    launch
}

# --- until the end ---

# Exits if the run needs no further start.
finish() { # ANSWERS
    local codes
    codes=" $(printf '%s\n' "$1" | sed -n 's/.* with //p' | tr '\n' ' ')"
    case $codes in
        *' 2 '*) exit 2 ;;
        *' 3 '*) exit 3 ;;
        *' 5 '*) exit 5 ;;
    esac
    if [[ $codes != *[1-9]* && $1 != *'not running'* ]]; then
        say "$name: the run is done; delete gives the slice back"
        exit 0
    fi
    [[ $1 != *': stopped with'* ]] || exit 143
}

resume() {
    local state before='' answers started='' failures=0 since=$SECONDS
    pack
    if [[ -n $dry_run ]]; then
        describe
        release
        request
        describe
        install
        start
        [[ -z $watch ]] || echo "# and again after each preemption or crash, looking every $poll s"
        return
    fi
    while ((failures <= retries)); do
        state=$(slice_state)
        answers=''
        if [[ $state == ACTIVE ]]; then
            since=$SECONDS
            answers=$(answers_of_workers) || answers='the workers do not answer'
        fi
        [[ $state$answers == "$before" ]] || say "$name: $state${answers:+$'\n'$answers}"
        case $state:$answers in
            UNKNOWN:) [[ -n $before ]] || exit 1 ;;
            ABSENT:) request || failures=$((failures + 1)) ;;
            FAILED: | SUSPENDED:)
                [[ $state == SUSPENDED ]] || failures=$((failures + 1))
                release && request || failures=$((failures + 1))
                ;;
            ACTIVE:*'do not answer') ;;
            ACTIVE:*': running'*)
                [[ -n $watch ]] || return 0
                started=1
                ;;
            ACTIVE:*'not installed'*) install && launch && started=1 || failures=$((failures + 1)) ;;
            ACTIVE:*)
                # How an earlier run ended is no reason not to start this one.
                if [[ -n $started ]]; then
                    finish "$answers"
                    failures=$((failures + 1))
                fi
                launch && started=1 || failures=$((failures + 1))
                ;;
        esac
        before=$state$answers
        ((SECONDS - since < timeout)) || fail "$name has not been ACTIVE for $timeout s; it stays in the queue"
        sleep "$poll"
    done
    fail "$name: given up after $failures failures; see logs"
}

case $command in
    install) pack && install ;;
    status) describe && ask ;;
    logs) on_workers "$worker" "tail -n 100 -F $here/launch.log" ;;
    stop) on_workers all "bash $here/launch/worker.sh stop $timeout" ;;
    delete) release ;;
    *) "$command" ;;
esac
