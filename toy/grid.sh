#!/usr/bin/env bash
# The grid behind the README's results: every task, method and seed, then three more learning
# rates with and without the regulariser.
# Two runs side by side; start it again after a stop and it goes on with the runs that are missing.
#     bash toy/grid.sh && python eval.py --compare runs/grid/*/ --out toy/results/grid.json
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

run() {  # NAME ARGUMENTS…
    local folder=runs/grid/$1
    shift
    [ -e "$folder/scores.json" ] && return
    rm -rf "$folder"
    python train.py "$@" --eval-every 10 --eval-size 200 --keep 1 --out "$folder" \
        > "$folder.log" 2>&1 && rm "$folder"/step_*.pt
}
export -f run

mkdir -p runs/grid
tasks="title summary completion"
{
    for seed in ${SEEDS:-10 11 12 13 14}; do
        for task in $tasks; do
            echo "$task-plain-$seed --task $task --seed $seed"
            echo "$task-reg-$seed --task $task --seed $seed --reg 0.1"
        done
    done
    for seed in ${OTHERS-10 11 12 13 14}; do
        for task in $tasks; do
            echo "$task-aux-$seed --task $task --seed $seed --train en de"
            echo "$task-both-$seed --task $task --seed $seed --train en de --reg 0.1"
            echo "$task-frozen-$seed --task $task --seed $seed --freeze decoder head"
            echo "$task-mix-$seed --task $task --seed $seed --mix de es fr ru tr"
        done
    done
    for seed in ${RATE_SEEDS-10 11 12}; do
        for lr in 1e-3 3e-4 1e-4; do
            for task in $tasks; do
                echo "$task-plain-$lr-$seed --task $task --seed $seed --lr $lr"
                echo "$task-reg-$lr-$seed --task $task --seed $seed --lr $lr --reg 0.1"
            done
        done
    done
} | xargs -P 2 -I LINE bash -c 'run LINE'
