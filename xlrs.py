"""The paper's measure and checkpoint rule, and a regulariser after it, as functions.

XLRS is Cross-Lingual Representation Similarity: how alike a model's encoder represents sentences
and their translations.

Tianjian Li and Kenton Murray, "Why Does Zero-Shot Cross-Lingual Generation Fail? An Explanation
and a Solution", Findings of ACL 2023, https://aclanthology.org/2023.findings-acl.789. What is
marked "ours" is a choice of this implementation.

Shapes: B sentences, S tokens, D width of the encoder, L languages.
"""

import math

from torch.nn import functional as F

FLOOR = -0.5  # cosine that is low enough, for the regulariser and for choosing (ours)


def pool(states, mask):
    """Return one vector a sentence, (B, D) float32: the mean encoder state of its tokens (ours).

    states (B, S, D) final encoder states, of any precision; mask (B, S) bool, True at real tokens.
    A sentence without any real token pools to zeros.

    Two tokens, (2, 0) and (4, 6), and padding:

    >>> import torch
    >>> pool(torch.tensor([[[2., 0.], [4., 6.], [9., 9.]]]), torch.tensor([[True, True, False]]))
    tensor([[3., 3.]])
    """
    weights = mask.unsqueeze(-1).float()  # (B, S, 1)
    return (states.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def similarity(a, b):
    """Return the cosine of each pair of sentence vectors, (…, B), in [-1, 1] (ours).

    XLRS is the mean of this over the pairs of a parallel text.
    a, b (…, B, D), one may broadcast: the same sentences in two languages. In float32 whatever the
    model's precision.
    """
    return F.cosine_similarity(a.float(), b.float(), dim=-1)


def xlrs(pooled):
    """Return XLRS of the source with each other language, (L - 1,), each in [-1, 1].

    A model's XLRS, one number, is the mean of these.
    pooled (L, B, D): B parallel sentences in L languages; row 0 is the source.

    One sentence, (3, 4) in English, (4, 3) in German, (0, 5) in French: the cosines are
    (3·4 + 4·3) / (5·5) and (4·5) / (5·5).

    >>> import torch
    >>> xlrs(torch.tensor([[[3., 4.]], [[4., 3.]], [[0., 5.]]]))
    tensor([0.9600, 0.8000])
    """
    return similarity(pooled[:1], pooled[1:]).mean(dim=1)


def regulariser(pooled, floor=FLOOR):
    """Return max(0, Σ over the other languages of (XLRS − floor)), a scalar: what λ multiplies.

    Ours, after the paper's explanation, and so is the floor: without it (floor = −1) the cheapest
    way to please the term is to push the languages to opposite poles, where XLRS nears −1 and many
    outputs are in a wrong language. Gradient flows to the source, too.
    pooled (L, B, D): B parallel sentences in L languages; row 0 is the source. Raises ValueError
    for one language.

    The sentence above, with floor 0.5: 0.46 + 0.3.

    >>> import torch
    >>> regulariser(torch.tensor([[[3., 4.]], [[4., 3.]], [[0., 5.]]]), floor=0.5)
    tensor(0.7600)
    """
    if len(pooled) < 2:
        raise ValueError(f"the regulariser compares languages: expected at least 2, "
                         f"found {len(pooled)}; name more with --parallel")
    return (xlrs(pooled) - floor).sum().clamp(min=0)


def choose(checkpoints, by="xlrs", floor=FLOOR):
    """Return the checkpoint with the lowest number under by; the earliest of equals.

    checkpoints: dicts with "step" and "xlrs", in [-1, 1], or "dev_loss", nats a token on the source
    language's development set. by="xlrs" is the paper's rule, which needs no target-language data;
    by="dev_loss" the usual one.
    floor: XLRS below it counts as equal to it (ours): lower is no merit there, where momentum alone
    carries XLRS on. -1 leaves the paper's rule as it is.
    Raises ValueError where there is no checkpoint, or one lacks a finite number.

    >>> rows = [{"step": 10, "xlrs": 0.4, "dev_loss": 1}, {"step": 20, "xlrs": 0.1, "dev_loss": 2}]
    >>> choose(rows)["step"], choose(rows, floor=0.5)["step"], choose(rows, by="dev_loss")["step"]
    (20, 10, 10)
    """
    if by not in ("xlrs", "dev_loss"):
        raise ValueError(f"expected by to be 'xlrs' or 'dev_loss', found {by!r}")
    if not checkpoints:
        raise ValueError("expected at least one checkpoint to choose from, found none")
    for row in checkpoints:
        if not math.isfinite(row.get(by, math.nan)):
            raise ValueError(f"checkpoint at step {row.get('step')}: expected a finite {by!r}, "
                             f"found {row.get(by)!r}")
    lowest = floor if by == "xlrs" else -math.inf
    return min(checkpoints, key=lambda row: max(row[by], lowest))
