#!/usr/bin/env bash
# Makes the runs behind lab/results: every task, method and seed, then three more learning rates
# with and without the regulariser. 129 runs of about 87 s on each of two cores, 95 minutes in all,
# two side by side; started again after a stop it goes on with the runs that are missing.
#     bash lab/grid.sh
#     python lab/claims.py runs/grid/*/ --out lab/results/grid.json --plot lab/results/runs.png
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

run() {  # NAME ARGUMENTS…
    local folder=runs/grid/$1
    shift
    [ -e "$folder/scores.json" ] && return
    rm -rf "$folder"
    python train.py "$@" --eval-every 10 --eval-size 200 --out "$folder" \
        > "$folder.log" 2>&1 && rm "$folder"/*.pt
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
