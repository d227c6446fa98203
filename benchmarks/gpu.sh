#!/usr/bin/env bash
# Everything worth knowing on one GPU, in parts that each end within minutes and can be run alone and again:
#
#     pip install -e '.[cuda12,bench]' && benchmarks/gpu.sh results            # all parts
#     benchmarks/gpu.sh results step sample                                    # some of them
#
# Sizes are those of benchmarks/step.py; SIZES, SAMPLED, STEPS and LONGEST change what is measured. What a part prints is
# kept in results/PART.txt; a part whose file is there is skipped.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,8p' "$0"; exit 2; }
out=$1; shift
parts=${*:-versions parity repeat step score sample iteration}
sizes=${SIZES:-60m 1b}; sampled=${SAMPLED:-1b}; steps=${STEPS:-6}; longest=${LONGEST:-2048}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
# XLA takes flags that begin with a blank for the name of a file.
flags=${GPU_FLAGS---xla_gpu_deterministic_ops=true}
[ -z "$flags" ] || export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }$flags"

versions() {
    python -c "
import jax, sys
print('python', sys.version.split()[0], 'jax', jax.__version__)
for device in jax.devices():
    print(device.device_kind, (device.memory_stats() or {}).get('bytes_limit'))"
}

parity() { # attention of this backend, and whole models against transformers
    (cd "$here/.." && python -m pytest -q -n 0 -m "slow or not slow" tests/model/test_attention.py && python -m tests.parity)
}

repeat() { # the same small run twice: equal to the bit
    for number in 1 2; do
        rm -rf "$out/repeat$number"
        python -m scir_jax.train --run.directory "$out/repeat$number" --world.directory "$out/world" \
            --run.iterations 1 --sft.epochs 0.2 --sample.prompts 128 --run.tensorboard false
    done
    cmp "$out/repeat1/export/model.safetensors" "$out/repeat2/export/model.safetensors" && echo "equal to the bit"
}

step() { # pairs and tokens per second, MFU, the table of memory against the allocator's peak
    for size in $sizes; do
        echo "== $size"
        python "$here/step.py" --size "$size" --steps "$steps" --longest "$longest" --repeat 1 --dtype bfloat16 \
            --only "scir_jax dpo" "scir_jax scir" "scir_jax scir continued"
    done
}

score() {
    for size in $sampled; do
        echo "== $size"
        python "$here/score.py" --size "$size" --longest "$longest" --only alone --dtype bfloat16
    done
}

sample() {
    for size in $sampled; do
        echo "== $size"
        python "$here/sample.py" --size "$size" --batch 32 --prompts 256 --only scir_jax --dtype bfloat16
    done
}

iteration() {
    python "$here/iteration.py"
}

for part in $parts; do
    declare -F "$part" > /dev/null || { echo "no part is called $part"; exit 2; }
    [ -s "$out/$part.txt" ] && { echo "$part: done before, see $out/$part.txt"; continue; }
    echo "$part ..."
    if "$part" > "$out/$part.partial" 2>&1; then
        mv "$out/$part.partial" "$out/$part.txt"
        tail -n 25 "$out/$part.txt"
    else
        tail -n 25 "$out/$part.partial"
        echo "$part: failed, see $out/$part.partial"
        exit 1
    fi
done
