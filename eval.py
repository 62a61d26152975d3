"""The two metrics, ROUGE-L and the language of an output, of files, models and runs.

Shapes: N texts, B sentences, D width of the encoder, L languages; more where they are met.
"""

import os

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000", **os.environ}  # see train.py

import argparse
import functools
import json
import math
import re
import sys
import unicodedata
import zlib
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import data
from model import load, read_json, whole
from xlrs import choose, pool, xlrs

TOY_BASE, LID = data.TOY / "base.pt", data.TOY / "lid.bin"
# The settings of the runs of lab/results, which a report shows beside a run with the same ones.
SHIPPED = dict(init=None, train=["en"], train_size=None, dropout=None, lr=5e-4, steps=100,
               warmup=20, batch_size=32, eval_every=10, eval_size=100, test_size=None,
               max_source=512, max_target=32, num_beams=1)

# Scores -------------------------------------------------------------------------------------------


def score(outputs, references, language, source, identifier, expected=None):
    """Return the scores of a system's outputs in one language, a dict of plain numbers.

    rougeL: mean F1, 0 to 100. wrong_language: % of outputs in another language than `language`, or
    in none though the reference is in one. source_language: % in the source language. mixed: mean
    % of source words in the outputs that are in `language`, left out where none is. loops: % of
    outputs that repeat themselves. n: number of outputs. A rate whose language the identifier lacks
    is left out. language, source: ISO 639-1; without a source, or where it is language itself,
    source_language and mixed are 0. expected: languages that are likelier, besides `language`; by
    default the source.

    Limits: wrong_language is noisy in outputs of up to three words. In doubt they are the target's:
    of single English words four of five, of pairs a fifth, of three in a row one in twenty; one in
    a hundred human ones is called wrong (9 to 21 in Latin script without this doubt). An answer
    half in English is found by mixed more surely than by wrong_language. Levels of rougeL do not
    compare between scripts: where a character is a word, two unrelated lines of Thai share a fifth.
    """
    def percent(values):
        return 100 * sum(values) / max(1, len(outputs))

    scores = {"rougeL": percent(rouge_l(outputs, references).tolist())}
    if language in identifier.languages:
        source = source or language
        # In doubt it is the target; a language that nobody trained the system on needs most.
        likely = {**dict.fromkeys(expected or (), 1 / 2), source: 1, language: 3 / 2}
        found = identifier.predict(outputs, likely)
        scores["wrong_language"] = percent(pair[0] != language and pair != ("und", "und")
                                           for pair in zip(found, identifier.predict(references)))
        if source in identifier.languages:
            scores["source_language"] = percent(code == source != language for code in found)
            right = [text for text, code in zip(outputs, found) if code == language]
            if right:
                scores["mixed"] = 100 * identifier.mixed(right, language, source).mean().item()
    return scores | {"loops": percent(map(loops, outputs)), "n": len(outputs)}


# ROUGE-L ------------------------------------------------------------------------------------------


def rouge_l(predictions, references):
    """Return the F1 of each pair's longest common subsequence of tokens, (N,) float, in [0, 1].

        F1 = 2 · LCS / (P + R)

    0 where either side has no token. On ASCII text equal to rouge_score 0.1.2 without stemming.
    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, section 3, β = 1.
    Raises ValueError where the lists differ in length.
    """
    if len(predictions) != len(references):
        raise ValueError(f"found {len(references)} references for {len(predictions)} predictions")
    number = {}  # token -> its id
    pairs = [[[number.setdefault(token, len(number)) for token in tokens(text)] for text in pair]
             for pair in zip(predictions, references)]
    order = sorted(range(len(pairs)), key=lambda i: max(map(len, pairs[i])))  # little padding
    common = torch.zeros(len(pairs))
    for start in tqdm(range(0, len(pairs), 256), desc="ROUGE-L", leave=False, delay=1):
        some = order[start:start + 256]
        a, b = (torch.tensor([*zip_longest(*(pairs[i][k] for i in some), fillvalue=-1 - k)])
                .view(-1, len(some)).T for k in (0, 1))
        common[some] = lcs(a, b).float()
    return 2 * common / torch.tensor([max(1, len(a) + len(b)) for a, b in pairs])


def lcs(a, b):
    """Return the length of the longest common subsequence of each pair of rows, (N,) int32.

    a (N, P), b (N, R): ids of tokens; what pads a must not occur in b, nor the other way round.
    The textbook table, table[i, j] = table[i-1, j-1] + 1 where a[i] = b[j], else the larger of
    table[i-1, j] and table[i, j-1] (the latter by cummax), a row of all pairs at a time.
    """
    row = torch.zeros(len(b), b.shape[1] + 1, dtype=torch.int32)  # the old row: table[i-1]
    for token in a.T:
        match = (b == token[:, None]).int()  # (N, R)
        row[:, 1:] = torch.maximum(row[:, 1:], row[:, :-1] + match).cummax(dim=1).values
    return row[:, -1]


CONTROL = re.compile(r"<extra_id_\d+>|<pad>|</s>|<unk>")  # pieces of the vocabulary, no text
# Marks up to U+FFFF: of longer ones `re` would make a list that it searches at every letter. Those
# that enclose a character or choose a variant of it, as in 1️⃣, are no part of a word.
MARKS = "".join(c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c) in "Mn Mc"
                and not re.search("VARIATION|GRAPHEME JOINER", unicodedata.name(c)))
# Han, kana, Thai, Lao, Tibetan, Khmer, Myanmar.
NO_SPACES = ("\u0e00-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
             "\u3400-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\U00020000-\U0003ffff")
SINGLE = re.compile(f"[{NO_SPACES}]")
# One character with its marks, or a run of such; the lookahead drops punctuation.
TOKEN = re.compile(rf"(?=[^\W_])[{NO_SPACES}][{MARKS}]*|(?:[^\W_{NO_SPACES}][{MARKS}]*)+")
def tokens(text):
    """Return the tokens of text that ROUGE-L compares, a list of str in lower case.

    Unicode words with their combining marks; single characters in scripts without spaces.
    """
    return TOKEN.findall(clean(text).lower())


def clean(text):
    """Return text in the normal form NFKC, without the vocabulary's marks and soft hyphens.

    U+200C and U+200D stay and part words: mT5 reads and writes a space there. Turkish İ becomes I,
    since Python's lower case of it is an i with a second dot.
    """
    text = unicodedata.normalize("NFKC", CONTROL.sub(" ", text).replace("\xad", ""))
    return text.replace("İ", "I").replace("i\u0307", "i")


AGAIN = 12  # letters that chance seldom repeats: three words, or a dozen characters of Han or Thai


def loops(text):
    """Return whether text repeats itself, bool.

    It does where three tokens in a row of AGAIN letters come again, or AGAIN tokens of any length,
    or where three tokens or more repeat what stands one or two tokens before them, or a stretch of
    3 to 11 is written twice in a row. Of human sentences about 1 % do, in scripts with and without
    spaces. The rule is ours.
    """
    words = tokens(text)
    runs = [run for size in (3, AGAIN) for run in zip(*(words[i:] for i in range(size)))
            if len("".join(run)) >= AGAIN]
    return len(set(runs)) < len(runs) or any(  # "=": a token is the one `step` later
        "=" * max(3, step) in "".join(" ="[a == b] for a, b in zip(words, words[step:]))
        for step in range(1, AGAIN))


# Language identifier ------------------------------------------------------------------------------

GRAMS, WORDS = 2**17, 2**16  # rows of the table for n-grams and, after them, for whole words
WEIGHTS = 5 * [1 / 16] + [1 / 4]  # of the evidence of n-grams of 1 to 5 letters, which overlap, and
#                                   of whole words
UNIT = 1 / 16  # nats: what a 1 in the table's file means
# Six constants of judgement. More of …
FOREIGN = .1  # share of words of any language: no word decides alone, relatives are told less well
NAME = .3  # weight of a word that may be a name: names mislead more, German nouns say more
FIRST = .4  # weight of a first word without a capital: short texts say more, an English one too
EXPECTED = 3.5  # nats for expected languages beforehand: they are missed less, a third one more
CLEAR = 1.5  # nats a word that tell languages apart: less counts as mixed in, more as names alone
COMMON = 8.5  # nats of a word of one line in twenty: fewer capitalised words count as mixed in
# No words are URLs and domains, e-mail addresses, @names, #tags.
ADDRESS = re.compile(r"https?://[!-~]+|(?<![A-Za-z\d.+-])(?:www\.[!-~]+|[!-~]*@[\w.-]+|#\w+#?|"
                     r"[A-Za-z\d-]+(?:\.[a-z\d-]+)*\.[a-z]{2,}(?:/[!-~]*)?)")


class LanguageIdentifier:
    """Names the language of a text: naive Bayes over hashed character n-grams, word by word.

        evidence(text, l) = Σ over words w of weight(w) · log((1 - ε) · p(w | l) / p(w) + ε)
        log p(w | l) = Σ over n-grams g in w of weight(g) · log((count(g, l) + α) / α) + constant

    ε is FOREIGN, p(w) the mean over the table's columns: a word may be of any language, so a name
    or a loan can't outvote a sentence. What a column has never seen says nothing for it. Counts are
    scaled as if every language had shown equally many letters. The weights are ours.
    path: a table that lab/identifier.py wrote. Raises FileNotFoundError where there is none,
    ValueError for other bytes.
    """

    def __init__(self, path=LID):
        with whole(path, "a language table, as python lab/identifier.py NTREX_DIR makes it"):
            head, _, body = Path(path).read_bytes().partition(b"\n")
            self.languages, self.columns, self.blocks = json.loads(head)
            table = torch.frombuffer(bytearray(zlib.decompress(body)), dtype=torch.uint8)
            self.table = table.view(GRAMS + WORDS, sum(self.columns)).bfloat16()  # exact

    def predict(self, texts, expected=None):
        """Return the most probable language of each text, ISO 639-1 (639-3 where there is none).

        expected: languages that are EXPECTED nats likelier beforehand, or how many times as much,
        {language: times}; every other one remains possible. `und` where no language has seen
        anything of the text, or where it is names alone.
        """
        times = expected if isinstance(expected, dict) else dict.fromkeys(expected or (), 1)
        prior = torch.tensor([EXPECTED * times.get(name, 0) for name in self.languages])
        best, place = (self.evidence(texts) + prior).max(dim=1)
        return ["und" if none else self.languages[i] for none, i in zip(best == -torch.inf, place)]

    def evidence(self, texts):
        """Return what speaks for each language rather than the average one, (N, L), nats.

        -inf for one that has seen nothing of the text; for all where its words, more than one, all
        have capitals and none speaks for a language with CLEAR nats in the mean: they are names.
        """
        lines, places, _, scores = self.words(texts)
        starts = torch.tensor([0, *map(len, lines)]).cumsum(0)[:-1]
        seen = F.embedding_bag(places, scores, starts, mode="max") > 0
        scores = ((1 - FOREIGN) * scores.softmax(dim=1) * scores.shape[1] + FOREIGN).log()
        weight = torch.tensor([weight for line in lines for weight in weights(line)])
        evidence = F.embedding_bag(places, scores, starts, mode="sum", per_sample_weights=weight)
        least = torch.tensor([CLEAR * NAME * len(line) if len(line) > 1 and all(names(line))
                              else -torch.inf for line in lines])
        return evidence.masked_fill(~seen | (evidence.amax(dim=1) < least)[:, None], -torch.inf)

    def mixed(self, texts, target, source):
        """Return the share of each text's words that are the source's though not the target's.

        (N,) float in [0, 1]. A word counts if the source explains it better than the target by
        CLEAR nats and if it is a common word of the source or, without a capital, no language
        explains it better: what has one may be a name. In scripts without spaces a word is a
        character. This rule is ours. Raises ValueError for a language that the table lacks.
        """
        target, source = self.languages.index(target), self.languages.index(source)
        lines, places, whole, scores = self.words(texts)
        clear = scores[:, source] > scores[:, target] + CLEAR  # (W,)
        common = clear & (whole[:, source] > COMMON)
        best = clear & (scores.argmax(dim=1) == source)
        small = torch.tensor([word == word.lower() for line in lines for word in line], dtype=bool)
        hits = (common[places] | best[places] & small).split(list(map(len, lines)))
        return torch.tensor([line.sum() / max(1, len(line)) for line in hits])

    def words(self, texts):
        """Return (lines, places, whole, scores): the words of each text, which of W different
        pieces each word is, (all words), and what a piece says of each language, log p(w | l),
        (W, L), as a whole word and in all.
        """
        lines, number = list(map(written, texts)), {"": 0}  # piece -> its place
        places = [number.setdefault(piece, len(number)) for line in lines for piece in pieces(line)]
        known = [piece if any(map(str.isalpha, piece)) else "" for piece in number]
        scores = torch.zeros(len(known), sum(self.columns))
        for weight, (rows, owner) in zip(WEIGHTS, ngrams(known)):
            starts = torch.from_numpy(np.searchsorted(owner, np.arange(len(known))))
            found = UNIT * F.embedding_bag(torch.from_numpy(rows), self.table, starts, mode="sum")
            scores += weight * found
        blocks = [frozenset(ord(letter) >> 6 for letter in piece.strip()) for piece in known]
        shown = {some: torch.tensor(list(map(some.issubset, self.blocks))) for some in set(blocks)}
        scores *= torch.stack([shown[some] for some in blocks])  # a row may be other letters' too
        parts = torch.stack([found, scores]).split(self.columns, dim=2)
        found, scores = torch.stack([part.amax(dim=2) for part in parts], dim=2)
        return lines, torch.tensor(places, dtype=torch.long), found, scores


def written(text):
    """Return the words of text as they are written there, without addresses."""
    return TOKEN.findall(ADDRESS.sub(" ", clean(text)))


def names(words):
    """Return which of a text's words may be names, a list of bool: capitalised Latin ones, but not
    the first of a sentence, in which others have no capital.
    """
    capital = [word < "\u0250" and word != word.lower() for word in words]
    return [name and (place > 0 or all(capital)) for place, name in enumerate(capital)]


def weights(words):
    """Return how much each of a text's words counts, a list: one that may be a name counts less,
    and a first one without a capital: it is English in half of the questions of such systems.
    """
    return [NAME if name else FIRST if not place and "\u0250" > word == word.lower() else 1.
            for place, (word, name) in enumerate(zip(words, names(words)))]


def pieces(words):
    """Return what is looked up for each word: itself in lower case, between spaces.

    For a character of a script without spaces, it and the one before it: that tells more.
    """
    singles = [word if SINGLE.match(word) else "" for word in words]
    return [before + single if single else f" {word.lower()} "
            for word, single, before in zip(words, singles, ["", *singles])]


def ngrams(words):
    """Return the hashed n-grams of words by order: a list of (rows (G,), word numbers (G,)).

    Orders 1 to 5 inside each word, the spaces around it included, then whole words.
    """
    letters = np.array([*map(ord, "".join(words))], dtype=np.uint64)
    owner = np.repeat(np.arange(len(words)), list(map(len, words)))
    found, value = [], np.zeros(len(letters) + 1, dtype=np.uint64)
    for order in range(1, len(WEIGHTS)):  # value: a hash of the letters from each place, mod 2^64
        value = (value[:-1] + np.uint64(order)) * FACTOR + letters[order - 1:]
        inside = owner[:len(value)] == owner[order - 1:]
        inside &= (letters[order - 1:] > ord("9")) | (order > 1)  # a digit alone says nothing
        rows = (value ^ (value >> np.uint64(32))) * FACTOR >> np.uint64(40)
        found.append((rows[inside].astype(np.int64) % GRAMS, owner[:len(value)][inside]))
    whole = [(GRAMS + zlib.crc32(word.encode("utf-8", "surrogatepass")) % WORDS, place)
             for place, word in enumerate(words) if word]
    return [*found, tuple(np.array(whole, dtype=np.int64).reshape(-1, 2).T)]


FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, its bits without pattern


identifier = functools.cache(LanguageIdentifier)  # with the shipped table, read once

# A model's outputs and its similarity -------------------------------------------------------------

BEAMS = 100  # of a batch: their scores over mT5's vocabulary take 0.1 GB, a few times over


def in_batches(texts, tokenizer, args, device):
    """Yield (places, input_ids, mask) of texts, the longest first, so that little is padded."""
    size = 2**15 if device.type == "cuda" else 2**13  # source tokens of a batch, with padding
    ids = [tokenizer.encode(text, args.max_source) for text in texts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    while order:
        count = max(1, min(size // len(ids[order[0]]), BEAMS // args.num_beams))
        places, order = order[:count], order[count:]
        input_ids, mask = data.pad_source([ids[i] for i in places])
        yield places, input_ids.to(device), mask.to(device)


def answer(model, tokenizer, texts, args, name):
    """Return the model's output for each text, a list of str; name: the progress bar's."""
    outputs, batches = {}, in_batches(texts, tokenizer, args, model.head.weight.device)
    for places, *batch in tqdm(batches, desc=name, unit=" batches", leave=False):
        found = model.generate(*batch, args.max_target, args.num_beams).tolist()
        outputs |= zip(places, map(tokenizer.decode, found))
    return [outputs[place] for place in range(len(texts))]


@torch.no_grad()
def similarities(model, tokenizer, sentences, args):
    """Return XLRS of the source, the first language, with each other, {language: cosine}.

    sentences: {language: sentences}, aligned.
    """
    pooled = torch.zeros(len(sentences), len(next(iter(sentences.values()))), model.config.d_model)
    for vectors, texts in zip(pooled, sentences.values()):
        for places, *batch in in_batches(texts, tokenizer, args, model.head.weight.device):
            vectors[places] = pool(model.encode(*batch), batch[1]).cpu()
    return dict(zip(list(sentences)[1:], xlrs(pooled).tolist()))


@torch.no_grad()
def mean_loss(model, examples, size=64):
    """Return the mean cross-entropy, nats a token, of (source ids, target ids) examples."""
    total, count = 0, sum(len(target) for _, target in examples)
    for start in range(0, len(examples), size):
        batch = data.collate(examples[start:start + size])
        real = (batch[2] != data.IGNORE).sum()
        total += model(*(rows.to(model.head.weight.device) for rows in batch)).item() * real.item()
    return total / count


def score_tests(model, tokenizer, tests, args):
    """Return ({language: scores}, {language: outputs}) of tests, {language: pairs}.

    args: a run's; its languages are the ones that the identifier expects.
    """
    expected, scores, outputs = data.languages(args), {}, {}
    for language, pairs in tests.items():
        sources, references = zip(*pairs)
        outputs[language] = answer(model, tokenizer, sources, args, f"answering in {language}")
        scores[language] = score(outputs[language], references, language, expected[0],
                                 identifier(), expected)
    return scores, outputs


# A run; its folder is train.py's ------------------------------------------------------------------

def say_unidentified(languages):
    """Print which of languages the identifier lacks, so that no rates are known there."""
    lacking = sorted(set(languages) - set(identifier().languages))
    if lacking:
        print(f"the language identifier lacks {' '.join(lacking)}: language rates are left out "
              "there" + " (Norwegian is nb or nn)" * ("no" in lacking))


def read_run(folder):
    """Return (arguments, evaluation rows) of a run folder. Raises FileNotFoundError, ValueError.

    A row's "loss" is the mean of the training losses since the row before.
    """
    path, rows, losses = Path(folder) / "args.json", [], []
    with whole(path, "a run folder, written by train.py"):
        arguments = argparse.Namespace(**json.loads(path.read_bytes())["arguments"])
    for row in read_log(folder):
        if row["kind"] == "train":
            losses.append(row["loss"])
        else:
            rows.append(row | {"loss": mean(losses)})
            losses.clear()
    return arguments, rows


def read_log(folder):
    """Return the rows of a run's log.jsonl; a last line that a kill tore off is left out."""
    path = Path(folder) / "log.jsonl"
    lines = path.read_text("utf-8").split("\n") if path.exists() else []
    with whole(path, "a JSON object a line"):
        return [json.loads(line) for line in lines[:-1]]  # the last is empty, or torn off


def progress(args, row):
    """Return {column: text} of an evaluation row; what was not measured is left out.

    Scores are means over the target languages, those that were not trained on.
    """
    learnt, test = data.files_by_language(args.train), row.get("test", {})
    targets = [scores for lang, scores in test.items() if lang not in learnt]
    told = {"loss": (row["loss"], ".3f"), "XLRS": (mean(row.get("xlrs", {}).values()), ".3f"),
            "source dev loss": (row.get("dev_loss", math.nan), ".4f"),
            "target ROUGE-L": (mean(scores["rougeL"] for scores in targets), ".1f"),
            "wrong %": (mean(scores.get("wrong_language", math.nan) for scores in targets), ".1f")}
    return {"step": str(row["step"])} | {name: format(number, digits) for name, (number, digits)
                                         in told.items() if not math.isnan(number)}


def choose_checkpoint(folder, by=None):
    """Return the evaluation row of a run's chosen checkpoint, "xlrs" as one number; write its step
    to selected.json.

    by: "xlrs", or "dev" for the development loss; by default "xlrs" where the run measured it, else
    "dev", else the last. XLRS counts down to the run's floor. The base, step 0, is not on offer: it
    has not learnt the task, and its XLRS may be the lowest.
    """
    args, rows = read_run(folder)
    if not rows or rows[-1]["step"] == 0:
        raise ValueError(f"{folder}: expected a checkpoint, found none yet; go on with --resume")
    by = by or ("xlrs" if "xlrs" in rows[-1] else "dev" if "dev_loss" in rows[-1] else "last")
    offered = [row | {"xlrs": mean(row.get("xlrs", {}).values())} for row in rows if row["step"]]
    key = "dev_loss" if by == "dev" else by
    chosen = offered[-1] if by == "last" else choose(offered, key, args.reg_floor)
    content = json.dumps({"step": chosen["step"], "by": by})
    data.write_file(Path(folder) / "selected.json", content + "\n")
    return chosen


def score_run(folder, tests, held_out, args, device, autocast):
    """Score a run's base and chosen checkpoint on tests; print, and write to args.out or folder.

    tests: {language: pairs}; held_out: {language: sentences}, aligned, for XLRS. For a run of the
    toy world with the settings in SHIPPED the shipped scores stand around them: of the usual way,
    `--reg 0` and the checkpoint that is best on the source, also at a lower rate; and of
    fine-tuning in the target language itself.
    """
    step = read_json(folder / "selected.json")["step"]
    base, ours = (score_checkpoint(folder / f"step_{number:06d}.pt", tests, held_out, args, device,
                                   autocast) for number in (0, step))
    systems = {"base": base, "this run": ours}
    shipped = data.TOY.parent / "lab" / "results" / f"{args.task}.json"
    alike = all(getattr(args, name) == value for name, value in SHIPPED.items())
    if alike and "=" not in f"{args.test} {args.parallel}" and shipped.exists():
        usual, low, upper = read_json(shipped).items()  # (name, system), as grid.sh wrote them
        systems = dict([("base", base), usual, low, ("this run", ours), upper])
    report(systems, "this run", tests, args, step, Path(args.out or folder))


def score_checkpoint(path, tests, held_out, args, device, autocast):
    """Return {"scores": {language: …}, "outputs": {language: …}, "xlrs": {language: …}} and
    "texts", a checksum of what they are scores of."""
    model, tokenizer = load(path)
    model.to(device)
    with autocast:
        scores, outputs = score_tests(model, tokenizer, tests, args)
        similarity = similarities(model, tokenizer, held_out, args) if held_out else {}
    return {"scores": scores, "outputs": outputs, "xlrs": similarity,
            "texts": zlib.crc32(json.dumps([tests, held_out]).encode())}


def report(systems, ours, tests, args, step, folder):
    """Print systems, {name: what score_checkpoint() returns}; write the one named ours too."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"task": args.task, "step": step} | systems[ours]
    outputs = content.pop("outputs")
    data.write_file(folder / "scores.json", json.dumps(content, indent=1) + "\n")
    lines = [json.dumps(dict(language=lang, source=text, reference=reference, output=output),
                        ensure_ascii=False) + "\n" for lang, pairs in tests.items()
             for (text, reference), output in zip(pairs, outputs[lang])]
    data.write_file(folder / "outputs.jsonl", "".join(lines))

    print(f"\n{args.task}, step {step}: {len(lines)} test texts, languages: {' '.join(tests)}")
    table([[lang, *columns(content, [lang])] for lang in tests], ["this run", *COLUMNS])
    targets = [lang for lang in tests if lang not in data.files_by_language(args.train)]
    if targets:
        print()
        table([[name, *columns(system, targets)] for name, system in systems.items()],
              [f"mean of {' '.join(targets)}", *COLUMNS])
        for title, (lang, place) in examples(systems, targets, data.languages(args)).items():
            text, reference = tests[lang][place]
            print(f"\n{title}, {lang}: {text[:300]}\n{'reference':16} {reference[:300]}")
            for name, system in systems.items():
                if name != "base" and lang in system["outputs"]:
                    print(f"{name:16} {system['outputs'][lang][place][:300]}")
    print(f"\nWritten to {folder}")


def examples(systems, targets, expected):
    """Return {title: (language, place)} of texts to show, among the first 20 of a language: the
    first whose language is mended, the first whose is not, if there are such; without the usual way
    to compare with, the first of all.
    """
    if "usual way" not in systems:
        return {"text": (targets[0], 0)}
    shown = {}
    for lang in targets:
        usual, ours = (identifier().predict(systems[name]["outputs"][lang][:20], expected)
                       for name in ("usual way", "this run"))
        for place, codes in enumerate(zip(usual, ours)):
            if codes[0] != lang:
                shown.setdefault("mended" if codes[1] == lang else "not mended", (lang, place))
    return shown


COLUMNS = {"ROUGE-L": "rougeL", "wrong %": "wrong_language", "source %": "source_language",
           "mixed %": "mixed", "XLRS": "xlrs"}  # of a report -> names in scores.json


def columns(system, languages):
    """Return the means over languages of a system's numbers, as COLUMNS names them.

    A mean is blank, "", where one of the languages lacks the number.
    """
    found = [[(system["scores"].get(lang, {}) | {"xlrs": system["xlrs"].get(lang)}).get(kind)
              for lang in languages] for kind in COLUMNS.values()]
    return ["" if None in row or not row else mean(row) for row in found]


def compare(args):
    """Print a row a run in args.compare, train.py's folders: means over the languages from which
    none of them learnt.

    Raises ValueError where two are scored on other texts, or measured on other parallel ones.
    """
    runs = {folder: read_json(Path(folder) / "scores.json") for folder in args.compare}
    learnt = {lang for folder in runs for lang in data.files_by_language(read_run(folder)[0].train)}
    for folder, found in runs.items():
        if found.get("texts") != runs[args.compare[0]].get("texts"):
            raise ValueError(f"{folder}: expected scores on the texts of {args.compare[0]}")
    targets = [lang for lang in found["scores"] if lang not in learnt]  # the same in each
    table([[folder, *columns(found, targets)] for folder, found in runs.items()],
          [f"mean of {' '.join(targets)}", *COLUMNS])


def mean(values):
    """Return the mean of values, NaN of none."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def table(rows, header):
    """Print rows as an aligned table, all but the first column to the right; numbers that are no
    text yet get one decimal, XLRS two."""
    cells = [[f"{c:.{1 + (name == 'XLRS')}f}" if isinstance(c, float) else str(c)
              for name, c in zip(header, row)] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  ".join(cell.rjust(w) if i else cell.ljust(w)
                        for i, (cell, w) in enumerate(zip(row, widths))).rstrip())


# Command line -------------------------------------------------------------------------------------

def positive(text, least=1):
    """An argparse type: a whole number from `least`."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least}, found {text:.40}")
    return int(text)


def add_texts(parser):
    """Add the flags on texts and device that train.py and eval.py share."""
    parser.epilog = "TEXT is LANG for the toy world, LANG=FILE, or LANG=SOURCE_FILE,TARGET_FILE."
    add = parser.add_argument_group("task and text").add_argument
    add("--task", choices=data.TASKS, help="of the toy world (title)")
    add("--train", nargs="+", metavar="TEXT", default=["en"], help="pairs; source first (en)")
    add("--test", nargs="+", metavar="TEXT", help="test pairs (toy: every language)")
    add("--parallel", nargs="+", metavar="TEXT", help="aligned lines, for XLRS (toy: all)")
    add("--fields", metavar="S,T", default="source,target", help="columns of files (%(default)s)")
    add("--test-size", type=positive, metavar="N", help="test texts a language (all; toy: 200)")
    add("--eval-size", type=positive, default=100, metavar="N",
        help="texts a language at each checkpoint, and in all to measure XLRS on (%(default)s)")
    add("--max-source", type=positive, default=512, metavar="N", help="tokens, then cut (512)")
    add("--max-target", type=positive, metavar="N", help="also in generation (64; toy: 32)")
    add("--num-beams", type=positive, default=1, metavar="N", help="in generation (1: greedy)")
    add("--device", help="cpu, cuda, … (cuda where there is one)")
    add("--dtype", choices=["float32", "bfloat16"],
        help="of matrix products, not of weights (bfloat16 on a GPU that has it, else float32)")
    add("--out", metavar="FOLDER", help="where the results go (train.py: runs/NAME)")


def complete(args):
    """Return args with the defaults that depend on whether files were named."""
    source, in_files = args.train[0].partition("=")[0], "=" in f"{args.train[0]} {args.test}"
    args.task = args.task or ("files" if in_files else "title")
    if not in_files:
        everywhere = [source, *(lang for lang in data.TOY_LANGUAGES if lang != source)]
        args.test = args.test or everywhere
        args.parallel = args.parallel or everywhere
    args.max_target = args.max_target or (64 if in_files else 32)
    return args


def pick_device(args):
    """Return (device, autocast context) as asked for or, where not, the best; say which."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {device}: torch can't compute there; leave it out") from None
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = args.dtype or ("bfloat16" if has_bf16 else "float32")
    print(f"device {device}, {dtype} (it has {'' if has_bf16 else 'no fast '}bfloat16)")
    return device, torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Score a run, a checkpoint or any outputs.")
    add_texts(parser)
    add = parser.add_argument
    add("model", nargs="?", metavar="CHECKPOINT|RUN", help="what to score")
    add("--compare", nargs="+", metavar="RUN", help="print a row a run")
    add("--hyp", metavar="FILE", help="outputs of any system, a text a line")
    add("--ref", metavar="FILE", help="their references, aligned by line")
    add("--lang", help="their language, ISO 639-1")
    add("--source", default="en", help="the language fine-tuned on (en)")
    add("--expected", nargs="+", metavar="LANG", help="languages that are likelier (the source)")
    args = parser.parse_args(argv)
    if not (args.model or args.compare or (args.hyp and args.ref and args.lang)):
        parser.error("expected CHECKPOINT|RUN, --compare RUN…, or --hyp, --ref and --lang")
    if args.model and Path(args.model).is_dir():  # what is not given is as in the run
        known, _ = read_run(args.model)
        known.out = known.device = None  # the run may have moved, to another machine too
        run = vars(known).copy()
        args = parser.parse_args(argv, known)
        other = [name for name in run if vars(args)[name] != run[name] and name != "device"]
        if other and not args.out:
            parser.error(f"--out: expected FOLDER, as {other[0]} is not the run's")
    elif args.model:
        args.out = args.out or "runs/eval"
    if args.out and (Path(args.out) / "scores.json").exists():
        parser.error(f"--out: expected a folder without scores, found {args.out}")
    return complete(args)


def score_model(args):
    """Score the run or the checkpoint that args.model names."""
    path = Path(args.model)
    device, autocast = pick_device(args)
    say_unidentified(data.languages(args))
    tests = data.task_pairs(args.test, args, "test", args.test_size)
    if not tests:
        raise ValueError("no test pairs; name some with --test LANG=FILE")
    _, held_out = data.parallel_texts(args) if args.parallel else ({}, {})
    if path.is_dir():
        if not (path / "selected.json").exists():
            choose_checkpoint(path)
        score_run(path, tests, held_out, args, device, autocast)
    else:
        found = score_checkpoint(path, tests, held_out, args, device, autocast)
        report({path.name: found}, path.name, tests, args, None, Path(args.out))


def score_files(args):
    """Score the outputs in the file args.hyp against the references in args.ref; print."""
    say_unidentified([args.lang, args.source, *(args.expected or [])])
    texts = data.read_lines(args.hyp), data.read_lines(args.ref)
    scores = score(*texts, args.lang, args.source, identifier(), args.expected)
    table([[args.lang, *scores.values()]], ["language", *scores])


def main(argv=None):
    try:
        args = parse_args(argv)
        work = compare if args.compare else score_model if args.model else score_files
        work(args)
    except (ValueError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # whatever the console can show
    main()
