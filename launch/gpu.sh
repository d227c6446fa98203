#!/usr/bin/env bash
# A run on the GPUs of one machine: one process drives them all, and is started again when it crashes.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat << 'HELP'
usage: launch/gpu.sh [options] -- train options

options
  --gpus LIST             which GPUs, such as 0,1; default: all that CUDA shows
  --venv DIR              the virtual environment, made if it is not there; default: .venv of this checkout
  --extra NAME            what is installed into a new one, cuda12 or cuda13; default: by the driver that nvidia-smi
                          reports, cuda13 from 580 on, cuda12 from 525 on
  --memory-fraction X     of each GPU's memory for arrays; default: XLA_PYTHON_CLIENT_MEM_FRACTION or 0.92
  --deterministic         deterministic kernels: a resumed run is then equal to the bit; some are slower
  --env NAME=VALUE        set for the run, such as HF_TOKEN=...; repeatable
  --retries N             starts after a crash; default: 3
  --wait SECONDS          before each of them; default: 10
  --dry-run               print the commands, run none of them
  --help

The run is in the foreground: Ctrl-C or SIGTERM lets it save and exit, and the same command goes on. The exit code is
the run's: 0 done, 2 bad input, 3 disk full, 130 or 143 stopped; after any other it is started again.

examples
  launch/gpu.sh -- --model models/NAME --prompts prompts.jsonl --run mine
  launch/gpu.sh --gpus 0,1 --deterministic --retries 10 -- --model models/NAME --prompts prompts.jsonl --run mine
HELP
}

gpus='' venv=$root/.venv extra='' memory_fraction=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92} deterministic='' env=()
retries=3 wait=10
parse_options 'gpus venv extra memory-fraction retries wait' env 'deterministic dry-run' "$@"

((${#words[@]} == 0)) || die "${words[0]}: unexpected; options of the training come after --"
((${#train[@]} > 0)) || die "the options of the training are missing; they come after --, such as -- --config FILE"
[[ -z $gpus || $gpus =~ ^[0-9]+(,[0-9]+)*$ ]] || die "--gpus $gpus: expected numbers with commas, such as 0,1"
[[ -z $extra || $extra == cuda12 || $extra == cuda13 ]] || die "--extra $extra: expected cuda12 or cuda13"
[[ $memory_fraction =~ ^(0?\.[0-9]+|1(\.0*)?)$ ]] ||
    die "--memory-fraction $memory_fraction: expected a share such as 0.92"
[[ $wait =~ ^[0-9]+([.][0-9]+)?$ ]] || die "--wait $wait: expected seconds"
whole_number retries "$retries" 0

if [[ ! -x $venv/bin/python ]]; then
    require python3 "install Python 3.11 or newer"
    if [[ -z $extra ]]; then
        query=(nvidia-smi --query-gpu=driver_version "--format=csv,noheader")
        if [[ -n $dry_run ]]; then
            echo "$(quote "${query[@]}")  # from 580 on cuda13, else cuda12"
            extra=cuda13
        else
            require nvidia-smi "install NVIDIA's driver, or give --extra cuda12 or cuda13"
            driver=$("${query[@]}") || die "nvidia-smi finds no GPU: repair the driver, or give --extra"
            driver=${driver%%.*}
            [[ $driver =~ ^[0-9]+$ ]] || die "nvidia-smi reports no driver version: give --extra cuda12 or cuda13"
            ((driver >= 525)) || die "NVIDIA's driver $driver is too old: CUDA 12 needs 525, CUDA 13 needs 580"
            extra=cuda12
            ((driver < 580)) || extra=cuda13
            say "driver $driver: $extra"
        fi
    fi
    run python3 -m venv "$venv"
    run "$venv/bin/python" -m pip install -q -e "${root}[$extra]"
fi

flags=${XLA_FLAGS:-}
[[ -z $deterministic ]] || flags="${flags:+$flags }--xla_gpu_deterministic_ops=true"
program=(env "XLA_PYTHON_CLIENT_MEM_FRACTION=$memory_fraction" ${gpus:+"CUDA_VISIBLE_DEVICES=$gpus"}
    ${flags:+"XLA_FLAGS=$flags"} ${env[@]+"${env[@]}"} "$venv/bin/python" -m scir_jax.train "${train[@]}")
if [[ -n $dry_run ]]; then
    run "${program[@]}"
    exit
fi

child='' stopped=''
trap 'stopped=143; [[ -z $child ]] || kill -TERM "$child" 2> /dev/null || true' TERM
# The terminal sends Ctrl-C to the run itself; a second one from here would stop it without saving.
trap 'stopped=130' INT
for ((attempt = 0; ; attempt++)); do
    # In the background, so that SIGTERM is passed on at once; bash has such a process ignore Ctrl-C unless told not to.
    (trap - INT TERM && exec "${program[@]}") &
    child=$!
    while kill -0 "$child" 2> /dev/null; do wait "$child" || true; done
    code=0
    wait "$child" || code=$?
    child=''
    case $code in 0 | 2 | 3 | 5 | 130 | 143) exit "$code" ;; esac
    [[ -z $stopped ]] || exit "$code"
    if ((attempt == retries)); then
        ((retries == 0)) || say "the run crashed $((retries + 1)) times, at last with exit code $code" >&2
        exit "$code"
    fi
    say "the run crashed with exit code $code; start $((attempt + 1)) of $retries more in $wait s" >&2
    sleep "$wait"
    [[ -z $stopped ]] || exit "$stopped"
done
