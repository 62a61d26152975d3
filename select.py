"""Chooses a checkpoint of a run by the paper's rule, lowest XLRS down to a floor; shows why.

`python select.py RUN` prints the run's checkpoints with the chosen one marked and writes its step
to RUN/selected.json. With `--plot FILE` it also draws XLRS and what goes with it.
"""

# A script's folder comes first on sys.path, so when torch's imports reach Python's own module
# `select` they find this file. Under that name we load the compiled module and step aside; that
# is also why the functions below import what they need themselves.
if __name__ == "select":
    import sys
    from importlib import machinery, util

    compiled = (machinery.ExtensionFileLoader, machinery.EXTENSION_SUFFIXES)  # no .py files
    finders = (machinery.FileFinder(str(folder), compiled) for folder in sys.path)
    spec = next(filter(None, (finder.find_spec("select") for finder in finders)))
    real = util.module_from_spec(spec)
    spec.loader.exec_module(real)
    globals().update(vars(real))  # for a thread that was already waiting for this import
    sys.modules["select"] = real  # for everyone else


def parse_args(argv=None):
    import argparse

    parser = argparse.ArgumentParser(description="Choose a checkpoint of a run; draw runs.")
    parser.add_argument("runs", metavar="RUN", nargs="+",
                        help="a run folder that train.py wrote; to draw also what eval.py "
                             "--compare wrote")
    parser.add_argument("--by", choices=["xlrs", "dev"],
                        help="lowest XLRS (down to the run's --reg-floor), or lowest loss on the "
                             "source language's development set (default xlrs, where the run "
                             "measured it)")
    parser.add_argument("--plot", metavar="FILE",
                        help="draw the runs, one row of pictures a task (PNG, SVG or PDF; needs "
                             "matplotlib)")
    return parser.parse_args(argv)


def show(rows, chosen):
    """Print a run's evaluation rows as a table, the chosen one marked."""
    import eval as scoring

    lines = []
    for row in rows:
        similarity = row.get("xlrs", {})
        targets = [row["test"][lang] for lang in row.get("test", {}) if lang in similarity]
        lines.append([row["step"], f"{scoring.mean(similarity.values()):.3f}",
                      f"{row.get('dev_loss', float('nan')):.4f}",
                      scoring.mean(scores["rougeL"] for scores in targets),
                      scoring.mean(scores["wrong_language"] for scores in targets),
                      "<- chosen" if row["step"] == chosen["step"] else ""])
    scoring.table(lines, ["step", "XLRS", "source dev loss", "target ROUGE-L", "wrong %", ""])


def plot(runs, path):
    """Draw runs, summaries as eval.read_runs returns them, into a PNG, SVG or PDF file at path.

    A row a task; from left to right XLRS and wrong-language rate over steps, mean and 95 % interval
    over runs, and ROUGE-L against XLRS, a point a checkpoint, with the mean of the runs' rank
    correlations. Of the runs those that differ in --reg and the seed alone.
    """
    import itertools

    import data
    import eval as scoring
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None

    groups = {}  # task -> {method: runs}
    for run in scoring.at_usual_rate(runs):
        if scoring.method(run) == f"--reg {run['reg']:g}":
            groups.setdefault(run["task"], {}).setdefault(scoring.method(run), []).append(run)
    if not groups:
        raise ValueError("--plot: expected a run with --reg and nothing else, found none")
    figure, axes = pyplot.subplots(len(groups), 3, squeeze=False, layout="constrained",
                                   figsize=(9, 2.6 * len(groups)))
    for row, (task, methods) in zip(axes, groups.items()):
        for ax, (x, y) in zip(row, [("step", "XLRS"), ("step", "wrong %"), ("XLRS", "ROUGE-L")]):
            ax.set(xlabel=x, ylabel=y, title=task)
        for name, style in zip(sorted(methods), itertools.cycle(("k--o", "k-s", "k:^", "k-.v"))):
            curves = {}  # step -> scores, a run each
            for run in methods[name]:
                for checkpoint in [run["base"], *run["checkpoints"]]:
                    curves.setdefault(checkpoint["step"], []).append(
                        scoring.scores_of(run, checkpoint))
            for ax, column in zip(row, ("XLRS", "wrong %")):
                values = [[scores[column] for scores in curves[step]] for step in curves]
                means, halves = map(list, zip(*map(scoring.mean_and_half, values)))
                ax.errorbar(list(curves), means, halves, fmt=style, markersize=3, linewidth=1,
                            capsize=2, label=name)
            points = [scores for step in list(curves)[1:] for scores in curves[step]]
            rho = scoring.mean(scoring.within_run(run, None)["ROUGE-L (rho)"]
                               for run in methods[name])
            row[2].plot(*([scores[column] for scores in points] for column in ("XLRS", "ROUGE-L")),
                        style[0] + style[-1], markersize=3, fillstyle="none",
                        label=f"{name}, mean ρ {rho:.2f}")
        row[1].legend(fontsize=8)
        row[2].legend(fontsize=8)
    form = path.rpartition(".")[2]
    data.write_file(path, lambda file: figure.savefig(file, format=form))


def main(argv=None):
    import os
    import sys

    args = parse_args(argv)
    try:
        import eval as scoring

        for run in args.runs:
            if not (args.plot and os.path.isfile(run)):
                chosen = scoring.choose_checkpoint(run, args.by)
                show(scoring.read_run(run)[1], chosen)
                print(f"step {chosen['step']} was chosen: {run}/selected.json")
        if args.plot:
            plot(scoring.read_runs(args.runs), args.plot)
            print(f"drawn: {args.plot}")
    except (ValueError, OSError) as error:
        print(f"select.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
