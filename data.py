"""Text to batches: tokenizer, file readers, batches, span corruption, and the toy world.

Shapes: B sentences, S source tokens, T target tokens, L languages.
"""

import configparser
import contextlib
import csv
import functools
import io
import itertools
import json
import math
import os
import random
import re
import reprlib
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import sentencepiece
import torch

PAD, EOS, UNK = 0, 1, 2  # mT5's ids; the decoder also starts with PAD
IGNORE = -100  # label of padding: no loss there
HALF = re.compile("[\ud800-\udfff]")  # half of a surrogate pair: JSON can spell it, UTF-8 not
CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # line breaks among them


class Tokenizer:
    """mT5's tokenizer: a SentencePiece model, `</s>` after each text, and sentinels.

    model: the bytes of a SentencePiece model (`spiece.model`).
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
            raise ValueError("expected a SentencePiece model whose padding, end and unknown have "
                             f"mT5's ids {PAD}, {EOS}, {UNK}, found {found}: of another model")

    def __len__(self):
        return self.pieces.get_piece_size()

    def encode(self, text):
        """Return the ids of text, `</s>` at the end. Line breaks and tabs become spaces."""
        return self.pieces.encode(text) + [EOS]

    def decode(self, ids):
        """Return the text of ids up to `</s>`, padding left out; sentinels are shown as text.

        Ids without a piece are left out too: mT5 has 12 more rows in its embedding than pieces.
        """
        ids = [int(i) for i in ids]
        ids = ids[:ids.index(EOS)] if EOS in ids else ids
        return self.pieces.decode([i for i in ids if EOS < i < len(self)])

    def sentinels(self):
        """Return the ids of `<extra_id_0>`, `<extra_id_1>`, … as far as the vocabulary has them.

        mT5 spells them with SentencePiece's space sign in front, our toy vocabulary without.
        """
        ids = [max(self.pieces.piece_to_id(f"{space}<extra_id_{i}>") for space in ("▁", ""))
               for i in range(100)]  # the id of a spelling it lacks, UNK, is lower than any other
        return list(itertools.takewhile(lambda piece: piece != UNK, ids))

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


def write_file(path, content):
    """Write content to path under a temporary name, flush it to disk, then rename it.

    content: bytes, str, or a function that writes into the open binary file it is given.
    A reader sees the old file or the whole new one, never a part. Raises OSError, path named.
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
    except (OSError, RuntimeError) as error:  # torch.save puts its own error over the disk's
        why = error if isinstance(error, OSError) else error.__context__
        raise OSError(f"{path}: could not be written ({getattr(why, 'strerror', None) or error}); "
                      "what stood there before still does; make room, or write elsewhere with "
                      "--out") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def train_tokenizer(lines, vocab_size):
    """Return a Tokenizer trained on lines: mT5's layout of ids, at most vocab_size pieces.

    Ours: byte pairs (BPE) where mT5 has a unigram model, which finds too few pieces in a text as
    repetitive as the toy world. Deterministic.
    """
    model = io.BytesIO()
    parts = (line[i:i + 1000] for line in lines for i in range(0, len(line), 1000))
    try:  # in parts, since SentencePiece leaves out what is longer than 4,192 bytes
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(parts), model_writer=model, vocab_size=vocab_size,
            model_type="bpe", byte_fallback=True, character_coverage=0.9995, split_digits=True,
            pad_id=PAD, eos_id=EOS, unk_id=UNK, bos_id=-1, hard_vocab_limit=False,
            user_defined_symbols=[f"<extra_id_{i}>" for i in range(100)], minloglevel=2)
    except RuntimeError as error:
        raise ValueError(f"no vocabulary of {vocab_size} pieces could be trained on this text; "
                         f"choose another --vocab-size ({error})") from None
    return Tokenizer(model.getvalue())


# Readers of users' files. A mistake is a ValueError that names the file and, where there is one,
# the line; a file that cannot be opened is an OSError.

# JSON is checked by `parse` and `check`; how they do it can be skipped on a first reading.

SHORT = reprlib.Repr()
SHORT.maxstring = 80  # characters


def brief(value):
    """Return value as a message can show it: on one line, shortened, however deep or long it is."""
    return " ".join(SHORT.repr(value).split())


@contextlib.contextmanager
def naming(where):
    """Let a ValueError that is raised inside begin with the file or folder that it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def parse(text, where, form=dict):
    """Return the JSON value in text, str or bytes; raises ValueError, as `check` does.

    where: the file, or "file:line", that the message names.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: expected JSON, {describe(form)}, found {text[:40]!r}; mend or "
                         "replace it") from None
    return check(value, where, form)


def check(value, where, form):
    """Return value; raises ValueError, one line that names where, if it is not of that form.

    form: a type (float: any number); a range of whole numbers; [form] a list of at least one such
    item; [] the empty list; {str: form} a dict with such values; {"name": form, "other?": form} a
    dict with these entries, those with a question mark if they are there, and any others; None;
    (form, form) either. A text has no control characters: it is a name, a path or the like.
    """
    if fault := misfit(value, form, ""):
        raise ValueError(f"{where}: expected {fault}; mend or replace it")
    return value


def misfit(value, form, name):
    """Return what about value, called name, is not of a form; see `check`. '' if nothing is."""
    if isinstance(form, tuple):
        faults = [misfit(value, one, name) for one in form]
        return faults[0] if all(faults) else ""
    if not fits(value, form):
        return f"{describe(form)}{name and f' as {name}'}, found {brief(value)}"
    inside = name and name + "."
    parts = []
    if isinstance(form, list):
        parts = [(item, form[0], f"{inside}{place}") for place, item in enumerate(value)]
    for key, inner in form.items() if isinstance(form, dict) else ():
        if key is str:
            parts += [(key, str, f"a name in {name}") for key in value]
            parts += [(item, inner, f"{inside}{key}"[:200]) for key, item in value.items()]
        elif key.removesuffix("?") in value:
            parts.append((value[key.removesuffix("?")], inner, inside + key.removesuffix("?")))
        elif not key.endswith("?"):
            return f"{describe(inner)} as {inside}{key}, found none"
    return next(filter(None, (misfit(*part) for part in parts)), "")


def fits(value, form):
    """Return whether value is of a form, not tuple, as far as can be told from outside."""
    if isinstance(form, list):
        return isinstance(value, list) and bool(value) == bool(form)
    if isinstance(form, range):
        return type(value) is int and value in form
    if form is float:
        return type(value) in (int, float) and not 2**63 <= abs(value) < math.inf
    if form is str:
        return isinstance(value, str) and not CONTROL.search(value)
    return isinstance(value, form if isinstance(form, type) else type(form))


def describe(form):
    """Return what a form asks for, in words; see `check`."""
    if isinstance(form, tuple):
        return " or ".join(map(describe, form))
    if isinstance(form, range):
        return f"a whole number from {form.start}"
    kind = form if isinstance(form, type) or form is None else type(form)
    return {dict: "an object", list: "a list" if form else "an empty list", float: "a number",
            str: "text on one line", torch.Tensor: "a tensor", None: "null"}[kind]


def check_text(text, where):
    """Return text; raises ValueError if half of a surrogate pair is in it."""
    if HALF.search(text):
        raise ValueError(f"{where}: expected text, found half of a surrogate pair; mend or remove "
                         "this line")
    return text


def each_line(path):
    """Yield the lines of a UTF-8 text file, split at line feeds alone, without carriage returns."""
    try:
        file = open(path, "rb")
    except OSError as error:
        raise type(error)(f"{path}: {error.strerror}; expected a UTF-8 text file") from None
    with file:
        for number, raw in enumerate(file, start=1):
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            try:
                line = raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: expected UTF-8, found byte "
                                 f"0x{raw[error.start]:02x}; convert the file to UTF-8") from None
            yield line


def read_lines(path):
    """Return the lines of a UTF-8 text file, a list of at least one."""
    lines = list(each_line(path))
    if not lines:
        raise ValueError(f"{path}: expected text, found an empty file")
    return lines


def read_pairs(path, fields=("source", "target")):
    """Return [(source, target), …] of a file: one pair an object, a row, or a line.

    path: `.jsonl`, `.tsv` or `.csv` with a header, or "SOURCE_FILE,TARGET_FILE" of aligned lines.
    fields: the names of the source's and the target's column.
    """
    path = str(path)
    if path.endswith(".jsonl"):
        rows = jsonl_rows(path, fields)
    elif path.endswith((".tsv", ".csv")):
        rows = table_rows(path, fields)
    elif "," in path.strip(","):
        sides = read_parallel(dict(enumerate(path.split(",", 1))))
        rows = zip(itertools.count(1), sides[0], sides[1])
    else:
        raise ValueError(f"{path}: expected a name that ends in .jsonl, .tsv or .csv, "
                         "or two aligned text files as SOURCE_FILE,TARGET_FILE")
    pairs = []
    for line, *pair in rows:
        for field, text in zip(fields, pair):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{path}:{line}: expected text in {field!r}, found {brief(text)}; "
                                 "mend or remove this line")
            check_text(text, f"{path}:{line}")
        pairs.append(tuple(pair))
    if not pairs:
        raise ValueError(f"{path}: expected at least one pair, found an empty file or only "
                         "a header")
    return pairs


def jsonl_rows(path, fields):
    """Yield (line number, source, target) of a file with a JSON object a line."""
    for number, line in enumerate(each_line(path), start=1):
        row = parse(line, f"{path}:{number}")
        if not set(fields) <= set(row):
            raise ValueError(f"{path}:{number}: expected an object with the fields "
                             f"{' and '.join(fields)}, found {brief(sorted(row))}; name them with "
                             "--fields")
        yield number, row[fields[0]], row[fields[1]]


def table_rows(path, fields):
    """Yield (line number, source, target) of a table with a header; quoted line breaks are kept."""
    lines = (line + "\n" for line in each_line(path))
    separator = "\t" if path.endswith(".tsv") else ","
    csv.field_size_limit(2**31 - 1)  # a text may be as long as the file
    reader = csv.DictReader(lines, delimiter=separator, strict=True)
    try:
        if not set(fields) <= set(reader.fieldnames or ()):
            raise ValueError(f"{path}:1: expected a header with columns {' and '.join(fields)}, "
                             f"found {brief(reader.fieldnames or 'an empty file')}; name them with "
                             "--fields")
        for row in reader:
            if any(row.get(None, ())):  # what is beyond the header's last column
                raise ValueError(f"{path}:{reader.line_num}: expected {len(reader.fieldnames)} "
                                 f"columns, found {len(reader.fieldnames) + len(row[None])}; put "
                                 "a text that has the separator in it between quotes")
            yield reader.line_num, row[fields[0]], row[fields[1]]
    except csv.Error as error:
        line = reader.reader.line_num  # reader.line_num is that of the row before
        raise ValueError(f"{path}:{line}: expected a table, found a row that the reader refuses "
                         f"({error}); put a text with a quote in it between quotes and double the "
                         "quote") from None


def read_parallel(paths):
    """Return {language: sentences} of files that are aligned line by line.

    paths: {language: path}. A line that is blank in one file is left out in all.
    """
    texts = {language: read_lines(path) for language, path in paths.items()}
    counts = {str(paths[language]): len(lines) for language, lines in texts.items()}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{path} has {count}" for path, count in counts.items())
        raise ValueError(f"expected aligned files with equally many lines, found {found}")
    full = [all(line.strip() for line in row) for row in zip(*texts.values())]
    if not any(full):
        raise ValueError(f"{' and '.join(counts)}: expected aligned text, found only blank lines")
    return {language: list(itertools.compress(lines, full)) for language, lines in texts.items()}


# Batches.

def encode(text, tokenizer, longest):
    """Return the ids of text, the end cut off where there are more than longest; `</s>` is last.

    A long text is not tokenized to its end, only until there are twice as many ids as are kept:
    where that start breaks off changes the last pieces before it, not those that are kept.
    """
    letters = 16 * longest
    ids = tokenizer.encode(text[:letters])
    while letters < len(text) and len(ids) < 2 * longest:
        letters *= 2
        ids = tokenizer.encode(text[:letters])
    return ids if len(ids) <= longest else ids[:longest - 1] + [EOS]


def pad(sequences, value=PAD):
    """Return (B, longest) int64: sequences of ids filled up with value."""
    width = max(map(len, sequences))
    return torch.tensor([ids + [value] * (width - len(ids)) for ids in sequences])


def collate(examples):
    """Return (input_ids (B, S), mask (B, S), labels (B, T)) of (source ids, target ids) pairs.

    mask is True at real tokens; labels are −100 at padding, where there is no loss.
    """
    sources, targets = zip(*examples)
    input_ids = pad(sources)
    return input_ids, input_ids != PAD, pad(targets, IGNORE)


def encode_pair(pair, tokenizer, args):
    """Return (source ids, target ids) of a pair of texts, cut to the lengths of args."""
    source, target = pair
    return (encode(source, tokenizer, args.max_source),
            encode(target, tokenizer, args.max_target))


def batches(draw, batch_size, seed, start=0):
    """Yield batches for ever, from number start on; batch k depends on seed and k alone.

    A group is eight batches; draw(group, count) returns its count examples. These are sorted by
    length, so that a batch has little padding, and then the batches are shuffled.
    """
    first, skip = divmod(start, 8)
    for group in itertools.count(first):
        examples = sorted(draw(group, 8 * batch_size), key=lambda pair: len(pair[0]))
        order = np.random.default_rng([seed, group]).permutation(8)
        for k in order[skip:] if group == first else order:
            yield collate(examples[k * batch_size:(k + 1) * batch_size])


def epochs(pairs, example_of, seed):
    """Return a draw function for `batches`: passes over all pairs, each in a new order.

    example_of(pair) returns its (source ids, target ids).
    """
    @functools.lru_cache(maxsize=2)
    def order(epoch):
        return np.random.default_rng([seed, epoch, 1]).permutation(len(pairs))

    def draw(group, count):
        places = range(group * count, (group + 1) * count)
        return [example_of(pairs[order(i // len(pairs))[i % len(pairs)]]) for i in places]
    return draw


def blend(draw, other, share):
    """Return a draw function that takes a share of its examples, in [0, 1], from the other."""
    def both(group, count):
        few = round(share * count)
        return draw(group, count - few) + other(group, few)
    return both


def parallel_batches(parallel, tokenizer, args, start=0):
    """Yield (input_ids (L, B, S), mask) for ever, from number start on."""
    lines = len(next(iter(parallel.values())))
    for step in itertools.count(start):
        chosen = np.random.default_rng([args.seed, step, 2]).integers(lines, size=args.reg_batch)
        ids = [encode(side[i], tokenizer, args.max_source)
               for side in parallel.values() for i in chosen]
        input_ids = pad(ids).unflatten(0, (len(parallel), -1))
        yield input_ids, input_ids != PAD


# Span corruption: mT5's pre-training task.

def corruption(pages, tokenizer, args, density=0.25, whole_sentences=0.4):
    """Return a draw function for `batches`: pages with spans masked.

    pages(rng) returns a page, a list of sentences, cut to args.max_source ids. With probability
    whole_sentences one or two of its sentences are masked, else random spans of density of its ids.
    Both numbers are ours: mT5 has 0.15 and no whole sentences; with them a small model learns more
    from each page.
    """
    sentinels = tokenizer.sentinels()

    def drawn(rng):
        for _ in range(1000):
            sentences = [encode(sentence, tokenizer, args.max_source + 1)[:-1]
                         for sentence in pages(rng)]
            if sum(map(len, sentences)) > 1:
                return sentences
        raise ValueError("span corruption: expected lines of two tokens and more, found none among "
                         "1,000 lines of the unlabelled text; name another file")

    def example(rng):
        sentences = drawn(rng)
        ids = list(itertools.chain(*sentences))
        if 2 < len(sentences) and len(ids) < args.max_source and rng.random() < whole_sentences:
            ends = np.cumsum([len(sentence) for sentence in sentences])
            masked = sorted(rng.choice(len(sentences), rng.choice([1, 1, 2]), replace=False))
            spans = [(int(ends[i]) - len(sentences[i]), int(ends[i])) for i in masked]
        else:
            ids = ids[:args.max_source - 1]
            spans = random_spans(len(ids), rng, density)
        return mask_spans(ids, spans, sentinels)

    def draw(group, count):
        rng = np.random.default_rng([args.seed, group])
        return [example(rng) for _ in range(count)]
    return draw


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
    """Return spans that cover about density of length ids, mean ids each (T5, section 3.1.4)."""
    masked = min(max(1, round(length * density)), length - 1)
    count = max(1, min(round(masked / mean), length - masked))
    kept, noise = (partition(total, count, rng) for total in (length - masked, masked))
    ends = np.cumsum(kept + noise)
    return list(zip((ends - noise).tolist(), ends.tolist()))


def partition(total, parts, rng):
    """Return (parts,) random positive lengths that sum to total."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


# The toy world: stories from one small causal generator, told in each language of toy/*.ini.

TOY = Path(__file__).resolve().parent / "toy"
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
    return story | {"plot": rng.choice(list(PLOTS)), "helped": rng.random() < 0.5,
                    "n": rng.randint(2, 9), "opening": rng.choice(["opening_1", "opening_2"])}


def tell(story, language):
    """Return the story in a language: "title", "summary", "ending" and "sentences", a list of 3."""
    lexicon = world(language)
    plot, frame = lexicon[story["plot"]], lexicon["frame"]
    words = {name: {"": pattern} for name, pattern in lexicon["phrases"].items()}
    words |= {name: lexicon[name][story[name]] for name in ("hero", *CAST)}
    words["plot"] = {"": plot["plot"]}
    words["n"] = {"": str(story["n"]), "agree": int(story["n"] > 4)}  # Russian 2–4, 5–9
    helped = story["helped"]
    patterns = [frame[story["opening"]], plot["problem"], plot["good" if helped else "bad"],
                plot["title"], frame["summary_good" if helped else "summary_bad"],
                frame[PLOTS[story["plot"]][not helped]]]
    told = [fill(pattern, words) for pattern in patterns]
    told = [text[0].upper() + text[1:] for text in told]
    return {"sentences": told[:3], "title": told[3], "summary": told[4], "ending": told[5]}


def toy_pair(story, language, task):
    """Return (source, target) of a story for a task, one of TASKS."""
    if task not in TASKS:
        raise ValueError(f"the toy world's tasks are {', '.join(TASKS)}: name one with --task, or "
                         "write LANG=FILE for every text")
    told = tell(story, language)
    opening = " ".join(told["sentences"])
    if task == "completion":
        return opening, told["ending"]
    return f"{opening} {told['ending']}", told[task]


def page(rng, languages, bilingual):
    """Return one pre-training document of the toy world, a list of sentences.

    A story with its title and summary in one language; or, with probability bilingual, three of
    its sentences, each followed by its translation. The web has such pages by accident, we by
    design (ours). rng: a numpy generator; languages: a list of toy languages.
    """
    stream = random.Random(int(rng.integers(2**62)))
    story = draw_story(stream)
    while split_of(story) != "pretrain":
        story = draw_story(stream)
    if rng.random() >= bilingual:
        return document(story, rng.choice(languages))
    sides = [document(story, language) for language in rng.choice(languages, 2, replace=False)]
    chosen = sorted(rng.choice(len(sides[0]), 3, replace=False))
    return [side[i] for i in chosen for side in sides]


def document(story, language):
    """Return the story in a language, a list of sentences from its title to its summary."""
    told = tell(story, language)
    return [told["title"] + ".", *told["sentences"], told["ending"], told["summary"]]


# The texts of a run, and its log.

COUNT, NUMBER = range(1, 2**31), range(2**31)
ARGUMENTS = {  # of a run, as far as others than train.py read them
    "task": str, "train": [str], "test": ([str], None), "parallel": ([str], None), "fields": str,
    "mix": ([str], []), "freeze": ([str], []), "init": str, "reg": float, "reg_floor": float,
    "lr": float, "steps": COUNT, "seed": range(2**63), "batch_size": COUNT, "num_beams": COUNT,
    "max_source": COUNT, "max_target": COUNT, "eval_size": COUNT, "test_size": (COUNT, None)}
MEASURED = {  # an evaluation row of a run's log
    "xlrs?": {str: float}, "xlrs_mismatched?": {str: float}, "dev_loss?": float,
    "test?": {str: {"rougeL": float, "wrong_language": float}}}


def read_arguments(folder):
    """Return the arguments in a run's args.json, a dict."""
    path = Path(folder) / "args.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a run folder, written by train.py")
    return parse(path.read_bytes(), path, {"arguments": ARGUMENTS})["arguments"]


def read_log(folder):
    """Return the rows of a run's log.jsonl, a list of dicts; a torn last line is left out.

    A run that was stopped before its first row has no log yet: [].
    """
    path, rows = Path(folder) / "log.jsonl", []
    if not path.exists():
        return rows
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        row = parse(line, f"{path}:{number}", {"kind": str, "step": NUMBER})
        rows.append(check(row, f"{path}:{number}", MEASURED if row["kind"] == "eval" else dict))
    return rows


def load_texts(args):
    """Return the texts that a run's arguments name, from the toy world or from files.

    source: the source language; train, dev, test: {language: [(source, target), …]}; mix, and
    train in pre-training: {language: lines, or None for the toy world}; parallel: {language:
    sentences}, aligned, the source first, to regularise on; held_out: likewise, to measure on.
    """
    columns(args)  # raises ValueError, also where no file will be read
    texts = SimpleNamespace(source=languages(args)[0], mix={}, dev={}, test={}, parallel={},
                            held_out={})
    if args.pretrain:
        texts.train = unlabelled(args.train)
    else:
        texts.mix = unlabelled(args.mix)
        texts.train = task_pairs(args.train, args, "train", args.train_size, args.seed)
        texts.dev = task_pairs(args.dev, args, "dev", args.eval_size)
        if texts.dev and texts.source not in texts.dev:
            raise ValueError(f"--dev: expected pairs in the source language {texts.source!r}, "
                             f"found {' '.join(texts.dev)}")
        texts.test = task_pairs(args.test, args, "test", args.test_size)
    if args.parallel:
        texts.parallel, texts.held_out = parallel_texts(args)
    elif args.reg:
        raise ValueError("--reg: expected parallel text; name it with --parallel LANG=FILE …")
    return texts


def columns(args):
    """Return the names of the source's and the target's column."""
    fields = args.fields.split(",")
    if len(fields) != 2 or not all(fields):
        raise ValueError(f"--fields: expected SOURCE,TARGET, found {args.fields!r}")
    return fields


def by_language(words):
    """Return {language: path, or None for the toy world} of words, LANG=FILE or LANG alone."""
    paths = {}
    for word in words or ():
        language, equals, path = word.partition("=")
        if not language or (equals and not path):
            raise ValueError(f"expected LANG or LANG=FILE, found {word!r}")
        if language in paths:
            raise ValueError(f"expected each language once, found {' '.join(words)}")
        if not equals:
            world(language)  # raises ValueError where the toy world lacks it
        paths[language] = path or None
    return paths


def languages(args):
    """Return the languages that a run's arguments name, the source first."""
    words = [*args.train, *(args.test or ()), *(args.parallel or ())]
    return list(dict.fromkeys(word.partition("=")[0] for word in words))


def task_pairs(words, args, split, count, seed=1):
    """Return {language: [(source, target), …]}, the first count of a file or of the toy world.

    count None: a file whole; of the toy world 4,000 stories to train on, else 200.
    """
    pairs, toy_count = {}, count or (4000 if split == "train" else 200)
    for language, path in by_language(words).items():
        if path:
            pairs[language] = read_pairs(path, columns(args))[:count]
        else:
            pairs[language] = [toy_pair(story, language, args.task)
                               for story in stories(split, toy_count, seed)]
    return pairs


def unlabelled(words):
    """Return {language: lines, or None for the toy world}."""
    texts = {lang: [line for line in read_lines(path) if line.strip()] if path else None
             for lang, path in by_language(words).items()}
    if [] in texts.values():
        raise ValueError(f"expected text, found only blank lines: {' '.join(words)}")
    if len({lines is None for lines in texts.values()}) > 1:
        raise ValueError(f"expected toy languages or files, found both: {' '.join(words)}")
    return texts


def parallel_texts(args):
    """Return (to regularise on, to measure on), each {language: sentences} and aligned."""
    source = languages(args)[0]
    paths = dict(sorted(by_language(args.parallel).items(), key=lambda pair: pair[0] != source))
    if source not in paths:
        raise ValueError(f"--parallel: expected the source language {source!r} among "
                         f"{' '.join(paths)}")
    if len(paths) < 2:
        raise ValueError(f"--parallel: expected at least two languages, found {' '.join(paths)}")
    if len(set(map(bool, paths.values()))) > 1:
        raise ValueError("--parallel: expected toy languages or files, found both")
    if None in paths.values():
        drawn = stories("parallel", 300 + args.eval_size)
        lines = {lang: [toy_pair(story, lang, args.task)[0] for story in drawn] for lang in paths}
    else:
        lines = read_parallel(paths)
    total = len(next(iter(lines.values())))
    if total < 2:
        raise ValueError("--parallel: expected at least 2 aligned lines, found 1")
    held = min(args.eval_size, total // 2)
    return ({lang: side[held:] for lang, side in lines.items()},
            {lang: side[:held] for lang, side in lines.items()})


def pages(train, bilingual):
    """Return the function from a numpy generator to a page that `corruption` asks for."""
    languages = list(train)
    if None in train.values():
        return lambda rng: page(rng, languages, bilingual)

    def line(rng):
        lines = train[rng.choice(languages)]
        return [lines[rng.integers(len(lines))]]
    return line
