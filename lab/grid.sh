#!/usr/bin/env bash
# Makes the runs behind lab/results, two side by side on two cores: every task, method and seed;
# both learning rates; and the upper bound, fine-tuned in each target language. Started again
# after a stop it goes on with the runs that are missing. SEEDS, OTHERS (seeds of further source
# languages and of a frozen decoder) and JOBS may be set.
#     bash lab/grid.sh            # in the toy world: 135 runs of 45 s
#     python lab/claims.py runs/grid/*/ --out lab/results/grid.json --plot lab/results/runs.png
#     bash lab/grid.sh FOLDER     # on captions, as lab/captions.py wrote them: 121 runs of 25 s
#     python lab/claims.py runs/captions/*/ --out lab/results/captions.json \
#         --plot lab/results/captions.png --pair "--reg 0" "--reg 1" \
#         "--reg 0 --freeze decoder head" "--reg 1 --freeze decoder head"
# In the toy world it makes lab/results/TASK.json last, which train.py prints beside a run.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

run() {  # NAME ARGUMENTS…
    local folder=runs/$1
    shift
    [ -e "$folder/done" ] && return
    rm -rf "$folder"
    {
        python train.py --out "$folder" "$@" && case $folder in *upper* | *usual*)
            python select.py "$folder" --by dev && python eval.py "$folder";;
        esac
    } > "$folder.log" 2>&1 && rm "$folder"/*.pt && touch "$folder/done"
}
export -f run

toy() {
    tasks="title summary completion"
    for task in $tasks; do
        echo "usual/$task --task $task"
        echo "usual/$task-low --task $task --lr 1e-4"
    done
    for seed in ${SEEDS:-10 11 12 13 14}; do
        for task in $tasks; do
            for reg in 0 0.1; do
                given="--task $task --seed $seed --reg $reg"
                echo "grid/$task-$reg-$seed $given"
                echo "grid/$task-$reg-1e-4-$seed $given --lr 1e-4"
            done
        done
    done
    for seed in ${OTHERS-10 11 12}; do
        for task in $tasks; do
            for reg in 0 0.1; do
                given="--task $task --seed $seed --reg $reg"
                echo "grid/$task-$reg-de-$seed $given --train en de"
                echo "grid/$task-$reg-de-es-$seed $given --train en de es"
                echo "grid/$task-$reg-frozen-$seed $given --freeze decoder head"
            done
        done
    done
    for task in $tasks; do
        for lang in de es fr ru tr; do
            echo "grid/$task-upper-$lang --task $task --train $lang --test $lang"
        done
    done
}

captions() {  # FOLDER
    local folder=$1 tasks="completion keywords summary"
    files() { for lang in $2; do echo -n " $lang=$folder/$1.$lang${3-}"; done; }  # NAME LANGUAGES
    train() { echo "--train$(files $task.train "$1" .jsonl)"; }
    rest="--init $folder/base.pt --max-source 96 --max-target 32 --eval-size 60 --test-size 100"
    rest+=" --parallel$(files parallel "en de fr cs")"
    for seed in ${SEEDS:-10 11 12 13 14}; do
        for task in $tasks; do
            given="--seed $seed $rest --dev$(files $task.dev en .jsonl)"
            given+=" --test$(files $task.test "$(languages $task)" .jsonl)"
            for reg in 0 1; do
                name="captions/$task-$reg" with="--reg $reg $given"
                few="--steps 40 --eval-every 5"
                echo "$name-$seed $with $(train en) $few"
                echo "$name-low-$seed $with $(train en) --lr 1e-4 --steps 80 --eval-every 20"
                echo "$name-frozen-$seed $with $(train en) --freeze decoder head --steps 90" \
                    "--eval-every 15"
                [[ $task = summary || ${OTHERS-10 11 12} != *$seed* ]] && continue
                echo "$name-de-$seed $with $(train "en de") $few"
                echo "$name-fr-$seed $with $(train "en de fr") $few"
            done
        done
    done
    for task in $tasks; do
        for lang in $(languages $task); do
            [ $lang = en ] || echo "captions/$task-upper-$lang $rest $(train $lang) --lr 1e-3" \
                "--dev$(files $task.dev $lang .jsonl) --test$(files $task.test $lang .jsonl)" \
                "--steps 150 --eval-every 30"
        done
    done
}

languages() {  # TASK
    if [ $1 = summary ]; then echo en de; else echo en de fr cs; fi
}

if [ $# = 0 ]; then
    mkdir -p runs/grid runs/usual
    toy
else
    mkdir -p runs/captions
    captions "$1"
fi | xargs -P "${JOBS:-2}" -I LINE bash -c 'run LINE'
[ $# = 0 ] || exit 0

python - <<'END'
import json
from pathlib import Path

import eval as scoring


def read(folder):
    """Return {"scores": …, "xlrs": …, "outputs": …} of a run, the outputs that a report shows."""
    outputs = {}
    for line in (folder / "outputs.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        outputs.setdefault(row["language"], []).append(row["output"])
    shown = {lang: texts[:20] for lang, texts in outputs.items()}
    return {**scoring.read_json(folder / "scores.json"), "outputs": shown}


for task in ("title", "summary", "completion"):
    upper = {"scores": {}, "outputs": {}, "xlrs": {}}
    for path in sorted(Path("runs/grid").glob(f"{task}-upper-*/")):
        found = read(path)
        upper["scores"] |= found["scores"]
        upper["outputs"] |= found["outputs"]
    content = {"usual way": read(Path("runs/usual") / task),
               "usual, --lr 1e-4": read(Path(f"runs/usual/{task}-low")), "upper bound": upper}
    Path(f"lab/results/{task}.json").write_text(
        json.dumps(content, indent=1, ensure_ascii=False) + "\n")
END
