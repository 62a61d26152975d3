"""The two metrics, ROUGE-L and the language of an output, of files, models and runs.

Shapes: N texts, P tokens of a prediction, R tokens of a reference, L languages, C letters of all
texts, G n-grams; of the identifier's table, M known buckets; D width of the encoder.
"""

import argparse
import functools
import itertools
import json
import math
import re
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import data
from model import load
from xlrs import choose, pool, spearman, xlrs

FLOOR = 0.3  # the default of --reg-floor, a cosine
LID = data.TOY / "lid.bin"

# ROUGE-L ------------------------------------------------------------------------------------------

TOKENS = ("NFKC, lower case, Unicode words with their combining marks; single characters in "
          "scripts without spaces (Han, kana, Thai, Lao, Tibetan, Khmer, Myanmar)")
MARKS = "".join(c for c in map(chr, range(0x300, 0x20000)) if unicodedata.category(c)[0] == "M")
NO_SPACES = ("\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff"
             "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff"
             "\U00020000-\U0003ffff")
# One character with its marks, or a run of word characters; the lookahead drops punctuation.
TOKEN = re.compile(rf"(?=[^\W_])[{NO_SPACES}][{MARKS}]*|(?:[^\W_{NO_SPACES}]|[{MARKS}])+")
# More than 30 marks on a letter: no language writes them, and NFKC takes quadratic time over them.
PILED = re.compile(rf"([{MARKS}]{{30}})[{MARKS}]+")
JOINERS = dict.fromkeys([0xAD, 0x200C, 0x200D])  # invisible: they shape or hyphenate a word
ASCII = bytes(ord(chr(i).lower()) if i < 128 and chr(i).isalnum() else 32 for i in range(256))


def tokens(text):
    """Return the tokens of text that ROUGE-L compares, a list of str; see TOKENS."""
    if text.isascii():  # the same result, several times faster
        return text.encode().translate(ASCII).decode().split()
    return TOKEN.findall(normal(text).translate(JOINERS).lower())


def normal(text):
    """Return text in the normal form NFKC, with at most 30 marks in a row (Unicode UAX #15, 13)."""
    if text.isascii():
        return text
    return unicodedata.normalize("NFKC", PILED.sub(r"\1", text))


def rouge_l(predictions, references):
    """Return the F1 of each pair's longest common subsequence of tokens, (N,) float, in [0, 1].

        F1 = 2 · LCS / (P + R)

    0 where either side has no token. On ASCII text equal to rouge_score 0.1.2 without stemming.
    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, section 3, β = 1.
    Raises ValueError where the lists differ in length.
    """
    if len(predictions) != len(references):
        raise ValueError(f"expected as many references as predictions, found {len(references)} "
                         f"and {len(predictions)}")
    scores = []
    for prediction, reference in tqdm(zip(predictions, references), total=len(references),
                                      desc="ROUGE-L", leave=False, delay=1):  # shown after 1 s
        a, b = tokens(prediction), tokens(reference)
        scores.append(2 * lcs(a, b) / (len(a) + len(b)) if a and b else 0.)
    return torch.tensor(scores)


def lcs(a, b):
    """Return the length of the longest common subsequence of two lists.

    The textbook table, table[i, j] = table[i-1, j-1] + 1 where a[i] = b[j], else the larger
    neighbour, but a whole row at a time: a row never falls and rises by steps of 1, so one integer
    holds it, with bit j cleared where the row rises at j. Adding does the work of the row's loop.
    Source: Hyyrö, "Bit-Parallel LCS-length Computation Revisited", 2004.
    """
    if len(a) < len(b):
        a, b = b, a
    places, bit = {}, 1  # token -> bits of its places in b
    get = places.get
    for token in b:
        places[token] = get(token, 0) | bit
        bit += bit
    row = bit - 1  # nothing has risen yet
    for match in filter(None, map(get, a)):
        free = row & match
        row = (row + free) | (row - free)
    return len(b) - (row & (bit - 1)).bit_count()


# Language identifier ------------------------------------------------------------------------------

# NTREX's codes and ISO 639-1 (639-3 where there is none); a regional variant joins its language.
LANGUAGES = dict(entry.split(":") for entry in """
    afr:af amh:am arb:ar aze:az bak:ba bel:be bem:bem ben:bn bod:bo bos:bs bul:bg cat:ca ces:cs
    ckb:ckb cym:cy dan:da deu:de div:dv dzo:dz ell:el eng:en est:et eus:eu ewe:ee fao:fo fas:fa
    fij:fj fil:tl fin:fi fra:fr fuc:ff gle:ga glg:gl gsw:gsw guj:gu hau:ha heb:he hin:hi hmn:hmn
    hrv:hr hun:hu hye:hy ibo:ig ind:id isl:is ita:it jpn:ja kan:kn kat:ka kaz:kk khm:km kin:rw
    kir:ky kmr:ku kor:ko lao:lo lav:lv lit:lt ltz:lb mal:ml mar:mr mey:mey mkd:mk mlg:mg mlt:mt
    mon:mn mri:mi msa:ms mya:my nde:nd nep:ne nld:nl nno:nn nob:nb nso:nso nya:ny orm:om pan:pa
    pol:pl por:pt prs:fa pus:ps ron:ro rus:ru shi:shi sin:si slk:sk slv:sl smo:sm sna:sn snd:sd
    som:so spa:es sqi:sq srp:sr ssw:ss swa:sw swe:sv tah:ty tam:ta tat:tt tel:te tgk:tg tha:th
    tir:ti ton:to tsn:tn tuk:tk tur:tr uig:ug ukr:uk urd:ur uzb:uz ven:ve vie:vi wol:wo xho:xh
    yor:yo yue:yue zho:zh zul:zu""".split())
APART = ("srp-Latn", "zho-TW", "prs")  # variants that are written otherwise: columns of their own
SPACE = ord(" ")
ORDERS = 5  # n-grams of 1 to 5 characters
WORDS = 2**22  # n-grams are hashed into buckets 0 to 2^22 - 1, whole words into as many after them
ALPHA = .02  # added to every count: what an n-gram that a language never showed still counts
# The shares of one piece of evidence that n-grams and whole words count: they overlap. Their ratio
# was tuned for accuracy, their size so that the probabilities of two words are about true.
WEIGHTS = (1 / 16, 1 / 4)
MIXED = 1.5  # nats for the source from which a word counts: clean text shows under 1 %
# Texts are taken in groups of at most BATCH texts, and LETTERS letters unless one text alone has
# more: a letter needs about 150 bytes.
BATCH, LETTERS = 1024, 2**20
DENSE = 4  # n-grams known in more columns than this are looked up as a full row: faster
FORMAT = "xlrs language table 2"
FOLD = np.full(0x110000, -1, dtype=np.int32)  # code point -> its letter in lower case; -1: unknown


def fold(text):
    """Return text's code points as int32, letters and marks in lower case, all else as a space."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    for point in np.unique(points[FOLD[points] < 0]):
        letter = unicodedata.category(chr(point))[0] in "LM"
        FOLD[point] = ord(chr(point).lower()[0]) if letter else SPACE
    return FOLD[points]


def spaced(texts):
    """Return (letters, owner, space) of texts, all (C,): code points, text number, is it a space.

    Each text begins and ends with a space, and one space stands between its words.
    """
    texts = [f" {normal(text)} " for text in texts]
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    letters = fold("".join(texts))
    space = letters == SPACE
    keep = np.ones(len(letters), dtype=bool)
    keep[1:] = ~(space[1:] & space[:-1] & (owner[1:] == owner[:-1]))
    return letters[keep], owner[keep], space[keep]


def ngrams(texts):
    """Return the hashed n-grams of texts, by order: a list of (buckets (G,), text numbers (G,)).

    Orders 1 to ORDERS inside words, a space before and after included, then whole words. The hash
    of letters u in a span is Σ u · f^(end - place) mod 2^64; running sums give that of every span.
    """
    letters, owner, space = spaced(texts)
    factor = 0x9E3779B97F4A7C15
    power = np.cumprod(np.full(len(letters) + 1, factor, dtype=np.uint64))
    inverse = np.cumprod(np.full(len(letters), pow(factor, -1, 2**64), dtype=np.uint64))
    sums = np.zeros(len(letters) + 1, dtype=np.uint64)
    np.cumsum(letters.astype(np.uint64) * inverse, out=sums[1:])
    blanks = np.zeros(len(letters) + 1, dtype=np.int32)  # spaces before each place
    np.cumsum(space, out=blanks[1:])

    found = []
    for order in range(1, min(ORDERS, len(letters)) + 1):
        last = len(letters) - order  # the last place where an n-gram can start
        inside = blanks[order - 1:][:last + 1] == blanks[1:last + 2]  # no space in between
        if order < 3:  # a space alone or two of them are no n-gram
            inside = ~(space[:last + 1] & space[order - 1:])
        value = (sums[order:] - sums[:last + 1]) * power[order:]
        found.append((bucket_of(value, order)[inside], owner[:last + 1][inside]))
    start = np.flatnonzero(space[:-1] & ~space[1:]) + 1
    end = np.flatnonzero(~space[:-1] & space[1:]) + 1
    value = (sums[end] - sums[start]) * power[end]
    return found + [(bucket_of(value, ORDERS + 1) + WORDS, owner[start])]


def bucket_of(value, order):
    """Return the buckets in [0, WORDS) of hashes (G,) uint64; order tells equal spans apart."""
    value = value + np.uint64(order)
    value = (value ^ (value >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return (value >> np.uint64(64 - WORDS.bit_length() + 1)).astype(np.int64)


def in_groups(texts):
    """Return texts in lists, in order, of at most BATCH texts and about LETTERS letters."""
    places = ((number // BATCH, letters // LETTERS) for number, letters in enumerate(
        itertools.accumulate(map(len, texts))))
    groups = itertools.groupby(zip(places, texts), key=lambda pair: pair[0])
    return [[text for _, text in group] for _, group in groups]


class LanguageIdentifier:
    """Names the language of a text: multinomial naive Bayes over hashed character n-grams.

        score(text, l) = Σ over n-grams g of weight(g) · log((count(g, l) + α) / α)

    which is log p(text | l) up to a constant, with counts scaled as if every language had shown
    equally many letters, and every language as likely beforehand. The weights are ours: n-grams
    overlap. What the table has never seen says nothing. A language's score is that of its best
    column: Serbian, Chinese and Persian have two.
    path: a table that `python eval.py --train-lid` wrote. Raises FileNotFoundError where there is
    none, ValueError for other bytes.
    """

    def __init__(self, path=LID):
        self.columns, buckets, sizes, self.column, counts, letters = read_table(path)
        self.languages = sorted(set(self.columns))
        self.first = [self.columns.index(name) for name in self.languages]  # its first column
        # Evidence of a cell, looked up by the code of its count and its column.
        value = np.log1p(2. ** np.arange(32)[:, None] * (np.mean(letters) / letters) / ALPHA)
        value = value.astype(np.float32)[counts, self.column]
        words = sizes[:np.searchsorted(buckets, WORDS)].sum()  # cells before those of words
        value[:words] *= WEIGHTS[0]
        value[words:] *= WEIGHTS[1]
        self.value, self.size, self.start = value, sizes, np.cumsum(sizes) - sizes

        # index: bucket -> r > 0, row r of the full table; r < 0, the short row -r; 0, unknown.
        rows = np.arange(1, len(buckets) + 1, dtype=np.int32)
        full = sizes > DENSE
        self.index = np.zeros(2 * WORDS, dtype=np.int32)
        self.index[buckets] = np.where(full, np.cumsum(full), -rows)
        cells = self.cells(np.flatnonzero(full))
        row = np.repeat(np.arange(1, full.sum() + 1), sizes[full])
        self.table = torch.zeros(full.sum() + 1, len(self.columns))
        self.table.numpy()[row, self.column[cells]] = value[cells]

    def cells(self, rows):
        """Return the numbers of the cells of the given rows, one row's after the other's."""
        size = self.size.take(rows)
        cells = np.repeat(self.start.take(rows) - np.cumsum(size) + size, size)
        cells += np.arange(len(cells))
        return cells

    def evidence(self, texts):
        """Return the score of each text in each language, (N, L) float, nats above no evidence."""
        groups = tqdm(in_groups(texts), desc="languages", leave=False, delay=1)
        found = [self.evidence_of_group(group) for group in groups]
        return torch.cat(found or [torch.zeros(0, len(self.languages))])

    def evidence_of_group(self, texts):
        """Return the same of few texts, all at once."""
        sums, rare = np.zeros((len(texts), len(self.columns))), []
        for buckets, owner in ngrams(texts):
            row = self.index.take(buckets)  # faster than self.index[buckets]
            full, short = np.flatnonzero(row > 0), np.flatnonzero(row < 0)
            sums += self.full_rows(row.take(full), owner.take(full), len(texts))
            rare.append((-row.take(short) - 1, owner.take(short)))
        sums += self.short_rows(*map(np.concatenate, zip(*rare)), len(texts))
        return torch.from_numpy(np.maximum.reduceat(sums, self.first, axis=1)).float()

    def full_rows(self, rows, owner, n):
        """Return the sum of each text's rows of the full table, (n, columns); owner is sorted."""
        offsets = torch.from_numpy(np.searchsorted(owner, np.arange(n)).astype(np.int32))
        return F.embedding_bag(torch.from_numpy(rows), self.table, offsets, mode="sum").numpy()

    def short_rows(self, rows, owner, n):
        """Return the sum of each text's short rows, (n, columns): cell by cell."""
        cells = self.cells(rows)
        place = np.repeat(owner * len(self.columns), self.size.take(rows))
        place += self.column.take(cells)
        return np.bincount(place, self.value.take(cells), n * len(self.columns)).reshape(n, -1)

    def choice(self, candidates):
        """Return which languages may be answered, (L,) bool; raises ValueError for unknown ones."""
        unknown = set(candidates or ()) - set(self.languages)
        if unknown:
            raise ValueError(f"the identifier does not know {', '.join(sorted(unknown))}; "
                             f"it knows {' '.join(self.languages)}")
        return torch.tensor([not candidates or name in candidates for name in self.languages])

    def scores(self, texts, candidates=None):
        """Return the log-probability of each language, (N, L) float, nats; rows sum to 1 as exp.

        candidates: the only languages that may be answered; all others get -inf.
        """
        chosen = self.choice(candidates)
        return self.evidence(texts).masked_fill(~chosen, -torch.inf).log_softmax(dim=1)

    def predict(self, texts, candidates=None):
        """Return the most probable language of each text; `und` where there is no letter."""
        best = self.scores(texts, candidates).argmax(dim=1).tolist()
        return [self.languages[i] if any(c.isalpha() for c in text) else "und"
                for i, text in zip(best, texts)]

    def mixed(self, texts, target, source):
        """Return the share of each text's words that are the source's though not the target's.

        (N,) float in [0, 1]. A word counts if its own n-grams speak for the source rather than the
        target by more than MIXED nats. A capitalised word never does: it may be a name, in no
        language. In scripts without spaces a word is a character. This rule is ours.
        """
        self.choice([target, source])
        words = [TOKEN.findall(normal(text)) for text in texts]
        flat = [word for line in words for word in line]
        if target == source or not flat:
            return torch.zeros(len(texts))
        found = self.evidence(flat)
        gain = found[:, self.languages.index(source)] - found[:, self.languages.index(target)]
        small = torch.tensor([word == word.lower() for word in flat])
        hits = ((gain > MIXED) & small).float().split([len(line) for line in words])
        return torch.stack([line.sum() / max(1, len(line)) for line in hits])


TABLE = {"format": str, "rows": data.NUMBER, "cells": data.NUMBER, "letters": [data.COUNT],
         "columns": [str]}


def read_table(path):
    """Return (columns, buckets (M,), cells a bucket (M,), column, count code (cells,), letters).

    The file: a line of JSON, then zlib-compressed bytes: a bit for each bucket, set where it is
    known; for each known bucket its number of cells, one for each column that showed it; then each
    cell's column; then each cell's count, rounded to a power of two: c stands for 2^c.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no language table; python eval.py --train-lid makes one")
    head, _, body = path.read_bytes().partition(b"\n")
    try:
        head = data.parse(head, path, TABLE)
        unzip = zlib.decompressobj()
        body = np.frombuffer(unzip.decompress(body, WORDS // 4 + 20 * len(body)), np.uint8)
        bits, sizes, column, counts = np.split(body, np.cumsum(
            [WORDS // 4, head["rows"], head["cells"]]))
        buckets, sizes = np.flatnonzero(np.unpackbits(bits).view(bool)), sizes.astype(np.int64)
        letters = np.array(head["letters"], dtype=float)
        if (head["format"] != FORMAT or not unzip.eof or min(letters) <= 0
                or head["columns"] != sorted(head["columns"]) or len(head["columns"]) > 256
                or len(buckets) != len(sizes) or len(counts) != len(column)
                or sizes.sum() != len(column) or column.max() >= len(head["columns"])
                or counts.max() > 31 or len(letters) != len(head["columns"])):
            raise ValueError
    except (ValueError, zlib.error):
        raise ValueError(f"{path}: expected a language table, found other or damaged bytes; "
                         "python eval.py --train-lid makes one") from None
    return head["columns"], buckets, sizes, column, counts, letters


def train_lid(folder, out):
    """Write the identifier's table to out from NTREX-128's files in folder; see read_table.

    n-grams, not words, that a language showed only once are left out: they are many and tell
    little. Deterministic: the same files give the same bytes.
    """
    texts = read_ntrex(folder)
    names, letters, cells, counts = sorted(texts), [], [], []
    for column, name in enumerate(tqdm(names, desc="columns", unit="", disable=None)):
        found = [np.unique(buckets, return_counts=True) for buckets, _ in ngrams(texts[name])]
        if not found[0][1].sum():
            raise ValueError(f"{folder}: expected text in {name}, found no letter")
        letters.append(int(found[0][1].sum()))
        bucket, count = map(np.concatenate, zip(*found))
        keep = (count > 1) | (bucket >= WORDS)
        cells.append(bucket[keep] * 256 + column)
        counts.append(count[keep])
    cells, place = np.unique(np.concatenate(cells), return_inverse=True)  # orders share buckets
    counts = np.bincount(place, np.concatenate(counts))
    buckets, sizes = np.unique(cells // 256, return_counts=True)
    bits = np.zeros(2 * WORDS, dtype=np.uint8)
    bits[buckets] = 1
    body = np.concatenate([np.packbits(bits), sizes, cells % 256, np.rint(np.log2(counts))])
    head = {"format": FORMAT, "rows": len(sizes), "cells": len(cells), "letters": letters,
            "columns": [name.split("/")[0] for name in names]}
    data.write_file(out, json.dumps(head).encode() + b"\n"
                    + zlib.compress(body.astype(np.uint8).tobytes(), 9))


def read_ntrex(folder):
    """Return {column: [sentences]} of NTREX-128's `newstest2019-*.CODE.txt` in folder.

    A column is a language of LANGUAGES or, as "language/CODE", one of its variants in APART.
    """
    texts = {}
    for path in sorted(Path(folder).glob("newstest2019-*.txt")):
        code = path.name.split(".")[-2]
        language = LANGUAGES.get(code.split("-")[0])
        if language is None:
            raise ValueError(f"{path}: no ISO 639 code is known for {code}; add it to LANGUAGES")
        name = f"{language}/{code}" if code in APART else language
        texts.setdefault(name, []).extend(data.read_lines(path))
    if not texts:
        raise FileNotFoundError(f"{folder}: expected NTREX-128's newstest2019-*.txt, found none")
    return texts


# Scores -------------------------------------------------------------------------------------------


def score(outputs, references, language, source, identifier, candidates=None):
    """Return the scores of a system's outputs in one language, a dict of plain numbers.

    rougeL: mean F1, 0 to 100. wrong_language: % of outputs in another language than `language`;
    an output without any letter is in no language and counts. source_language: % in the source
    language. mixed: mean % of an output's words that are the source's. loops: % of outputs in which
    three tokens in a row come again. n: number of outputs.
    language, source: ISO 639-1; where source is None or language itself, source_language and mixed
    are 0.
    """
    found = identifier.predict(outputs, candidates)
    share = lambda hits: 100 * sum(hits) / max(1, len(outputs))
    other = source is not None and source != language
    return {"rougeL": 100 * float(rouge_l(outputs, references).mean()) if outputs else 0.,
            "wrong_language": share(code != language for code in found),
            "source_language": share(code == source for code in found) if other else 0.,
            "mixed": share(identifier.mixed(outputs, language, source).tolist()) if other else 0.,
            "loops": share(map(loops, outputs)), "n": len(outputs)}


def loops(text):
    """Return whether three tokens in a row come again in text."""
    words = tokens(text)
    triples = list(zip(words, words[1:], words[2:]))
    return len(set(triples)) < len(triples)


def table(rows, header):
    """Print rows as an aligned table: text to the left, numbers with one decimal to the right."""
    cells = [[f"{c:.1f}" if isinstance(c, float) else str(c) for c in row]
             for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    number = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
    for row in cells:
        print("  ".join(c.rjust(w) if right else c.ljust(w)
                        for c, w, right in zip(row, widths, number)).rstrip())


# A model's outputs and its similarity -------------------------------------------------------------


def pick_device(device, dtype):
    """Return (device, dtype of the matrix products, why), as asked for or, of None, the best.

    fp16 is not offered: mT5's activations exceed its range and the loss becomes NaN.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: torch can't compute there; leave it out") from None
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" and not has_bf16:
        raise ValueError("--dtype bfloat16: this GPU has none; leave it out")
    if dtype:
        return device, dtype, "as asked"
    if device.type == "cuda" and has_bf16:
        return device, "bfloat16", "this GPU has bfloat16"
    return device, "float32", "a CPU" if device.type == "cpu" else "this GPU has no bfloat16"


def in_batches(texts, tokenizer, max_source, size=2**13):
    """Yield (places, input_ids, mask) of texts, the longest first, so that little is padded.

    size: source tokens of a batch, its padding included.
    """
    ids = [data.encode(text, tokenizer, max_source) for text in texts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    start = 0
    while start < len(order):
        places = order[start:start + max(1, size // len(ids[order[start]]))]
        start += len(places)
        input_ids = data.pad([ids[i] for i in places])
        yield places, input_ids, input_ids != data.PAD


@torch.no_grad()
def sentence_vectors(model, tokenizer, texts, max_source):
    """Return the pooled encoder states of texts, (N, D) float32."""
    device = next(model.parameters()).device
    vectors = torch.zeros(len(texts), model.config.d_model)
    for places, input_ids, mask in in_batches(texts, tokenizer, max_source):
        mask = mask.to(device)
        vectors[places] = pool(model.encode(input_ids.to(device), mask), mask).float().cpu()
    return vectors


def vectors_by_language(model, tokenizer, sentences, args):
    """Return {language: sentence vectors (N, D)} of {language: sentences}, the source first."""
    return {lang: sentence_vectors(model, tokenizer, side, args.max_source)
            for lang, side in sentences.items()}


def language_similarity(vectors, shift=0):
    """Return XLRS of the source, the first language, with each other: {language: cosine}.

    shift: compare each sentence with the translation of the one so many lines before. What is left
    between such mismatched pairs is language and format, not meaning.
    """
    source, *others = vectors.values()
    pooled = torch.stack([source.roll(-shift, 0), *others])
    return dict(zip(list(vectors)[1:], xlrs(pooled).tolist()))


def answer(model, tokenizer, texts, args, name):
    """Return the model's output for each text, a list of str; name: the progress bar's."""
    device = next(model.parameters()).device
    outputs = [""] * len(texts)
    with tqdm(total=len(texts), desc=name, unit="text", leave=False) as progress:
        for places, input_ids, mask in in_batches(texts, tokenizer, args.max_source):
            found = model.generate(input_ids.to(device), mask.to(device), args.max_target,
                                   args.num_beams)
            for place, ids in zip(places, found.tolist()):
                outputs[place] = tokenizer.decode(ids)
            progress.update(len(places))
    return outputs


@torch.no_grad()
def mean_loss(model, examples, size=64):
    """Return the mean cross-entropy, nats a token, of (source ids, target ids) examples."""
    device = next(model.parameters()).device
    total = count = 0
    for start in range(0, len(examples), size):
        input_ids, mask, labels = (x.to(device) for x in data.collate(examples[start:start + size]))
        real = (labels != data.IGNORE).sum().item()
        total += model(input_ids, mask, labels).item() * real
        count += real
    return total / count


def retrieval(source, other):
    """Return the share of sentences whose translation is nearest, in [0, 1].

    source, other (N, D): vectors of N parallel sentences, each side centred first: without its
    mean, which is its language's. At most the first 64 count, so that chance is 1.6 %.
    """
    source, other = (F.normalize(side[:64] - side[:64].mean(0), dim=-1) for side in (source, other))
    nearest = (source @ other.T).argmax(dim=1)
    return (nearest == torch.arange(len(source))).float().mean().item()


def score_tests(model, tokenizer, tests, args):
    """Return ({language: scores}, {language: outputs}) of tests, {language: pairs}.

    args: a run's. The identifier chooses among the languages that they name, source first.
    """
    candidates = data.languages(args)
    scores, outputs = {}, {}
    for language, pairs in tests.items():
        sources, references = zip(*pairs)
        outputs[language] = answer(model, tokenizer, sources, args, f"answering in {language}")
        scores[language] = score(outputs[language], references, language, candidates[0],
                                 identifier(), candidates)
    return scores, outputs


@functools.cache
def identifier():
    """Return the shipped identifier, loaded once."""
    return LanguageIdentifier()


# A run --------------------------------------------------------------------------------------------


def read_run(folder):
    """Return (arguments, evaluation rows) of a run folder."""
    arguments = argparse.Namespace(**data.read_arguments(folder))
    return arguments, [row for row in data.read_log(folder) if row["kind"] == "eval"]


def mean(values):
    """Return the mean of values, NaN of none."""
    values = list(values)
    return sum(values) / len(values) if values else float("nan")


MEASURES = {"xlrs": "xlrs", "dev": "dev_loss"}  # the rule, and the log's field that it goes by


def best_row(rows, by, floor=-1.0):
    """Return the evaluation row that the rule picks.

    The base, step 0, is not on offer: it has not learnt the task, and its XLRS may be the lowest.
    by: "xlrs" or "dev", and floor, as in xlrs.choose; the development score is minus the loss.
    """
    trained = [row for row in rows if row["step"] > 0]
    known = [{"step": row["step"], "xlrs": mean(row.get("xlrs", {}).values()),
              "dev": -row.get("dev_loss", float("nan"))} for row in trained]
    return trained[known.index(choose(known, by, floor))]


def choose_checkpoint(folder, by=None):
    """Return the row of a run's chosen checkpoint, and write its step to selected.json.

    by: as in best_row; by default "xlrs" where the run measured it, else "dev", else the last.
    XLRS counts down to the run's own floor; where the base is there already, that is printed.
    """
    args, rows = read_run(folder)
    if not rows:
        raise ValueError(f"{folder}: expected a checkpoint, found none yet; go on with --resume")
    by = by or next((by for by, field in MEASURES.items() if field in rows[0]), "last")
    with data.naming(folder):
        row = rows[-1] if by == "last" else best_row(rows, by, args.reg_floor)
    if by == "xlrs" and (start := mean(rows[0]["xlrs"].values())) <= args.reg_floor:
        print(f"{folder}: XLRS of the base, {start:.3f}, is not above --reg-floor "
              f"{args.reg_floor:g}: there is little to choose by; set a lower floor, or take --by "
              "dev")
    chosen = {"step": row["step"], "by": by, **{key: row.get(key) for key in MEASURES.values()}}
    data.write_file(Path(folder) / "selected.json", json.dumps(chosen, indent=1) + "\n")
    return row


def score_checkpoint(path, tests, args, device, autocast):
    """Return (scores, outputs, XLRS), each {language: …}, of the checkpoint at path.

    tests: {language: pairs}; args: a run's, which name the parallel text.
    """
    model, tokenizer = load(path)
    with autocast:
        scores, outputs = score_tests(model.to(device), tokenizer, tests, args)
        similarity = {}
        if args.parallel:
            _, sentences = data.parallel_texts(args)
            similarity = language_similarity(
                vectors_by_language(model, tokenizer, sentences, args))
    return scores, outputs, similarity


def score_run(folder, tests, args, device, autocast, out=None):
    """Score a run's base and chosen checkpoint on tests; print, and write to out or folder.

    In the toy world the shipped scores of the usual way stand between them: fine-tuning without
    the regulariser, and the checkpoint that is best on the source language.
    """
    path = folder / "selected.json"
    if not path.is_file():
        choose_checkpoint(folder)
    step = data.parse(path.read_bytes(), path, {"step": data.NUMBER})["step"]
    base, ours = (score_checkpoint(folder / f"step_{number:06d}.pt", tests, args, device, autocast)
                  for number in (0, step))
    report({"base": base, **usual_way(args), "this run": ours}, tests, args, step,
           Path(out or folder))


COMPARED = ("task", "train", "test", "lr", "steps", "batch_size", "test_size")


def usual_way(args):
    """Return {"--reg 0": (scores, outputs, XLRS)} as shipped for a run with these arguments, or {}.

    The file is a copy of a run's scores.json; its outputs are the first of each language.
    """
    path = data.TOY / "results" / f"{args.task}.json"
    if not path.is_file() or Path(args.init).resolve() != data.TOY / "base.pt":
        return {}
    content = json.loads(path.read_text())
    if content["arguments"] != {name: getattr(args, name) for name in COMPARED}:
        return {}
    return {"--reg 0": (content["scores"], content["first_outputs"], content["xlrs"])}


def report(systems, tests, args, step, folder):
    """Print systems, {name: (scores, outputs, XLRS)}, side by side; write the last to folder.

    scores.json: {"task", "step", "xlrs": {LANG: …}, "scores": {LANG: …}, …}; outputs.jsonl: an
    object a test text.
    """
    scores, outputs, similarity = list(systems.values())[-1]
    folder.mkdir(parents=True, exist_ok=True)
    data.write_file(folder / "scores.json", json.dumps(
        {"task": args.task, "step": step, "xlrs": similarity, "scores": scores,
         "first_outputs": {lang: side[:1] for lang, side in outputs.items()},
         "arguments": {name: getattr(args, name, None) for name in COMPARED}},
        indent=1, ensure_ascii=False) + "\n")
    lines = [{"language": lang, "source": source, "reference": reference, "output": output}
             for lang, pairs in tests.items()
             for (source, reference), output in zip(pairs, outputs[lang])]
    data.write_file(folder / "outputs.jsonl",
                    "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    source = data.languages(args)[0]
    print(f"\n{args.task}: {len(lines)} test texts in {len(tests)} languages, step {step}")
    print_scores(systems, source)
    for lang in [lang for lang in tests if lang != source][:2]:
        text, reference = tests[lang][0]
        print(f"\n{lang}  {text}\n    {'reference':10}{reference}")
        for name, (_, outputs, _) in systems.items():
            print(f"    {name:10}{outputs[lang][0]}")
    print(f"\nROUGE-L, 0 to 100, over tokens: {TOKENS}.\nwrong %: answers in another language "
          f"than the row's, {source} %: in {source}; mixed %: {source} words in the answers.\n"
          f"Written to {folder}.")


def print_scores(systems, source):
    """Print a row for each language and system, and for each system's mean but for the source."""
    kinds = {"rougeL": "ROUGE-L", "wrong_language": "wrong %", "source_language": f"{source} %",
             "mixed": "mixed %"}
    rows = []
    for language in [*next(iter(systems.values()))[0], f"mean but {source}"]:
        for name, (scores, _, similarity) in systems.items():
            among = [language] if language in scores else [x for x in scores if x != source]
            known = [similarity[lang] for lang in among if lang in similarity]
            rows.append([language if name == next(iter(systems)) else "", name,
                         *(mean(scores[lang][kind] for lang in among) for kind in kinds),
                         f"{mean(known):.2f}" if known else ""])
    table(rows, ["language", "system", *kinds.values(), "XLRS"])


# Many runs ----------------------------------------------------------------------------------------

T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t for 1 to 9 degrees
SCORES = {"ROUGE-L": "rougeL", "wrong %": "wrong_language", "source %": "source_language",
          "mixed %": "mixed", "loops %": "loops"}  # column -> its key in scores


def mean_and_half(values):
    """Return (mean, half the width of its 95 % interval, NaN of one value), by Student's t."""
    values = [value for value in values if value == value]  # NaN: undefined in that run
    middle = mean(values)
    if len(values) < 2:
        return middle, math.nan
    variance = sum((value - middle) ** 2 for value in values) / (len(values) - 1)
    return middle, T95[min(len(values) - 2, len(T95) - 1)] * (variance / len(values)) ** 0.5


def interval(values, digits=1):
    """Return "mean ± half the width of its 95 % interval" over runs; of one, the value alone."""
    middle, half = mean_and_half(values)
    return f"{middle:.{digits}f}" + (f" ± {half:.{digits}f}" if half == half else "")


KEPT = ("task", "train", "reg", "reg_floor", "freeze", "mix", "lr", "steps", "seed")
CHECKPOINT = {"step": data.NUMBER, "xlrs": {str: float}, "xlrs_mismatched": {str: float},
              "dev_loss": float, "test": {str: dict.fromkeys(SCORES.values(), float)}}
RUN = {**{name: data.ARGUMENTS[name] for name in KEPT}, "base": CHECKPOINT,
       "checkpoints": [CHECKPOINT]}


def summarise(folder):
    """Return what `compare` needs of a run: its arguments and its checkpoints' scores."""
    args, rows = read_run(folder)
    seen = {word.partition("=")[0] for word in args.train} - {data.languages(args)[0]}
    if len(rows) < 2 or any(set(CHECKPOINT) - set(row) for row in rows):
        raise ValueError(f"{folder}: expected checkpoints of a run with --dev, --test, --parallel")
    base, *checkpoints = [{key: row[key] for key in CHECKPOINT} | {
        "test": {lang: scores for lang, scores in row["test"].items() if lang not in seen}}
        for row in rows]
    known = {name: getattr(args, name) for name in KEPT}
    known |= {"base": base, "checkpoints": checkpoints}
    return json.loads(json.dumps(known), parse_float=lambda number: float(f"{float(number):.4g}"))


def read_runs(paths):
    """Return the summaries of run folders, or of the JSON files that `compare` wrote."""
    runs = []
    for path in map(Path, paths):
        where = f"{path}: not a run folder, nor what --compare --out wrote"
        found = [summarise(path)] if path.is_dir() else data.parse(path.read_bytes(), where, [RUN])
        runs += data.check(found, where, [RUN])
        with data.naming(path):
            for run, by in itertools.product(found, MEASURES):
                best_row(run["checkpoints"], by)
    return runs


def method(run):
    """Return the name of a run's method, as it was asked for."""
    words = [f"--reg {run['reg']:g}"] if run["reg"] else []
    words += [f"--reg-floor {run['reg_floor']:g}"] if run["reg"] and run["reg_floor"] != FLOOR \
        else []
    words += ["--train " + " ".join(run["train"])] if len(run["train"]) > 1 else []
    words += [f"--{name} " + " ".join(run[name]) for name in ("freeze", "mix") if run[name]]
    return " ".join(words) or "--reg 0"


def scores_of(run, row):
    """Return {column: number} of a checkpoint, `row` of a run.

    Means over the languages that the run did not train on; NaN where the source was not tested.
    """
    source = run["train"][0].partition("=")[0]
    targets = [scores for lang, scores in row["test"].items() if lang != source]
    return {**{name: mean(scores[kind] for scores in targets) for name, kind in SCORES.items()},
            "source ROUGE-L": row["test"].get(source, {}).get("rougeL", math.nan),
            "XLRS": mean(row["xlrs"].values()),
            "XLRS mismatched": mean(row["xlrs_mismatched"].values())}


def by_language(run, row):
    """Return {column: number} of a checkpoint: two columns a target language."""
    source = run["train"][0].partition("=")[0]
    return {f"{lang} {name}": scores[SCORES[name]] for lang, scores in row["test"].items()
            if lang != source for name in ("ROUGE-L", "wrong %")}


def by_rule(run, _):
    """Return {rule: target ROUGE-L of the checkpoint that the rule picks from a run}."""
    rows = run["checkpoints"]
    picks = {"XLRS down to the floor": best_row(rows, "xlrs", run["reg_floor"]),
             "lowest XLRS": best_row(rows, "xlrs"), "best dev": best_row(rows, "dev"),
             "last step": rows[-1],
             "oracle": max(rows, key=lambda row: scores_of(run, row)["ROUGE-L"])}
    return {name: scores_of(run, row)["ROUGE-L"] for name, row in picks.items()}


def within_run(run, _):
    """Return {score: its rank correlation with XLRS over the checkpoints of a run}."""
    scores = [scores_of(run, row) for row in run["checkpoints"]]
    similarity = [numbers["XLRS"] for numbers in scores]
    return {f"{name} (rho)": spearman(similarity, [numbers[name] for numbers in scores])
            for name in ("ROUGE-L", "wrong %")}


def print_means(title, heads, checkpoints, measure=scores_of):
    """Print a table: mean ± 95 % interval over runs, then of the mean over the tasks.

    checkpoints: (run, row) pairs; measure(run, row) returns {column: number}. heads: what a row of
    the table has in common, the task first. Tasks are averaged seed by seed, where a seed has them
    all.
    """
    groups, seeds = {}, {}
    for run, row in checkpoints:
        known = {"task": run["task"], "lr": f"{run['lr']:g}", "method": method(run),
                 "step": row["step"]}
        task, *rest = (known[head] for head in heads)
        numbers = measure(run, row)
        groups.setdefault((task, *rest), []).append(numbers)
        seeds.setdefault((*rest, run["seed"]), {})[task] = numbers
    tasks = {task for task, *_ in groups}
    for (*rest, _), by_task in seeds.items():
        if len(by_task) == len(tasks) > 1:
            average = {name: mean(numbers.get(name, math.nan) for numbers in by_task.values())
                       for name in next(iter(by_task.values()))}
            groups.setdefault(("mean", *rest), []).append(average)
    columns = list(dict.fromkeys(name for members in groups.values() for name in members[0]))
    digits = {name: 2 if name in ("XLRS", "XLRS mismatched") or "rho" in name else 1
              for name in columns}
    print(f"\n{title}")
    table([[*head, len(members), *(
        interval([numbers.get(name, math.nan) for numbers in members], digits[name])
        if name in members[0] else "" for name in columns)] for head, members in groups.items()],
          [*heads, "runs", *columns])


def at_usual_rate(runs):
    """Return the runs at the learning rate that most of them have."""
    rates = [run["lr"] for run in runs]
    return [run for run in runs if run["lr"] == max(rates, key=rates.count)]


def chosen_row(run):
    """Return the checkpoint that is chosen without any target-language data.

    By XLRS where it was regularised, as in the paper; else by English development loss, as usual.
    """
    return best_row(run["checkpoints"], "xlrs" if run["reg"] else "dev", run["reg_floor"])


def at_its_best(runs):
    """Return (run, checkpoint) pairs at the learning rate and step that serve each task best.

    Best is the highest target ROUGE-L, mean over seeds, on the test set itself: more than anybody
    could choose, so that no method is called ahead of a badly tuned one.
    """
    choices = {}  # (task, method) -> {(lr, step): [(run, checkpoint), …]}
    for run in runs:
        for row in run["checkpoints"]:
            choices.setdefault((run["task"], method(run)), {}).setdefault(
                (run["lr"], row["step"]), []).append((run, row))
    return [pair for by_choice in choices.values() for pair in max(
        by_choice.values(), key=lambda pairs: mean(
            scores_of(run, row)["ROUGE-L"] for run, row in pairs))]


def headline(checkpoints, name):
    """Return how far a method is from `--reg 0`, cells of a table: before -> after (difference).

    checkpoints: (run, row) pairs. Means over the languages that both are judged on and over the
    tasks, of the seeds that have them all; the difference seed by seed, with its 95 % interval.
    """
    pairs = [(run, row) for run, row in checkpoints if method(run) in ("--reg 0", name)]
    tasks = {run["task"] for run, _ in pairs}
    judged = set.intersection(*(set(row["test"]) for _, row in pairs))
    found = {}  # (method, seed) -> {task: {column: number}}
    for run, row in pairs:
        tests = {lang: row["test"][lang] for lang in judged}
        found.setdefault((method(run), run["seed"]), {})[run["task"]] = scores_of(
            run, {**row, "test": tests})
    seeds = [seed for kind, seed in found if kind == name and all(
        set(found.get((either, seed), ())) == tasks for either in ("--reg 0", name))]

    cells = []
    for column in ("source %", "wrong %", "ROUGE-L", "loops %", "source ROUGE-L"):
        before, after = ([mean(numbers[column] for numbers in found[kind, seed].values())
                          for seed in seeds] for kind in ("--reg 0", name))
        change = interval([b - a for a, b in zip(before, after)])
        cells.append(f"{mean(before):.1f} -> {mean(after):.1f} ({change})")
        if column == "source %":
            share = 100 * (mean(after) / mean(before) - 1) if any(before) else math.nan
            cells.insert(0, f"{share:.0f} %")
    return [len(seeds), *cells]


def across_runs(runs):
    """Return rows: rank correlations of XLRS with scores over the last checkpoints of runs.

    With their 95 % intervals by Fisher's transformation.
    """
    rows = []
    for task in dict.fromkeys(run["task"] for run in runs):
        for kind in ("--reg 0", "every method"):
            chosen = [run for run in runs
                      if run["task"] == task and kind in ("every method", method(run))]
            last = [scores_of(run, run["checkpoints"][-1]) for run in chosen]
            rows.append([task, kind, len(chosen), *(
                fisher([numbers["XLRS"] for numbers in last], [numbers[name] for numbers in last])
                for name in ("ROUGE-L", "wrong %"))])
    return rows


def fisher(x, y):
    """Return "rho [low, high]": Spearman's correlation and its 95 % interval."""
    rho = spearman(x, y)
    if len(x) < 4 or not abs(rho) < 1:
        return f"{rho:.2f}"
    half = 1.96 / math.sqrt(len(x) - 3)
    return f"{rho:.2f} [{math.tanh(math.atanh(rho) - half):.2f}, " \
           f"{math.tanh(math.atanh(rho) + half):.2f}]"


def compare(paths, out=None):
    """Print tables over runs, folders or the JSON that this wrote to out: mean ± 95 % interval.

    Scores are means over the languages that a run did not train on.
    """
    runs = read_runs(paths)
    if out:
        lines = [json.dumps(run, ensure_ascii=False) for run in runs]
        data.write_file(out, "[" + ",\n".join(lines) + "]\n")
    usual = at_usual_rate(runs)
    picked = {"last step": [(run, run["checkpoints"][-1]) for run in usual],
              "chosen checkpoint": [(run, chosen_row(run)) for run in usual],
              "each at its best": at_its_best(runs)}
    for name in dict.fromkeys(map(method, usual)):
        if name != "--reg 0" and headline(picked["last step"], name)[0]:
            print(f"\n--reg 0 -> {name} (difference ± 95 % interval over seeds), "
                  "mean over the tasks:")
            table([[title, *headline(checkpoints, name)] for title, checkpoints in picked.items()],
                  ["", "seeds", "source % by", "source %", "wrong %", "ROUGE-L", "loops %",
                   "source ROUGE-L"])

    last = [(run, run["checkpoints"][-1]) for run in runs]
    heads = ["task", "lr", "method"]
    print_means("At the last step:", heads, last)
    print_means("At the checkpoint chosen by XLRS where --reg is on, else by source dev loss:",
                heads, [(run, chosen_row(run)) for run in runs],
                lambda run, row: {"step": row["step"], **scores_of(run, row)})
    print_means("At the last step, by language:", heads, picked["last step"], by_language)
    print_means("At the learning rate and step that are best on the test set:", ["task", "method"],
                picked["each at its best"], lambda run, row: {
                    "lr / 1e-4": run["lr"] * 1e4, "step": row["step"], **scores_of(run, row)})
    print_means(f"Step by step, learning rate {usual[0]['lr']:g}:", ["task", "method", "step"],
                [(run, row) for run in usual if method(run).startswith("--reg")
                 for row in [run["base"], *run["checkpoints"]]])
    print_means("ROUGE-L of the checkpoint chosen by each rule:", heads, last, by_rule)
    print_means("Spearman's rank correlation with XLRS over the checkpoints of a run:", heads, last,
                within_run)
    print("\nSpearman's rank correlation with XLRS over runs, at the last step:")
    table(across_runs(runs), ["task", "method", "runs", "ROUGE-L", "wrong %"])


# Command line -------------------------------------------------------------------------------------


def bounded(kind, least, most=math.inf):
    """Return an argparse type: a finite number in [least, most]; kind: int or float."""
    def convert(text):
        value = kind(text)
        if not least <= value <= most or value == math.inf:
            limit = f"at most {most}" if value > most else f"at least {least}"
            raise argparse.ArgumentTypeError(f"expected a finite number, {limit}, found {text}")
        return value
    convert.__name__ = "whole number" if kind is int else "number"
    return convert


def precision(text):
    """An argparse type: the name of a precision that mT5 can compute in."""
    if text not in ("float32", "bfloat16"):
        why = "; mT5's states overflow float16 to NaN" if text in ("float16", "fp16") else ""
        raise argparse.ArgumentTypeError(f"expected float32 or bfloat16, found {text!r}{why}")
    return text


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Score a run, a checkpoint, or any system's outputs: ROUGE-L and language.",
        epilog="TEXT is LANG for the toy world, LANG=FILE, or LANG=SOURCE_FILE,TARGET_FILE. "
               "What is not given is as in the run; for a checkpoint as train.py has it in the "
               "toy world (answers of at most 32 tokens).")
    model = parser.add_argument_group("score a model")
    model.add_argument("model", nargs="?", metavar="CHECKPOINT|RUN", help="what to score")
    model.add_argument("--by", choices=["xlrs", "dev"], help="choose the run's checkpoint anew")
    model.add_argument("--task", choices=data.TASKS, help="task of the toy world")
    model.add_argument("--train", nargs="+", metavar="LANG", help="what it was fine-tuned on")
    model.add_argument("--test", nargs="+", metavar="TEXT", help="test pairs")
    model.add_argument("--parallel", nargs="+", metavar="TEXT", help="parallel text, for XLRS")
    model.add_argument("--fields", metavar="SOURCE,TARGET", help="column names in files")
    model.add_argument("--test-size", type=bounded(int, 1), metavar="N",
                       help="test texts a language")
    model.add_argument("--num-beams", type=bounded(int, 1), metavar="N", help="beams in generation")
    model.add_argument("--device", help="cpu, cuda, … (default cuda where there is one)")
    model.add_argument("--dtype", type=precision, metavar="float32|bfloat16",
                       help="precision of the matrix products (default as in train.py)")
    model.add_argument("--out", metavar="PATH", help="where scores.json and outputs.jsonl go "
                       "(default: the run; for a checkpoint runs/eval)")
    files = parser.add_argument_group("score files, one text a line")
    files.add_argument("--hyp", metavar="FILE", help="the system's outputs")
    files.add_argument("--ref", metavar="FILE", help="the references, aligned by line")
    files.add_argument("--lang", help="their language, ISO 639-1")
    files.add_argument("--source", default="en", help="the language fine-tuned on (default en)")
    files.add_argument("--candidates", nargs="+", metavar="LANG",
                       help="languages that the identifier may answer (default: all it knows)")
    runs = parser.add_argument_group("compare runs")
    runs.add_argument("--compare", nargs="+", metavar="RUN",
                      help="print tables over runs (or the JSON of an earlier --compare); with "
                           "--out FILE keep what they were made of")
    lid = parser.add_argument_group("language identifier")
    lid.add_argument("--train-lid", nargs=2, metavar=("DIR", "OUT"),
                     help="rebuild the table OUT from NTREX-128's files in DIR")
    args = parser.parse_args(argv)
    if not (args.model or args.compare or args.train_lid or (args.hyp and args.ref and args.lang)):
        parser.error("expected CHECKPOINT|RUN, or --hyp FILE --ref FILE --lang LANG, or "
                     "--compare RUN…, or --train-lid DIR OUT")
    return args


def score_model(args):
    """Score the run or the checkpoint that args.model names."""
    path = Path(args.model)
    toy = data.TOY_LANGUAGES
    known = (vars(read_run(path)[0]) if path.is_dir() else
             dict(task="completion", train=["en"], test=toy, parallel=toy, fields="source,target",
                  test_size=None, eval_size=100, num_beams=1, max_source=512, max_target=32))
    asked = {name: value for name, value in vars(args).items() if value is not None}
    merged = argparse.Namespace(**{**known, **asked})
    device, dtype, _ = pick_device(args.device, args.dtype)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    tests = data.task_pairs(merged.test, merged, "test", merged.test_size)
    if not tests:
        raise ValueError("no test pairs; name some with --test LANG=FILE")
    if path.is_dir():
        if args.by:
            choose_checkpoint(path, args.by)
        score_run(path, tests, merged, device, autocast, args.out)
    else:
        system = score_checkpoint(path, tests, merged, device, autocast)
        report({path.name: system}, tests, merged, None, Path(args.out or "runs/eval"))


def score_files(args):
    """Score the outputs in the file args.hyp against the references in args.ref; print."""
    outputs, references = data.read_lines(args.hyp), data.read_lines(args.ref)
    identifier().choice([args.lang, args.source])
    if args.candidates and args.lang not in args.candidates:
        raise ValueError(f"--candidates: expected {args.lang} among {' '.join(args.candidates)}")
    if len(outputs) != len(references):
        raise ValueError(f"expected as many lines in {args.ref} as in {args.hyp}, found "
                         f"{len(references)} and {len(outputs)}")
    scores = score(outputs, references, args.lang, args.source, identifier(), args.candidates)
    table([[args.lang, *scores.values()]], ["language", *scores])
    print(f"tokens of ROUGE-L: {TOKENS}")
    print(json.dumps({args.lang: scores}))


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.model:
            score_model(args)
        elif args.compare:
            compare(args.compare, args.out)
        elif args.train_lid:
            train_lid(*args.train_lid)
        else:
            score_files(args)
    except (ValueError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
