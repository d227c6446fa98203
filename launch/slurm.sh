#!/usr/bin/env bash
# A run on GPU nodes under Slurm: makes the batch script and submits it.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat << 'HELP'
usage: launch/slurm.sh --nodes N --gpus-per-node N [options] -- train options

options
  --nodes N               (required)
  --gpus-per-node N       (required)
  --process-per-gpu       a process for every GPU; default: one per node, which drives all its GPUs
  --time TIME             limit, such as 24:00:00; default: the partition's
  --partition NAME, --account NAME, --cpus-per-task N
  --name NAME             of the job; default: scir_jax
  --sbatch=FLAG           any other flag of sbatch, --sbatch=--exclusive; repeatable
  --requeue               put the job into the queue again when it is preempted, nears its time limit or crashes
  --grace SECONDS         with --requeue: before the limit, time to save; default: 120
  --retries N             with --requeue: no more after a crash once the job was requeued so often; default: 20
  --setup COMMAND         run by the job before the steps, such as 'module load cuda'
  --venv DIR              virtual environment on a shared file system; default: .venv of this checkout
  --deterministic         deterministic kernels: a resumed run is then equal to the bit; some are slower
  --env NAME=VALUE        set for the run, such as HF_TOKEN=...; repeatable
  --logs DIR              NAME-JOB.log, and NAME-JOB-TASK.log of every process; default: logs
  --dry-run               print the submission with its batch script, submit nothing
  --help

The job runs in the directory you submit from; that, the virtual environment, run.directory and the data must be on a
file system that all nodes share. Make the environment first:
  python3 -m venv .venv && .venv/bin/pip install -e '.[cuda12]'

The run ends with 0, or with 2 (bad input), 3 (disk full) or 5 (it diverged), which need you. Whatever else ends it, the
same command goes on where it was; --requeue sees to that. To stop it: scancel JOB; or, where saving takes longer than
your Slurm's KillWait (30 s by default), scancel --signal=TERM JOB, which leaves it all the time it needs.

examples
  launch/slurm.sh --nodes 4 --gpus-per-node 8 --time 24:00:00 --partition gpu --account lab --requeue \
      -- --config mistral-7b --model /shared/mistral --prompts /shared/prompts.jsonl \
      --run /shared/runs/mistral-7b
  launch/slurm.sh --nodes 1 --gpus-per-node 4 --sbatch=--mem=0 --dry-run -- --config mistral-7b
HELP
}

nodes='' gpus_per_node='' process_per_gpu='' time='' partition='' account='' cpus_per_task='' name=scir_jax sbatch=()
requeue='' grace=120 retries=20 setup='' venv=$root/.venv deterministic='' env=() logs=logs
parse_options 'nodes gpus-per-node time partition account cpus-per-task name grace retries setup venv logs' \
    'sbatch env' 'process-per-gpu requeue deterministic dry-run' "$@"

((${#words[@]} == 0)) || die "${words[0]}: unexpected; options of the training come after --"
[[ -n $nodes ]] || die "--nodes N is missing"
[[ -n $gpus_per_node ]] || die "--gpus-per-node N is missing"
((${#train[@]} > 0)) || die "the options of the training are missing; they come after --, such as -- --config FILE"
whole_number nodes "$nodes" 1
whole_number gpus-per-node "$gpus_per_node" 1
[[ -z $cpus_per_task ]] || whole_number cpus-per-task "$cpus_per_task" 1
whole_number grace "$grace" 1
whole_number retries "$retries" 0
[[ $name =~ ^[A-Za-z0-9_.-]+$ ]] || die "--name $name: expected letters, digits, '.', '_' and '-'"
require sbatch "run this on a login node of a Slurm cluster"
[[ -n $dry_run || -x $venv/bin/python ]] ||
    die "$venv has no bin/python: make it with python3 -m venv and pip install -e '.[cuda12]', or give --venv"

tasks=1
[[ -z $process_per_gpu ]] || tasks=$gpus_per_node
step=(srun --nodes="$nodes" --ntasks-per-node="$tasks" ${cpus_per_task:+"--cpus-per-task=$cpus_per_task"}
    --kill-on-bad-exit=1 --wait=0 --output="$logs/$name-%j-%t.log" --open-mode=append
    "$venv/bin/python" -m scir_jax.train "${train[@]}" --run.distributed true)

header() {
    printf '#SBATCH %s\n' --job-name="$name" --nodes="$nodes" --ntasks-per-node="$tasks" \
        --gpus-per-node="$gpus_per_node" ${cpus_per_task:+"--cpus-per-task=$cpus_per_task"} \
        ${time:+"--time=$time"} ${partition:+"--partition=$partition"} ${account:+"--account=$account"} \
        ${sbatch[@]+"${sbatch[@]}"} --output="$(quote "$logs/$name-%j.log")" --open-mode=append
    if [[ -n $requeue ]]; then
        # SIGUSR1, because SIGTERM is also what scancel sends, and a cancelled job must not come back.
        printf '#SBATCH %s\n' --requeue --signal="B:USR1@$grace"
    else
        printf '#SBATCH %s\n' --no-requeue
    fi
}

exports() {
    cat << 'SCRIPT'
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
SCRIPT
    # JAX gives a Slurm task one GPU unless it is told of them all.
    [[ -n $process_per_gpu ]] || echo "export JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 $((gpus_per_node - 1)))"
    [[ -z $deterministic ]] || cat << 'SCRIPT'
export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_gpu_deterministic_ops=true"
SCRIPT
    ((${#env[@]} == 0)) || echo "export $(quote "${env[@]}")"
}

batch() {
    echo '#!/usr/bin/env bash'
    header
    cat << 'SCRIPT'
set -uo pipefail
step=
ending=
# srun passes SIGTERM on, and the run saves and exits. When Slurm sends it, the run has got it already.
trap 'ending=1; [ -z "$step" ] || kill -TERM "$step" 2> /dev/null' USR1
trap : TERM
SCRIPT
    [[ -z $setup ]] || echo "$setup"
    exports
    echo "$(quote "${step[@]}") &"
    cat << 'SCRIPT'
step=$!
while kill -0 "$step" 2> /dev/null; do wait "$step"; done
wait "$step"
code=$?
echo "the run ended with $code"
SCRIPT
    [[ -z $requeue ]] || cat << SCRIPT
case \$code in
    0 | 2 | 3 | 5) ;;
    *)
        if [[ -n \$ending ]]; then
            exec scontrol requeue "\$SLURM_JOB_ID"
        elif [[ \$code == 130 || \$code == 143 ]]; then
            # Stopped from outside: a preempted job must last until Slurm requeues it, a cancelled one is killed.
            sleep "\${SCIR_LINGER:-300}"
        elif ((\${SLURM_RESTART_COUNT:-0} < $retries)); then
            exec scontrol requeue "\$SLURM_JOB_ID"
        fi
        ;;
esac
SCRIPT
    cat << 'SCRIPT'
exit "$code"
SCRIPT
}

script=$(batch)
run mkdir -p "$logs"
if [[ -n $dry_run ]]; then
    printf "sbatch --parsable << 'END'\n%s\nEND\n" "$script"
    exit
fi
job=$(sbatch --parsable <<< "$script")
job=${job%%;*}
echo "job $job; follow it with: tail -F $(quote "$logs/$name-$job-0.log"); stop it with: scancel $job"
