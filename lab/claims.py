"""Prints what runs say of the paper's four claims, on each task; draws them with --plot.

    python lab/claims.py lab/results/grid.json --plot lab/results/runs.png

prints the tables of lab/results/README.md and draws its figure, in five seconds; captions.json
beside it has the runs on real text. It takes run folders as well, and --out FILE writes what is
needed of them, as those files have it.

Numbers are means over seeds ± 95 % interval (Student's t); a run's score is the mean over the
languages that it was not trained on; under "mean" the tasks are averaged seed by seed. The few runs
whose source is another language are the upper bound, fine-tuned in a target language itself.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the project's folder

import numpy as np

import data
import eval as scoring
from model import whole
from xlrs import FLOOR, choose

USUAL = 5e-4  # train.py's learning rate: the name of a method leaves it out
SCORES = {"ROUGE-L": "rougeL", "wrong %": "wrong_language", "source %": "source_language",
          "mixed %": "mixed", "loops %": "loops"}  # column -> its key in a run's scores
COLUMNS = {**dict.fromkeys(SCORES, 1), "source ROUGE-L": 1, "XLRS": 2}  # column -> decimals
RULES = ("last step", "dev loss", "XLRS", "oracle")  # for a checkpoint; XLRS counts to the floor;
# oracle: the best on the test set, which nobody can choose
ALIKE = (*RULES[:3], "equal loss")  # where two runs are compared; the last see pairs()


def print_claims(runs, pair, tasks):
    """Print the table of the four claims: a verdict and a number for each task.

    pair: the two methods that are compared, without and with a remedy.
    """
    both = pairs(runs, *pair)
    plain, changes = [a for a, _ in both], differences(both)
    rows = []

    def row(claim, runs, key, sign, digits):
        rows.append([claim, *(verdict(per_seed(runs, task, key), sign, digits) for task in tasks)])

    row("1 XLRS at the end minus the base's", plain, "rise", 1, 3)
    row("1 … minus the lowest on the way", plain, "climb", 1, 3)
    row("2 rank correlation of XLRS and ROUGE-L", plain, "rho", -1, 2)
    for rule in ALIKE:
        rows.append([f"3 accidental translation removed, {rule}",
                     *(share_removed(both, task, (rule, "source %")) for task in tasks)])
        row(f"3 ROUGE-L, difference, {rule}", changes, (rule, "ROUGE-L"), 1, 1)
        row(f"3 wrong %, difference, {rule}", changes, (rule, "wrong %"), -1, 1)
    row("4 ROUGE-L chosen by XLRS minus by dev loss", plain, "choice", 1, 1)
    print(f"The paper's claims (1, 2, 4: {pair[0]}; 3: {pair[1]} against it), "
          f"{len({run['seed'] for run in plain})} seeds.\n"
          "holds: the interval is on the paper's side of zero, fails: on the other, open: neither.")
    scoring.table(rows, ["", *tasks])


def pairs(runs, *methods):
    """Return [(run, run), …] of two methods, alike in task and seed, with "equal loss" in facts.

    It is the first checkpoint of each with a source development loss that both reach. Both are
    judged on the languages that neither was trained on.
    """
    found = []
    for both in itertools.product(*([run for run in runs if run["method"] == name]
                                    for name in methods)):
        if len({(run["task"], run["seed"]) for run in both}) == 1:
            shared = set.intersection(*(set(run["base"]["test"]) for run in both))
            both = [judged(run, shared) for run in both]
            level = max(run["facts"]["lowest loss"] for run in both)
            found.append([run | {"facts": run["facts"] | at(
                "equal loss", next(row for row in run["scores"][1:] if row["dev_loss"] <= level))}
                for run in both])
    return found


def differences(both):
    """Return the second run of each pair, with what its facts are more than the first's."""
    return [b | {"facts": {key: number - a["facts"][key] for key, number in b["facts"].items()}}
            for a, b in both]


def verdict(values, sign, digits, unit=""):
    """Return whether the interval of values is on the side of zero that sign names, and itself."""
    middle, half = mean_and_half(values)
    word = "holds" if sign * middle > half else "fails" if -sign * middle > half else "open"
    return f"{word} {interval(values, digits)}{unit}" if values else "-"


def share_removed(both, task, key):
    """Return the cell on a rate in pairs of runs, before and after: which share of it is removed.

    Where less than 5 % were there before, a share says nothing and both rates stand instead.
    """
    before, after = (per_seed([pair[side] for pair in both], task, key) for side in (0, 1))
    if scoring.mean(before) < 5:
        return f"{scoring.mean(before):.1f} -> {scoring.mean(after):.1f} %"
    return verdict([100 * (1 - b / a) for a, b in zip(before, after) if a], 1, 0, " %")


def print_remedies(runs, tasks):
    """Print each method against the better of the rates without one, on seeds that both have.

    At equal loss, the fairest of the rules.
    """
    plain, rows = {run["method"] for run in runs if kind(run) == "--reg 0"}, []

    def against_the_better(name, task):
        rivals = [both for other in plain if (both := pairs(runs, other, name))]
        best = differences(max(rivals, key=lambda both: scoring.mean(
            per_seed([a for a, _ in both], task, ("equal loss", "ROUGE-L")))))
        return ", ".join(verdict(per_seed(best, task, ("equal loss", column)), sign, 1)
                         for column, sign in (("ROUGE-L", 1), ("wrong %", -1)))

    for name in dict.fromkeys(run["method"] for run in runs if run["method"] not in plain):
        rows.append([name, *(against_the_better(name, task) for task in tasks)])
    print("\nROUGE-L and wrong %, difference to the better rate of --reg 0, at equal loss:")
    scoring.table(rows, ["", *tasks])


def print_methods(runs, tasks):
    """Print every method: in full at the last step; by rule; by task."""
    def rows(cells):
        return [[name, *cells([run for run in runs if run["method"] == name])]
                for name in dict.fromkeys(run["method"] for run in runs)]

    print(f"\nAt the last step, {tasks[-1]}:")
    scoring.table(rows(lambda alike: [cell(alike, tasks[-1], ("last step", column), digits)
                                      for column, digits in COLUMNS.items()]), ["", *COLUMNS])
    print(f"\nROUGE-L / wrong % of the checkpoint that each rule chooses, {tasks[-1]}:")
    scoring.table(rows(lambda alike: [two(alike, tasks[-1], rule) for rule in RULES]), ["", *RULES])
    print("\nROUGE-L / wrong % of the checkpoint that XLRS chooses:")
    scoring.table(rows(lambda alike: [two(alike, task, "XLRS") for task in tasks]), ["", *tasks])


def at_the_best_rate(runs):
    """Return runs anew, as methods of their own: those at the rate of lowest source dev loss.

    Of each method that was run at several rates; of seeds that have them all.
    """
    groups = {}
    for run in runs:
        groups.setdefault((kind(run), run["task"], run["seed"]), []).append(run)
    rates = {name: len({run["lr"] for run in runs if kind(run) == name}) for name, *_ in groups}
    return [min(alike, key=lambda run: run["facts"]["lowest loss"]) | {
        "method": f"{name}, rate by dev loss"} for (name, *_), alike in groups.items()
        if len(alike) == rates[name] > 1]


def kind(run):
    """Return the name of a run's method without its learning rate."""
    return run["method"].partition(" --lr")[0]


def print_correlation(runs):
    """Print how XLRS goes with ROUGE-L and with wrong answers over runs, at the last step."""
    rows = []
    for task in dict.fromkeys(run["task"] for run in runs):
        for which in ("--reg 0, all rates", "all"):
            alike = [run["facts"] for run in runs if run["task"] == task
                     and (which == "all" or kind(run) == "--reg 0")]
            xlrs, *others = ([facts["last step", column] for facts in alike]
                             for column in ("XLRS", "ROUGE-L", "wrong %"))
            rows.append([f"{task} {which}", len(alike), *(f"{spearman(xlrs, other):.2f}"
                                                         for other in others)])
    print("\nRank correlation of XLRS with two scores over runs, at the last step:")
    scoring.table(rows, ["", "runs", "ROUGE-L", "wrong %"])


def spearman(x, y):
    """Return Spearman's rank correlation of two equally long lists, in [-1, 1]; ties averaged.

    NaN where it is undefined: fewer than two points, or one list constant.
    """
    x, y = map(centred_ranks, (x, y))
    norm = math.sqrt((x @ x) * (y @ y))
    return float(x @ y) / norm if norm else math.nan


def centred_ranks(values):
    """Return each value's rank less the mean rank, (N,): how many are below, less how many above,
    halved. Equal values share their mean rank."""
    values = np.array(values)
    return np.sign(values[:, None] - values).sum(axis=1) / 2  # (N, N) -> (N,)


def print_upper_bound(runs, tasks):
    """Print what fine-tuning in a language itself, English too, reaches, chosen by its dev loss.

    In brackets: the ROUGE-L of the same answers, each to another text.
    """
    rows = []
    for lang in dict.fromkeys(run["train"][0] for run in runs):
        alike = [run for run in runs if run["train"] == [lang]]
        rows.append([lang])
        for task in tasks:
            score = cell(alike, task, ("dev loss", "source ROUGE-L"))
            others = [run["shuffled"] for run in alike if run["task"] == task and "shuffled" in run]
            rows[-1].append(f"{score} ({scoring.mean(others):.1f})" if others else score)
    print("\nUpper bound: ROUGE-L after fine-tuning in the language itself, chosen by dev loss "
          "(and of\nthe same answers shuffled over the texts):")
    scoring.table(rows, ["", *tasks])


def plot(runs, methods, tasks, path):
    """Draw XLRS and wrong-language rate over steps, and the latter over the source's dev loss.

    A column a task; methods in twos, without and with a remedy; means over seeds, bars their 95 %
    intervals. Into a PNG, SVG or PDF file.
    """
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(3, len(tasks), squeeze=False, sharey="row", layout="constrained",
                                   figsize=(1.5 + 2.6 * len(tasks), 6.4))
    rows = ("step", "XLRS"), ("step", "wrong %"), ("dev_loss", "wrong %")
    for ax, ((x, y), task) in zip(axes.flat, itertools.product(rows, tasks)):
        for name, fmt in zip(methods, ("k--o", "k-s", "C1--o", "C1-s")):
            curves = [run["scores"] for run in runs if (run["task"], run["method"]) == (task, name)]
            if curves:
                points = list(zip(*curves))[x == "dev_loss":]  # by step; without the base
                means, halves = zip(*(mean_and_half(row[y] for row in point) for point in points))
                places = [scoring.mean(row[x] for row in point) for point in points]
                ax.errorbar(places, means, halves, fmt=fmt, markersize=4, linewidth=1.2,
                            elinewidth=0.8, capsize=2, label=name)
        ax.set(title=task, xlabel={"dev_loss": "source dev loss"}.get(x, x),
               ylabel=y if task == tasks[0] else "")
        if x == "dev_loss":
            ax.invert_xaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=110)


T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 1 to 9 degrees


def mean_and_half(values):
    """Return (mean, half the width of its 95 % interval, NaN of one value), by Student's t."""
    values = list(values)
    if len(values) < 2:
        return scoring.mean(values), math.nan
    t = T95[min(len(values) - 2, len(T95) - 1)]
    return scoring.mean(values), t * np.std(values, ddof=1) / math.sqrt(len(values))


def interval(values, digits=1):
    """Return "mean ± half the width of its 95 % interval" over runs; of one, the value alone."""
    middle, half = mean_and_half(values)
    return f"{middle:.{digits}f}" + (f" ± {half:.{digits}f}" if half == half else "")


def cell(runs, task, key, digits=1):
    """Return the mean at key ± its interval, as a table has it; empty where nothing is known."""
    values = per_seed(runs, task, key)
    return interval(values, digits) if values else ""


def two(runs, task, rule):
    """Return the cell with ROUGE-L and wrong % of what a rule chooses."""
    return " / ".join(cell(runs, task, (rule, column)) for column in ("ROUGE-L", "wrong %"))


def per_seed(runs, task, key):
    """Return the numbers at key of facts(), one a seed, of runs of one method; NaN is left out.

    For the task "mean" the mean over the runs' tasks, of the seeds that have them all.
    """
    runs = [run for run in runs if task in ("mean", run["task"])]
    numbers = {}  # seed -> task -> number
    for run in runs:
        numbers.setdefault(run["seed"], {})[run["task"]] = run["facts"][key]
    tasks = {run["task"] for run in runs}
    means = [scoring.mean(one.values()) for one in numbers.values() if len(one) == len(tasks)]
    return [number for number in means if not math.isnan(number)]


# A run: a dict of its arguments, its "base" and its "checkpoints" (rows of the log), and what
# judged() adds.

def read_runs(paths):
    """Return the runs of run folders and of JSON files that --out wrote, `--reg 0` first."""
    runs = []
    for path in map(Path, paths):
        with whole(path, "a run with --dev, --test and --parallel, or what --out wrote"):
            found = [read_folder(path)] if path.is_dir() else json.loads(path.read_text("utf-8"))
            runs += map(judged, found)
    return sorted(runs, key=lambda run: (run["task"], len(run["method"]), run["method"]))


def read_folder(folder):
    """Return what is needed of a run folder; numbers with four digits."""
    args, rows = scoring.read_run(folder)
    learnt = [word.partition("=")[0] for word in args.train]  # all but the source are not judged
    for row in rows:
        row["test"] = {lang: one for lang, one in row["test"].items() if lang not in learnt[1:]}
    base, *checkpoints = [{key: row[key] for key in ("step", "xlrs", "dev_loss", "test")}
                          for row in rows]
    run = {name: getattr(args, name) for name in ("reg", "reg_floor", "freeze", "lr", "seed")}
    file = Path(args.train[0].partition("=")[2])  # of a task, "TASK.train.en.jsonl", or none
    run |= {"task": file.name.partition(".")[0] or args.task, "train": learnt,
            "shuffled": shuffled(folder / "outputs.jsonl", learnt[0])}
    return json.loads(json.dumps(run | {"base": base, "checkpoints": checkpoints}),
                      parse_float=lambda number: float(f"{float(number):.4g}"))


def shuffled(path, language):
    """Return ROUGE-L of a run's outputs in a language, each beside the next text's reference."""
    rows = [row for _, row in data.json_rows(path) if row["language"] == language]
    outputs, references = ([row[key] for row in rows] for key in ("output", "reference"))
    return 100 * scoring.rouge_l(outputs, references[1:] + references[:1]).mean().item()


def judged(run, langs=None):
    """Return the run with "method", its name as it was asked for, "scores" and "facts".

    langs: what to judge it on, by default all that it was tested on but those it learnt.
    """
    method = f"--reg {run['reg']:g}"
    if run["reg"] and run["reg_floor"] != FLOOR:
        method += f" --reg-floor {run['reg_floor']:g}"
    if len(run["train"]) > 1:
        method += f" --train {' '.join(run['train'])}"
    if run["freeze"]:
        method += f" --freeze {' '.join(run['freeze'])}"
    if run["lr"] != USUAL:
        method += f" --lr {run['lr']:g}"
    scores = [scores_of(row, run["train"][0], langs) for row in (run["base"], *run["checkpoints"])]
    return run | {"method": method, "scores": scores, "facts": facts(scores, run["reg_floor"])}


def scores_of(row, source, langs):
    """Return {column: number} of a row, means over target languages, and what choose() goes by."""
    targets = [row["test"][lang] for lang in langs or row["test"] if lang != source]
    scores = {column: scoring.mean(one[key] for one in targets if key in one)
              for column, key in SCORES.items()}
    xlrs = scoring.mean(row["xlrs"].values())
    return scores | {"source ROUGE-L": row["test"].get(source, {}).get("rougeL", math.nan),
                     "XLRS": xlrs, "xlrs": xlrs, "dev_loss": row["dev_loss"], "step": row["step"]}


def facts(scores, floor):
    """Return what is known of a run: numbers by (rule, column), and those of claims 1, 2 and 4.

    scores: of the base and of each checkpoint. "rho" counts from the checkpoint on at which the
    source is learnt: within 2 of its best ROUGE-L.
    """
    xlrs = [one["XLRS"] for one in scores]
    scores = scores[1:]  # the base is none to choose
    picks = scores[-1], choose(scores, "dev_loss"), choose(scores, "xlrs", floor), max(
        scores, key=lambda one: one["ROUGE-L"])
    best = max(one["source ROUGE-L"] for one in scores)
    learnt = itertools.dropwhile(lambda one: one["source ROUGE-L"] < best - 2, scores)
    found = {"rise": xlrs[-1] - xlrs[0], "climb": xlrs[-1] - min(xlrs),
             "rho": spearman(*zip(*((one["XLRS"], one["ROUGE-L"]) for one in learnt))),
             "choice": picks[2]["ROUGE-L"] - picks[1]["ROUGE-L"],
             "lowest loss": picks[1]["dev_loss"]}
    for rule, pick in zip(RULES, picks):
        found |= at(rule, pick)
    return found


def at(rule, scores):
    """Return {(rule, column): number} of scores."""
    return {(rule, column): number for column, number in scores.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Print and draw what runs say of the claims.")
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run folder, or what --out wrote")
    add("--pair", nargs="+", metavar="METHOD",
        help="what to compare, in twos, and to draw (--reg 0 and the regulariser)")
    add("--out", metavar="FILE", help="write what is needed of the runs, as JSON")
    add("--plot", metavar="FILE", help="draw them: PNG, SVG or PDF; needs matplotlib")
    args = parser.parse_args(argv)
    try:
        runs = read_runs(args.runs)
        if args.out:
            lines = [json.dumps({key: value for key, value in run.items()
                                 if key not in ("method", "scores", "facts")}) for run in runs]
            Path(args.out).write_text("[" + ",\n".join(lines) + "]\n", encoding="utf-8")
        source = statistics.mode(run["train"][0] for run in runs)
        bound = [run for run in runs if run["train"][0] != source]
        runs = [run for run in runs if run["train"][0] == source]
        names = [run["method"] for run in runs if run["reg"] and run["method"].count("--") == 1]
        methods = args.pair or ("--reg 0", max(names, key=names.count, default="(none)"))
        tasks = list(dict.fromkeys(run["task"] for run in runs))
        columns = tasks + ["mean"] * (len(tasks) > 1)
        for pair in zip(methods[::2], methods[1::2]):
            print_claims(runs, pair, columns)
        print_remedies(runs, columns)
        print_methods(runs + at_the_best_rate(runs), columns)
        print_correlation(runs)
        if bound:
            print_upper_bound([run for run in runs if run["method"] == "--reg 0"] + bound, tasks)
        if args.plot:
            plot(runs, methods, tasks, args.plot)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # whatever the console can show
    main()
