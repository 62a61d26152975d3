"""Chooses a checkpoint of a run: lowest XLRS, the paper's rule, down to a floor (ours); shows why.

`python select.py RUN` prints the run's checkpoints with the chosen one marked and writes its step
to RUN/selected.json.
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


def show(args, rows, chosen):
    """Print a run's evaluation rows as a table, the chosen one marked."""
    import eval as scoring

    told = [scoring.progress(args, row) for row in rows]
    names = max(told, key=len)  # the columns of a row that has them all
    marks = ["<- chosen" if row["step"] == chosen["step"] else "" for row in rows]
    scoring.table([[row.get(name, "") for name in names] + [mark]
                   for row, mark in zip(told, marks)], [*names, ""])


def main(argv=None):
    import argparse

    parser = argparse.ArgumentParser(description="Choose a checkpoint of a run.")
    parser.add_argument("run", metavar="RUN", help="a run folder that train.py wrote")
    parser.add_argument("--by", choices=["xlrs", "dev"],
                        help="lowest XLRS, down to the run's --reg-floor, or lowest loss on the "
                             "source language's development set (xlrs, where the run measured it)")
    args = parser.parse_args(argv)
    try:
        import eval as scoring

        chosen = scoring.choose_checkpoint(args.run, args.by)
        show(*scoring.read_run(args.run), chosen)
        print(f"step {chosen['step']} was chosen: {args.run}/selected.json; "
              f"python eval.py {args.run} scores it")
    except (ValueError, OSError) as error:
        parser.exit(2, f"select.py: {error}\n")


if __name__ == "__main__":
    import sys

    sys.stdout.reconfigure(errors="backslashreplace")  # whatever the console can show
    main()
