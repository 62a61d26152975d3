"""Text to batches: batches, readers of users' files, the tokenizer, and the toy world.

Shapes: B sentences, S source tokens, T target tokens, L languages.
"""

import configparser
import csv
import functools
import gzip
import itertools
import json
import os
import random
import re
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
    first, size = start // GROUP, GROUP * args.batch_size
    order = itertools.islice(passes(len(pairs), args.seed), first * size, None)
    for group in itertools.count(first):
        examples = [encode_pair(pairs[i], tokenizer, args) for i in itertools.islice(order, size)]
        rng = np.random.default_rng([args.seed, group])
        # Of the first group only the batches from start on.
        yield from of_similar_length(examples, args.batch_size, rng)[max(0, start - group * GROUP):]


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
    """Yield parallel batches for ever, from number start on: (input_ids, mask).

    input_ids (B, L, S) int64, mask (B, L, S) bool: args.reg_batch sentences, each in every
    language, the source first. parallel: {language: sentences}, aligned, the source first.
    """
    rows = list(zip(*parallel.values()))  # each a sentence in every language
    for step in itertools.count(start):
        drawn = np.random.default_rng([args.seed, step, 2]).integers(len(rows), size=args.reg_batch)
        ids = [tokenizer.encode(text, args.max_source) for i in drawn for text in rows[i]]
        yield tuple(tensor.unflatten(0, (-1, len(parallel))) for tensor in pad_source(ids))


def encode_pair(pair, tokenizer, args):
    """Return (source ids, target ids) of a pair of texts, cut to the lengths of args."""
    return tokenizer.encode(pair[0], args.max_source), tokenizer.encode(pair[1], args.max_target)


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
    """Return (B, longest) int64: sequences of ids, a row each, filled up with value."""
    return torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, sequences)), True, value)


# The texts of a run: LANG alone means the toy world, LANG=FILE a file, LANG=FILE,FILE two files
# that are aligned by line.

def languages(args):
    """Return the languages that a run's arguments name, the source first."""
    words = [*args.train, *(args.test or ()), *(args.parallel or ())]
    return list(dict.fromkeys(word.partition("=")[0] for word in words))


def files_by_language(words):
    """Return {language: path, or None for the toy world} of words, LANG=FILE or LANG alone."""
    paths = dict(word.partition("=")[::2] for word in words)
    if len(paths) < len(words) or "" in paths or any(word.endswith("=") for word in words):
        raise ValueError(f"expected each language once, as LANG or LANG=FILE, found {words}")
    return {language: path or None for language, path in paths.items()}


def load_texts(args):
    """Return the texts of a run: train [(source, target), …]; dev and test {language: such pairs};
    parallel and held_out {language: sentences}, to regularise on and to measure on."""
    train = task_pairs(args.train, args, "train", args.train_size, args.seed)
    parallel, held_out = parallel_texts(args) if args.parallel else ({}, {})
    return SimpleNamespace(train=sum(train.values(), []), parallel=parallel, held_out=held_out,
                           dev=task_pairs(args.dev, args, "dev", args.eval_size),
                           test=task_pairs(args.test, args, "test", args.test_size))


def task_pairs(words, args, split, count, seed=1):
    """Return {language: [(source, target), …]}, the first count of a file or of the toy world.

    count None: a file whole; of the toy world 4,000 stories to train on, else 200.
    args: task, of the toy world; fields, "SOURCE,TARGET", the columns of files.
    """
    pairs, size = {}, count or (4000 if split == "train" else 200)  # size: toy stories
    for lang, path in files_by_language(words or ()).items():
        if path:
            pairs[lang] = read_pairs(path, args.fields.partition(",")[::2])[:count]
        else:
            pairs[lang] = [toy_pair(story, lang, args.task) for story in stories(split, size, seed)]
    return pairs


def parallel_texts(args):
    """Return (to regularise on, to measure on), each {language: sentences}, aligned, source first.

    Of the toy world these are sources of the task. At most args.eval_size sentences, and at most
    half of them, are to measure on.
    """
    source, paths = languages(args)[0], files_by_language(args.parallel)
    if source not in paths or len(paths) < 2 or len(set(map(bool, paths.values()))) > 1:
        raise ValueError(f"--parallel: expected the source {source} and others, all of the toy "
                         f"world or all LANG=FILE, found {args.parallel}")
    paths = {source: paths[source], **paths}
    if paths[source] is None:
        drawn = stories("parallel", 300 + args.eval_size)
        texts = {lang: [toy_pair(story, lang, args.task)[0] for story in drawn] for lang in paths}
    else:
        texts = read_parallel(paths)
    held = min(args.eval_size, len(texts[source]) // 2)
    if held == 0:
        raise ValueError("--parallel: expected at least two lines of aligned text, found fewer")
    return ({lang: sentences[held:] for lang, sentences in texts.items()},
            {lang: sentences[:held] for lang, sentences in texts.items()})


# Readers of files, which may be packed in .gz, and the writer. A mistake is a ValueError that names
# the file and, where there is one, the line; a file that cannot be opened is an OSError.

TABLES = (".jsonl", ".tsv", ".csv", ".jsonl.gz", ".tsv.gz", ".csv.gz")  # with named columns


def read_pairs(path, fields=("source", "target")):
    """Return [(source, target), …] of a file: one pair an object, a row, or a line.

    path: `.jsonl`, `.tsv` or `.csv` with a header, or "SOURCE_FILE,TARGET_FILE" of aligned lines.
    fields: the names of the source's and the target's column.
    """
    path, pairs = str(path), []
    for line, row in each_row(path) if path.endswith(TABLES) else ():
        for field in fields:
            text = row.get(field)
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{path}:{line}: expected text as {field!r}, found {text!r:.80}; "
                                 f"mend or remove it, or choose --fields from {', '.join(row):.99}")
        pairs.append(tuple(row[field] for field in fields))
    if not path.endswith(TABLES):
        if "," not in path:
            raise ValueError(f"{path}: expected .jsonl, .tsv, .csv, or SOURCE_FILE,TARGET_FILE")
        pairs = list(zip(*read_parallel(dict(enumerate(path.split(",", 1)))).values()))
    if not pairs:
        raise ValueError(f"{path}: expected at least one pair, found none")
    return pairs


def each_row(path):
    """Return an iterator of (line number, {column: value}); other files than TABLES have one."""
    if path.endswith(TABLES):
        return json_rows(path) if ".jsonl" in path[-9:] else table_rows(path)
    return ((number, {"": line}) for number, line in enumerate(each_line(path), start=1))


def json_rows(path):
    """Yield (line number, object) of a file with a JSON object a line; blank lines are left out."""
    for number, line in enumerate(each_line(path), start=1):
        if line.strip():
            try:
                row = dict(json.loads(line))
                json.dumps(row, ensure_ascii=False).encode()  # JSON may have half of an emoji
            except (ValueError, TypeError, RecursionError) as why:
                raise ValueError(f"{path}:{number}: expected a JSON object: {why!s:.99}") from None
            yield number, row


def table_rows(path):
    """Yield (line number, {column: text}) of a table with a header; line breaks may be quoted."""
    csv.field_size_limit(2**31 - 1)  # instead of 131,072 characters
    separator = "\t" if ".tsv" in path[-7:] else ","
    lines = (line + "\n" for line in each_line(path))
    table = csv.DictReader(lines, delimiter=separator, restval="", strict=True)
    try:
        for row in table:
            if None in row:  # what is beyond the header's last column
                raise csv.Error(f"more than the header's {len(table.fieldnames)} columns")
            if separator == "\t" and any("\t" in text and "\n" in text for text in row.values()):
                raise csv.Error("a quote that closes rows later, perhaps a literal one")
            yield table.line_num, row
    except csv.Error as error:
        found = "a carriage return inside a row" if "new-line" in str(error) else error
        raise ValueError(f"{path}:{table.reader.line_num}: expected a row, found {found}; put each "
                         "text between quotes and double its own quotes") from None


def read_parallel(paths):
    """Return {language: sentences} of files that are aligned line by line.

    paths: {language: path}. A line that is blank in one file is left out in all.
    """
    texts = {language: read_lines(path) for language, path in paths.items()}
    if len(set(map(len, texts.values()))) > 1:
        found = ", ".join(f"{paths[language]} has {len(texts[language])}" for language in texts)
        raise ValueError(f"expected aligned files with equally many lines, found {found}")
    full = [all(map(str.strip, row)) for row in zip(*texts.values())]
    return {language: tuple(itertools.compress(texts[language], full)) for language in texts}


def read_lines(path):
    """Return the texts of a file that has one a line; ValueError for a table, or JSON's start."""
    lines = list(each_line(path))
    if str(path).lower().endswith(TABLES) or re.match(r'\s*\[?\{\s*("|$)', "".join(lines[:1])):
        raise ValueError(f"{path}: expected a text a line, found a table; take one column of it")
    return lines


def each_line(path):
    """Yield the lines of a UTF-8 text file, split at line feeds alone, without carriage returns."""
    number, opened = 0, gzip.open if str(path).endswith(".gz") else open
    try:
        with opened(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}:{number}: expected UTF-8: {error}; convert or unpack") from None


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
        raise OSError(f"{path}: could not be written ({error.__context__ or error}); what stood "
                      "there before still does; make room, or write elsewhere") from None
    finally:
        temporary.unlink(missing_ok=True)


class Tokenizer:
    """mT5's tokenizer: a SentencePiece model, `</s>` after each text, and sentinels.

    model: the bytes of a SentencePiece model (`spiece.model`). Raises RuntimeError for other
    bytes, ValueError for a model of another kind.
    sentinels: the ids of `<extra_id_0>`, `<extra_id_1>`, … as far as the vocabulary has them.
    """

    def __init__(self, model):
        self.model = bytes(model)
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        found = self.pieces.pad_id(), self.pieces.eos_id(), self.pieces.unk_id()
        if found != (PAD, EOS, UNK):
            raise ValueError(f"expected padding, end, unknown at {PAD, EOS, UNK}, found at {found}")
        # mT5 spells them with SentencePiece's space sign in front, our toy vocabulary without.
        names = [f"{space}<extra_id_{i}>" for i in range(100) for space in ("▁", "")]
        self.sentinels = [piece for piece in self.pieces.piece_to_id(names) if piece != UNK]

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
        return sorted(ids.union(itertools.chain.from_iterable(map(self.pieces.encode, texts))))

    def only(self, ids):
        """Return a tokenizer with these pieces only, renumbered from 0 in the order they stand.

        A text whose pieces are all kept is segmented as before: the scores stay. A model file is
        a protobuf message, which is a row of fields: a key byte, a length, that many bytes. The
        length stands in digits to base 128, the lowest first, plus 128 where more follow. Key 10
        is a piece, in the order of ids; what else there is (the normaliser) is copied.
        """
        field = re.compile(rb"(.)([\x80-\xff]*[\x00-\x7f])", re.DOTALL)  # key, length
        ids, model, piece, end = set(ids), bytearray(), 0, 0
        while head := field.match(self.model, end):
            key, digits = head.groups()
            end = head.end() + sum(digit % 128 * 128**i for i, digit in enumerate(digits))
            if key[0] != 10 or piece in ids:
                model += self.model[head.start():end]
            piece += key[0] == 10
        return Tokenizer(model)


# The toy world: stories from one small causal generator, told in each language of toy/*.ini.

TOY = Path(__file__).resolve().parent / "toy"
TOY_LANGUAGES = sorted(path.stem for path in TOY.glob("*.ini"))
TASKS = ("title", "summary", "completion")
SPLITS = ("pretrain", "train", "dev", "test", "parallel")
PLOTS = ("lost", "forgotten", "stolen", "broken", "expensive", "old", "painted", "drawn")
CAST = ("object", "helper", "place", "day", "link")  # entries of one word or phrase


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
        forms, *lines = (line.split(" | ") for line in sections[name].values())  # forms is first
        sections[name] = [dict(zip(forms, line, strict=True)) for line in lines]
        for entry in sections[name]:
            agree = "mfn".index(entry.pop("agree", "m"))
            entry.update({"": next(iter(entry.values())), "agree": agree})
    sections["hero"] = [{"": name, "agree": i} for i, gender in enumerate("mf")
                        for name in sections["hero"][gender].split()]
    return sections


def fill(pattern, words):
    """Return pattern with its slots filled from words, the slots inside the words too."""
    # A slot: {name}, {name.form}, {name?m|f|n}.
    while slot := re.search(r"\{(\w+)(?:\.(\w+))?(?:\?([^{}]*))?\}", pattern):
        name, form, choices = slot.groups()
        word = choices.split("|")[words[name]["agree"]] if choices else words[name][form or ""]
        pattern = pattern.replace(slot[0], word)
    return pattern


def stories(split, count, seed=0):
    """Return count distinct stories of a split, each a dict of choices that no language changes.

    A story belongs to one split alone, by a checksum of its choices, so that no seed can put a
    test story into training. split: one of SPLITS.
    """
    rng, found = random.Random(f"{split} {seed}"), {}
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
    story = {name: rng.randrange(len(world("en")[name])) for name in ("hero", *CAST)}
    return story | {"plot": rng.choice(PLOTS), "helped": rng.random() < 0.5,
                    "n": rng.randint(2, 9), "opening": rng.choice(["opening_1", "opening_2"])}


def tell(story, language):
    """Return the story in a language: "story", its three sentences; and for each task all answers
    that are right."""
    lexicon, side = world(language), "good" if story["helped"] else "bad"
    plot, frame = lexicon[story["plot"]], lexicon["frame"]
    patterns = lexicon["phrases"] | plot | {"outcome": plot[side]}
    words = {name: {"": pattern} for name, pattern in patterns.items()}
    words |= {name: lexicon[name][story[name]] for name in ("hero", *CAST)}
    words["n"] = {"": str(story["n"]), "agree": int(story["n"] > 4)}  # Russian 2–4, 5–9
    texts = {"story": "\n".join([frame[story["opening"]], plot["problem"], plot[side]]),
             "title": frame["title"], "summary": frame[f"summary_{side}"],
             "completion": frame[f"ending_{side}"]}
    told = {name: fill(text, words).strip().split("\n") for name, text in texts.items()}
    return {name: [line[0].upper() + line[1:] for line in lines] for name, lines in told.items()}


def toy_pair(story, language, task):
    """Return (source, target) of a story for a task, one of TASKS.

    The target is one of several right answers. A story draws it by lot, the same in each language,
    and nothing in the source tells which.
    """
    told = tell(story, language)
    if task not in TASKS:
        raise ValueError(f"{language}: expected {language}=FILE, or --task {' or '.join(TASKS)}")
    return " ".join(told["story"]), random.Random(f"{task} {story}").choice(told[task])
