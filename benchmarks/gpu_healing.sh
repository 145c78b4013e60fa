#!/bin/sh
# What healing repairs, on one GPU: rows of docs/results.md, those named beside each other.
#
#     benchmarks/gpu_healing.sh TEXTS TASKS DIRECTORY ROW…
#
# TEXTS and TASKS are directories with the texts and the benchmark items. A row is 46, 40 or 30 (the
# plans of docs/results.md, 2 million tokens), 46-local (rank-local, for three ranks), or a row with
# the run of healing.py behind it: 46:all:2e-5. DIRECTORY gets one JSON file per row, and the
# checkpoints; a call that was cut off resumes there. TOKENS, MODEL and PYTHON name other ones;
# OPTIONS are more options of healing.py.
set -eu
: "${4:?TEXTS TASKS DIRECTORY ROW…}"
root=$(cd "$(dirname "$0")/.." && pwd)
texts=$1 tasks=$2 to=$3
shift 3
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
trap 'trap - TERM; kill 0' INT TERM

row() {
    case $1 in
    46) plan=$root/src/truedepth/demo_plan.yaml ;;
    46-local) plan=$root/docs/results/plan_local_46.yaml ;;
    *) plan=$root/docs/results/plan_stages_$1.yaml ;;
    esac
    # each text by its size, short ones twice, so that none is read more than three times
    # shellcheck disable=SC2086
    exec "${PYTHON:-$root/.venv/bin/python}" "$root/benchmarks/healing.py" \
        --model "${MODEL:-default}" --plan "$plan" --runs "$2" --tokens "${TOKENS:-2000000}" \
        --calibration "$texts/c4-calibration.jsonl" --calibration "$texts/mixed-technical.txt" \
        --calibration "$texts/mixed-code.txt" \
        --calibration "$texts/gutenberg-melville-moby_dick.txt" \
        --train-text "$texts/c4-finetune.jsonl=2.2" --train-text "$texts/c4-calibration.jsonl=2.2" \
        --train-text "$texts/gutenberg-melville-moby_dick.txt=1.2" \
        --train-text "$texts/gutenberg-chesterton-brown.txt=0.4" \
        --train-text "$texts/gutenberg-carroll-alice.txt=0.15" \
        --train-text "$texts/mixed-technical.txt=0.4" --train-text "$texts/mixed-code.txt=0.5" \
        --text "$texts/wikitext2-valid.txt" --text "$texts/mixed-wiki.txt" \
        --answers 128 --probes 50 --task-dir "$tasks" --limit 500 \
        --directory "$to/$3" --json "$to/$3.json" --plot "$to/$3.png" ${OPTIONS:-}
}

running=
for each; do
    run=kl
    case $each in *:*) run=${each#*:} ;; esac
    name=$(printf %s "$each" | tr : -)
    mkdir -p "$to/$name"
    row "${each%%:*}" "$run" "$name" >"$to/$name.log" 2>&1 &
    running="$running $!"
done
failed=0
for each in $running; do
    wait "$each" || failed=1
done
exit $failed
