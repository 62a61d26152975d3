"""Prints what runs say of the paper's four claims, on each task; draws them with --plot.

    python lab/claims.py lab/results/grid.json --plot lab/results/runs.png

prints the tables of lab/results/README.md and draws its figure, in five seconds. It takes run
folders as well, and --out FILE writes what is needed of them, as lab/results/grid.json has it.

Numbers are means over seeds ± 95 % interval (Student's t); a run's score is the mean over the
languages that it was not trained on; under "mean" the tasks are averaged seed by seed. Runs that
differ in the learning rate alone stand in the table of rates; the others have the usual one. The
few whose source is another language are the upper bound, fine-tuned in a target language itself.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the project's folder

import eval as scoring
from xlrs import FLOOR, choose, spearman

SCORES = {"ROUGE-L": "rougeL", "wrong %": "wrong_language", "source %": "source_language",
          "mixed %": "mixed", "loops %": "loops"}  # column -> its key in a run's scores
COLUMNS = {**dict.fromkeys(SCORES, 1), "source ROUGE-L": 1, "XLRS": 2}  # column -> decimals
ALIKE = ("last step", "dev loss", "XLRS")  # rules for a checkpoint; XLRS counts down to the floor
RULES = (*ALIKE, "lowest XLRS", "oracle")  # oracle: the best on the test set; nobody can choose it


def print_claims(runs, pair, tasks):
    """Print the table of the four claims: a verdict and a number for each task.

    pair: the two methods that are compared, without and with the regulariser.
    """
    plain, regularised = ([run for run in runs if run["method"] == name] for name in pair)
    both = [(a, b) for a in plain for b in regularised
            if (a["task"], a["seed"]) == (b["task"], b["seed"])]
    changes = [b | {"facts": {key: number - a["facts"][key] for key, number in b["facts"].items()}}
               for a, b in both]
    rows = []

    def row(claim, runs, key, sign, digits):
        rows.append([claim, *(verdict(per_seed(runs, task, key), sign, digits) for task in tasks)])

    row("1 XLRS at the end of --reg 0 minus the base's", plain, "rise", 1, 3)
    row("1 … minus the lowest on the way", plain, "climb", 1, 3)
    row("2 rank correlation of XLRS and ROUGE-L in --reg 0", plain, "rho", -1, 2)
    for rule in ALIKE:
        rows.append([f"3 accidental translation removed, {rule}",
                     *(share_removed(both, task, (rule, "source %")) for task in tasks)])
        row(f"3 ROUGE-L, difference, {rule}", changes, (rule, "ROUGE-L"), 1, 1)
        row(f"3 wrong %, difference, {rule}", changes, (rule, "wrong %"), -1, 1)
    row("4 ROUGE-L chosen by XLRS minus by dev loss, --reg 0", plain, "choice", 1, 1)
    print(f"The paper's claims (3: {pair[1]} against {pair[0]}), "
          f"{len({run['seed'] for run in plain})} seeds.\n"
          "holds: the interval is on the paper's side of zero, fails: on the other, open: neither.")
    scoring.table(rows, ["", *tasks])


def verdict(values, sign, digits, unit=""):
    """Return whether the interval of values is on the side of zero that sign names, and itself."""
    middle, half = scoring.mean_and_half(values)
    word = "holds" if sign * middle > half else "fails" if -sign * middle > half else "open"
    return f"{word} {scoring.interval(values, digits)}{unit}" if values else "-"


def share_removed(both, task, key):
    """Return the cell on a rate in pairs of runs, before and after: which share of it is removed.

    Where less than 5 % were there before, a share says nothing and both rates stand instead.
    """
    before, after = (per_seed([pair[side] for pair in both], task, key) for side in (0, 1))
    if scoring.mean(before) < 5:
        return f"{scoring.mean(before):.1f} -> {scoring.mean(after):.1f} %"
    return verdict([100 * (1 - b / a) for a, b in zip(before, after) if a], 1, 0, " %")


def print_methods(runs, pair, tasks):
    """Print the methods at the last step, and at the checkpoint that each rule chooses."""
    last, chosen = [], []
    for task, name in itertools.product(tasks, dict.fromkeys(run["method"] for run in runs)):
        alike = [run for run in runs if run["method"] == name]
        last.append([f"{task} {name}", *(cell(alike, task, ("last step", column), digits)
                                         for column, digits in COLUMNS.items())])
        if name in pair or task == tasks[-1]:
            chosen.append([f"{task} {name}", *(cell(alike, task, (rule, "ROUGE-L"))
                                               for rule in RULES)])
    print(f"\nAt the last step, --lr {runs[0]['lr']:g}:")
    scoring.table(last, ["", *COLUMNS])
    print("\nROUGE-L of the checkpoint that each rule chooses (oracle: the best on the test set):")
    scoring.table(chosen, ["", *RULES])


def print_rates(runs, pair, tasks):
    """Print what a pair of methods reaches at each learning rate, and at the best of them."""
    rows = []
    for name, rate in itertools.product(pair, sorted({run["lr"] for run in runs})):
        rows.append((f"{name} --lr {rate:g}", "dev loss",
                     [run for run in runs if (run["method"], run["lr"]) == (name, rate)]))
    for label, rule, score in (("the rate of lowest dev loss", "dev loss", "dev"),
                               ("oracle's rate and step", "oracle", "ROUGE-L")):
        rows += [(f"{name}, {label}", rule, at_best_rate(runs, name, (rule, score)))
                 for name in pair]
    print("\nROUGE-L by learning rate, chosen by dev loss:")
    scoring.table([[label, *(cell(alike, task, (rule, "ROUGE-L")) for task in tasks)]
                   for label, rule, alike in rows if alike], ["", *tasks])


def at_best_rate(runs, name, key):
    """Return a method's run of highest facts[key], of each task and seed that has all the rates."""
    rates = {}
    for run in runs:
        if run["method"] == name:
            rates.setdefault((run["task"], run["seed"]), []).append(run)
    most = max(map(len, rates.values()), default=0)
    return [max(alike, key=lambda run: run["facts"][key]) for alike in rates.values()
            if len(alike) == most]


def print_correlation(runs):
    """Print how XLRS and ROUGE-L go together over runs of all rates, at the last step."""
    rows = []
    for task in dict.fromkeys(run["task"] for run in runs):
        for kind in ("--reg 0", "all"):
            alike = [run["facts"] for run in runs
                     if run["task"] == task and kind in ("all", run["method"])]
            rho = spearman([facts["last step", "XLRS"] for facts in alike],
                           [facts["last step", "ROUGE-L"] for facts in alike])
            rows.append([f"{task} {kind}", len(alike), f"{rho:.2f}"])
    print("\nRank correlation of XLRS and ROUGE-L over runs of all rates, at the last step:")
    scoring.table(rows, ["", "runs", "rho"])


def print_upper_bound(runs):
    """Print what fine-tuning in a language itself reaches there, chosen by its own dev loss."""
    tasks = dict.fromkeys(run["task"] for run in runs)
    found = {language: [scoring.mean(
        run["facts"]["dev loss", "source ROUGE-L"] for run in runs
        if run["train"] == [language] and run["task"] == task) for task in tasks]
        for language in sorted({run["train"][0] for run in runs})}
    found["mean"] = map(scoring.mean, zip(*found.values()))
    print("\nUpper bound: ROUGE-L after fine-tuning in the language itself, chosen by dev loss:")
    scoring.table([[name, *row] for name, row in found.items()], ["", *tasks])


def plot(runs, pair, tasks, path):
    """Draw XLRS and wrong-language rate over steps, a column a task, into a PNG, SVG or PDF file.

    With and without the regulariser; means over seeds, the bars their 95 % intervals.
    """
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, len(tasks), squeeze=False, sharex=True, sharey="row",
                                   layout="constrained", figsize=(1.5 + 2.6 * len(tasks), 4.4))
    styles = dict(zip(pair, ({"fmt": "k--o", "markerfacecolor": "w"}, {"fmt": "k-s"})))
    for ax, (column, task) in zip(axes.flat, itertools.product(("XLRS", "wrong %"), tasks)):
        for name, style in styles.items():
            alike = [run for run in runs if (run["task"], run["method"]) == (task, name)]
            curve = {}  # step -> a number a run
            for scores in itertools.chain(*(run["scores"] for run in alike)):
                curve.setdefault(scores["step"], []).append(scores[column])
            if curve:
                means, halves = zip(*map(scoring.mean_and_half, curve.values()))
                ax.errorbar(list(curve), means, halves, markersize=4, linewidth=1.2,
                            elinewidth=0.8, capsize=2, label=name, **style)
        ax.set(title=task, xlabel="step", ylabel=column)
        ax.label_outer()
    axes[1, 0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def cell(runs, task, key, digits=1):
    """Return the mean at key ± its interval, as a table has it; empty where nothing is known."""
    values = per_seed(runs, task, key)
    return scoring.interval(values, digits) if values else ""


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
        try:
            found = [read_folder(path)] if path.is_dir() else json.loads(path.read_text("utf-8"))
            runs += map(judged, found)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: expected a run with --dev, --test and --parallel, or what "
                             f"--out wrote, found another thing ({error!r})") from None
    return sorted(runs, key=lambda run: (run["task"], len(run["method"]), run["method"]))


def read_folder(folder):
    """Return what is needed of a run folder; numbers with four digits."""
    args, rows = scoring.read_run(folder)
    learnt = {word.partition("=")[0] for word in args.train[1:]}  # not judged, unlike the source
    for row in rows:
        row["test"] = {lang: one for lang, one in row["test"].items() if lang not in learnt}
    base, *checkpoints = [{key: row[key] for key in ("step", "xlrs", "dev_loss", "test")}
                          for row in rows]
    run = {name: getattr(args, name) for name in (
        "task", "train", "reg", "reg_floor", "freeze", "lr", "steps", "seed")}
    return json.loads(json.dumps(run | {"base": base, "checkpoints": checkpoints}),
                      parse_float=lambda number: float(f"{float(number):.4g}"))


def judged(run):
    """Return the run with "method", its name as it was asked for, "scores" and "facts"."""
    method = f"--reg {run['reg']:g}"
    if run["reg"] and run["reg_floor"] != FLOOR:
        method += f" --reg-floor {run['reg_floor']:g}"
    if len(run["train"]) > 1:
        method += f" --train {' '.join(run['train'])}"
    if run["freeze"]:
        method += f" --freeze {' '.join(run['freeze'])}"
    source = run["train"][0].partition("=")[0]
    scores = [scores_of(row, source) for row in (run["base"], *run["checkpoints"])]
    return run | {"method": method, "scores": scores, "facts": facts(scores, run["reg_floor"])}


def scores_of(row, source):
    """Return {column: number} of a row, means over target languages, and what choose() goes by."""
    targets = [one for lang, one in row["test"].items() if lang != source]
    scores = {column: scoring.mean(one[key] for one in targets if key in one)
              for column, key in SCORES.items()}
    xlrs = scoring.mean(row["xlrs"].values())
    return scores | {"source ROUGE-L": row["test"].get(source, {}).get("rougeL", math.nan),
                     "XLRS": xlrs, "xlrs": xlrs, "dev": -row["dev_loss"], "step": row["step"]}


def facts(scores, floor):
    """Return what is known of a run: numbers by (rule, column), and those of claims 1, 2 and 4.

    scores: of the base and of each checkpoint. "rho" counts from the checkpoint on at which the
    source is learnt: within 2 of its best ROUGE-L.
    """
    xlrs = [one["XLRS"] for one in scores]
    scores = scores[1:]  # the base is none to choose
    picks = {"last step": scores[-1],
             "dev loss": choose(scores, "dev"),
             "XLRS": choose(scores, "xlrs", floor),
             "lowest XLRS": choose(scores, "xlrs", -1.0),
             "oracle": max(scores, key=lambda one: one["ROUGE-L"])}
    best = max(one["source ROUGE-L"] for one in scores)
    learnt = itertools.dropwhile(lambda one: one["source ROUGE-L"] < best - 2, scores)
    return {(rule, column): picks[rule][column] for rule in picks for column in picks[rule]} | {
        "rise": xlrs[-1] - xlrs[0],
        "climb": xlrs[-1] - min(xlrs),
        "rho": spearman(*zip(*((one["XLRS"], one["ROUGE-L"]) for one in learnt))),
        "choice": picks["XLRS"]["ROUGE-L"] - picks["dev loss"]["ROUGE-L"]}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Print and draw what runs say of the claims.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or what --out wrote")
    parser.add_argument("--out", metavar="FILE", help="write what is needed of the runs, as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw XLRS and wrong-language rate over "
                        "steps (PNG, SVG or PDF; needs matplotlib)")
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
        rate = statistics.mode(run["lr"] for run in runs)  # the most frequent
        usual = [run for run in runs if run["lr"] == rate]
        names = [run["method"] for run in usual if run["reg"] and run["method"].count("--") == 1]
        pair = "--reg 0", max(names, key=names.count, default="(none)")
        tasks = list(dict.fromkeys(run["task"] for run in usual))
        columns = tasks + ["mean"] * (len(tasks) > 1)
        print_claims(usual, pair, columns)
        print_methods(usual, pair, columns)
        print_rates(runs, pair, columns)
        print_correlation(runs)
        if bound:
            print_upper_bound(bound)
        if args.plot:
            plot(usual, pair, tasks, args.plot)
    except (ValueError, OSError, ImportError) as error:
        print(f"claims.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
