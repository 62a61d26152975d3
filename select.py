"""Chooses a checkpoint of a run by the paper's rule, lowest XLRS, and shows why.

`python select.py RUN` prints the run's checkpoints with the chosen one marked and writes its step
to RUN/selected.json.
"""

# A script's folder comes first on sys.path, so when torch's imports reach Python's own module
# `select` they find this file. Under that name we load the compiled module and step aside.
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

    parser = argparse.ArgumentParser(description="Choose a checkpoint of a run.")
    parser.add_argument("run", metavar="RUN", help="a run folder that train.py wrote")
    parser.add_argument("--by", choices=["xlrs", "dev"], default="xlrs",
                        help="lowest XLRS, or lowest loss on the source language's development "
                             "set (default xlrs)")
    return parser.parse_args(argv)


def show(rows, chosen):
    """Print a run's evaluation rows as a table, the chosen one marked."""
    import eval as scoring

    lines = []
    for row in rows:
        targets = [scores for lang, scores in row.get("test", {}).items() if lang in row["xlrs"]]
        lines.append([row["step"], f"{scoring.mean(row['xlrs'].values()):.3f}",
                      f"{row.get('dev_loss', float('nan')):.4f}",
                      scoring.mean(scores["rougeL"] for scores in targets),
                      scoring.mean(scores["wrong_language"] for scores in targets),
                      "<- chosen" if row["step"] == chosen["step"] else ""])
    scoring.table(lines, ["step", "XLRS", "source dev loss", "target ROUGE-L", "wrong language %",
                          ""])


def main(argv=None):
    import sys

    args = parse_args(argv)
    try:
        import eval as scoring

        rows = [row for row in scoring.data.read_log(args.run) if row["kind"] == "eval"]
        chosen = scoring.choose_step(args.run, args.by)
        show(rows, chosen)
        print(f"chosen by {args.by}: step {chosen['step']}, written to {args.run}/selected.json")
    except (ValueError, OSError) as error:
        print(f"select.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
