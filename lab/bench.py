"""Prints how fast the project is: a step and generation beside transformers', and the metrics.

    python lab/bench.py step generate     # mT5-small's shape, both libraries by turns: 7 minutes
    python lab/bench.py score             # metrics: 1 minute

Batches are those that training draws from the toy's summaries; the embedding and the head
have mT5's 250,112 rows. Medians of --repeats, and the ratio of times taken side by side. Needs
requirements-test.txt.
"""

import os
import sys
from pathlib import Path

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000", **os.environ}  # see train.py
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import argparse
import functools
import itertools
import statistics
import timeit

import torch
import transformers
from rouge_score.rouge_scorer import RougeScorer

import data
import eval as scoring
import train
from model import MT5, SIZES, load, published_names

PAIRS = 32  # of a batch: train.py's default


def rivals():
    """Return (our mT5-small, transformers'), random and with the same weights.

    Drawn as mT5's were. transformers' own random head is so wide (1 instead of D^-0.5) that most
    probabilities are denormal numbers, with which both take two to three times as long.
    """
    torch.manual_seed(0)
    ours = MT5(SIZES["small"])
    with torch.no_grad():  # outputs vary and end as the toy's do: the mean is 0.8 of the longest
        ours.head.weight.normal_(std=ours.config.d_model ** -0.5)
        ours.head.weight[data.EOS] *= 2.45
    theirs = transformers.MT5ForConditionalGeneration(transformers.MT5Config(**vars(ours.config)))
    theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.clone())  # untied, as mT5's is
    with torch.no_grad():
        for name, published in published_names(ours.config).items():
            theirs.get_parameter(published).copy_(ours.get_parameter(name))
    return ours, theirs


def batches():
    """Yield (input_ids, mask, labels) as train.py does."""
    args = train.parse_args(["--task", "summary", "--batch-size", str(PAIRS)])
    _, tokenizer = load(args.init)
    return data.batches(data.load_texts(args).train, tokenizer, args)


def bench_step(repeats):
    """A training step, without and with AdamW's update."""
    ours, theirs = rivals()
    for update, label in ((False, ""), (True, ", with AdamW")):
        compare(f"step of {PAIRS} pairs{label}, s", repeats,
                training_step(ours, ours, update),
                training_step(theirs, lambda ids, mask, labels: theirs(
                    input_ids=ids, attention_mask=mask, labels=labels).loss, update))


def training_step(model, loss, update):
    """Return a function of (input_ids, mask, labels): a step of the model."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=True)

    def step(*batch):
        loss(*batch).backward()
        if update:
            optimizer.step()
        optimizer.zero_grad()
    return step


@torch.no_grad()
def bench_generate(repeats):
    """Generation of at most 32 tokens."""
    ours, theirs = (model.eval() for model in rivals())
    for beams in (1, 4):
        compare(f"generation, {beams} beam{'s' * (beams > 1)}, s", repeats,
                lambda ids, mask, _, beams=beams: ours.generate(ids, mask, 32, beams),
                lambda ids, mask, _, beams=beams: theirs.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=32, num_beams=beams,
                    do_sample=False))


def compare(figure, repeats, *functions):
    """Print the median times of two functions of a batch, by turns, and their ratio."""
    times = [], []
    for batch in itertools.islice(batches(), repeats + 1):  # the first warms up
        for taken, function in zip(times, functions):
            taken.append(timeit.timeit(functools.partial(function, *batch), number=1))
    ours, theirs = (taken[1:] for taken in times)
    ratios = [b / a for a, b in zip(ours, theirs)]
    print(f"{figure}: {statistics.median(ours):.2f}, transformers {statistics.median(theirs):.2f}; "
          f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def bench_score(repeats):
    """ROUGE-L beside rouge_score, and texts identified a second, on the toy's titles, summaries."""
    stories = [data.tell(story, "en") for story in data.stories("train", 5000)]
    for task in ("title", "summary"):
        time_metrics(task, [told[task][0] for told in stories], repeats)


def time_metrics(task, texts, repeats):
    """Print how many texts a second the metrics take, each repeat side by side."""
    others = texts[1:] + texts[:1]
    scorer, identifier = RougeScorer(["rougeL"]), scoring.identifier()
    functions = {"ROUGE-L": lambda: scoring.rouge_l(texts, others),
                 "rouge_score": lambda: [scorer.score(*pair) for pair in zip(others, texts)],
                 "identified": lambda: identifier.predict(texts),
                 "mixed": lambda: identifier.mixed(texts, "de", "en")}
    taken = [[timeit.timeit(function, number=1) for function in functions.values()]
             for _ in range(repeats)]
    for name, times in zip(functions, zip(*taken)):
        print(f"{task}, {name}: {len(texts) / statistics.median(times):,.0f} a second")
    ratios = [theirs / ours for ours, theirs, *_ in taken]
    print(f"{task}, ROUGE-L beside rouge_score: {statistics.median(ratios):.2f} times as fast "
          f"({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # whatever the console can show
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    benches = {"step": bench_step, "generate": bench_generate, "score": bench_score}
    parser.add_argument("what", nargs="+", choices=benches)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    for name in args.what:
        benches[name](args.repeats)
