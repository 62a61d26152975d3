"""Text to batches: batches, readers of users' files, the tokenizer, and the toy world.

Shapes: B sentences, S source tokens, T target tokens, L languages.
"""

import configparser
import csv
import functools
import itertools
import json
import os
import random
import re
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import sentencepiece
import torch

PAD, EOS, UNK = 0, 1, 2  # mT5's ids; the decoder also starts with PAD
IGNORE = -100  # label of padding: no loss there
GROUP = 8  # batches whose examples are sorted by length together


# Batches.

def batches(pairs, tokenizer, args, start=0):
    """Yield batches for ever, as collate() makes them, from number start on.

    Batch k depends on args.seed and k alone. Passes over all pairs, each in a new order.
    pairs: [(source, target), …], texts; args: batch_size, seed, max_source, max_target.
    """
    group, done = divmod(start, GROUP)
    size = GROUP * args.batch_size
    order = itertools.islice(passes(len(pairs), args.seed), group * size, None)
    while True:
        examples = [encode_pair(pairs[i], tokenizer, args) for i in itertools.islice(order, size)]
        rng = np.random.default_rng([args.seed, group])
        yield from of_similar_length(examples, args.batch_size, rng)[done:]
        group, done = group + 1, 0


def passes(count, seed):
    """Yield the numbers below count for ever, in each pass in another order."""
    for epoch in itertools.count():
        yield from np.random.default_rng([seed, epoch, 1]).permutation(count)


def of_similar_length(examples, batch_size, rng):
    """Return the batches of examples sorted by length, little of them padding; then shuffled."""
    examples = sorted(examples, key=lambda pair: len(pair[0]))
    starts = rng.permutation(range(0, len(examples), batch_size))
    return [collate(examples[i:i + batch_size]) for i in starts]


def parallel_batches(parallel, tokenizer, args, start=0):
    """Yield parallel batches for ever, from number start on: a list of (input_ids, mask).

    input_ids (B, S) int64, mask (B, S) bool: args.reg_batch sentences in one language, the source
    first; S differs by language. parallel: {language: sentences}, aligned, the source first.
    """
    lines = len(next(iter(parallel.values())))
    for step in itertools.count(start):
        rng = np.random.default_rng([args.seed, step, 2])
        chosen = rng.integers(lines, size=args.reg_batch)
        yield [pad_source([tokenizer.encode(sentences[i], args.max_source) for i in chosen])
               for sentences in parallel.values()]


def encode_pair(pair, tokenizer, args):
    """Return (source ids, target ids) of a pair of texts, cut to the lengths of args."""
    source, target = pair
    return (tokenizer.encode(source, args.max_source), tokenizer.encode(target, args.max_target))


def collate(examples):
    """Return (input_ids (B, S), mask (B, S), labels (B, T)) of (source ids, target ids) pairs.

    mask is True at real tokens; labels are −100 at padding, where there is no loss.
    """
    sources, targets = zip(*examples)
    return *pad_source(sources), pad(targets, IGNORE)


def pad_source(sequences):
    """Return (input_ids (B, S) int64, mask (B, S) bool, True at real tokens) of lists of ids."""
    input_ids = pad(sequences, PAD)
    return input_ids, input_ids != PAD


def pad(sequences, value):
    """Return (B, longest) int64: sequences of ids filled up with value."""
    width = max(map(len, sequences))
    return torch.tensor([ids + [value] * (width - len(ids)) for ids in sequences])


# The texts of a run: LANG alone means the toy world, LANG=FILE a file, LANG=FILE,FILE two files
# that are aligned by line.

def languages(args):
    """Return the languages that a run's arguments name, the source first."""
    words = [*args.train, *(args.test or ()), *(args.parallel or ())]
    return list(dict.fromkeys(word.partition("=")[0] for word in words))


def files_by_language(words):
    """Return {language: path, or None for the toy world} of words, LANG=FILE or LANG alone."""
    paths = {}
    for word in words:
        language, equals, path = word.partition("=")
        if not language or (equals and not path) or language in paths:
            found = " ".join(words)
            raise ValueError(f"expected each language once, as LANG or LANG=FILE, found {found}")
        paths[language] = path or None
    return paths


def load_texts(args):
    """Return the texts of a run: train [(source, target), …]; dev and test {language: such pairs};
    parallel and held_out {language: sentences}, to regularise on and to measure on."""
    train = task_pairs(args.train, args, "train", args.train_size, args.seed)
    parallel, held_out = parallel_texts(args) if args.parallel else ({}, {})
    return SimpleNamespace(train=list(itertools.chain(*train.values())), parallel=parallel,
                           dev=task_pairs(args.dev, args, "dev", args.eval_size),
                           test=task_pairs(args.test, args, "test", args.test_size),
                           held_out=held_out)


def task_pairs(words, args, split, count, seed=1):
    """Return {language: [(source, target), …]}, the first count of a file or of the toy world.

    count None: a file whole; of the toy world 4,000 stories to train on, else 200.
    args: task, of the toy world; fields, "SOURCE,TARGET", the columns of files.
    """
    pairs, toy_count = {}, count or (4000 if split == "train" else 200)
    for language, path in files_by_language(words or ()).items():
        if path:
            pairs[language] = read_pairs(path, args.fields.split(","))[:count]
        else:
            pairs[language] = [toy_pair(story, language, args.task)
                               for story in stories(split, toy_count, seed)]
    return pairs


def parallel_texts(args):
    """Return (to regularise on, to measure on), each {language: sentences}, aligned, source first.

    Of the toy world these are sources of the task. At most args.eval_size sentences, and at most
    half of them, are to measure on.
    """
    paths = files_by_language(args.parallel)
    source = languages(args)[0]
    if source not in paths or len(paths) < 2 or len(set(map(bool, paths.values()))) > 1:
        raise ValueError(f"--parallel: expected the source {source} and others, all of the toy "
                         f"world or all LANG=FILE, found {' '.join(args.parallel)}")
    paths = {source: paths.pop(source), **paths}
    if paths[source] is None:
        drawn = stories("parallel", 300 + args.eval_size)
        texts = {lang: [toy_pair(story, lang, args.task)[0] for story in drawn] for lang in paths}
    else:
        texts = read_parallel(paths)
    held = min(args.eval_size, len(texts[source]) // 2)
    if held == 0:
        raise ValueError("--parallel: expected at least two aligned lines, found one")
    return ({lang: sentences[held:] for lang, sentences in texts.items()},
            {lang: sentences[:held] for lang, sentences in texts.items()})


# Readers and the writer of files. A mistake is a ValueError that names the file and, where there
# is one, the line; a file that cannot be opened is an OSError.

def read_pairs(path, fields=("source", "target")):
    """Return [(source, target), …] of a file: one pair an object, a row, or a line.

    path: `.jsonl`, `.tsv` or `.csv` with a header, or "SOURCE_FILE,TARGET_FILE" of aligned lines.
    fields: the names of the source's and the target's column.
    """
    path = str(path)
    if not path.endswith((".jsonl", ".tsv", ".csv")):
        source, comma, target = path.partition(",")
        if not comma:
            raise ValueError(f"{path}: expected a name that ends in .jsonl, .tsv or .csv, "
                             "or two aligned text files as SOURCE_FILE,TARGET_FILE")
        return list(zip(*read_parallel({"source": source, "target": target}).values()))
    pairs = []
    for line, row in json_rows(path) if path.endswith(".jsonl") else table_rows(path):
        pair = tuple(row.get(field) for field in fields)
        for field, text in zip(fields, pair):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{path}:{line}: expected text as {field!r}, found {text!r} among "
                                 f"{', '.join(row)}; mend or remove the line, or see --fields")
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path}: expected at least one pair, found none")
    return pairs


def json_rows(path):
    """Yield (line number, object) of a file with a JSON object a line; blank lines are left out."""
    for number, line in enumerate(each_line(path), start=1):
        if not line.strip():
            continue
        try:
            row = dict(json.loads(line))
        except (ValueError, TypeError):
            found = repr(line[:40])
            raise ValueError(f"{path}:{number}: expected a JSON object, found {found}") from None
        yield number, row


def table_rows(path):
    """Yield (line number, {column: text}) of a table with a header; line breaks may be quoted."""
    csv.field_size_limit(sys.maxsize)  # a text may be as long as the file
    separator = "\t" if path.endswith(".tsv") else ","
    lines = (line + "\n" for line in each_line(path))
    reader = csv.DictReader(lines, delimiter=separator, strict=True)
    try:
        for row in reader:
            texts = list(map(str, row.values()))
            if None in row:  # what is beyond the header's last column
                raise csv.Error(f"more than the header's {len(reader.fieldnames)} columns")
            if separator == "\t" and any("\t" in text and "\n" in text for text in texts):
                raise csv.Error("a literal quote, it seems: it opens a field and closes rows later")
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.reader.line_num}: expected a row of the table, found "
                         f"{error}; put a text with quotes, line breaks or the separator in it "
                         "between quotes and double its own quotes") from None


def read_parallel(paths):
    """Return {language: sentences} of files that are aligned line by line.

    paths: {language: path}. A line that is blank in one file is left out in all.
    """
    texts = {language: list(each_line(path)) for language, path in paths.items()}
    if len(set(map(len, texts.values()))) > 1:
        found = ", ".join(f"{paths[language]} has {len(texts[language])}" for language in texts)
        raise ValueError(f"expected aligned files with equally many lines, found {found}")
    rows = [row for row in zip(*texts.values()) if all(map(str.strip, row))]
    if not rows:
        raise ValueError(f"{' and '.join(paths.values())}: expected aligned text, found none")
    return dict(zip(texts, zip(*rows)))


def each_line(path):
    """Yield the lines of a UTF-8 text file, split at line feeds alone, without carriage returns."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: expected UTF-8, found byte "
                                 f"0x{raw[error.start]:02x}; convert the file") from None
            yield line.removesuffix("\n").removesuffix("\r")


def write_file(path, content):
    """Write content to path under a temporary name, flush it to disk, then rename it.

    content: bytes, str, or a function that writes into the open binary file it is given.
    A reader sees the old file or the whole new one, never a part. Raises OSError, path named.
    """
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save puts a RuntimeError over the disk's
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be written ({error.__context__ or error}); what stood "
                      "there still does; make room, or write elsewhere") from None


class Tokenizer:
    """mT5's tokenizer: a SentencePiece model, `</s>` after each text, and sentinels.

    model: the bytes of a SentencePiece model (`spiece.model`). Raises ValueError for other bytes.
    sentinels: the ids of `<extra_id_0>`, `<extra_id_1>`, … as far as the vocabulary has them.
    """

    def __init__(self, model):
        self.model = bytes(model)
        self.pieces = sentencepiece.SentencePieceProcessor()
        try:
            self.pieces.load_from_serialized_proto(self.model)
        except RuntimeError:
            raise ValueError("expected a SentencePiece model, found other bytes") from None
        found = self.pieces.pad_id(), self.pieces.eos_id(), self.pieces.unk_id()
        if found != (PAD, EOS, UNK):
            raise ValueError(f"expected mT5's ids of padding, end and unknown, {(PAD, EOS, UNK)}, "
                             f"found {found}: a SentencePiece model, but another one")
        # mT5 spells them with SentencePiece's space sign in front, our toy vocabulary without.
        ids = (max(self.pieces.piece_to_id(f"{space}<extra_id_{i}>") for space in ("▁", ""))
               for i in range(100))
        self.sentinels = [piece for piece in ids if piece != UNK]

    def __len__(self):
        return self.pieces.get_piece_size()

    def encode(self, text, longest=None):
        """Return the ids of text, `</s>` at the end. Line breaks and tabs become spaces.

        Where there are more than longest ids, `</s>` included, the text's end is cut off.
        """
        ids = self.pieces.encode(text)
        return ids[:longest and longest - 1] + [EOS]

    def decode(self, ids):
        """Return the text of ids up to `</s>`; padding and sentinels are no text.

        Ids without a piece are left out too: mT5 has 12 more rows in its embedding than pieces.
        """
        ids = ids[:ids.index(EOS)] if EOS in ids else ids
        left_out = {PAD, *self.sentinels}
        return self.pieces.decode([i for i in ids if i < len(self) and i not in left_out])

    def needed(self, texts):
        """Return the sorted ids that texts need, and those that any text may need.

        The latter are single characters, bytes, special pieces and sentinels. All but the
        characters have a score of 0, which no learnt piece of mT5 has.
        """
        ids = {i for i in range(len(self))
               if self.pieces.get_score(i) == 0 or len(self.pieces.id_to_piece(i)) == 1}
        for text in texts:
            ids.update(self.pieces.encode(text))
        return sorted(ids)

    def only(self, ids):
        """Return a tokenizer with these pieces only, renumbered from 0 in the order they stand.

        A text whose pieces are all kept is segmented as before: the scores stay. A model file is
        a protobuf message, which is a row of fields: a key byte, a length, that many bytes. Key 10
        is a piece, in the order of ids; what else there is (the normaliser) is copied.
        """
        ids, model, start, piece = set(ids), bytearray(), 0, 0
        while start < len(self.model):
            end, length, shift = start + 1, 0, 0
            while True:  # the length: seven bits a byte, lowest first, the top bit for "more"
                length |= (self.model[end] & 127) << shift
                shift, end = shift + 7, end + 1
                if self.model[end - 1] < 128:
                    break
            if self.model[start] != 10 or piece in ids:
                model += self.model[start:end + length]
            piece += self.model[start] == 10
            start = end + length
        return Tokenizer(model)


# The toy world: stories from one small causal generator, told in each language of toy/*.ini.

TOY = Path(__file__).resolve().parent / "toy"
TOY_LANGUAGES = sorted(path.stem for path in TOY.glob("*.ini"))
TASKS = ("title", "summary", "completion")
SPLITS = ("pretrain", "train", "dev", "test", "parallel")
PLOTS = ("lost", "forgotten", "stolen", "broken", "expensive", "old", "painted", "drawn")
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
    """Return the entry of a line of toy/*.ini, see `world`; forms: the names of its columns."""
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
        if split_of(story) == split:
            found[json.dumps(story)] = story
    return list(found.values())


def split_of(story):
    """Return the split, one of SPLITS, that a story belongs to."""
    return SPLITS[zlib.crc32(json.dumps(story).encode()) % len(SPLITS)]


def draw_story(rng):
    """Return one story: what the causal generator chose. rng: a random.Random."""
    english = world("en")
    story = {name: rng.randrange(len(english[name])) for name in ("hero", *CAST)}
    return story | {"plot": rng.choice(PLOTS), "helped": rng.random() < 0.5,
                    "n": rng.randint(2, 9), "opening": rng.choice(["opening_1", "opening_2"])}


def tell(story, language):
    """Return the story in a language: "story", its three sentences; and for each task all answers
    that are right."""
    lexicon, side = world(language), "good" if story["helped"] else "bad"
    plot, frame = lexicon[story["plot"]], lexicon["frame"]
    words = {name: {"": pattern} for name, pattern in (lexicon["phrases"] | plot).items()}
    words |= {name: lexicon[name][story[name]] for name in ("hero", *CAST)}
    words["outcome"] = {"": plot[side]}
    words["n"] = {"": str(story["n"]), "agree": int(story["n"] > 4)}  # Russian 2–4, 5–9
    patterns = {"story": [frame[story["opening"]], plot["problem"], plot[side]],
                "title": frame["title"].split("\n")[1:],
                "summary": frame[f"summary_{side}"].split("\n")[1:],
                "completion": frame[f"ending_{side}"].split("\n")[1:]}
    told = {name: [fill(pattern, words) for pattern in lines] for name, lines in patterns.items()}
    return {name: [text[0].upper() + text[1:] for text in texts] for name, texts in told.items()}


def toy_pair(story, language, task):
    """Return (source, target) of a story for a task, one of TASKS.

    The target is one of several right answers. A story draws it by lot, the same in each language,
    and nothing in the source tells which.
    """
    told = tell(story, language)
    if task not in TASKS:
        raise ValueError(f"{language}: expected {language}=FILE, as for the other texts, or "
                         f"--task, one of {' '.join(TASKS)}")
    return " ".join(told["story"]), random.Random(f"{task} {story}").choice(told[task])
