#!/bin/sh
# What healing repairs, on one GPU: rows of docs/results.md, those named beside each other.
#
#     benchmarks/gpu_healing.sh TEXTS TASKS DIRECTORY ROW…
#
# TEXTS and TASKS are directories with the texts and the benchmark items. A row is 46, 40 or 30 (the
# plans of docs/results.md, 2 million tokens), 46-local or 40-local (rank-local, for three ranks), or
# one of these with the run of healing.py behind it, as 46:all:2e-5, which is measured on the texts
# alone. DIRECTORY gets one JSON file and one plot per row, and the checkpoints; a call that was cut
# off resumes there. TOKENS, MODEL and PYTHON name other ones; OPTIONS are more options of healing.py.
set -eu
: "${4:?TEXTS TASKS DIRECTORY ROW…}"
root=$(cd "$(dirname "$0")/.." && pwd)
texts=$1 tasks=$2 to=$3
shift 3
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
trap 'trap - TERM; kill 0' INT TERM

row() {
    plan=$1 run=kl name=$(printf %s "$1" | tr : -)
    set -- --answers 128 --probes 50 --limit 500 --task-dir "$tasks"
    case $plan in
    *:*)
        run=${plan#*:} plan=${plan%%:*}
        set --
        ;;
    esac
    case $plan in
    46) plan=$root/src/truedepth/demo_plan.yaml ;;
    *-local) plan=$root/docs/results/plan_local_${plan%-local}.yaml ;;
    *) plan=$root/docs/results/plan_stages_$plan.yaml ;;
    esac
    mkdir -p "$to/$name"
    # each text by its size, short ones twice, so that none is read more than three times
    # shellcheck disable=SC2086
    exec "${PYTHON:-$root/.venv/bin/python}" "$root/benchmarks/healing.py" \
        --model "${MODEL:-default}" --plan "$plan" --runs "$run" --tokens "${TOKENS:-2000000}" \
        --calibration "$texts/c4-calibration.jsonl" --calibration "$texts/mixed-technical.txt" \
        --calibration "$texts/mixed-code.txt" \
        --calibration "$texts/gutenberg-melville-moby_dick.txt" \
        --train-text "$texts/c4-finetune.jsonl=2.2" --train-text "$texts/c4-calibration.jsonl=2.2" \
        --train-text "$texts/gutenberg-melville-moby_dick.txt=1.2" \
        --train-text "$texts/gutenberg-chesterton-brown.txt=0.4" \
        --train-text "$texts/gutenberg-carroll-alice.txt=0.15" \
        --train-text "$texts/mixed-technical.txt=0.4" --train-text "$texts/mixed-code.txt=0.5" \
        --text "$texts/wikitext2-valid.txt" --text "$texts/mixed-wiki.txt" \
        --directory "$to/$name" --json "$to/$name.json" --plot "$to/$name.png" ${OPTIONS:-} "$@" \
        >"$to/$name.log" 2>&1
}

running=
for each; do
    row "$each" &
    running="$running $!"
done
failed=0
for each in $running; do
    wait "$each" || failed=1
done
exit $failed
