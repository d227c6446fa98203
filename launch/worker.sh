#!/usr/bin/env bash
# What tpu_vm.sh runs on every worker, in the copy that is installed there:
# worker.sh install | status | start MOUNT PROGRAM... | stop SECONDS
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() {
    printf 'worker %s: %s\n' "$(hostname)" "$*"
}

suitable() {
    "$1" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2> /dev/null
}

# Google's images up to v6e have Python 3.10, and Ubuntu's may lack ensurepip: then uv brings a Python of its own.
environment() {
    local python
    for python in python3.13 python3.12 python3.11 python3; do
        if suitable "$python"; then
            "$python" -m venv .venv
            return
        fi
    done
    python3 -m pip --version > /dev/null 2>&1 || { sudo apt-get -q update && sudo apt-get -qy install python3-pip; }
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user uv
    python3 -m uv venv -q --seed --python 3.12 .venv
}

install() {
    rm -f launch.installed
    .venv/bin/python -m pip --version > /dev/null 2>&1 || { rm -rf .venv && environment; }
    .venv/bin/python -m pip install -q -e '.[tpu,gcs]'
    touch launch.installed
    say installed
}

# The run holds a lock: unlike a process id, it cannot outlive a reboot.
running() {
    [[ ! -e launch.exit ]] && ! flock -n launch.lock true
}

status() {
    if [[ ! -e launch.installed ]]; then
        say not installed
    elif running; then
        say running
    elif [[ ! -e launch.exit ]]; then
        say not running
    elif [[ -e launch.stop ]]; then
        say "stopped with $(cat launch.exit)"
    else
        say "exited with $(cat launch.exit)"
    fi
}

start() { # MOUNT PROGRAM...
    bash -c "$1" || { say "the mount command failed" >&2 && exit 1; }
    shift
    exec 9> launch.lock
    flock -n 9 || { say "a run is on already" >&2 && exit 1; }
    rm -f launch.exit launch.stop launch.pid
    # shellcheck disable=SC2016
    setsid nohup sh -c '"$@" & echo $! > launch.pid; wait $!; echo $? > launch.exit' launch "$@" \
        >> launch.log 2>&1 < /dev/null &
    say started
}

stop() { # SECONDS
    if ! running; then
        status
        return
    fi
    touch launch.stop
    kill -TERM "$(cat launch.pid)"
    flock -w "$1" launch.lock true || { say "still saving after $1 s" >&2 && exit 1; }
    status
}

"$@"
