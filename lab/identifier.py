"""Makes the language identifier's table, toy/lid.bin, from NTREX-128, and measures it.

    python lab/identifier.py NTREX_DIR [OUT]       the table: about a minute on one core
    python lab/identifier.py --measure DATA_DIR    its figures: about two minutes

NTREX-128 is 1,997 lines of news in 128 languages, https://github.com/MicrosoftTranslator/NTREX.
DATA_DIR has the folders ntrex, tatoeba_dev (CODE.txt), xquad (xquad.LANG.json) and xglue_dev
(NTG.LANG.txt, QG.LANG.txt). Constants were tuned on tatoeba_dev, xquad, xglue_dev. In a figure's
list of the worst, sr/uk is Ukrainian where Serbian is expected, zh/yue the column of Cantonese.
"""

import argparse
import json
import sys
import tempfile
import timeit
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tqdm import tqdm

import data
import eval as scoring

# NTREX's codes and ISO 639-1 (639-3 where there is none). A regional variant joins its language;
# one that is written or spoken otherwise is its own column, "language/CODE". Not Swiss German:
# seldom written, as a column it takes short German from German.
LANGUAGES = dict(entry.split(":") for entry in """
    afr:af amh:am arb:ar aze:az bak:ba bel:be bem:bem ben:bn bod:bo bos:bs bul:bg cat:ca ces:cs
    ckb:ckb cym:cy dan:da deu:de div:dv dzo:dz ell:el eng:en est:et eus:eu ewe:ee fao:fo fas:fa
    fij:fj fil:tl fin:fi fra:fr fuc:ff gle:ga glg:gl guj:gu hau:ha heb:he hin:hi hmn:hmn hrv:hr
    hun:hu hye:hy ibo:ig ind:id isl:is ita:it jpn:ja kan:kn kat:ka kaz:kk khm:km kin:rw kir:ky
    kmr:ku kor:ko lao:lo lav:lv lit:lt ltz:lb mal:ml mar:mr mey:ar/mey mkd:mk mlg:mg mlt:mt mon:mn
    mri:mi msa:ms mya:my nde:nd nep:ne nld:nl nno:nn nob:nb nso:nso nya:ny orm:om pan:pa pol:pl
    por:pt prs:fa/prs pus:ps ron:ro rus:ru shi:shi sin:si slk:sk slv:sl smo:sm sna:sn snd:sd som:so
    spa:es sqi:sq srp:sr srp-Latn:sr/srp-Latn ssw:ss swa:sw swe:sv tah:ty tam:ta tat:tt tel:te
    tgk:tg tha:th tir:ti ton:to tsn:tn tuk:tk tur:tr uig:ug ukr:uk urd:ur uzb:uz ven:ve vie:vi
    wol:wo xho:xh yor:yo yue:zh/yue zho:zh zho-TW:zh/zho-TW zul:zu tgl:tl zsm:ms""".split())
LANGUAGES |= {code: code for code in LANGUAGES.values()}  # so read() takes either
ALPHA = .02  # added to every count: what an n-gram that a language never showed still counts


def read(folder, pattern, reader=data.read_lines):
    """Return {column: [texts]} of folder's files by a pattern, CODE.txt or NAME.CODE.txt.

    A column is a language or a variant, as in LANGUAGES; files of others are left out. reader: a
    function that returns a file's texts.
    """
    texts = {}
    for path in sorted(Path(folder).glob(pattern)):
        code = path.stem.split(".")[-1]
        if column := LANGUAGES.get(code, LANGUAGES.get(code.split("-")[0])):
            texts.setdefault(column, []).extend(reader(path))
    if not texts:
        raise FileNotFoundError(f"{folder}: expected files {pattern}, found none")
    return texts


def train(texts, out):
    """Write the table of {column: [sentences]} to out; see eval.LanguageIdentifier.

    n-grams, not words, that a language showed only once are left out: they are many and tell
    little. Counts are rounded to powers of two. The same texts give the same bytes: a line of
    JSON, [languages, how many columns each has, the 64s of code points of which a column shows
    letters], then compressed bytes, (rows, columns), in units of eval.UNIT nats.
    """
    names, counts, letters, blocks = sorted(texts), [], [], []
    for name in tqdm(names, desc="columns", unit="", disable=None):
        words = Counter(word for text in texts[name]
                        for word in scoring.pieces(scoring.written(text)))
        often = np.array(list(words.values()))
        found = [np.bincount(rows, often[owner], scoring.GRAMS + scoring.WORDS)
                 for rows, owner in scoring.ngrams(list(words))]
        counts.append(sum(np.where(count > 1, count, 0) for count in found[:-1]) + found[-1])
        letters.append(found[0].sum())
        shown = Counter(ord(c) >> 6 for word in words.elements() for c in word.strip())
        blocks.append(sorted(block for block, count in shown.items() if count > 1))
    share = np.mean(letters) / np.array(letters)[:, None]
    counts = np.stack(counts)
    value = np.log1p(2 ** np.rint(np.log2(counts.clip(1))) * share / ALPHA) * (counts > 0)
    body = np.rint(value.T / scoring.UNIT).clip(0, 255).astype(np.uint8)
    columns = Counter(name.split("/")[0] for name in names)
    head = [list(columns), list(columns.values()), blocks]
    Path(out).write_bytes(json.dumps(head).encode() + b"\n" + zlib.compress(body.tobytes(), 9))


def measure(folder):
    """Print every figure that this project promises of the identifier and of loops."""
    torch.set_num_threads(1)
    tatoeba, ntrex = (read(folder, f"{x}/*.txt") for x in ("tatoeba_dev", "ntrex"))
    qg, ntg = (read(folder, f"xglue_dev/{task}.*.txt") for task in ("QG", "NTG"))
    xquad = read(folder, "xquad/*.json", questions)
    toy = {x: sum((data.toy_pair(story, x, "title") for story in data.stories("test", 200)), ())
           for x in data.TOY_LANGUAGES}
    for name, sides in {"tatoeba": tatoeba, "XQuAD": xquad, "toy": toy}.items():
        show(f"{name}: a third language called wrong, other script", ">= 95", third(sides, False))
        show(f"{name}: a third language called wrong, same script", ">= 85", third(sides, True))
        show(f"{name}: human text called wrong, English expected", "<= 1", wrong(sides, ["en"]))
        show(f"{name}: human text called wrong, all expected", "<= 1", wrong(sides, list(sides)))
        show(f"{name}: English words in clean text", "<= 1", mixed(sides))
    for name, sides in {"XQuAD": xquad, "QG": qg, "NTG": ntg}.items():
        english = dict.fromkeys("de es fr it pt nl ca da nb tr".split(), sides["en"])
        show(f"{name}: outputs called wrong", "<= 10", scored(sides, list(sides)))
        show(f"{name}: English not taken for the target", ">= 99.6", scored(english))
    titles = {x: [text for text in side if text.startswith("The ")] for x, side in ntg.items()}
    show("NTG: titles with The that are mixed", ">= 90", {
        x: shares > 0 for x, shares in mixed(titles).items()})
    show("NTREX: human sentences that loops finds", "<= 3", {
        x: list(map(scoring.loops, side)) for x, side in ntrex.items()})
    with tempfile.TemporaryDirectory() as temporary:
        train({x: side[::2] for x, side in ntrex.items()}, Path(temporary) / "half.bin")
        half = scoring.LanguageIdentifier(Path(temporary) / "half.bin")
    for kind, wanted, samples in ("sentences", "<= 4", list), ("word pairs", "<= 14", word_pairs):
        sides = {x: samples(side[1:801:4]) for x, side in ntrex.items()}
        show(f"NTREX: unseen {kind} called wrong", wanted, wrong(sides, identifier=half))
    texts = sum(xquad.values(), [])
    speed = len(texts) / timeit.timeit(lambda: scoring.identifier().predict(texts), number=1)
    print(f"{speed:.0f} sentences a second on one core, wanted >= 5000; the table has "
          f"{scoring.LID.stat().st_size / 1e6:.1f} MB, wanted <= 8, and loads in "
          f"{timeit.timeit(scoring.LanguageIdentifier, number=1):.2f} s, wanted <= 0.3")


def show(what, wanted, shares):
    """Print the mean and the worst, in %, of {key: the share of each text, 0 to 1}."""
    shares = {key: 100 * np.mean(share) for key, share in shares.items()}
    worst = sorted(shares, key=shares.get, reverse="<" in wanted)[:4]
    print(f"{what}, wanted {wanted} %: mean {np.mean(list(shares.values())):.2f}; worst",
          ", ".join(f"{key} {shares[key]:.1f}" for key in worst), flush=True)


def questions(path):
    """Return the questions of a file of XQuAD."""
    articles = json.loads(path.read_text("utf-8"))["data"]
    return [qa["question"] for text in articles for p in text["paragraphs"] for qa in p["qas"]]


def word_pairs(texts):
    """Return the third and fourth word of each text, where they have six letters or more.

    Characters 3 to 6 of a text without spaces.
    """
    pairs = [" ".join(text.split()[2:4]) if " " in text else text[2:6] for text in texts]
    return [pair for pair in pairs if " " not in pair or sum(map(str.isalpha, pair)) >= 6]


def wrong(sides, expected=None, identifier=None):
    """Return {key: which texts are predicted in another language than the key's} of {key: texts}.

    A key is a language, or a language and what else there is to say, after a slash. expected:
    languages besides it; None: neither they nor it.
    """
    identifier, found = identifier or scoring.identifier(), {}
    for key, texts in tqdm(sides.items(), leave=False, disable=None):
        right = key.split("/")[0]
        codes = identifier.predict(texts, expected and [right, *expected])
        found[key] = [code != right for code in codes]
    return found


RELATED = "id ms, da nb sv, hr sr, gl es ca, cs sk, ru uk be, bg mk sr".split(", ")


def third(sides, same):
    """Return {"target/other": which of other's texts are called wrong where target is expected}.

    same: whether the two are written in the same script, that of their first letter. Not English,
    nor RELATED languages.
    """
    script = {x: unicodedata.name(next(filter(str.isalpha, "".join(side)))).split()[0]
              for x, side in sides.items()}
    return wrong({f"{target}/{other}": sides[other] for target in sides for other in sides
                  if len({target, other, "en"}) == 3 and same == (script[target] == script[other])
                  and not any({target, other} <= set(group.split()) for group in RELATED)}, ["en"])


def mixed(sides):
    """Return {language: the share of English words in each text} of {language: texts}."""
    return {x: scoring.identifier().mixed(side, x, "en").numpy()
            for x, side in sides.items() if x != "en"}


def scored(sides, expected=None):
    """Return {language: the share that score() calls wrong} of {language: outputs}."""
    return {x: scoring.score(side, ["a text"] * len(side), x, "en", scoring.identifier(),
                             expected)["wrong_language"] / 100 for x, side in sides.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="NTREX-128's files, or DATA_DIR with --measure")
    parser.add_argument("out", nargs="?", type=Path, default=scoring.LID, help="the table's file")
    parser.add_argument("--measure", action="store_true", help="print the shipped table's figures")
    args = parser.parse_args(argv)
    try:
        if args.measure:
            measure(args.folder)
        else:
            train(read(args.folder, "newstest2019-*.txt"), args.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
