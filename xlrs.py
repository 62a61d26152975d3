"""The paper as functions: similarity, XLRS, regulariser, checkpoint rule, rank correlation.

XLRS is Cross-Lingual Representation Similarity: how alike a model's encoder represents sentences
and their translations.

Tianjian Li and Kenton Murray, "Why Does Zero-Shot Cross-Lingual Generation Fail? An Explanation
and a Solution", Findings of ACL 2023. What is marked "ours" is a choice of this implementation.

Shapes: B sentences, S tokens, D width of the encoder, L languages, N points of a correlation.
"""

import math

import torch
from torch.nn import functional as F

FLOOR = -0.5  # cosine that is low enough, for the regulariser and for choosing (ours)


def pool(states, mask):
    """Return one vector a sentence, (B, D) float32: the mean encoder state of its tokens (ours).

    states (B, S, D) final encoder states, of any precision; mask (B, S) bool, True at real tokens.
    A sentence without any real token pools to zeros.
    """
    weights = mask.unsqueeze(-1).float()  # (B, S, 1)
    return (states.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def similarity(a, b):
    """Return the cosine of each pair of sentence vectors, (B,), in [-1, 1] (ours).

    XLRS is the mean of this over the pairs of a parallel text, and then over language pairs.
    a, b (…, B, D), one may broadcast: the same sentences in two languages. In float32 whatever the
    model's precision.
    """
    return F.cosine_similarity(a.float(), b.float(), dim=-1)


def xlrs(pooled):
    """Return XLRS of the source with each other language, (L - 1,), each in [-1, 1].

    A model's XLRS, one number, is the mean of these.
    pooled (L, B, D): B parallel sentences in L languages; row 0 is the source.
    """
    return similarity(pooled[:1], pooled[1:]).mean(dim=1)


def regulariser(pooled, floor=FLOOR):
    """Return how far XLRS is above the floor, a scalar ≥ 0; train.py says what λ multiplies.

        max(0, mean cosine of source and other languages − floor)

    pooled (L, B, D): B parallel sentences in L languages; row 0 is the source. Gradient flows to
    both sides. This form is ours, and so is the floor: without it (floor = −1) the cheapest way to
    please the term is to push the languages to opposite poles, where XLRS nears −1 and many outputs
    are in a wrong language.
    """
    if pooled.shape[0] < 2:
        raise ValueError(f"the regulariser compares languages: expected at least 2, "
                         f"found {pooled.shape[0]}; name more with --parallel")
    return (xlrs(pooled).mean() - floor).clamp(min=0)


def choose(checkpoints, by="xlrs", floor=FLOOR):
    """Return the checkpoint that the rule picks; the earliest of equals.

    checkpoints: dicts with "step", "xlrs" (a number in [-1, 1]) and "dev" (the source language's
    development score, higher is better: minus the loss, say). by="xlrs": lowest XLRS, the paper's
    rule, which needs no target-language data; by="dev": best development score, the usual rule.
    floor: XLRS below it counts as equal to it (ours): lower is no merit there, where momentum alone
    carries XLRS on. -1 leaves the paper's rule as it is.
    """
    keys = {"xlrs": lambda row: max(row["xlrs"], floor), "dev": lambda row: -row["dev"]}
    if by not in keys:
        raise ValueError(f"expected by to be one of {sorted(keys)}, found {by!r}")
    if not checkpoints:
        raise ValueError("expected at least one checkpoint to choose from, found none")
    for row in checkpoints:
        if row.get(by) is None or not math.isfinite(row[by]):
            raise ValueError(f"checkpoint at step {row.get('step')}: expected a finite {by!r}, "
                             f"found {row.get(by)!r}")
    return min(checkpoints, key=keys[by])


def spearman(x, y):
    """Return Spearman's rank correlation of two equally long lists, in [-1, 1]; ties averaged.

    NaN where it is undefined: fewer than two points, or one list constant.
    """
    if len(x) != len(y):
        raise ValueError(f"expected two lists of equal length, found {len(x)} and {len(y)}")
    if len(x) < 2:
        return math.nan
    rx, ry = (ranks(values) - (len(values) - 1) / 2 for values in (x, y))
    norm = math.sqrt(float(rx @ rx) * float(ry @ ry))
    return float(rx @ ry) / norm if norm else math.nan


def ranks(values):
    """Return the rank of each value from 0, (N,) float64; equal values share their mean rank."""
    v = torch.as_tensor(values, dtype=torch.float64)
    below = (v[None] < v[:, None]).sum(dim=1)  # (N, N) -> (N,)
    equal = (v[None] == v[:, None]).sum(dim=1)
    return below + (equal - 1) / 2
