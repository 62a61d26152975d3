"""Prints how fast the project is beside transformers, and ROUGE-L beside rouge_score.

    python lab/bench.py step generate     # mT5-small's shape, both libraries by turns: 7 minutes
    python lab/bench.py score             # ROUGE-L: 10 seconds

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


def batches(count):
    """Return the first count of train.py's batches, each (input_ids, mask, labels)."""
    args = train.parse_args(["--task", "summary", "--batch-size", str(PAIRS)])
    _, tokenizer = load(scoring.TOY_BASE)
    return itertools.islice(data.batches(data.load_texts(args).train, tokenizer, args), count)


def bench_step(repeats):
    """A training step, without and with AdamW's update."""
    ours, theirs = rivals()
    for update, label in ((False, ""), (True, ", with AdamW")):
        compare(f"step of {PAIRS} pairs{label}", batches(1 + repeats),
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
        compare(f"generation for {PAIRS} texts, beams {beams}", batches(1 + repeats),
                lambda ids, mask, _, beams=beams: ours.generate(ids, mask, 32, beams),
                lambda ids, mask, _, beams=beams: theirs.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=32, num_beams=beams,
                    do_sample=False))


def bench_score(repeats):
    """ROUGE-L of 5,000 of the toy's titles, and of its summaries, beside rouge_score."""
    told = [data.tell(story, "en") for story in data.stories("train", 5000)]
    scorer = RougeScorer(["rougeL"])
    for task in ("title", "summary"):
        texts = [answers[task][0] for answers in told]
        compare(f"ROUGE-L, {task}", [(texts, texts[1:] + texts[:1])] * (1 + repeats),
                scoring.rouge_l,
                lambda outputs, references: list(map(scorer.score, references, outputs)))


def compare(figure, inputs, *functions):
    """Print the median times of ours and another's function, by turns, and their ratio."""
    times = [[timeit.timeit(functools.partial(function, *given), number=1)
              for function in functions] for given in inputs][1:]  # the first warms up
    ours, theirs = map(statistics.median, zip(*times))
    ratios = [theirs / ours for ours, theirs in times]
    print(f"{figure}: {ours:.3g} s, the other library {theirs:.3g} s; ratio "
          f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # whatever the console can show
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    benches = {"step": bench_step, "generate": bench_generate, "score": bench_score}
    parser.add_argument("what", nargs="+", choices=benches)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    for name in args.what:
        benches[name](args.repeats)
