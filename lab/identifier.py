"""Makes the language identifier's table, toy/lid.bin, from NTREX-128, and measures it.

    python lab/identifier.py NTREX_DIR [OUT]       the table: about three minutes on one core
    python lab/identifier.py --measure DATA_DIR    its figures: about two minutes

NTREX-128 is 1,997 lines of news in 128 languages, https://github.com/MicrosoftTranslator/NTREX.
DATA_DIR has the folders ntrex, tatoeba_dev (CODE.txt), xquad (xquad.LANG.json) and xglue_dev
(NTG.LANG.txt, QG.LANG.txt). Constants were tuned on tatoeba_dev, xquad, xglue_dev.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import timeit
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tqdm import tqdm

import data
import eval as scoring

# NTREX's codes and ISO 639-1 (639-3 where there is none); a regional variant joins its language.
LANGUAGES = dict(entry.split(":") for entry in """
    afr:af amh:am arb:ar aze:az bak:ba bel:be bem:bem ben:bn bod:bo bos:bs bul:bg cat:ca ces:cs
    ckb:ckb cym:cy dan:da deu:de div:dv dzo:dz ell:el eng:en est:et eus:eu ewe:ee fao:fo fas:fa
    fij:fj fil:tl fin:fi fra:fr fuc:ff gle:ga glg:gl guj:gu hau:ha heb:he hin:hi hmn:hmn
    hrv:hr hun:hu hye:hy ibo:ig ind:id isl:is ita:it jpn:ja kan:kn kat:ka kaz:kk khm:km kin:rw
    kir:ky kmr:ku kor:ko lao:lo lav:lv lit:lt ltz:lb mal:ml mar:mr mey:ar mkd:mk mlg:mg mlt:mt
    mon:mn mri:mi msa:ms mya:my nde:nd nep:ne nld:nl nno:nn nob:nb nso:nso nya:ny orm:om pan:pa
    pol:pl por:pt prs:fa pus:ps ron:ro rus:ru shi:shi sin:si slk:sk slv:sl smo:sm sna:sn snd:sd
    som:so spa:es sqi:sq srp:sr ssw:ss swa:sw swe:sv tah:ty tam:ta tat:tt tel:te tgk:tg tha:th
    tir:ti ton:to tsn:tn tuk:tk tur:tr uig:ug ukr:uk urd:ur uzb:uz ven:ve vie:vi wol:wo xho:xh
    yor:yo yue:zh zho:zh zul:zu""".split())
APART = ("srp-Latn", "zho-TW", "prs", "mey", "yue")  # written or spoken otherwise: own columns
ALPHA = .02  # added to every count: what an n-gram that a language never showed still counts


def read_ntrex(folder):
    """Return {column: [sentences]} of NTREX-128's `newstest2019-*.CODE.txt` in folder.

    A column is a language of LANGUAGES or, as "language/CODE", one of its variants in APART.
    """
    texts = {}
    for path in sorted(Path(folder).glob("newstest2019-*.txt")):
        code = path.name.split(".")[-2]
        language = LANGUAGES.get(code.split("-")[0])
        if code.startswith("gsw"):
            continue  # Swiss German, seldom written: as a column it takes short German from German
        if language is None:
            raise ValueError(f"{path}: no ISO 639 code is known for {code}; add it to LANGUAGES")
        name = f"{language}/{code}" if code in APART else language
        texts.setdefault(name, []).extend(path.read_text(encoding="utf-8").splitlines())
    if not texts:
        raise FileNotFoundError(f"{folder}: expected NTREX-128's newstest2019-*.txt, found none")
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


def rate(flags):
    """Return the share of true flags, per cent."""
    flags = list(flags)
    return 100 * sum(flags) / max(1, len(flags))


def show(name, wanted, shares):
    """Print the mean and the worst of {key: per cent} beside what is wanted of it."""
    worst = sorted(shares.items(), key=lambda item: item[1], reverse=wanted[0] == "≤")[:4]
    print(f"{name}, wanted {wanted} %: mean {np.mean(list(shares.values())):.2f}; worst",
          ", ".join(f"{key} {value:.1f}" for key, value in worst), flush=True)


def human_texts(folder):
    """Return {name: {language: sentences}}: tatoeba_dev, XQuAD's questions, the toy world's."""
    codes = LANGUAGES | {"tgl": "tl", "zsm": "ms"}  # without Esperanto
    tatoeba = {codes[path.stem]: path.read_text("utf-8").splitlines()
               for path in sorted(folder.glob("tatoeba_dev/*.txt")) if path.stem in codes}
    xquad = {}
    for path in sorted(folder.glob("xquad/*.json")):
        articles = json.loads(path.read_text("utf-8"))["data"]
        xquad[path.suffixes[0][1:]] = [question["question"] for article in articles
                                       for p in article["paragraphs"] for question in p["qas"]]
    toy = {language: [text for story in data.stories("test", 200)
                      for text in data.toy_pair(story, language, "title")]
           for language in data.TOY_LANGUAGES}
    return {"tatoeba": tatoeba, "XQuAD": xquad, "toy": toy}


def script(texts):
    """Return the first word of the Unicode names of most letters of texts, LATIN for example."""
    letters = Counter(letter for text in texts for letter in text if letter.isalpha())
    return unicodedata.name(letters.most_common(1)[0][0]).split()[0]


def measure(folder):
    """Print every figure that this project promises of the identifier and of loops."""
    identifier, texts = scoring.identifier(), human_texts(folder)
    for name, sides in texts.items():
        measure_human(identifier, name, sides)
    for language in "de es fr ru".split():
        titles = (folder / f"xglue_dev/NTG.{language}.txt").read_text("utf-8").splitlines()
        titles = [title for title in titles if title.startswith("The ")]
        found = identifier.predict(titles, ["en", language])
        titles = [title for title, code in zip(titles, found) if code == language]
        mixed = identifier.mixed(titles, language, "en") > 0
        show(f"xglue_dev: mixed above 0 of {len(titles)} titles with The", "≥ 90",
             {language: rate(mixed.tolist())})
    ntrex = read_ntrex(folder / "ntrex")
    measure_doubt(folder, {"XQuAD": texts["XQuAD"]["en"], "NTREX": ntrex["en"][:1997]})
    show("NTREX: human sentences that loops finds", "≤ 3",
         {x: rate(map(scoring.loops, side)) for x, side in ntrex.items()})
    measure_unseen(ntrex)
    many = [text for name in ("tatoeba", "XQuAD") for side in texts[name].values() for text in side]
    torch.set_num_threads(1)
    speed = len(many) / timeit.timeit(lambda: identifier.predict(many), number=1)
    print(f"{speed:.0f} sentences a second on one core, wanted ≥ 5000; the table has "
          f"{scoring.LID.stat().st_size / 1e6:.1f} MB, wanted ≤ 8, and loads in "
          f"{timeit.timeit(scoring.LanguageIdentifier, number=1):.2f} s, wanted ≤ 0.3")


def measure_doubt(folder, english):
    """Print what score() calls wrong of outputs with their task's languages, and misses of English.

    english: {name: sentences}.
    """
    for task, languages in (("QG", "de en es fr it pt"), ("NTG", "de en es fr ru")):
        outputs = {x: (folder / f"xglue_dev/{task}.{x}.txt").read_text("utf-8").splitlines()
                   for x in languages.split()}
        english[f"{task}.en"] = outputs["en"]
        show(f"xglue_dev: {task} called wrong", "≤ 10", {
            x: wrong(texts, x, languages.split()) for x, texts in outputs.items()})
    for name, texts in english.items():
        show(f"{name}: English taken for the target", "≤ 0.4", {
            x: 100 - wrong(texts, x, None) for x in "de es fr it pt nl ca da nb tr".split()})


def wrong(outputs, language, expected):
    """Return the % of outputs that score() calls wrong."""
    references = ["a text"] * len(outputs)
    return scoring.score(outputs, references, language, "en", scoring.identifier(),
                         expected)["wrong_language"]


RELATED = [set(group.split()) for group in (
    "id ms", "da nb sv", "hr sr", "gl es ca", "cs sk", "ru uk be", "bg mk sr")]


def measure_human(identifier, name, sides):
    """Print what the identifier says of what people wrote, {language: sentences}."""
    write = {language: script(side) for language, side in sides.items()}
    third = {True: {}, False: {}}  # in the target's script? -> shares
    for target, other in tqdm([*itertools.permutations(sides, 2)], desc=name, leave=False):
        if "en" not in (target, other) and not any({target, other} <= group for group in RELATED):
            share = rate(x != target for x in identifier.predict(sides[other], ["en", target]))
            third[write[target] == write[other]][f"{other} for {target}"] = share
    show(f"{name}: a third language called wrong, other script", "≥ 95", third[False])
    show(f"{name}: a third language called wrong, same script", "≥ 85", third[True])
    for expected in (None, ["en"], list(sides)):
        show(f"{name}: human text called wrong, expected its own, "
             f"{' '.join(expected or ['or rather nothing'])}", "≤ 1",
             {x: rate(x != y for y in identifier.predict(side, expected and [x, *expected]))
              for x, side in sides.items()})
    for source in ("en", "de"):
        show(f"{name}: words of {source} in clean text", "≤ 1",
             {x: 100 * identifier.mixed(side, x, source).mean().item()
              for x, side in sides.items() if x != source})


SEVENTY = set("""af ar az be bg bn bs ca cs cy da de el en es et eu fa fi fr ga gu he hi hr hu hy
    id is it ja ka kk ko lt lv mi mk mn mr ms nb nl nn pa pl pt ro ru sk sl sn so sq sr st sv sw
    ta te th tl tn tr uk ur vi xh yo zh zu""".split())  # those that other identifiers report on


def measure_unseen(ntrex):
    """Print how many of NTREX's sentences and word pairs a table of half the lines tells right."""
    with tempfile.TemporaryDirectory() as folder:
        train({x: side[::2] for x, side in ntrex.items()}, Path(folder) / "half.bin")
        identifier = scoring.LanguageIdentifier(Path(folder) / "half.bin")
    for kind, wanted in (("sentences", "≥ 96"), ("word pairs", "≥ 86")):
        right = {}
        for name, side in ntrex.items():
            samples = side[1:801:4]
            if kind == "word pairs":
                samples = [" ".join(x.split()[2:4]) if " " in x else x[2:6] for x in samples]
                samples = [x for x in samples if " " not in x or sum(map(str.isalpha, x)) >= 6]
            right[name] = rate(x == name.split("/")[0] for x in identifier.predict(samples))
        big = {x: share for x, share in right.items() if x in SEVENTY}
        show(f"NTREX, unseen {kind}, all {len(right)} columns: right", wanted, right)
        show(f"NTREX, unseen {kind}, {len(big)} larger languages: right", wanted, big)


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
            train(read_ntrex(args.folder), args.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # whatever the console can show
    main()
