"""Makes a base and tasks of real text: human captions of pictures, in English, German, French and
Czech (Multi30k: Elliott et al., 2016, 2017; Barrault et al., 2018).

    git clone https://github.com/multi30k/dataset multi30k
    python lab/captions.py multi30k FOLDER

writes FOLDER/base.pt, a small mT5 that has read the captions of 22,000 pictures, and tasks made of
those of the other pictures: FOLDER/TASK.PART.LANG.jsonl (source, target) and, to measure XLRS on,
FOLDER/parallel.LANG, in 80 minutes on one core. `bash lab/grid.sh FOLDER` fine-tunes on them, and
lab/results says what comes out. No licence lets us ship the captions or what was trained on them.
"""

import argparse
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pretrain  # it sets what must be set before torch, and the path to our files
import torch

import data
import eval as scoring
from data import EOS

LANGUAGES = ["en", "de", "fr", "cs"]
PARALLEL = 600  # lines of `val` to measure XLRS on and to regularise; the others are to develop on


def main(argv=None):
    args = parse_args(argv)
    captions, descriptions = {}, {}
    for part, one, two in (("train", "train", "train"), ("val", "val", "val"),
                           ("test", "test_2016_flickr", "test_2016")):
        captions[part] = {lang: read(args.multi30k / f"data/task1/raw/{one}.{lang}.gz")
                          for lang in LANGUAGES}
        descriptions[part] = {lang: list(zip(*(
            read(args.multi30k / f"data/task2/raw/{two}.{i}.{lang}.gz") for i in range(1, 6))))
            for lang in ("en", "de")}
    args.folder.mkdir(parents=True, exist_ok=True)
    write_tasks(captions, descriptions, args)
    make_base(captions, descriptions, args)


def read(path):
    """Return the lines of a text file, single spaces between words."""
    return [" ".join(line.split()) for line in data.each_line(path)]


# What follows takes captions, {part: {language: [caption, …]}}, aligned by line, which were
# translated from English; and descriptions, {part: {language: [five descriptions, …]}}, of the
# same pictures, but independent of each other.

# Tasks: functions of what is known of a picture in one language to (source, target), or None.

def completion(caption):
    """The first half of a caption, and the rest."""
    words = caption.split()
    half = len(words) // 2
    return (" ".join(words[:half]), " ".join(words[half:])) if half > 2 else None


def keywords(caption):
    """The four longest words of a caption in a random order, and the caption."""
    words = {word.strip(".,;:!?()\"'") for word in caption.split()}
    words = sorted(words, key=lambda word: (len(word), word))[-4:]
    random.Random(caption).shuffle(words)
    return (" ".join(words), caption) if len(caption.split()) > 5 else None


def summary(descriptions):
    """The three longest of a picture's five descriptions, and the shortest."""
    *_, third, second, first = shortest, *_ = sorted(descriptions, key=len)
    return (" ".join([first, second, third]), shortest) if shortest else None


def write_tasks(captions, descriptions, args):
    """Write each task's pairs, to train, develop and test on, and the parallel lines."""
    for task in (completion, keywords, summary):
        sides = descriptions if task is summary else captions
        for lang in sides["train"]:
            parts = {"train": sides["train"][lang][args.read:], "test": sides["test"][lang],
                     "dev": sides["val"][lang][PARALLEL:]}
            for part, texts in parts.items():
                pairs = filter(None, map(task, texts))
                data.write_file(args.folder / f"{task.__name__}.{part}.{lang}.jsonl", "".join(
                    json.dumps({"source": source, "target": target}, ensure_ascii=False) + "\n"
                    for source, target in pairs))
    for lang in LANGUAGES:
        lines = captions["val"][lang][:PARALLEL]
        data.write_file(args.folder / f"parallel.{lang}", "".join(line + "\n" for line in lines))


# The base.

def make_base(captions, descriptions, args):
    """Pre-train a small mT5 on what is read; print measurements; save it."""
    torch.manual_seed(args.seed)
    read = {lang: texts[:args.read] for lang, texts in captions["train"].items()}
    tokenizer = pretrain.train_tokenizer(itertools.chain(*read.values()), 4000, "unigram")

    def encode(texts):
        ids = (tokenizer.encode(text)[:-1] for text in texts)
        return [some for some in ids if len(some) > 1]  # one to mask, one to keep

    seen = {lang: [encode([caption, *five]) for caption, five in zip(
        texts, descriptions["train"].get(lang, itertools.repeat(())))]
        for lang, texts in read.items()}
    val = {lang: [encode([text]) for text in texts] for lang, texts in captions["val"].items()}
    model = pretrain.small_model(len(tokenizer))

    def draw(group, count):
        rng = np.random.default_rng([args.seed, group])
        return [example(seen, rng, tokenizer.sentinels) for _ in range(count)]

    rng = np.random.default_rng([args.seed, pretrain.UNSEEN])
    unseen = [example(val, rng, tokenizer.sentinels, page_is_target=0) for _ in range(512)]
    pretrain.learn(model, tokenizer, draw, unseen, captions["val"], args)
    print(json.dumps({"right language, %": {
        lang: fills_in_its_language(model, tokenizer, lang, val[lang][-200:], rng)
        for lang in LANGUAGES}}))


def fills_in_its_language(model, tokenizer, lang, captions, rng):
    """Return the share of captions, %, that the model fills in their language.

    Half of a caption's pieces are masked, as one span; the identifier expects all languages.
    """
    masked = []
    for ids, in captions:
        start = int(rng.integers(1, 1 + len(ids) // 2))
        spans = [(start, start + len(ids) // 2)]
        masked.append(pretrain.mask_spans(ids, spans, tokenizer.sentinels)[0])
    found = model.generate(*data.pad_source(masked), max_new_tokens=32).tolist()
    codes = scoring.identifier().predict([tokenizer.decode(ids) for ids in found], LANGUAGES)
    return 100 * codes.count(lang) / len(codes)


def page(texts, rng):
    """Return a page, [ids of a text, …]; texts: {language: [[caption, description, …], …]}, ids.

    One in five has a picture's caption in two languages, as in the toy: the web has such pages by
    accident, we by design (ours). Seven in ten have texts of two or three pictures, each in another
    language, so that a span's language is its neighbours', not the page's. The others are one or
    two texts in one language. A text is a caption or, in English and German, a description.
    """
    def one(lang, picture):
        return texts[lang][picture][rng.integers(len(texts[lang][picture]))]

    kind, count = rng.random(), int(rng.integers(1, 3))
    pictures = [int(i) for i in rng.integers(len(texts["en"]), size=3)]
    first, *others = (str(lang) for lang in rng.permutation(LANGUAGES))
    if kind < 0.2:
        return [texts[lang][pictures[0]][0] for lang in (first, others[0])]
    if kind < 0.9:
        return list(map(one, others, pictures[:count + 1]))
    return [one(first, i) for i in pictures[:count]]


def example(texts, rng, sentinels, page_is_target=0.5):
    """Return (source ids, target ids): a page with 30 % of its pieces masked, in short spans.

    Half of the targets are the page itself (BART's denoising: Lewis et al., 2020), which teaches to
    attend to the source; the others are mT5's, the spans. No page shows a task.
    """
    ids = sum(page(texts, rng), [])
    spans = pretrain.random_spans(len(ids), rng, density=0.3, mean=rng.choice([2., 3., 6.]))
    source, target = pretrain.mask_spans(ids, spans, sentinels)
    return source, ids + [EOS] if rng.random() < page_is_target else target


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Make a base and tasks of Multi30k's captions.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("multi30k", type=Path, help="a clone of https://github.com/multi30k/dataset")
    add("folder", type=Path, help="where base and tasks go")
    add("--read", type=int, default=22000, metavar="N", help="pictures that are not for the tasks")
    add("--steps", type=int, default=14000, metavar="N", help="updates of the base")
    add("--seed", type=int, default=0, metavar="N", help="of all that is random")
    add("--lr", type=float, default=2e-3, help="AdamW's highest learning rate")
    add("--batch-size", type=int, default=48, metavar="N", help="pages a step")
    args = parser.parse_args(argv)
    if not (args.multi30k / "data/task1/raw").is_dir():
        parser.error(f"{args.multi30k}: expected a clone of Multi30k, found no data/task1/raw")
    args.steps, args.out = [args.steps], args.folder / "base.pt"
    return args


if __name__ == "__main__":
    main()
