#!/bin/sh
# What plans gain on one GPU, in one call of less than ten minutes:
#
#     benchmarks/gpu.sh [DIRECTORY]
#
# Decoding with CUDA graphs, prefill, and simulated ranks of the four shapes of one_device.py. Raw
# results go to DIRECTORY, docs/results/gpu by default; a call that was cut off resumes there. TINY=1
# runs all of it with a tiny shape in a minute, also on a CPU; PYTHON names the interpreter.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
to=${1:-$root/docs/results/gpu}
mkdir -p "$to"
if [ "${TINY:-0}" = 1 ]; then
    set -- --shapes tiny --length 8 --prompt 16 --steps 4 --repetitions 2 --ranks 2
else
    set -- --length 128 --prompt 1024 --steps 16 --repetitions 5 --ranks 4
fi
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" "$root/benchmarks/one_device.py" --json "$to/one_device.json" "$@"
