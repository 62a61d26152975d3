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


def print_claims(runs):
    """Print the table of the four claims: a verdict and a number for each task."""
    plain, regularised = pair_of_methods(runs)
    tasks = tasks_of(plain + regularised)
    rows = []
    for claim, sign, digits, key in (
            ("1 XLRS at the end of --reg 0 minus the base's", 1, 3, "rise"),
            ("1 … minus the lowest on the way", 1, 3, "climb"),
            ("2 rank correlation of XLRS and ROUGE-L in --reg 0", -1, 2, "rho"),
            ("4 ROUGE-L chosen by XLRS minus by dev loss, --reg 0", 1, 1, "choice")):
        rows.append([claim, *(verdict(per_seed(plain, task, key).values(), sign, digits)
                              for task in tasks)])
    for rule in ALIKE:
        both = {column: [pairs(plain, regularised, task, (rule, column)) for task in tasks]
                for column in ("source %", "ROUGE-L", "wrong %")}
        rows.append([f"3 accidental translation removed, {rule}",
                     *map(share_removed, both["source %"])])
        for column, sign in (("ROUGE-L", 1), ("wrong %", -1)):
            rows.append([f"3 {column}, difference, {rule}",
                         *(verdict([b - a for a, b in pair], sign, 1) for pair in both[column])])
    against = method(regularised[0]) if regularised else "(none)"
    print(f"The paper's claims (3: {against} against --reg 0), "
          f"{len({run['seed'] for run in plain})} seeds.\n"
          "holds: the interval is on the paper's side of zero, fails: on the other, open: neither.")
    scoring.table(sorted(rows, key=lambda row: row[0][0]), ["", *tasks])


def share_removed(before_after):
    """Return the cell on rates (before, after), a pair a seed: which share of it is removed.

    Where less than 5 % were there before, a share says nothing and both rates stand instead.
    """
    if not before_after:
        return "-"
    before, after = map(scoring.mean, zip(*before_after))
    if before < 5:
        return f"{before:.1f} -> {after:.1f} %"
    return verdict([100 * (1 - b / a) for a, b in before_after if a], 1, 0) + " %"


def verdict(values, sign, digits):
    """Return whether the interval of values is on the side of zero that sign names, and itself."""
    values = known(values)
    if not values:
        return "-"
    middle, half = scoring.mean_and_half(values)
    word = "holds" if sign * middle > half else "fails" if -sign * middle > half else "open"
    return f"{word} {scoring.interval(values, digits)}"


def print_details(runs):
    """Print methods at the last step, rules for a checkpoint, learning rates, and many runs."""
    usual, pair = at_usual_rate(runs), sum(pair_of_methods(runs), [])
    tasks = tasks_of(usual)
    groups = {name: [run for run in usual if method(run) == name] for name in map(method, usual)}
    show(f"At the last step, --lr {usual[0]['lr']:g}:", {
        (f"{task} {name}", column): (alike, task, ("last step", column), digits)
        for task, (name, alike) in itertools.product(tasks, groups.items())
        for column, digits in COLUMNS.items()})
    show("ROUGE-L of the checkpoint that each rule chooses (oracle: the best on the test set):", {
        (f"{task} {name}", rule): (alike, task, (rule, "ROUGE-L"), 1)
        for task, (name, alike) in itertools.product(tasks, groups.items())
        if alike[0] in pair or task == tasks[-1] for rule in RULES})
    names, rates = dict.fromkeys(map(method, pair)), sorted({run["lr"] for run in runs})
    rows = [(f"{name} --lr {rate:g}", "dev loss",
             [run for run in runs if (method(run), run["lr"]) == (name, rate)])
            for name, rate in itertools.product(names, rates)]
    rows += [(f"{name}, the rate of lowest dev loss", "dev loss",
              at_best_rate(runs, name, lambda facts: -facts["dev loss", "loss"])) for name in names]
    rows += [(f"{name}, oracle's rate and step", "oracle",
              at_best_rate(runs, name, lambda facts: facts["oracle", "ROUGE-L"])) for name in names]
    show("ROUGE-L by learning rate, chosen by dev loss:", {
        (row, task): (alike, task, (rule, "ROUGE-L"), 1)
        for row, rule, alike in rows for task in tasks_of(pair) if alike})

    print("\nRank correlation of XLRS and ROUGE-L over runs of all rates, at the last step:")
    kinds = {"--reg 0": [run for run in runs if method(run) == "--reg 0"], "all": runs}
    rows = []
    for task, kind in itertools.product(dict.fromkeys(run["task"] for run in runs), kinds):
        last = [[run["facts"]["last step", column] for run in kinds[kind] if run["task"] == task]
                for column in ("XLRS", "ROUGE-L")]
        rows.append([f"{task} {kind}", str(len(last[0])), f"{spearman(*last):.2f}"])
    scoring.table(rows, ["", "runs", "rho"])


def print_upper_bound(runs):
    """Print what fine-tuning in a language itself reaches there, chosen by its own dev loss."""
    tasks = dict.fromkeys(run["task"] for run in runs)
    found = {language: [scoring.mean(
        run["facts"]["dev loss", "source ROUGE-L"] for run in runs
        if run["train"] == [language] and run["task"] == task) for task in tasks]
        for language in sorted({run["train"][0] for run in runs})}
    print("\nUpper bound: ROUGE-L after fine-tuning in the language itself, chosen by dev loss:")
    found["mean"] = map(scoring.mean, zip(*found.values()))
    scoring.table([[name, *row] for name, row in found.items()], ["", *tasks])


def show(title, cells):
    """Print cells, {(row, column): (runs, task, key of facts, digits)}, as a table."""
    rows = {}
    for (row, _), (runs, task, key, digits) in cells.items():
        values = known(per_seed(runs, task, key).values())
        rows.setdefault(row, [row]).append(scoring.interval(values, digits) if values else "")
    print(f"\n{title}")
    scoring.table(rows.values(), ["", *dict.fromkeys(column for _, column in cells)])


def plot(runs, path):
    """Draw XLRS and wrong-language rate over steps, a column a task, into a PNG, SVG or PDF file.

    With and without the regulariser; means over seeds, the bars their 95 % intervals.
    """
    from matplotlib import pyplot
    methods = [alike for alike in pair_of_methods(runs) if alike]
    tasks = list(dict.fromkeys(run["task"] for run in sum(methods, [])))
    figure, axes = pyplot.subplots(2, len(tasks), squeeze=False, sharex=True, sharey="row",
                                   layout="constrained", figsize=(1.5 + 2.6 * len(tasks), 4.4))
    for (ax, (column, task)), alike in itertools.product(
            zip(axes.flat, itertools.product(("XLRS", "wrong %"), tasks)), methods):
        curve = {}  # step -> a number a run
        for run in (run for run in alike if run["task"] == task):
            for row in (run["base"], *run["checkpoints"]):
                curve.setdefault(row["step"], []).append(scores_of(run, row)[column])
        means, halves = zip(*map(scoring.mean_and_half, curve.values()))
        style = {"fmt": "k-s"} if alike[0]["reg"] else {"fmt": "k--o", "markerfacecolor": "w"}
        ax.errorbar(list(curve), means, halves, markersize=4, linewidth=1.2, elinewidth=0.8,
                    capsize=2, label=method(alike[0]), **style)
        ax.set(title=task, xlabel="step", ylabel=column)
        ax.label_outer()
    axes[1, 0].legend(frameon=False)
    figure.savefig(path, dpi=110)


# Many runs.

def at_usual_rate(runs):
    """Return the runs at the learning rate that most of them have."""
    rates = [run["lr"] for run in runs]
    return [run for run in runs if run["lr"] == max(rates, key=rates.count)]


def at_best_rate(runs, name, score):
    """Return the run of highest score(facts) over a method's rates, of each task and seed that has
    them all."""
    alike = {}
    for run in runs:
        if method(run) == name:
            alike.setdefault((run["task"], run["seed"]), []).append(run)
    rates = max(map(len, alike.values()))
    return [max(found, key=lambda run: score(run["facts"])) for found in alike.values()
            if len(found) == rates]


def pair_of_methods(runs):
    """Return ([runs with --reg 0], [runs with the most frequent --reg λ]), alike in all else."""
    alone = [run for run in at_usual_rate(runs) if method(run).count("--") == 1]
    names = [method(run) for run in alone if run["reg"]]
    return [[run for run in alone if method(run) == name]
            for name in ("--reg 0", max(names, key=names.count, default=None))]


def tasks_of(runs):
    """Return the tasks of runs, each once, and "mean" where there are several."""
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    return tasks + ["mean"] * (len(tasks) > 1)


def per_seed(runs, task, key):
    """Return {seed: number} of runs of one method; key: of facts().

    For the task "mean" the mean over all tasks, of the seeds that have them all.
    """
    if task != "mean":
        return {run["seed"]: run["facts"][key] for run in runs if run["task"] == task}
    by_task = [per_seed(runs, one, key) for one in dict.fromkeys(run["task"] for run in runs)]
    return {seed: scoring.mean(numbers[seed] for numbers in by_task)
            for seed in (by_task or [{}])[0] if all(seed in numbers for numbers in by_task)}


def pairs(before, after, task, key):
    """Return [(number before, number after), …] of the seeds that both sides have."""
    before, after = per_seed(before, task, key), per_seed(after, task, key)
    return [(before[seed], after[seed]) for seed in before if seed in after]


def known(values):
    """Return the values that are numbers; NaN is what is undefined in a run."""
    return [value for value in values if not math.isnan(value)]


# A run: a dict of its arguments, its "base" and its "checkpoints" (rows of the log), and "facts".

def read_runs(paths):
    """Return the runs of run folders and of JSON files that --out wrote, `--reg 0` first."""
    runs = []
    for path in map(Path, paths):
        try:
            found = [read_folder(path)] if path.is_dir() else json.loads(path.read_text("utf-8"))
            runs += [{**run, "facts": facts(run)} for run in found]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: expected a run with --dev, --test and --parallel, or what "
                             f"--out wrote, found another thing ({error!r})") from None
    return sorted(runs, key=lambda run: (run["task"], len(method(run)), method(run)))


def read_folder(folder):
    """Return what is needed of a run folder; numbers with four digits."""
    args, rows = scoring.read_run(folder)
    learnt = {word.partition("=")[0] for word in args.train[1:]}  # not judged, unlike the source
    base, *checkpoints = [{key: row[key] for key in ("step", "xlrs", "dev_loss")} | {
        "test": {lang: one for lang, one in row["test"].items() if lang not in learnt}}
        for row in rows]
    names = ("task", "train", "reg", "reg_floor", "freeze", "lr", "steps", "seed")
    run = {name: getattr(args, name) for name in names}
    return json.loads(json.dumps(run | {"base": base, "checkpoints": checkpoints}),
                      parse_float=lambda number: float(f"{float(number):.4g}"))


def method(run):
    """Return the name of a run's method, as it was asked for."""
    name = f"--reg {run['reg']:g}"
    if run["reg"] and run["reg_floor"] != FLOOR:
        name += f" --reg-floor {run['reg_floor']:g}"
    parts = {"train": run["train"][1:] and run["train"], "freeze": run["freeze"]}
    return name + "".join(f" --{part} {' '.join(words)}" for part, words in parts.items() if words)


def facts(run):
    """Return what is known of a run: numbers by (rule, column), and those of claims 1, 2 and 4.

    "rho" counts from the checkpoint on at which the source is learnt: within 2 of its best ROUGE-L.
    """
    scores = [scores_of(run, row) for row in run["checkpoints"]]
    offered = [{"place": place, "xlrs": one["XLRS"], "dev": -row["dev_loss"]}
               for place, (one, row) in enumerate(zip(scores, run["checkpoints"]))]
    picks = {"last step": -1,
             "dev loss": choose(offered, "dev")["place"],
             "XLRS": choose(offered, "xlrs", run["reg_floor"])["place"],
             "lowest XLRS": choose(offered, "xlrs", -1.0)["place"],
             "oracle": max(range(len(scores)), key=lambda place: scores[place]["ROUGE-L"])}
    best = max(one["source ROUGE-L"] for one in scores)
    found = {(rule, column): scores[place][column]
             for rule, place in picks.items() for column in COLUMNS}
    found["dev loss", "loss"] = run["checkpoints"][picks["dev loss"]]["dev_loss"]
    base = scores_of(run, run["base"])["XLRS"]
    found["rise"] = scores[-1]["XLRS"] - base
    found["climb"] = scores[-1]["XLRS"] - min(base, *(one["XLRS"] for one in scores))
    learnt = itertools.dropwhile(lambda one: one["source ROUGE-L"] < best - 2, scores)
    found["rho"] = spearman(*zip(*((one["XLRS"], one["ROUGE-L"]) for one in learnt)))
    found["choice"] = found["XLRS", "ROUGE-L"] - found["dev loss", "ROUGE-L"]
    return found


def scores_of(run, row):
    """Return {column: number} of a checkpoint, means over the target languages."""
    source = run["train"][0].partition("=")[0]
    targets = [one for lang, one in row["test"].items() if lang != source]
    numbers = {column: scoring.mean(one[key] for one in targets) for column, key in SCORES.items()}
    return numbers | {"source ROUGE-L": row["test"].get(source, {}).get("rougeL", math.nan),
                      "XLRS": scoring.mean(row["xlrs"].values())}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Print and draw what runs say of the claims.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or what --out wrote")
    parser.add_argument("--out", metavar="FILE", help="write what is needed of the runs, as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw XLRS and wrong-language rate over "
                        "steps (PNG, SVG or PDF; needs matplotlib)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        runs = read_runs(args.runs)
        if args.out:
            lines = [json.dumps({key: run[key] for key in run if key != "facts"}) for run in runs]
            Path(args.out).write_text("[" + ",\n".join(lines) + "]\n", encoding="utf-8")
        sources = [run["train"][0] for run in runs]
        bound = [run for run in runs if run["train"][0] != max(sources, key=sources.count)]
        runs = [run for run in runs if run not in bound]
        print_claims(runs)
        print_details(runs)
        if bound:
            print_upper_bound(bound)
        if args.plot:
            plot(runs, args.plot)
    except (ValueError, OSError, ImportError) as error:
        print(f"claims.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
