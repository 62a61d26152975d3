"""Text to batches: tokenizer, file readers, batches, span corruption, and the toy world.

Shapes: B sentences, S source tokens, T target tokens.
"""

import configparser
import functools
import json
import os
import random
import re
import zlib
from pathlib import Path

import sentencepiece

PAD, EOS, UNK = 0, 1, 2  # mT5's ids; the decoder also starts with PAD
IGNORE = -100  # label of padding: no loss there


class Tokenizer:
    """mT5's tokenizer: a SentencePiece model, `</s>` after each text, and sentinels.

    model: the bytes of a SentencePiece model (`spiece.model`).
    """

    def __init__(self, model):
        self.model = bytes(model)
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError:
            raise ValueError("expected a SentencePiece model, found other bytes") from None

    def __len__(self):
        return self.pieces.get_piece_size()

    def encode(self, text):
        """Return the ids of text, `</s>` at the end. Line breaks and tabs become spaces."""
        return self.pieces.encode(text) + [EOS]

    def decode(self, ids):
        """Return the text of ids up to `</s>`, padding left out; sentinels are shown as text."""
        ids = [int(i) for i in ids]
        ids = ids[:ids.index(EOS)] if EOS in ids else ids
        return self.pieces.decode([i for i in ids if i not in (PAD, EOS, IGNORE)])

    def sentinels(self):
        """Return the ids of `<extra_id_0>`, `<extra_id_1>`, … as far as the vocabulary has them.

        mT5 spells them with SentencePiece's space sign in front, our toy vocabulary without.
        """
        ids = []
        for i in range(100):
            found = [self.pieces.piece_to_id(f"{space}<extra_id_{i}>") for space in ("▁", "")]
            found = [piece for piece in found if piece != self.pieces.unk_id()]
            if not found:
                break
            ids.append(found[0])
        return ids


def write_file(path, content):
    """Write content to path under a temporary name, flush it to disk, then rename it.

    content: bytes, str, or a function that writes into the open binary file it is given.
    A reader sees the old file or the whole new one, never a part. Raises OSError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# The toy world: stories from one small causal generator, told in each language of toy/*.ini.

TOY = Path(__file__).parent / "toy"
TOY_LANGUAGES = sorted(path.stem for path in TOY.glob("*.ini"))
TASKS = ("title", "summary", "completion")
SPLITS = ("pretrain", "train", "dev", "test", "parallel")
# What happens → how it ends, when somebody helped and when nobody could.
PLOTS = {plot: ends for ends, plots in {
    ("relief", "grief"): ("lost", "forgotten", "stolen", "broken"),
    ("joy", "regret"): ("expensive", "old", "painted", "drawn"),
}.items() for plot in plots}
CAST = ("object", "helper", "place", "day", "link")  # entries of one word or phrase
SLOT = re.compile(r"\{(\w+)(?:\.(\w+))?(?:\?([^{}]*))?\}")


@functools.cache
def world(language):
    """Return the toy world's lexicon and patterns in a language, {section: {key: …}}.

    An entry of the lexicon is a dict of its forms, the first also under "", and "agree": the
    index of its gender in "mfn". A pattern is a string with slots; toy/en.ini explains them.
    """
    if language not in TOY_LANGUAGES:
        raise ValueError(f"expected a toy language, one of {' '.join(TOY_LANGUAGES)}, "
                         f"found {language!r}; for a file write {language}=FILE")
    parser = configparser.ConfigParser(delimiters=("=",), interpolation=None)
    parser.read(TOY / f"{language}.ini", encoding="utf-8")
    sections = {name: dict(section) for name, section in parser.items()}
    for name in CAST:
        forms = sections[name].pop("forms").split(" | ")
        sections[name] = [lexical_entry(forms, line) for line in sections[name].values()]
    sections["hero"] = [{"": name, "agree": i} for i, gender in enumerate("mf")
                        for name in sections["hero"][gender].split()]
    return sections


def lexical_entry(forms, line):
    entry = dict(zip(forms, line.split(" | "), strict=True))
    agree = "mfn".index(entry.pop("agree", "m"))
    return {**entry, "": next(iter(entry.values())), "agree": agree}


def fill(pattern, words):
    """Return pattern with its slots filled from words, the slots inside the words too."""
    def one(slot):
        name, form, choices = slot.groups()
        if choices is not None:
            return choices.split("|")[words[name]["agree"]]
        return fill(words[name][form or ""], words)
    return SLOT.sub(one, pattern)


def stories(split, count, seed=0):
    """Return count distinct stories of a split, each a dict of choices that no language changes.

    A story belongs to one split alone, by a checksum of its choices, so that no seed can put a
    test story into training. split: one of SPLITS.
    """
    rng = random.Random(f"{split} {seed}")
    found = {}
    while len(found) < count:
        story = draw_story(rng)
        key = json.dumps(story)
        if SPLITS[zlib.crc32(key.encode()) % len(SPLITS)] == split:
            found[key] = story
    return list(found.values())


def draw_story(rng):
    """Return one story: what the causal generator chose. rng: a random.Random."""
    english = world("en")
    story = {name: rng.randrange(len(english[name])) for name in ("hero", *CAST)}
    return story | {"plot": rng.choice(list(PLOTS)), "helped": rng.random() < 0.5,
                    "n": rng.randint(2, 9), "opening": rng.choice(["opening_1", "opening_2"])}


def tell(story, language):
    """Return the story in a language: "title", "summary", "ending" and "sentences", a list of 3."""
    lexicon = world(language)
    plot, frame = lexicon[story["plot"]], lexicon["frame"]
    words = {name: {"": pattern} for name, pattern in lexicon["phrases"].items()}
    words |= {name: lexicon[name][story[name]] for name in ("hero", *CAST)}
    words |= {"plot": {"": plot["plot"]}}
    words |= {"n": {"": str(story["n"]), "agree": int(story["n"] > 4)}}  # Russian 2–4, 5–9
    helped = story["helped"]
    patterns = [frame[story["opening"]], plot["problem"], plot["good" if helped else "bad"],
                plot["title"], frame["summary_good" if helped else "summary_bad"],
                frame[PLOTS[story["plot"]][not helped]]]
    told = [fill(pattern, words) for pattern in patterns]
    told = [text[0].upper() + text[1:] for text in told]
    return {"sentences": told[:3], "title": told[3], "summary": told[4], "ending": told[5]}


def toy_pair(story, language, task):
    """Return (source, target) of a story for a task, one of TASKS."""
    told = tell(story, language)
    opening = " ".join(told["sentences"])
    if task == "completion":
        return opening, told["ending"]
    return f"{opening} {told['ending']}", told[task]
