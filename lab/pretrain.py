"""Makes the toy base, toy/base.pt: a small mT5 that has read pages of the toy world, a fifth of
them in two languages. 9,000 steps take about 30 minutes on one CPU core:

    python lab/pretrain.py > pretrain.jsonl

On the same machine equal seeds give equal bytes. A line of what it prints is a measurement:
development loss in nats a token; XLRS; and retrieval, the share of English stories whose
translation is nearest among 64.

Its task is mT5's own, span corruption: parts of a text are masked, and the target tells them.

Shapes: B sentences, S tokens, D width.
"""

import argparse
import io
import itertools
import json
import math
import os
import random
import sys
from pathlib import Path

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}  # before torch; train.py says why
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the project's folder

import numpy as np
import sentencepiece
import torch
from torch.nn import functional as F
from tqdm import tqdm

import data
import eval as scoring
from data import EOS, PAD
from model import MT5, MT5Config, save
from xlrs import pool, xlrs

LANGUAGES = ["en", *(language for language in data.TOY_LANGUAGES if language != "en")]
UNSEEN = 10**6  # number of a group beyond any step (data.batches): the development set


def main(argv=None):
    """The whole of it: vocabulary, new model, learning, measuring, saving."""
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    stories = data.stories("parallel", 400)
    parallel = {language: [data.toy_pair(story, language, "title")[0] for story in stories]
                for language in LANGUAGES}
    tokenizer = train_tokenizer(vocabulary_text(parallel), vocab_size=3200)
    model = small_model(len(tokenizer))

    def draw(group, count):
        return corruption(group, count, tokenizer, args)

    learn(model, tokenizer, draw, draw(UNSEEN, 256), parallel, args)


def learn(model, tokenizer, draw, unseen, parallel, args):
    """Train model on what draw(group, count) returns, examples; print what is measured; save it.

    unseen: examples to measure the loss on; parallel: {language: sentences}, aligned.
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    model.eval()  # nothing is dropped out, as in mT5's pre-training
    steps = tqdm(range(1, sum(args.steps) + 1), desc="pre-training")
    for step, batch in zip(steps, batches_of(draw, args)):
        optimizer.param_groups[0]["lr"] = args.lr * schedule(step, args.steps)
        loss = model(*batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 1000 == 0 or step == sum(args.steps):
            measured = measure(model, tokenizer, unseen, parallel)
            print(json.dumps({"step": step, **measured}), flush=True)
            save(args.out, model, tokenizer)


def batches_of(draw, args):
    """Yield batches for ever, as data.collate() makes them, those of a group alike in length."""
    for group in itertools.count():
        examples = draw(group, data.GROUP * args.batch_size)
        rng = np.random.default_rng([args.seed, group, 1])
        yield from data.of_similar_length(examples, args.batch_size, rng)


def schedule(step, phases, warmup=20):
    """Return the learning rate's factor: in each phase a linear warm-up, a cosine from 1 to 5 %."""
    if step > phases[0]:
        return schedule(step - phases[0], phases[1:])
    past = max(0, step - warmup) / max(1, phases[0] - warmup)
    return min(1.0, step / warmup) * (0.525 + 0.475 * math.cos(math.pi * past))


def small_model(vocab_size):
    """Return a new MT5 whose attentions start as copiers: O = Vᵀ with orthogonal V (ours).

    What a token attends to then arrives unchanged, so that a small model learns to copy sooner.
    """
    model = MT5(MT5Config(vocab_size, d_model=128, d_kv=32, d_ff=256, num_layers=2,
                          num_decoder_layers=2, num_heads=4))
    for module in model.modules():
        if hasattr(module, "v"):
            torch.nn.init.orthogonal_(module.v.weight)
            module.o.weight.data.copy_(module.v.weight.T)
    return model


@torch.no_grad()
def measure(model, tokenizer, examples, parallel):
    """Return what is known of a model: {"dev_loss", "xlrs": {LANG: …}, "retrieval": {LANG: …}}."""
    vectors = []
    for texts in parallel.values():
        input_ids, mask = data.pad_source([tokenizer.encode(text) for text in texts[:100]])
        vectors.append(pool(model.encode(input_ids, mask), mask))  # (100, D)
    found, others = [retrieval(vectors[0][:64], other[:64]) for other in vectors], [*parallel][1:]
    return {"dev_loss": scoring.mean_loss(model, examples),
            "xlrs": dict(zip(others, xlrs(torch.stack(vectors)).tolist())),
            "retrieval": dict(zip(others, found[1:]))}


def retrieval(source, other):
    """Return the share of sentences whose translation is nearest, in [0, 1].

    source, other (B, D): vectors of parallel sentences, each side centred first: without its mean,
    which is its language's. Chance is 1 / B.
    """
    source, other = (F.normalize(side - side.mean(0), dim=-1) for side in (source, other))
    nearest = (source @ other.T).argmax(dim=1)
    return (nearest == torch.arange(len(source))).float().mean().item()


# The vocabulary.

def vocabulary_text(parallel):
    """Yield the lines that the vocabulary is trained on."""
    for language in LANGUAGES:
        for story in data.stories("pretrain", 3000):
            yield from itertools.chain(*data.tell(story, language).values())
    for sentences in parallel.values():
        yield from sentences[100:]


def train_tokenizer(lines, vocab_size, model_type="bpe"):
    """Return a Tokenizer trained on lines: mT5's layout of ids, at most vocab_size pieces.

    Byte pairs (BPE) are ours: a unigram model ("unigram"), which mT5 has, finds too few pieces in a
    text as repetitive as the toy world. Deterministic.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size,
        model_type=model_type, byte_fallback=True, character_coverage=0.9995, split_digits=True,
        pad_id=PAD, eos_id=EOS, unk_id=data.UNK, bos_id=-1, hard_vocab_limit=False,
        user_defined_symbols=[f"<extra_id_{i}>" for i in range(100)], minloglevel=2)
    return data.Tokenizer(model.getvalue())


# Pages of the toy world.

def page(rng, bilingual):
    """Return a pre-training page of the toy world: [(what it is, sentence), …].

    Half of the pages tell a story, from its title to its summary (its three sentences alone, if it
    is in two languages); the others are collections of titles, summaries and endings without their
    story. With probability bilingual a page has fewer sentences, each followed by its translation;
    the web has such pages by accident, we by design (ours). rng: a numpy generator.
    """
    stream = random.Random(int(rng.integers(2**62)))
    story = data.draw_story(stream)
    while data.split_of(story) != "pretrain":
        story = data.draw_story(stream)
    both = rng.random() < bilingual
    sides = [data.tell(story, lang) for lang in rng.choice(LANGUAGES, 1 + both, replace=False)]
    answers = {task: [(task, i) for i in range(len(sides[0][task]))] for task in data.TASKS}
    if rng.random() < 0.5:
        chosen = [("story", 0), ("story", 1), ("story", 2)]
        if not both:
            title, summary, ending = map(stream.choice, answers.values())
            chosen = [title, *chosen, ending, summary]
    else:
        chosen = stream.sample(sum(answers.values(), []), 4 - both)
    return [(name, side[name][i]) for name, i in chosen for side in sides]


# Span corruption: mT5's pre-training task.

def corruption(group, count, tokenizer, args, density=0.25, whole_sentences=0.4):
    """Return count examples, (source ids, target ids): pages with spans masked.

    On a share of whole_sentences of the pages one or two sentences are masked, on the others random
    spans of density of the ids. A title, summary or ending is masked whole in a collection alone: a
    page that asked for a story's would show what fine-tuning is to teach. In the second phase the
    sentences of stories are not masked whole either, those of collections twice as often: a base
    that has learnt to fill in those answers any story with one. The numbers are ours: mT5 has 0.15
    and no whole sentences. group: the examples depend on its number and args.seed alone.
    """
    rng, examples = np.random.default_rng([args.seed, group]), []
    for _ in range(count):
        names, texts = zip(*page(rng, args.bilingual))
        sentences = [tokenizer.encode(text)[:-1] for text in texts]
        ids = sum(sentences, [])
        maskable = [i for i, name in enumerate(names) if name == "story"] or range(len(names))
        share = whole_sentences
        if group * data.GROUP >= args.steps[0]:
            share = 0 if "story" in names else 2 * share
        if rng.random() < share:
            ends = [0, *itertools.accumulate(map(len, sentences))]
            masked = sorted(rng.choice(maskable, rng.choice([1, 1, 2]), replace=False))
            spans = [(ends[i], ends[i + 1]) for i in masked]
        else:
            spans = random_spans(len(ids), rng, density)
        examples.append(mask_spans(ids, spans, tokenizer.sentinels))
    return examples


def mask_spans(ids, spans, sentinels):
    """Return (source, target): spans of ids stand in the target, sentinels in their place.

    spans: ordered, disjoint (start, end). "a b c d e" with span (1, 3) gives
    "a <extra_id_0> d e </s>" and "<extra_id_0> b c </s>".
    """
    source, target, position = [], [], 0
    for (start, end), sentinel in zip(spans, sentinels, strict=False):
        source += [*ids[position:start], sentinel]
        target += [sentinel, *ids[start:end]]
        position = end
    return source + ids[position:] + [EOS], target + [EOS]


def random_spans(length, rng, density, mean=3.0):
    """Return spans over about density of length ids (from 2), mean ids each (T5, section 3.1.4)."""
    masked = min(max(1, round(length * density)), length - 1)
    count = max(1, min(round(masked / mean), length - masked))
    kept, noise = (partition(total, count, rng) for total in (length - masked, masked))
    ends = np.cumsum(kept + noise)
    return list(zip((ends - noise).tolist(), ends.tolist()))


def partition(total, parts, rng):
    """Return (parts,) random positive lengths that sum to total."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Pre-train the toy base by span corruption.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--out", metavar="FILE", default="toy/base.pt", help="what to write")
    add("--steps", type=int, nargs=2, default=[7000, 2000], metavar="N",
        help="updates in the two phases, see corruption()")
    add("--seed", type=int, default=0, metavar="N", help="of all that is random")
    add("--bilingual", type=float, default=0.2, metavar="SHARE",
        help="share of pages that are in two languages, 0 to 1")
    add("--lr", type=float, default=2e-3, help="AdamW's highest learning rate")
    add("--batch-size", type=int, default=32, metavar="N", help="pages a step")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
