"""All tests: `python -m pytest`. Formulas against numbers that can be redone on paper, properties,
parity with the tools in use, and each script as a user starts it.

`XLRS_IMPL=my_folder python -m pytest -k NAME` runs them on a student's files: those of my_folder
stand in for ours of the same name, in imports and as scripts (README, Exercises)."""

import argparse
import collections
import contextlib
import csv
import functools
import importlib.util
import inspect
import io
import json
import math
import os
import pickle
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
import tracemalloc
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import sentencepiece
import torch
import transformers

HERE = Path(__file__).parent
NAMES = ("xlrs.py", "train.py", "model.py", "data.py", "eval.py", "select.py", "answers.py")


def students_files(folder):
    """Return {name: path} of a student's files in folder, after putting them before ours."""
    found = {name: folder / name for name in NAMES if (folder / name).is_file()}
    if not found:
        lack = f"none of {' '.join(NAMES)}" if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"XLRS_IMPL={folder}: expected files to test, found {lack}")
    if {"data.py", "eval.py"} & set(found) and not (folder / "toy").is_dir():
        raise FileNotFoundError("XLRS_IMPL: expected toy/ beside data.py or eval.py, found none; "
                                f"copy it: cp -r {HERE / 'toy'} {folder}")
    sys.path.insert(0, str(folder))
    # Scripts look there too; "safe path" keeps Python from putting a script's own folder first.
    places = [str(folder), str(HERE), os.environ.get("PYTHONPATH")]
    os.environ.update(PYTHONPATH=os.pathsep.join(filter(None, places)), PYTHONSAFEPATH="1")
    return found


THEIRS = students_files(Path(os.environ["XLRS_IMPL"]).absolute()) if os.environ.get(
    "XLRS_IMPL") else {}

import data
import eval as scoring
import model as mt5
import train
import xlrs
from data import EOS, IGNORE, PAD, Tokenizer
from model import MT5, SIZES, MT5Config, convert, export, load, read_checkpoint, save

transformers.logging.set_verbosity_error()


@pytest.fixture(scope="session", autouse=True)
def whose(pytestconfig):
    """Say once which files are tested in place of ours."""
    if THEIRS:
        capture = pytestconfig.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print("\nXLRS_IMPL:", *THEIRS.values(), "in place of ours")


def ours(name):
    """Return the path of our file of that name, or of a student's in place of it."""
    return str(THEIRS.get(name, HERE / name))


def script(*words, cwd=HERE):
    """Return the finished process of `python WORDS…`, as a user starts it."""
    words = [str(THEIRS.get(word, word)) for word in words]
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True,
                          timeout=300)


def fails_in_one_line(finished, *parts):
    """Assert that a script stopped as it should for a user's mistake: one line, exit code 2."""
    assert finished.returncode == 2, finished.stderr
    assert "Traceback" not in finished.stderr
    line = finished.stderr.strip().splitlines()[-1]
    for part in parts:
        assert part in line, line


def answer(name, value):
    """Return the value of that name in a student's answers.py; without one, value, our own."""
    if "answers.py" not in THEIRS:
        return value
    import answers
    assert hasattr(answers, name), f"answers.py: expected a line {name} = …, found none"
    return getattr(answers, name)


# xlrs.py ------------------------------------------------------------------------------------------


def test_xlrs_of_two_sentences_is_as_computed_by_hand():
    english = [[[2., 0.], [4., 8.]], [[1., 0.], [9., 9.]]]  # (B, S, D); the last is padding
    german = [[[4., 3.], [9., 9.]], [[0., 2.], [0., 4.]]]
    mask = torch.tensor([[[True, True], [True, False]], [[True, False], [True, True]]])
    states = torch.tensor([english, german])  # (L, B, S, D)
    pooled = xlrs.pool(states.flatten(0, 1), mask.flatten(0, 1)).unflatten(0, (2, 2))
    slips = {0.96: "the first sentence alone", 0.98: "the cosine of the means of both sentences",
             12.: "dot products, not divided by the lengths", 0.83: "padding was counted"}
    for found in (answer("xlrs_by_hand", 0.48), xlrs.xlrs(pooled).item()):
        slip = [f" ({text})" for value, text in slips.items() if abs(found - value) < 0.005]
        assert found == pytest.approx(0.48, abs=0.005), (
            f"expected 0.48, found {found:.3g}{''.join(slip)}. The mean states are (3, 4) and "
            "(1, 0) in English, (4, 3) and (0, 3) in German; the cosines (3·4 + 4·3) / (5·5) = "
            "0.96 and 0 / (1·3) = 0; XLRS is their mean")


def test_pooling_is_the_mean_over_real_tokens():
    states = torch.tensor([[[2., 0.], [4., 6.], [9., 9.]]])
    mask = torch.tensor([[True, True, False]])
    found = xlrs.pool(states, mask).tolist()
    assert found == [[3., 3.]], (
        f"(2, 0), (4, 6), padding (9, 9): expected the mean (3, 3), found {found}")


def test_pooling_does_not_see_what_stands_in_the_padding():
    states, mask = torch.randn(4, 5, 8), torch.arange(5)[None] < torch.tensor([[5], [3], [1], [2]])
    noisy = torch.where(mask[..., None], states, torch.full_like(states, 1e4))
    unchanged = torch.equal(xlrs.pool(states, mask), xlrs.pool(noisy, mask))
    assert unchanged, "what stands in the padding, where mask is False, should change nothing"


def test_a_sentence_without_tokens_pools_to_zeros():
    found = xlrs.pool(torch.ones(1, 2, 3), torch.zeros(1, 2, dtype=torch.bool)).tolist()
    assert found == [[0] * 3], f"expected zeros, not a division by no token, found {found}"


@pytest.mark.parametrize("a, b, cosine", [
    ([1., 0.], [1., 1.], 1 / math.sqrt(2)), ([3., 4.], [4., 3.], 24 / 25),
    ([1., 2.], [-2., -4.], -1.), ([1., 0.], [0., 5.], 0.)])
def test_similarity_is_the_cosine(a, b, cosine):
    found = xlrs.similarity(torch.tensor([a]), torch.tensor([b]))
    dot, lengths = sum(x * y for x, y in zip(a, b)), f"{math.hypot(*a):.3f} · {math.hypot(*b):.3f}"
    assert found.tolist() == pytest.approx([cosine], abs=1e-6), (
        f"cosine of {a} and {b}: expected {dot:g} / ({lengths}) = {cosine:.3f}, found "
        f"{found.tolist()}")


def test_xlrs_compares_each_language_with_the_source_sentence_by_sentence():
    source = [[1., 0.], [0., 1.]]
    pooled = torch.tensor([source, source, [[0., 1.], [1., 0.]], [[1., 1.], [0., -1.]]])
    expected = [1., 0., (1 / math.sqrt(2) - 1) / 2]
    found = xlrs.xlrs(pooled).tolist()
    assert found == pytest.approx(expected, abs=1e-6), (
        "cosines with the source's two sentences: 1 and 1, 0 and 0, 0.707 and -1; expected each "
        f"language's mean, 1, 0 and -0.146, found {found}")


def test_the_regulariser_is_the_mean_cosine_above_the_floor():
    pooled = torch.tensor([[[1., 0.]], [[1., 0.]], [[0., 1.]]])  # cosines 1 and 0
    for floor, term in ((0, 0.5), (0.2, 0.3), (0.6, 0), (-1, 1.5)):
        found = xlrs.regulariser(pooled, floor).item()
        assert found == pytest.approx(term), (
            f"cosines 1 and 0, floor {floor}: expected max(0, (1 + 0) / 2 - {floor}) = {term}, "
            f"found {found:.3g}")


def test_a_step_against_the_regularisers_gradient_lowers_xlrs_and_moves_every_language():
    pooled = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)) + 1
    pooled.requires_grad_()
    xlrs.regulariser(pooled).backward()
    reached = (pooled.grad.abs().sum(dim=(1, 2)) > 0).tolist()
    assert all(reached), ("XLRS is above the floor: expected a gradient in each language, the "
                          f"source first, found {reached}")
    before, after = (xlrs.xlrs(vectors).mean().item() for vectors in (
        pooled.detach(), pooled.detach() - pooled.grad))
    assert after < before, (
        "loss = … + λ · term is minimised: expected a step against the term's gradient to lower "
        f"XLRS, found it go from {before:.3f} to {after:.3f}; see the term's sign")


def test_the_regulariser_has_no_gradient_below_its_floor():
    pooled = torch.tensor([[[1., 0.]], [[-1., 0.1]]], requires_grad=True)
    xlrs.regulariser(pooled).backward()
    found = pooled.grad.flatten().tolist()
    assert not any(found), f"cosine -0.995, floor 0: expected no gradient, found {found}"


def test_the_regulariser_needs_two_languages():
    with pytest.raises(ValueError, match="at least 2, found 1"):
        xlrs.regulariser(torch.ones(1, 2, 3))


def test_the_rule_takes_the_lowest_xlrs_or_the_best_development_score():
    rows = [dict(step=1, xlrs=0.4, dev=-0.9), dict(step=2, xlrs=0.1, dev=-0.5),
            dict(step=3, xlrs=0.1, dev=-0.2)]
    assert xlrs.choose(rows)["step"] == 2  # the earlier of equals
    assert xlrs.choose(rows, by="dev")["step"] == 3


def test_xlrs_below_the_floor_is_no_merit_and_the_earliest_such_checkpoint_is_taken():
    rows = [dict(step=1, xlrs=0.6), dict(step=2, xlrs=0.2), dict(step=3, xlrs=-0.4)]
    assert xlrs.choose(rows)["step"] == 3
    assert xlrs.choose(rows, floor=0.3)["step"] == 2
    assert xlrs.choose(rows[:1], floor=0.3)["step"] == 1


@pytest.mark.parametrize("rows, by, message", [
    ([], "xlrs", "at least one checkpoint"), ([dict(step=7, xlrs=math.nan)], "xlrs", "step 7"),
    ([dict(step=7, xlrs=0.1)], "dev", "finite 'dev'"), ([dict(step=7)], "test", "dev")])
def test_the_rule_says_what_it_lacks(rows, by, message):
    with pytest.raises(ValueError, match=message):
        xlrs.choose(rows, by)


@pytest.mark.parametrize("x, y, rho", [
    ([1, 2, 3, 4], [10, 20, 30, 40], 1), ([1, 2, 3, 4], [4, 3, 2, 1], -1),
    ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),  # 1 - 6 * 4 / (5 * 24)
    ([1, 1, 2, 2], [1, 2, 3, 4], 4 / math.sqrt(20))])  # ranks ½ ½ 2½ 2½ and 0 1 2 3
def test_spearman_is_the_correlation_of_ranks_with_ties_averaged(x, y, rho):
    assert xlrs.spearman(x, y) == pytest.approx(rho)


def test_spearman_is_undefined_for_a_constant_and_for_one_point():
    assert math.isnan(xlrs.spearman([1, 1, 1], [1, 2, 3]))
    assert math.isnan(xlrs.spearman([1], [2]))


# data.py: the toy world ---------------------------------------------------------------------------


def test_every_language_of_the_toy_world_has_the_same_entries_and_patterns():
    english = data.world("en")
    for language in data.TOY_LANGUAGES:
        other = data.world(language)
        for section in ("hero", *data.CAST):
            assert len(other[section]) == len(english[section]), (language, section)
        for section in ("frame", *data.PLOTS):
            assert list(other[section]) == list(english[section]), (language, section)


def test_every_story_can_be_told_in_every_language_without_a_slot_left_over():
    for story in data.stories("dev", 300, seed=5):
        for language in data.TOY_LANGUAGES:
            told = data.tell(story, language)
            for text in [*told["sentences"], told["title"], told["summary"], told["ending"]]:
                assert not set("{}|?[]") & set(text) and "  " not in text, text
                assert text[0].upper() == text[0]


def test_a_story_reads_as_it_should_in_german_and_russian():
    hero = next(i for i, entry in enumerate(data.world("en")["hero"]) if entry[""] == "Anna")
    story = dict(hero=hero, object=1, helper=0, place=0, day=0, link=1, plot="broken", helped=False,
                 n=3, opening="opening_1")
    german, russian = data.tell(story, "de"), data.tell(story, "ru")
    assert german["title"] == "Anna und die kaputte Lampe"
    assert " ".join(german["sentences"]) == (
        "Am Montag war Anna im Park. Plötzlich beschädigte sie die Lampe. "
        "Ihr Bruder arbeitete 3 Stunden lang, konnte sie aber nicht reparieren.")
    assert russian["sentences"][2] == "Брат работал 3 часа, но не смог её починить."
    assert data.tell(story | {"n": 7}, "ru")["sentences"][2].startswith("Брат работал 7 часов")
    assert russian["ending"] == "В конце концов Анна заплакала и пошла домой с братом."


def test_the_splits_of_the_toy_world_share_no_story_whatever_the_seed():
    found = {split: {json.dumps(story) for seed in range(3)
                     for story in data.stories(split, 300, seed)} for split in data.SPLITS}
    assert sum(map(len, found.values())) == len(set().union(*found.values()))
    for split, keys in found.items():
        assert {data.split_of(json.loads(key)) for key in keys} == {split}


def test_stories_are_distinct_and_the_same_for_the_same_seed():
    first = data.stories("train", 500, seed=3)
    assert first == data.stories("train", 500, seed=3) != data.stories("train", 500, seed=4)
    assert len({json.dumps(story) for story in first}) == 500


def test_a_pretraining_page_is_in_one_language_or_in_two_by_turns():
    rng = np.random.default_rng(0)
    alone = {len(data.page(rng, ["en", "de"], bilingual=0.0)) for _ in range(20)}
    paired = [data.page(rng, ["en", "de"], bilingual=1.0) for _ in range(20)]
    assert alone == {6} == {len(page) for page in paired}
    first, second = (scoring.identifier().predict([page[side] for page in paired], ["en", "de"])
                     for side in (0, 1))
    assert sum(a != b for a, b in zip(first, second)) >= 18


# data.py: files, batches, masks -------------------------------------------------------------------


def test_pairs_are_read_from_every_layout(tmp_path):
    pairs = [("Größe, \"so\"", "ขนาด"), ("мир", "दुनिया")]
    jsonl, tsv, csv_ = (tmp_path / name for name in ("a.jsonl", "a.tsv", "a.csv"))
    jsonl.write_text("".join(json.dumps({"id": 1, "text": s, "summary": t}) + "\n"
                             for s, t in pairs), encoding="utf-8")
    tsv.write_text('id\ttext\tsummary\n1\t"Größe, ""so"""\tขนาด\n2\tмир\tदुनिया\n',
                   encoding="utf-8")
    csv_.write_bytes('text,summary\r\n"Größe, ""so""",ขนาด\r\nмир,दुनिया\r\n'.encode())
    for path in (jsonl, tsv, csv_):
        assert data.read_pairs(path, ("text", "summary")) == pairs, path
    sides = [tmp_path / "a.src", tmp_path / "a.tgt"]
    for side, lines in zip(sides, zip(*pairs)):
        side.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert data.read_pairs(f"{sides[0]},{sides[1]}") == pairs


def test_a_quoted_line_break_stays_inside_its_field(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('source,target\n"one\ntwo",three\n', encoding="utf-8")
    assert data.read_pairs(path) == [("one\ntwo", "three")]


@pytest.mark.parametrize("name, content, parts", [
    ("a.jsonl", b'{"source": "a", "target": "b"}\n{"source": "a"\n', ["a.jsonl:2", "JSON"]),
    ("a.jsonl", b'{"source": "a", "target": null}\n', ["a.jsonl:1", "'target'", "None"]),
    ("a.jsonl", b'{"text": "a", "target": "b"}\n', ["a.jsonl:1", "source and target", "--fields"]),
    ("a.jsonl", b'[1]\n', ["a.jsonl:1", "an object", "[1]"]),
    ("a.jsonl", b'{"source": "\\ud800", "target": "b"}\n', ["a.jsonl:1", "surrogate"]),
    ("a.tsv", b"source\ttarget\na\t\n", ["a.tsv:2", "'target'"]),
    ("a.tsv", b"text\ttarget\na\tb\n", ["a.tsv:1", "columns source and target"]),
    ("a.csv", b"source,target\n", ["a.csv", "only a header"]),
    ("a.csv", b"", ["a.csv", "empty file"]),
    ("a.csv", b"source,target\na,\xff\n", ["a.csv:2", "UTF-8", "0xff"]),
    ("a.csv", b"source,target\na,b\na,b,c\n", ["a.csv:3", "2 columns, found 3"]),
    ("a.tsv", b'source\ttarget\n"a" b\tc\n', ["a.tsv:2", "double the quote"]),
    ("a.csv", b"x" * 10**5 + b"\na\n", ["a.csv:1", "columns source and target"]),
    ("a.jsonl", b"[" * 10**5, ["a.jsonl:1", "expected JSON"]),
    ("a.jsonl", b'{"source": "a", "target": ' + b"[" * 900 + b"]" * 900 + b"}", ["a.jsonl:1"]),
    ("a.jsonl", b'{"' + b"x" * 10**5 + b'": 1}', ["a.jsonl:1", "--fields"]),
    ("a.txt", b"x\n", ["a.txt", ".jsonl"])])
def test_a_reader_names_file_and_line_of_what_is_wrong(tmp_path, name, content, parts):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        data.read_pairs(path)
    one_line(caught, *parts)
    assert len(str(caught.value)) < 500


ODD = ["\0", "a\0b", "\x01\x1b[31m\x7f", "\u200b\u200d\ufeff", "\u202eעברית\u200e العربية\u202c",
       "a\x85\x1cb", "e" + "\u0301" * 50, "\U000e0001\ufff9", "x" * 200_000, "ab " * 50_000]


@pytest.mark.parametrize("name", ["a.jsonl", "a.tsv", "a.csv"])
def test_texts_of_odd_characters_and_of_any_length_are_read_as_they_stand(tmp_path, name, pieces):
    path = tmp_path / name
    with open(path, "w", encoding="utf-8", newline="") as file:
        if name == "a.jsonl":
            file.writelines(json.dumps({"source": a, "target": "b"}) + "\n" for a in ODD)
        else:
            writer = csv.writer(file, delimiter="\t" if name == "a.tsv" else ",")
            writer.writerows([("source", "target"), *((a, "b") for a in ODD)])
    assert data.read_pairs(path) == [(a, "b") for a in ODD]
    for text in ODD:
        ids = data.encode(text, Tokenizer(pieces), 10)
        assert ids[-1] == EOS and len(ids) <= 10


def test_a_long_text_is_not_tokenized_beyond_what_is_kept(pieces):
    tokenizer, seen = Tokenizer(pieces), []
    recorder = argparse.Namespace(encode=lambda text: seen.append(len(text)) or
                                  tokenizer.encode(text))
    for text in ("the cat sat " * 9000, "猫はマット" * 20_000, "  " * 50_000 + "cat", "cat"):
        for longest in (2, 40, 512):
            ids = tokenizer.encode(text)
            cut = ids if len(ids) <= longest else ids[:longest - 1] + [EOS]
            assert data.encode(text, recorder, longest) == cut
    seen.clear()
    data.encode("the cat sat " * 9000, recorder, 40)
    assert sum(seen) < 2000


def test_unequal_line_counts_are_named(tmp_path):
    (tmp_path / "en").write_text("a\nb\n")
    (tmp_path / "de").write_text("a\n")
    with pytest.raises(ValueError, match="en has 2.*de has 1"):
        data.read_parallel({lang: tmp_path / lang for lang in ("en", "de")})


def test_parallel_lines_stay_aligned_where_one_is_blank_and_ends_in_carriage_return(tmp_path):
    (tmp_path / "en").write_bytes(b"a\r\n\r\nc\r\n")
    (tmp_path / "de").write_bytes(b"x\ny\nz")
    found = data.read_parallel({lang: tmp_path / lang for lang in ("en", "de")})
    assert found == {"en": ["a", "c"], "de": ["x", "z"]}


def test_masked_spans_go_to_the_target_in_order():
    source, target = data.mask_spans([10, 11, 12, 13, 14, 15], [(1, 3), (5, 6)], [99, 98, 97])
    assert source == [10, 99, 13, 14, 98, data.EOS], (
        f"source: expected 99 in place of 11 12, 98 in place of 15, {data.EOS} (</s>) at the end")
    assert target == [99, 11, 12, 98, 15, data.EOS], (
        f"target: expected 99 before 11 12, 98 before 15, {data.EOS} (</s>) at the end")
    assert data.mask_spans([10, 11], [(0, 1)], [99, 98]) == ([99, 11, 1], [99, 10, 1]), (
        "a span at the start: expected nothing before its sentinel")


@pytest.mark.parametrize("length", [2, 3, 10, 57, 500])
def test_random_spans_are_disjoint_and_cover_the_density(length):
    rng = np.random.default_rng(0)
    spans = data.random_spans(length, rng, density=0.15, mean=3)
    flat = [place for span in spans for place in span]
    assert flat == sorted(flat) and len(set(start for start, _ in spans)) == len(spans)
    assert all(0 <= start < end <= length for start, end in spans)
    assert sum(end - start for start, end in spans) == max(1, round(0.15 * length))


def test_a_batch_is_padded_and_its_mask_is_true_at_real_tokens():
    input_ids, mask, labels = data.collate([([5, 6, 1], [7, 1]), ([8, 1], [9, 9, 1])])
    assert input_ids.tolist() == [[5, 6, 1], [8, 1, 0]]
    assert mask.tolist() == [[True] * 3, [True, True, False]]
    assert labels.tolist() == [[7, 1, -100], [9, 9, 1]]


def test_an_epoch_sees_each_pair_once_and_batches_can_start_anywhere():
    pairs = [(f"{i}", f"{i}") for i in range(64)]
    draw = data.epochs(pairs, lambda pair: ([int(pair[0]) + 3], [1]), seed=1)
    stream = data.batches(draw, batch_size=4, seed=1)
    batches = [next(stream)[0].flatten().tolist() for _ in range(32)]
    assert sorted(sum(batches[:16], [])) == sorted(sum(batches[16:], [])) == list(range(3, 67))
    later = data.batches(draw, batch_size=4, seed=1, start=11)
    assert [next(later)[0].flatten().tolist() for _ in range(21)] == batches[11:]


def test_a_new_vocabulary_has_mt5s_special_ids_and_spells_any_script():
    tokenizer = data.train_tokenizer(["the cat sat on the mat"] * 20, 500)
    assert [tokenizer.pieces.id_to_piece(i) for i in range(3)] == ["<pad>", "</s>", "<unk>"]
    assert len(set(tokenizer.sentinels())) == 100
    for text in ("the cat", "Привет", "ภาษาไทย", "हिन्दी", "中文", "😀"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("") == [data.EOS]
    assert tokenizer.encode("the\n\tcat") == tokenizer.encode("the cat")


def test_a_new_vocabulary_learns_from_lines_of_any_length_and_odd_characters():
    tokenizer = data.train_tokenizer(["the cat sat on the mat \0\u200b\x85" * 1000] * 2, 500)
    assert len(tokenizer.encode("the cat sat")) < 6
    assert len(data.train_tokenizer(["\u200b\0", "\u200d"], 500)) > 256  # the bytes at least


def test_unlabelled_text_without_two_tokens_in_a_line_is_refused(pieces):
    args = argparse.Namespace(seed=0, max_source=8)
    draw = data.corruption(data.pages({"en": ["\u200b"]}, 0), Tokenizer(pieces), args)
    with pytest.raises(ValueError, match="two tokens"):
        draw(0, 1)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.json"
    data.write_file(path, "old")

    def fails(file):
        file.write(b"half")
        raise OSError("disk full")
    with pytest.raises(OSError):
        data.write_file(path, fails)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


# select.py beside Python's own select ------------------------------------------------------------


@pytest.mark.parametrize("code", [
    "import torch", "import selectors, subprocess, torch; selectors.DefaultSelector().select(0)",
    "import select; assert not hasattr(select, 'parse_args'); select.select([], [], [], 0)"])
def test_python_finds_its_own_select_from_this_folder(code):
    finished = script("-c", code)
    assert finished.returncode == 0, finished.stderr


def test_many_threads_may_import_select_at_once():
    code = ("import threading, sys\n"
            "errors = []\n"
            "def use():\n"
            "    try:\n"
            "        import select; select.select\n"
            "    except Exception as error: errors.append(error)\n"
            "threads = [threading.Thread(target=use) for _ in range(8)]\n"
            "[thread.start() for thread in threads]; [thread.join() for thread in threads]\n"
            "sys.exit(len(errors))")
    for _ in range(5):
        assert script("-c", code).returncode == 0


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers_start_beside_our_select(tmp_path, method):
    code = ("from torch.utils.data import DataLoader\n"
            "if __name__ == '__main__':\n"
            "    loader = DataLoader(range(8), num_workers=1, multiprocessing_context="
            f"'{method}')\n"
            "    assert len(list(loader)) == 8\n")
    path = tmp_path / "workers.py"
    path.write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\n" + code)
    finished = script(path)
    assert finished.returncode == 0, finished.stderr


# model.py: parity, conversion, damaged files ------------------------------------------------------

TEXTS = ["The cat sat on the mat.", "Die Katze saß auf der Matte.", "Кошка сидела на ковре.",
         "Le chat était assis sur le tapis.", "猫はマットの上に座った。", "แมวนั่งบนเสื่อ", ""]
WRITABLE = TEXTS[:4]  # transformers' own tokenizer has no byte fallback: it writes <unk>
SHAPES = {  # the last is mT5-small's true shape, with fewer pieces
    "width unlike heads": dict(d_model=96, d_kv=16, d_ff=80, num_layers=2, num_decoder_layers=2,
                               num_heads=4),
    "unequal depth": dict(d_model=64, d_kv=16, d_ff=96, num_layers=3, num_decoder_layers=1,
                          num_heads=4),
    "mT5-small": dict(d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_decoder_layers=8,
                      num_heads=6),
}
TINY = SHAPES["unequal depth"]


@pytest.fixture(scope="module")
def pieces():
    """The bytes of a small SentencePiece model with mT5's settings."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:5] * 20), model_writer=out, vocab_size=480, minloglevel=2,
        model_type="unigram", byte_fallback=True, normalization_rule_name="nmt_nfkc",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, character_coverage=0.98,
        user_defined_symbols=[f"▁<extra_id_{i}>" for i in reversed(range(100))])
    return out.getvalue()


def hub_weights(config, seed=0):
    """Return random weights under the published names, with a head of its own.

    Positions and head are spread so that outputs depend on them; the end token's row is larger, so
    that outputs end at different lengths.
    """
    names = {name: getattr(config, name) for name in config.__dataclass_fields__}
    with torch.device("meta"):
        shapes = transformers.MT5ForConditionalGeneration(
            transformers.MT5Config(**names)).state_dict()
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in shapes.items():
        scale = tensor.shape[-1] ** -0.5
        scale = 1 if "shared" in name or "relative" in name or "layer_norm" in name else scale
        scale = scale * config.d_kv ** -0.5 if ".q." in name else scale
        weights[name] = torch.randn(tensor.shape, generator=generator) * scale
        if "layer_norm" in name:
            weights[name] = 1 + weights[name] / 10
    weights["lm_head.weight"] = weights["lm_head.weight"] * 3
    weights["lm_head.weight"][EOS] *= 3
    for alias in mt5.ALIASES:
        weights[alias] = weights["shared.weight"]
    return weights


def hub_folder(folder, pieces, config, form="pytorch_model.bin", weights=None, **settings):
    """Write a folder like those of the hub, with the weights in one of four forms."""
    folder.mkdir(exist_ok=True)
    weights = weights or hub_weights(config)
    settings = {**{name: getattr(config, name) for name in config.__dataclass_fields__},
                "model_type": "mt5", "feed_forward_proj": "gated-gelu",
                "tie_word_embeddings": False, "architectures": ["MT5ForConditionalGeneration"],
                "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
                **settings}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "spiece.model").write_bytes(pieces)
    if form.endswith("safetensors") or "safetensors.index" in form:
        weights = {name: tensor for name, tensor in weights.items() if name not in mt5.ALIASES}
    def write(part, path):
        safe = path.suffix == ".safetensors"
        safetensors.torch.save_file(part, path, {"format": "pt"}) if safe else torch.save(
            part, path)
    if not form.endswith(".index.json"):
        write(weights, folder / form)
        return folder
    stem, suffix = form.removesuffix(".index.json").rsplit(".", 1)
    where = {}
    for shard in range(2):
        name = f"{stem}-{shard + 1:05}-of-00002.{suffix}"
        part = dict(list(weights.items())[shard::2])
        write(part, folder / name)
        where.update(dict.fromkeys(part, name))
    (folder / form).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def both(folder):
    """Return (our model, transformers') of one hub folder."""
    convert(folder, folder / "ours.pt")
    theirs = transformers.MT5ForConditionalGeneration.from_pretrained(folder).eval()
    assert theirs.lm_head.weight.data_ptr() != theirs.shared.weight.data_ptr()
    return load(folder / "ours.pt")[0], theirs


def batch(vocab_size=400, sentences=5, source=37, target=11, side="right", shortest=0):
    """Return ids, mask and labels of ragged lengths, the shortest at least that share."""
    generator = torch.Generator().manual_seed(1)
    def real(longest):
        least = max(2, int(shortest * longest))
        lengths = torch.randint(least, longest + 1, (sentences, 1), generator=generator)
        lengths[0] = longest
        return torch.arange(longest)[None] < lengths
    mask, kept = real(source), real(target)
    ids = torch.randint(3, vocab_size, mask.shape, generator=generator).masked_fill(~mask, PAD)
    labels = torch.randint(3, vocab_size, kept.shape, generator=generator)
    if side == "left":
        ids, mask = ids.flip(1), mask.flip(1)
    return ids, mask, labels.masked_fill(~kept, IGNORE)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory, pieces):
    config = MT5Config(vocab_size=len(Tokenizer(pieces)) + 12, **SHAPES[request.param])
    folder = hub_folder(tmp_path_factory.mktemp("hub"), pieces, config)
    return both(folder)


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_and_loss_equal_those_of_transformers(pair, side):
    ours, theirs = pair
    ids, mask, labels = batch(side=side)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask.long(), labels=labels)
        real = labels != IGNORE
        assert relative(ours.logits(ids, mask, labels)[real], expected.logits[real]) < 2e-5
        states = theirs.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        assert relative(ours.encode(ids, mask)[mask], states[mask]) < 2e-5
        assert ours(ids, mask, labels).item() == pytest.approx(expected.loss.item(), rel=2e-6)


def test_gradients_equal_those_of_transformers(pair):
    ours, theirs = pair
    ids, mask, labels = batch()
    (ours(ids, mask, labels) * 2).backward()  # a factor, as the regulariser's λ might be one
    (theirs(input_ids=ids, attention_mask=mask.long(), labels=labels).loss * 2).backward()
    published = dict(theirs.named_parameters())
    names = mt5.published_names(ours.config)
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, published[names[name]].grad) < 2e-5, name
        parameter.grad = published[names[name]].grad = None


@pytest.mark.parametrize("beams", [1, 4])
def test_generated_tokens_equal_those_of_transformers(pair, beams):
    ours, theirs = pair
    ids, mask, _ = batch(sentences=8)
    found = ours.generate(ids, mask, 24, beams)
    expected = theirs.generate(input_ids=ids, attention_mask=mask.long(), max_new_tokens=24,
                               num_beams=beams, do_sample=False)[:, 1:]
    ended = (expected == EOS).cumsum(1) - (expected == EOS).long() > 0
    expected = expected.masked_fill(ended, PAD)  # its beam search fills up with </s>
    found, expected = (torch.nn.functional.pad(x, (0, 24 - x.shape[1])) for x in (found, expected))
    differ = [f"sentence {row}: expected {y}, found {x}" for row, (x, y) in enumerate(
        zip(found.tolist(), expected.tolist())) if x != y]
    assert not differ, f"{len(differ)} differ; ids, {PAD} after the end {EOS}, of {differ[0]}"
    assert len(set((found != PAD).sum(1).tolist())) > 2, "the lengths should differ"


@pytest.mark.parametrize("beams", [1, 4])
def test_a_sentence_is_answered_alike_alone_and_in_a_batch(pair, beams):
    ours, _ = pair
    ids, mask, _ = batch(sentences=6)
    together = ours.generate(ids, mask, 20, beams)
    for row in range(6):
        alone = ours.generate(ids[row:row + 1, mask[row]], mask[row:row + 1, mask[row]], 20, beams)
        assert alone[0].tolist() == together[row, :alone.shape[1]].tolist(), (
            f"sentence {row}: expected the same ids alone and in a batch")
        assert not together[row, alone.shape[1]:].any(), (
            f"sentence {row}: expected {PAD} after its end")


def test_padding_on_either_side_changes_nothing(pair):
    ours, _ = pair
    ids, mask, labels = batch(sentences=1)
    with torch.no_grad():
        states, loss = ours.encode(ids, mask), ours(ids, mask, labels)
        for left, right in [(0, 9), (9, 0), (4, 70)]:
            wide, wide_mask = (torch.nn.functional.pad(x, (left, right)) for x in (ids, mask))
            found = ours.encode(wide, wide_mask)
            assert relative(found[:, left:left + ids.shape[1]], states) < 1e-5
            assert not found[~wide_mask].any(), "states at padding are zero"
            more = torch.nn.functional.pad(labels, (0, right), value=IGNORE)
            assert ours(wide, wide_mask, more).item() == pytest.approx(loss.item(), rel=1e-6)


def test_a_sentence_without_any_token_gives_no_nan():
    model = MT5(MT5Config(vocab_size=300, **TINY)).eval()
    ids, mask = torch.zeros(2, 4, dtype=torch.long), torch.tensor([[False] * 4, [True] * 4])
    assert mt5.hide(torch.zeros(1), torch.tensor([False])).bfloat16().isfinite()
    for low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            with torch.no_grad():
                assert model.encode(ids, mask).isfinite().all()
                assert model.generate(ids, mask, 3).shape == (2, 3)
            assert model(ids, mask, torch.tensor([[5], [6]])).isfinite()


def test_bf16_is_as_close_to_float32_as_in_transformers(pair):
    ours, theirs = pair
    ids, mask, labels = batch(sentences=16)
    real = labels != IGNORE
    inputs = dict(input_ids=ids, attention_mask=mask.long(), labels=labels)
    with torch.no_grad():
        exact = theirs(**inputs).logits[real]
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = ours.logits(ids, mask, labels)[real], theirs(**inputs).logits[real]
            loss = ours(ids, mask, labels)
    error = lambda logits: (logits.float() - exact).square().mean().sqrt().item()  # noqa: E731
    assert error(found) < 1.05 * error(expected)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(ours(ids, mask, labels).item(), rel=0.01)


def agree_on_buckets(distances, expected, both_ways):
    """Assert that bucket() gives the expected list for a list of distances."""
    found = mt5.bucket(torch.tensor(distances), both_ways).tolist()
    differ = [f"distance {distance}: expected {right}, found {wrong}"
              for distance, right, wrong in zip(distances, expected, found) if right != wrong]
    ways = "both ways" if both_ways else "back only"
    assert not differ, f"looking {ways}, {len(differ)} differ: {'; '.join(differ[:8])}"
    assert len(found) == len(expected)


def test_buckets_equal_a_table_made_by_hand():
    """32 buckets both ways: 16 a side, 8 exact, then 8 + floor(8 · ln(d / 8) / ln(128 / 8))."""
    both_ways = functools.partial(agree_on_buckets, both_ways=True)
    both_ways([0, -1, -2, -7, 1, 2, 7], [0, 1, 2, 7, 17, 18, 23])
    both_ways([-8, -11, -12, -15, -16, -22, -23], [8, 8, 9, 9, 10, 10, 11])
    both_ways([-31, -32, -63, -64, -90, -91, -127, -128, -999],
              [11, 12, 13, 14, 14, 15, 15, 15, 15])
    both_ways([16, 64, 91, 999], [26, 30, 31, 31])
    back_only = functools.partial(agree_on_buckets, both_ways=False)  # all 32 behind: 16 exact
    back_only([5, 1, 0, -1, -15], [0, 0, 0, 1, 15])
    back_only([-16, -18, -19, -31, -32, -113, -128, -999], [16, 16, 17, 21, 21, 31, 31, 31])


def test_buckets_equal_those_of_transformers_at_every_distance():
    attention = transformers.models.mt5.modeling_mt5.MT5Attention
    distances = torch.arange(-600, 601)
    for both_ways in (True, False):
        expected = attention._relative_position_bucket(distances, both_ways, 32, 128)
        agree_on_buckets(distances.tolist(), expected.tolist(), both_ways)


@pytest.mark.parametrize("scores", [1, 2000, 2**26])
def test_the_loss_in_parts_has_the_gradient_of_the_plain_one(monkeypatch, scores):
    monkeypatch.setattr(mt5.HeadLoss, "SCORES", scores)
    torch.manual_seed(0)
    target = torch.randint(0, 300, (23,))
    def gradients(loss):
        hidden = torch.randn(23, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        weight = torch.randn(300, 8, generator=torch.Generator().manual_seed(2), requires_grad=True)
        value = loss(hidden, weight)
        (3 * value).backward()
        return value.detach(), hidden.grad, weight.grad
    found = gradients(lambda hidden, weight: mt5.HeadLoss.apply(hidden, weight, target))
    expected = gradients(lambda hidden, weight: torch.nn.functional.cross_entropy(
        hidden @ weight.T, target))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


def test_the_head_may_be_frozen():
    model = MT5(MT5Config(vocab_size=300, **TINY))
    model.head.requires_grad_(False)
    model(*batch(300)).backward()
    assert model.head.weight.grad is None
    assert model.embedding.weight.grad.any()


def test_training_differs_by_dropout_and_repeats_with_its_seed():
    model = MT5(MT5Config(vocab_size=300, **TINY))
    def loss(seed):
        torch.manual_seed(seed)
        return model(*batch(300)).item()
    assert loss(1) == loss(1) != loss(2)
    model.eval()
    assert loss(1) == loss(2)


def test_each_weight_starts_at_mesh_tensorflows_scale():
    torch.manual_seed(0)
    model = MT5(MT5Config(vocab_size=500, d_model=96, d_kv=16, d_ff=200, num_heads=4))
    layer = model.decoder.layers[3]
    expected = {model.embedding: 1, layer.attention.q: (96 * 16) ** -0.5, layer.cross.k: 96 ** -0.5,
                layer.attention.v: 96 ** -0.5, layer.cross.o: 64 ** -0.5,
                layer.feed_forward.gate: 96 ** -0.5, layer.feed_forward.up: 96 ** -0.5,
                layer.feed_forward.down: 200 ** -0.5, model.head: 96 ** -0.5}
    for module, std in expected.items():
        assert module.weight.std().item() == pytest.approx(std, rel=0.05)
    assert model.encoder.positions.weight.std().item() == pytest.approx(96 ** -0.5, rel=0.3)
    assert (layer.cross_norm.weight == 1).all()


def test_the_sizes_have_the_published_numbers_of_parameters():
    published = {"small": 300_176_768, "base": 582_401_280, "large": 1_229_581_312,
                 "xl": 3_742_619_648, "xxl": 12_921_057_280}
    for name, count in published.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in MT5(SIZES[name]).parameters()) == count


@pytest.mark.parametrize("wrong", [dict(d_model=0), dict(num_heads=-1), dict(d_kv="64"),
                                   dict(dropout_rate=1.0), dict(vocab_size=True),
                                   dict(relative_attention_num_buckets=6),
                                   dict(relative_attention_max_distance=16),
                                   dict(layer_norm_epsilon=math.nan)])
def test_impossible_sizes_are_refused_in_one_line(wrong):
    with pytest.raises(ValueError) as error:
        MT5Config(**wrong)
    assert next(iter(wrong)) in str(error.value) and "\n" not in str(error.value)


# Conversion.

FORMS = ["pytorch_model.bin", "model.safetensors", "pytorch_model.bin.index.json",
         "model.safetensors.index.json"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_hub_folder_converts_to_the_same_weights(tmp_path, pieces, form, capsys):
    config = MT5Config(vocab_size=500, relative_attention_max_distance=64, **TINY)
    weights = {**hub_weights(config), mt5.STRAY: torch.zeros(32, 4)}
    folder = hub_folder(tmp_path / "hub", pieces, config, form, weights, model_type="t5",
                        vocab_size=7, num_heads=99)  # what shapes tell is taken from them
    assert mt5.main(["convert", str(folder), str(tmp_path / "x.pt")]) == 0
    assert "ignored: " + mt5.STRAY in capsys.readouterr().out
    model, tokenizer = load(tmp_path / "x.pt")
    assert model.config == config
    assert tokenizer.model == pieces
    for ours, theirs in mt5.published_names(config).items():
        assert torch.equal(model.state_dict()[ours], weights[theirs])


def test_half_precision_and_old_torch_files_convert(tmp_path, pieces):
    config = MT5Config(vocab_size=500, **TINY)
    weights = {name: tensor.bfloat16() for name, tensor in hub_weights(config).items()}
    folder = hub_folder(tmp_path / "hub", pieces, config, weights=weights)
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert(folder, tmp_path / "x.pt")
    model, _ = load(tmp_path / "x.pt")
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight, weights["lm_head.weight"].float())


def test_a_model_that_transformers_saved_with_a_tied_head_converts(tmp_path, pieces):
    config = MT5Config(vocab_size=500, **TINY)
    weights = hub_weights(config)
    del weights["lm_head.weight"]
    folder = hub_folder(tmp_path / "hub", pieces, config, weights=weights, tie_word_embeddings=True)
    convert(folder, tmp_path / "x.pt")
    model, _ = load(tmp_path / "x.pt")
    theirs = transformers.MT5ForConditionalGeneration.from_pretrained(folder).eval()
    ids, mask, labels = batch()
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask.long(), labels=labels).loss.item()
        assert model(ids, mask, labels).item() == pytest.approx(expected, rel=1e-5)


def one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_missing_unknown_and_misshapen_weights_are_all_named(tmp_path, pieces):
    config = MT5Config(vocab_size=500, **TINY)
    weights = hub_weights(config)
    del weights["encoder.block.1.layer.0.SelfAttention.k.weight"]
    weights["surprise.weight"] = torch.zeros(2)
    weights["decoder.final_layer_norm.weight"] = torch.zeros(3)
    folder = hub_folder(tmp_path / "hub", pieces, config, weights=weights)
    with pytest.raises(ValueError) as error:
        convert(folder, tmp_path / "x.pt")
    one_line(error, "missing encoder.block.1.layer.0.SelfAttention.k.weight",
             "unknown 'surprise.weight'", "decoder.final_layer_norm.weight is (3,)")
    assert not (tmp_path / "x.pt").exists()


def test_what_is_not_mt5_is_refused_by_name(tmp_path, pieces):
    config = MT5Config(vocab_size=500, **TINY)
    def error_of(weights=None, **settings):
        folder = hub_folder(tmp_path / "hub", pieces, config, weights=weights, **settings)
        with pytest.raises(ValueError) as error:
            convert(folder, tmp_path / "x.pt")
        return error
    one_line(error_of(model_type="umt5"), "umT5")
    extra = {"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight":
             torch.zeros(32, 4)}
    one_line(error_of({**hub_weights(config), **extra}), "umT5")
    one_line(error_of(feed_forward_proj="relu"), "gated-gelu")
    one_line(error_of({"bert.embeddings": torch.zeros(3)}), "no matrix shared.weight")
    one_line(error_of({**hub_weights(config), mt5.ALIASES[0]: torch.zeros(500, 64)}),
             mt5.ALIASES[0], "shared.weight")


@pytest.mark.parametrize("missing", ["config.json", "spiece.model", "pytorch_model.bin"])
def test_a_missing_file_of_a_hub_folder_is_named(tmp_path, pieces, missing, capsys):
    folder = hub_folder(tmp_path / "hub", pieces, MT5Config(vocab_size=500, **TINY))
    (folder / missing).unlink()
    assert mt5.main(["convert", str(folder), str(tmp_path / "x.pt")]) == 2
    message = capsys.readouterr().err
    assert missing in message and message.count("\n") == 1


def test_an_index_cannot_name_a_file_outside_its_folder(tmp_path, pieces):
    folder = hub_folder(tmp_path / "hub", pieces, MT5Config(vocab_size=500, **TINY), FORMS[3])
    (folder / FORMS[3]).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="weight_map"):
        convert(folder, tmp_path / "x.pt")


def test_a_wrong_value_of_a_hub_folder_is_refused_in_one_line_with_its_file(tmp_path, pieces):
    config = MT5Config(vocab_size=500, **TINY)
    def error_of(name, content):
        folder = hub_folder(tmp_path / "hub", pieces, config, FORMS[3])
        (folder / name).write_bytes(content)
        before = sorted(tmp_path.glob("**/*"))
        with pytest.raises(ValueError) as error:
            convert(folder, tmp_path / "x.pt", trim=[folder / "config.json"])
        one_line(error, str(folder))
        assert sorted(tmp_path.glob("**/*")) == before
    deep = b"[" * 900 + b"]" * 900
    for content in (b"{" * 5000, b'{"dropout_rate": "x\\ny"}', b'{"layer_norm_epsilon": -1}',
                    b'{"dropout_rate": ' + deep + b"}", b'{"relative_attention_max_distance": 1}'):
        error_of("config.json", content)
    for shards in ({"a": "b\nc.safetensors"}, {"a\nb": "c"}, [], {"a": 3}, {}):
        error_of(FORMS[3], json.dumps({"weight_map": shards}).encode())
    error_of("spiece.model", b"")
    scored = bytearray(pieces)  # a byte with the score of a learnt piece: nobody seems to need it
    scored[scored.index(b"<0x41>") + 10] = 0x3f
    error_of("spiece.model", scored)


def test_tensors_that_are_not_all_there_are_refused_with_their_name(tmp_path, pieces):
    config = MT5Config(vocab_size=500, **TINY)
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    size = hub_weights(config)[name].shape
    for tensor in (torch.zeros(1).half().expand(size), torch.zeros(size, device="meta"),
                   torch.zeros(size).to_sparse(), torch.zeros(1).expand(2**40, 2**20)):
        folder = hub_folder(tmp_path / "hub", pieces, config,
                            weights={**hub_weights(config), name: tensor})
        with pytest.raises(ValueError) as error:
            convert(folder, tmp_path / "x.pt")
        one_line(error, "pytorch_model.bin", name)
    folder = hub_folder(tmp_path / "hub", pieces, config, weights={
        key: torch.nn.Parameter(tensor.t().contiguous().t()) for key, tensor in
        hub_weights(config).items()})
    convert(folder, tmp_path / "x.pt")  # but columns first, or parameters, are as good


def test_text_to_trim_by_is_refused_with_its_line(tmp_path):
    for name, line in (("a.jsonl", b"[" * 10**5), ("a.jsonl", b'{"a": "\\ud800"}'), ("a", b"\xff"),
                       ("a.jsonl", b"[1]")):
        (tmp_path / name).write_bytes(b'{"a": "b"}\n' + line)
        with pytest.raises(ValueError) as error:
            list(mt5.each_text([tmp_path / name]))
        one_line(error, f"{tmp_path / name}:2")


def header(entries, length=None, data=b"\0" * 16):
    text = json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("content", [
    b"", b"1234567", header({}, length=10**6), header({}, length=2**63), header([1]),
    header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 20]}}),
    header({"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}),
    header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}),
    header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [4, 16]}}),
    header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}),
    header({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}),
    header({"a": {"dtype": "F32", "shape": [2.0, 2], "data_offsets": [0, 16]}}),
    header({"a": {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]}}),
    header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16, 3]}}),
    header({"a": {"dtype": "F32", "shape": [4], "data_offsets": 7}}),
    header({"a": {"dtype": "I8", "shape": [16], "data_offsets": [0, 16]}}),
    header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [3], "data_offsets": [4, 16]}}),
    header({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 2**82]}}),
    header({"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}),
    header({"a": {"dtype": "F32", "shape": [0, 2**47, 2**47], "data_offsets": [0, 0]}}),
    header({"a": {"dtype": "F32", "shape": [2**47] * 9999, "data_offsets": [0, 16]}}),
    header({"a\nb": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}),
    header({"a" * 10**5: {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}),
    (2).to_bytes(8, "little") + b"\xff\xfe" + b"\0" * 16,
])
def test_a_damaged_safetensors_file_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        mt5.read_safetensors(path)
    one_line(error, str(path))
    assert len(str(error.value)) < 500


def test_safetensors_are_read_as_their_own_library_wrote_them(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "c": torch.zeros(0, 3),
               "d": torch.tensor(2.5), "e": torch.randn(3).half(), "f": torch.randn(2).double()}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    found = mt5.read_safetensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
               for name, tensor in tensors.items())


def test_safetensors_are_written_as_their_own_library_reads_them():
    for name in ("a", "ab", "abc"):
        tensors = {name: torch.randn(3, 5), "t": torch.randn(5, 3).T}
        file = io.BytesIO()
        mt5.write_safetensors(tensors, file)
        found = safetensors.torch.load(file.getvalue())
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
        assert int.from_bytes(file.getvalue()[:8], "little") % 8 == 0, "tensors should be aligned"


# Export and trimming.

def test_an_exported_folder_gives_the_same_logits_and_ids_in_transformers(tmp_path, pieces):
    torch.manual_seed(0)
    tokenizer = Tokenizer(pieces)
    model = MT5(MT5Config(vocab_size=500, dropout_rate=0.2, **TINY)).eval()
    save(tmp_path / "x.pt", model, tokenizer, step=7)
    export(tmp_path / "x.pt", tmp_path / "deep" / "folder")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "deep" / "folder").eval()
    ids, mask, labels = batch()
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask.long(), labels=labels).logits
        assert relative(model.logits(ids, mask, labels)[labels != IGNORE],
                        expected[labels != IGNORE]) < 2e-5
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "deep" / "folder")
    assert len(their_tokenizer) == len(tokenizer), "no sentinels added to those it has"
    for text in WRITABLE:
        assert their_tokenizer(text).input_ids == tokenizer.encode(text), text
    convert(tmp_path / "deep" / "folder", tmp_path / "y.pt")
    again, _ = load(tmp_path / "y.pt")
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))


def test_a_model_saved_in_half_precision_is_exported_in_single(tmp_path, pieces):
    model = MT5(MT5Config(vocab_size=500, **TINY)).bfloat16()
    save(tmp_path / "x.pt", model, Tokenizer(pieces))
    export(tmp_path / "x.pt", tmp_path / "hub")
    found = mt5.read_safetensors(tmp_path / "hub" / "model.safetensors")
    assert torch.equal(found["shared.weight"], model.embedding.weight.float())


def test_trimming_keeps_segmentation_states_and_scores(tmp_path, pieces, capsys):
    config = MT5Config(vocab_size=500, **TINY)
    folder = hub_folder(tmp_path / "hub", pieces, config)
    (tmp_path / "a.txt").write_text("\n".join(TEXTS[:1]), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"id": 3, "text": TEXTS[1]}) + "\n\n")
    convert(folder, tmp_path / "full.pt")
    assert mt5.main(["convert", str(folder), str(tmp_path / "small.pt"), "--trim",
                     str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]) == 0
    (full, tokenizer), (small, trimmed) = load(tmp_path / "full.pt"), load(tmp_path / "small.pt")
    kept = tokenizer.needed(TEXTS[:2])
    assert len(trimmed) == len(kept) == small.config.vocab_size < len(tokenizer)
    assert len(trimmed.sentinels()) == 100
    for text in TEXTS[:2]:
        ids, few = tokenizer.encode(text), trimmed.encode(text)
        assert [kept[i] for i in few] == ids
        assert trimmed.decode(few) == tokenizer.decode(ids)
        ids, few = torch.tensor([ids]), torch.tensor([few])
        with torch.no_grad():
            everywhere = torch.ones_like(ids, dtype=torch.bool)
            assert relative(small.encode(few, everywhere), full.encode(ids, everywhere)) < 1e-6
            assert relative(small.logits(few, everywhere, few),
                            full.logits(ids, everywhere, ids)[:, :, kept]) < 1e-6
    for text in TEXTS:  # any text can still be written
        assert trimmed.decode(trimmed.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    export(tmp_path / "small.pt", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert all(theirs(text).input_ids == trimmed.encode(text) for text in TEXTS[:2])


# The tokenizer.

def test_the_tokenizer_has_mt5s_special_ids_and_sentinels(pieces):
    tokenizer = Tokenizer(pieces)
    assert [tokenizer.pieces.id_to_piece(i) for i in (PAD, EOS, 2)] == ["<pad>", "</s>", "<unk>"]
    sentinels = tokenizer.sentinels()
    assert len(set(sentinels)) == 100
    assert tokenizer.pieces.id_to_piece(sentinels[0]) == "▁<extra_id_0>"
    assert sentinels == list(range(sentinels[0], sentinels[0] - 100, -1)), "backwards, as in mT5"
    assert tokenizer.encode("<extra_id_7>") == [sentinels[7], EOS]
    assert "<extra_id_3>" in tokenizer.decode([sentinels[3], *tokenizer.encode("cat")])


def test_the_tokenizer_normalises_falls_back_to_bytes_and_stops_at_the_end(pieces):
    tokenizer = Tokenizer(pieces)
    assert tokenizer.encode("the\ncat\tsat") == tokenizer.encode("the cat sat")
    assert tokenizer.encode("ｃａｔ") == tokenizer.encode("cat")
    assert tokenizer.encode("") == [EOS]
    ids = tokenizer.encode("ก")  # not among the pieces: three bytes of UTF-8
    assert [tokenizer.pieces.id_to_piece(i) for i in ids[-4:-1]] == ["<0xE0>", "<0xB8>", "<0x81>"]
    assert tokenizer.decode(ids) == "ก"
    cat = tokenizer.encode("cat")
    assert tokenizer.decode([PAD, *cat, *tokenizer.encode("mat"), IGNORE, 10**6]) == "cat"
    assert tokenizer.decode([*cat[:-1], IGNORE, 10**6]) == "cat"


def test_all_pieces_kept_leave_the_tokenizer_as_it_was(pieces):
    tokenizer = Tokenizer(pieces)
    assert tokenizer.only(range(len(tokenizer))).model == pieces


def test_other_bytes_are_no_tokenizer():
    for content in (b"", b"junk", b"\x0a\xff\xff"):
        with pytest.raises(ValueError, match="SentencePiece"):
            Tokenizer(content)
    foreign = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=foreign, vocab_size=70, minloglevel=2)
    with pytest.raises(ValueError, match="mT5's ids 0, 1, 2, found"):
        Tokenizer(foreign.getvalue())


# Checkpoints.

@pytest.fixture
def saved(tmp_path, pieces):
    torch.manual_seed(0)
    model = MT5(MT5Config(vocab_size=500, **TINY))
    optimizer = torch.optim.AdamW(model.parameters())
    model(*batch()).backward()
    optimizer.step()
    save(tmp_path / "x.pt", model, Tokenizer(pieces), step=3, optimizer=optimizer.state_dict(),
         random=torch.get_rng_state(), args={"lr": 1e-3, "test": ["de", None]})
    return tmp_path / "x.pt", model, optimizer


def test_a_checkpoint_returns_what_was_saved(saved):
    path, model, optimizer = saved
    content = read_checkpoint(path)
    assert (content["step"], content["args"]) == (3, {"lr": 1e-3, "test": ["de", None]})
    found = content["optimizer"]["state"]
    assert all(torch.equal(found[i]["exp_avg"], state["exp_avg"])
               for i, state in optimizer.state_dict()["state"].items())
    loaded, _ = load(path)
    assert not loaded.training and loaded.config == model.config
    assert all(torch.equal(a, b) and b.requires_grad
               for a, b in zip(model.parameters(), loaded.parameters()))


def test_a_loaded_model_learns_without_changing_its_file(saved):
    path, _, _ = saved
    before = path.read_bytes()
    model, tokenizer = load(path)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.1)
    model(*batch()).backward()
    optimizer.step()
    assert path.read_bytes() == before
    save(path, model, tokenizer)  # onto the file it came from
    assert torch.equal(load(path)[0].head.weight, model.head.weight)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harm",)


@pytest.mark.parametrize("damage, words", [
    (lambda content: b"junk", "torch.save"),
    (lambda content: b"", "torch.save"),
    (lambda content: content[:len(content) // 2], "torch.save"),
    (lambda content: pickle.dumps(Harmful(), protocol=2), "system"),
    (lambda content: {"x": Harmful()}, "system"),
    (lambda content: {"shared.weight": torch.zeros(2)}, "convert"),
    (lambda content: [1, 2], "convert"),
    (lambda content: {**content, "format": "xlrs-mt5 99"}, "'xlrs-mt5 99'"),
    (lambda content: {k: v for k, v in content.items() if k != "tokenizer"}, "tokenizer"),
    (lambda content: {k: v for k, v in content.items() if k != "model"}, "model"),
    (lambda content: {**content, "config": {**content["config"], "depth": 3}}, "depth"),
    (lambda content: {**content, "config": {**content["config"], "num_heads": 0}}, "num_heads"),
    (lambda content: {**content, "config": {**content["config"], "num_layers": 10**9}}, "layers"),
    (lambda content: {**content, "config": {**content["config"], "d_ff": 3}}, "down.weight"),
    (lambda content: {**content, "model": {**content["model"], "more": torch.zeros(1)}}, "more"),
    (lambda content: {**content, "model": {**content["model"], "head.weight": 3}}, "head.weight"),
    (lambda content: {**content, "model": {**content["model"], "head.weight": torch.zeros(
        500, 64, dtype=torch.int8)}}, "head.weight"),
    (lambda content: {**content, "model": 5}, "damaged"),
    (lambda content: {**content, "format": ["xlrs-mt5 1"]}, "convert"),
    (lambda content: {**content, "config": {**content["config"], "a\nb": 3}}, "config"),
    (lambda content: {**content, "config": {**content["config"], "d_ff": ["a\nb"]}}, "d_ff"),
    (lambda content: {**content, "config": {**content["config"], "num_heads": 10**9,
                                            "d_kv": 10**9, "d_model": 10**9}}, "below 1,000,000"),
    (lambda content: {**content, "config": {**content["config"], "vocab_size": 400}}, "pieces"),
    (lambda content: {**content, "model": {**content["model"], "a\nb": torch.zeros(1)}}, "a name"),
    (lambda content: {**content, "model": torch.zeros(3)}, "damaged"),
    (lambda content: {**content, "model": {**content["model"], "head.weight": torch.zeros(
        1).expand(500, 64)}}, "head.weight"),
    (lambda content: {**content, "model": {**content["model"], "head.weight": torch.zeros(
        500, 64, device="meta")}}, "head.weight"),
    (lambda content: {**content, "model": {**content["model"], "head.weight": torch.zeros(
        500, 64).double()}}, "one precision"),
    (lambda content: {**content, "tokenizer": {"model": torch.zeros(1, dtype=torch.uint8).expand(
        10**11)}}, "model"),
    (lambda content: {**content, "tokenizer": {"model": torch.zeros(3, requires_grad=True)}},
     "SentencePiece"),
    (lambda content: {**content, "tokenizer": torch.zeros(3, 3)}, "damaged"),
    (lambda content: {**content, "tokenizer": {"model": b"junk"}}, "damaged"),
])
def test_a_file_that_is_no_whole_checkpoint_is_refused_in_one_line(saved, damage, words):
    path, _, _ = saved
    raw = damage(path.read_bytes()) if words in ("torch.save",) else None
    if raw is None:
        content = torch.load(path, weights_only=True)
        raw = damage(content)
    if isinstance(raw, bytes):
        path.write_bytes(raw)
    else:
        torch.save(raw, path)
    with pytest.raises(ValueError) as error:
        load(path)
    one_line(error, str(path), words)
    assert not Path("harm").exists()


def test_a_checkpoint_that_unpacks_to_more_than_the_file_is_refused(saved):
    path, _, _ = saved
    whole = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w") as bomb:
        for name in whole.namelist():
            pickled = name.endswith("data.pkl")
            bomb.writestr(name, whole.read(name) + bytes(10**8 * pickled),
                          zipfile.ZIP_DEFLATED if pickled else zipfile.ZIP_STORED)
    assert path.stat().st_size < 10**7
    with pytest.raises(ValueError) as error:
        read_checkpoint(path)
    one_line(error, str(path), "torch.save")


@pytest.mark.parametrize("wrap", [False, True])
def test_a_pickle_that_asks_for_memory_is_refused_before_it_gets_it(tmp_path, wrap):
    path, length = tmp_path / "x.pt", 3 * 10**8
    pickled = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + length.to_bytes(5, "little") + b"\x85R."
    path.write_bytes(pickled)
    if wrap:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", pickled)
            archive.writestr("x/version", "3\n")
    tracemalloc.start()
    with pytest.raises(ValueError) as error:
        mt5.read_pickle(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    one_line(error, str(path))
    assert peak < 10**7


def test_whatever_torch_says_of_a_broken_file_the_file_is_named(saved, monkeypatch):
    def fails(*_, **__):
        raise OSError(22, "Invalid argument")  # what seeking to a nonsensical place gives
    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(ValueError) as error:
        read_checkpoint(saved[0])
    one_line(error, str(saved[0]))


def test_no_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load(tmp_path / "none.pt")
    one_line(error, "none.pt")
    with pytest.raises(ValueError, match="convert"):
        load(tmp_path)


def test_the_command_line_ends_mistakes_with_one_line_and_code_2(tmp_path):
    def run(*args):
        return subprocess.run([sys.executable, mt5.__file__, *args], capture_output=True, text=True)
    (tmp_path / "junk.pt").write_bytes(pickle.dumps(Harmful()))
    result = run("export", str(tmp_path / "junk.pt"), str(tmp_path / "out"))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert mt5.main(["convert", str(tmp_path / "none"), str(tmp_path / "x.pt")]) == 2
    with pytest.raises(SystemExit) as end:
        mt5.main(["convert"])
    assert end.value.code == 2


# eval.py: ROUGE-L and the language identifier ----------------------------------------------------

GREETINGS = {
    "en": "The weather is nice today.", "de": "Heute ist das Wetter schön.",
    "fr": "Il fait beau aujourd’hui.", "es": "Hoy hace muy buen tiempo.",
    "tr": "Bugün hava çok güzel.", "ru": "Сегодня хорошая погода.",
    "el": "Σήμερα ο καιρός είναι καλός.", "ar": "الطقس جميل اليوم.", "he": "מזג האוויר יפה היום.",
    "hi": "आज मौसम बहुत अच्छा है।", "th": "วันนี้อากาศดีมาก", "zh": "今天天气很好。",
    "ja": "今日はとても天気がいいです。", "ko": "오늘 날씨가 아주 좋습니다.", "vi": "Hôm nay thời tiết rất đẹp.",
    "ka": "დღეს კარგი ამინდია.", "am": "ዛሬ አየሩ ጥሩ ነው።", "my": "ဒီနေ့ ရာသီဥတု ကောင်းတယ်။",
    "lo": "ມື້ນີ້ອາກາດດີຫຼາຍ", "km": "ថ្ងៃនេះអាកាសធាតុល្អណាស់", "bo": "དེ་རིང་གནམ་གཤིས་ཡག་པོ་འདུག",
}


@pytest.fixture(scope="module")
def identifier():
    return scoring.LanguageIdentifier()


@pytest.fixture(scope="module")
def three_words(tmp_path_factory):
    """A table of three words: German "ab" twice, English "ba"."""
    folder = tmp_path_factory.mktemp("ntrex")
    (folder / "newstest2019-ref.deu.txt").write_text("ab\r\n\r\nab\r\n")
    (folder / "newstest2019-src.eng.txt").write_text("ba\n")
    scoring.train_lid(folder, folder / "table.bin")
    return folder


def test_rouge_l_is_the_fraction_worked_by_hand():
    for prediction, reference, score, why in [
            ("a b c d", "A, c! e", 4 / 7, "the subsequence a c, so 2 · 2 / (4 + 3)"),
            ("b a", "a b", 1 / 2, "order counts: either token, not both, so 2 · 1 / (2 + 2)"),
            ("a a a", "a", 2 / 4, "a token is used once, so 2 · 1 / (3 + 1)")]:
        found = scoring.rouge_l([prediction], [reference]).tolist()
        assert found == pytest.approx([score]), (
            f"{prediction!r} against {reference!r}: expected {score:.3f} ({why}), found {found}")


def test_rouge_l_equals_rouge_score_on_ascii_text():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    rng = random.Random(0)
    letters = "aabC    __.,-'\"1\t"
    texts = ["".join(rng.choices(letters, k=rng.randrange(200))) for _ in range(400)]
    a, b = texts[:200], texts[200:]
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    expected = [scorer.score(y, x)["rougeL"].fmeasure for x, y in zip(a, b)]
    differ = [f"{x!r} against {y!r}: expected {right:.3f}, found {found:.3f}" for x, y, right, found
              in zip(a, b, expected, scoring.rouge_l(a, b).tolist()) if abs(right - found) > 1e-6]
    assert not differ, f"{len(differ)} of {len(a)} pairs differ; {min(differ, key=len)}"
    assert max(expected) > .3


def test_the_row_in_one_integer_is_the_textbook_table_also_beyond_64_tokens():
    rng = random.Random(1)
    for length in (1, 5, 63, 64, 65, 200):
        a, b = ([rng.randrange(6) for _ in range(length + extra)] for extra in (0, 3))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = (table[i][j] + 1 if x == y
                                       else max(table[i][j + 1], table[i + 1][j]))
        for one, other in ((a, b), (b, a)):
            found = scoring.lcs(one, other)
            assert found == table[-1][-1], (
                f"{length} and {length + 3} tokens: expected {table[-1][-1]} in common, found "
                f"{found}; lists {data.brief(one)} and {data.brief(other)}")


@pytest.mark.parametrize("language", GREETINGS)
def test_identical_texts_score_1_in_every_script(language):
    text = GREETINGS[language]
    assert len(scoring.tokens(text)) > 2
    assert scoring.rouge_l([text], [text]).tolist() == [1.]


def test_tokens_keep_marks_and_split_scripts_without_spaces():
    assert scoring.tokens("Ｆｕｌｌ-width, ﬁne_x 2½") == ["full", "width", "fine", "x", "21", "2"]
    assert scoring.tokens("हिन्दी में!") == ["हिन्दी", "में"]
    assert scoring.tokens("Мой ёж") == ["мой", "ёж"]
    assert scoring.tokens("东京 2020年, ok") == ["东", "京", "2020", "年", "ok"]
    assert scoring.tokens("ดีมาก") == ["ดี", "ม", "า", "ก"]
    assert scoring.tokens("می\u200cخواهم") == ["میخواهم"]
    assert scoring.tokens("") == scoring.tokens("—!?") == []


def test_a_pile_of_marks_is_read_quickly_and_an_ordinary_one_whole(identifier):
    pile = "\u0301\u0323" * 40_000  # NFKC alone takes six seconds to sort these
    began = timeit.default_timer()
    assert scoring.rouge_l(["a" + pile], ["a" + pile]) == 1
    identifier.predict(["a" + pile])
    identifier.mixed(["a" + pile], "de", "en")
    assert timeit.default_timer() - began < 2
    assert scoring.tokens("q" + "\u0301" * 20) == ["q" + "\u0301" * 20]


def test_many_long_texts_are_identified_within_a_bounded_memory(identifier, monkeypatch):
    texts = ["ein Satz auf Deutsch " * 5000] * 40
    tracemalloc.start()
    assert identifier.predict(texts) == ["de"] * 40
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 250 * scoring.LETTERS
    monkeypatch.setattr(scoring, "LETTERS", 7)
    assert scoring.in_groups(["abc", "", "def", "x" * 20, "ab"]) == [
        ["abc", "", "def"], ["x" * 20], ["ab"]]


def test_empty_sides_score_0_and_unequal_lists_are_refused():
    assert scoring.rouge_l(["", "a", "", "…"], ["a", "", "", "…"]).tolist() == [0, 0, 0, 0]
    assert scoring.rouge_l([], []).shape == (0,)
    with pytest.raises(ValueError, match="found 2 and 1"):
        scoring.rouge_l(["a"], ["a", "b"])


# Language identifier


def test_the_identifier_is_naive_bayes_worked_by_hand_on_three_words(three_words):
    # German shows 4 letters, English 2: counts are scaled by 3/4 and 3/2, the mean being 3.
    # "ab" in German: 8 n-grams ("a" "b" " a" "ab" "b " " ab" "ab " " ab ") and the word, each
    # twice; "ba" in English: the word, once, and n-grams once, which the table leaves out.
    nats = math.log((1.5 + .02) / .02)  # both counts scale to 1.5
    tiny = scoring.LanguageIdentifier(three_words / "table.bin")
    assert tiny.languages == ["de", "en"]
    expected = torch.tensor([[(8 / 16 + 1 / 4) * nats, 0],  # ab
                             [2 / 16 * nats, 1 / 4 * nats],  # ba: German knows "b" and "a"
                             [0, 0]])  # c
    assert torch.allclose(tiny.evidence(["ab", "ba", "c"]), expected, atol=1e-5)
    assert torch.allclose(tiny.scores(["ab", "ba", "c"]), expected.log_softmax(1), atol=1e-5)
    assert tiny.predict(["Ab, AB.", "ba"]) == ["de", "en"]


def test_training_the_identifier_twice_gives_the_same_bytes(three_words):
    # in another process, where Python's own hash of a string differs
    subprocess.run([sys.executable, ours("eval.py"), "--train-lid", three_words,
                    three_words / "again.bin"],
                   check=True, env={**os.environ, "PYTHONHASHSEED": "1"})
    assert (three_words / "again.bin").read_bytes() == (three_words / "table.bin").read_bytes()


def test_the_shipped_table_is_small_and_knows_100_languages_by_iso_code(identifier):
    assert scoring.LID.stat().st_size <= 8e6
    assert len(identifier.languages) >= 100
    assert {"bs", "hr", "sr", "ms", "id", "nb", "nn", "gsw", "yue"} <= set(identifier.languages)
    assert set(scoring.LANGUAGES.values()) == set(identifier.languages)


def test_everyday_sentences_are_identified_in_many_scripts(identifier):
    assert identifier.predict(list(GREETINGS.values())) == list(GREETINGS)


def test_case_digits_punctuation_and_neighbours_in_the_batch_change_nothing(identifier):
    texts = ["Die Katze schläft", "", "le chat dort", "!"]
    loud = ["»DIE, KATZE...  SCHLÄFT« 123", "4", "\tle-chat-dort\n", ""]
    assert torch.equal(identifier.scores(texts), identifier.scores(loud))
    alone = torch.cat([identifier.scores([text]) for text in texts])
    assert torch.allclose(identifier.scores(texts), alone, atol=1e-4)


def test_full_and_short_rows_give_the_same_scores(identifier, monkeypatch):
    texts = list(GREETINGS.values())[:12]
    monkeypatch.setattr(scoring, "DENSE", 16)
    assert torch.allclose(scoring.LanguageIdentifier().evidence(texts), identifier.evidence(texts),
                          atol=1e-3)


def test_candidates_restrict_the_answer_and_probabilities_sum_to_1(identifier):
    texts = ["Der Hund schläft", "Мама мыла раму", "xyz"]
    scores = identifier.scores(texts, ["en", "fr"])
    assert torch.allclose(scores.exp().sum(1), torch.ones(3), atol=1e-5)
    assert set(identifier.predict(texts, ["en", "fr"])) <= {"en", "fr"}
    assert identifier.scores([]).shape == (0, len(identifier.languages))
    with pytest.raises(ValueError, match="does not know xx"):
        identifier.predict(texts, ["en", "xx"])


def test_a_text_without_letters_is_in_no_language(identifier):
    assert identifier.predict(["", "42", "?!", " ", "a1"], ["en", "de"])[:4] == ["und"] * 4
    assert identifier.predict([]) == []


def test_titles_of_the_toy_world_are_told_apart_among_its_languages(identifier):
    titles = {"Anna und der verlorene Hut": "de", "Anna ve kayıp şapka": "tr",
              "Anna et le chapeau perdu": "fr", "Anna y el sombrero perdido": "es",
              "Анна и потерянная шляпа": "ru", "Anna and the lost hat": "en"}
    found = identifier.predict(list(titles), ["en", "de", "fr", "es", "tr", "ru"])
    assert found == list(titles.values())


def test_words_of_the_source_language_inside_another_are_counted(identifier):
    # of five words "the" and "lost" are English; names are in no language, "Hut" is German
    assert identifier.mixed(["Hugo und the lost Hut"], "de", "en").tolist() == pytest.approx([.4])
    assert identifier.mixed(["Hugo und the new Hut"], "de", "en").item() > 0
    assert identifier.mixed(["Hugo and the new hat"], "tr", "en").item() >= .6
    clean = ["Hugo und der neue Hut", "Anna und The Lost Hat", "", "42 !"]  # capitals: a name
    assert identifier.mixed(clean, "de", "en").tolist() == [0, 0, 0, 0]
    assert identifier.mixed(["Хуго и the новая шляпа"], "ru", "en").tolist() == pytest.approx([.2])
    assert identifier.mixed(["今天 is 好"], "zh", "en").tolist() == pytest.approx([.25])
    assert identifier.mixed(["the hat"], "en", "en").tolist() == [0]
    assert identifier.mixed([], "de", "en").shape == (0,)


@pytest.mark.parametrize("language", "en de fr es tr ru ar zh hi th vi el".split())
def test_clean_sentences_show_no_words_of_english(identifier, language):
    source = "de" if language == "en" else "en"
    assert identifier.mixed([GREETINGS[language]], language, source).tolist() == [0]


def test_scores_count_empty_outputs_as_wrong_and_nothing_as_accidental_in_the_source(identifier):
    outputs = ["Hugo und der neue Hut", "Hugo and the new hat", ""]
    references = ["Hugo und der neue Hut"] * 3
    found = scoring.score(outputs, references, "de", "en", identifier)
    assert found["rougeL"] == pytest.approx(100 * (1 + 1 / 5 + 0) / 3)
    assert found["wrong_language"] == pytest.approx(200 / 3)
    assert found["source_language"] == pytest.approx(100 / 3)
    assert found["mixed"] > 10 and found["n"] == 3
    for source in ("de", None):
        found = scoring.score(outputs, references, "de", source, identifier)
        assert found["source_language"] == found["mixed"] == 0
        assert found["wrong_language"] == pytest.approx(200 / 3)


def test_a_table_that_is_missing_or_damaged_is_refused_in_one_line(three_words):
    with pytest.raises(FileNotFoundError, match="none.bin: no language table"):
        scoring.LanguageIdentifier(three_words / "none.bin")
    good = (three_words / "table.bin").read_bytes()
    for bad in (b"", b"{}\n", b"[]\nx", good[:-9], good.replace(b'"cells": ', b'"cells": 1'),
                good.replace(b"table 2", b"table 9"), good.replace(b'"de"', b"[[]]"),
                good.replace(b'"de", "en"', b'"en", "de"'), good.replace(b"[4, ", b"[0, "),
                good.replace(b'"rows": ', b'"rows": 9999999999999999999'), b"[" * 10**5,
                good.split(b"\n")[0] + b"\n" + zlib.compress(bytes(10**8))):
        (three_words / "bad.bin").write_bytes(bad)
        assert bad != good
        tracemalloc.start()
        with pytest.raises(ValueError, match="bad.bin: expected a language table"):
            scoring.LanguageIdentifier(three_words / "bad.bin")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5e7, "no bytes should be unpacked beyond what a table can hold"


# Command line


def run_main(capsys, *arguments):
    """Return (exit code, standard error) of eval.py with these arguments."""
    with pytest.raises(SystemExit) as stop:
        scoring.main([str(argument) for argument in arguments])
    return stop.value.code, capsys.readouterr().err


def test_mistakes_in_files_and_flags_end_in_one_line_and_code_2(tmp_path, capsys):
    one, two, bad = tmp_path / "one", tmp_path / "two", tmp_path / "bad"
    one.write_text("a\n")
    two.write_text("a\nb\n")
    bad.write_bytes(b"a\n\xff\n")
    for arguments, words in [
            ((one, two, "de"), ["one", "two", "found 2 and 1"]),
            ((two, one, "de"), ["found 1 and 2"]), ((two, bad, "de"), [f"{bad}:2", "UTF-8"]),
            ((tmp_path / "none", one, "de"), ["none"]), ((one, one, "xx"), ["xx"])]:
        hyp, ref, lang = arguments
        code, error = run_main(capsys, "--hyp", hyp, "--ref", ref, "--lang", lang)
        assert code == 2 and error.count("\n") == 1 and all(word in error for word in words), error
    code, error = run_main(capsys, "--train-lid", tmp_path, tmp_path / "out")
    assert code == 2 and "newstest2019-*.txt" in error and not (tmp_path / "out").exists()
    (tmp_path / "newstest2019-ref.deu.txt").write_text("42\n")
    code, error = run_main(capsys, "--train-lid", tmp_path, tmp_path / "out")
    assert code == 2 and "no letter" in error and error.strip().count("\n") == 0
    (tmp_path / "newstest2019-ref.qqq.txt").write_text("a\n")
    assert "qqq" in run_main(capsys, "--train-lid", tmp_path, tmp_path / "out")[1]


def test_eval_scores_any_systems_files_from_the_command_line(tmp_path, capsys):
    (tmp_path / "hyp").write_text("Hugo and the new hat\nHugo und der neue Hut\n", encoding="utf-8")
    (tmp_path / "ref").write_text("Hugo und der neue Hut\n" * 2, encoding="utf-8")
    scoring.main(["--hyp", str(tmp_path / "hyp"), "--ref", str(tmp_path / "ref"), "--lang", "de"])
    printed = capsys.readouterr().out
    assert "60.0" in printed and scoring.TOKENS in printed
    assert '"wrong_language": 50.0, "source_language": 50.0' in printed


# train.py, select.py, eval.py: a run --------------------------------------------------------------

SMALL = ("--steps", 6, "--eval-every", 2, "--warmup", 2, "--batch-size", 8, "--eval-size", 8,
         "--train-size", 64, "--test-size", 8, "--test", "en", "de", "ru", "--parallel", "en", "de",
         "ru", "--lr", 1e-3)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A run of six steps with the regulariser, by subprocess; (folder, finished process)."""
    folder = tmp_path_factory.mktemp("run") / "small"
    finished = script("train.py", "--reg", 0.1, *SMALL, "--out", folder)
    assert finished.returncode == 0, finished.stderr
    return folder, finished


def rows(folder, kind):
    return [row for row in data.read_log(folder) if row["kind"] == kind]


def test_a_run_leaves_what_the_contract_names(small_run):
    folder, finished = small_run
    names = {path.name for path in folder.iterdir()}
    assert names == {"args.json", "log.jsonl", "selected.json", "scores.json", "outputs.jsonl",
                     *(f"step_{step:06d}.pt" for step in (0, 2, 4, 6))}
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["task"] == "completion" and set(scores["xlrs"]) == {"de", "ru"}
    for kinds in scores["scores"].values():
        assert {"rougeL", "wrong_language", "source_language", "mixed", "n"} <= set(kinds)
    outputs = (folder / "outputs.jsonl").read_text().splitlines()
    assert len(outputs) == 3 * 8 and json.loads(outputs[0])["language"] == "en"
    assert "mean but en" in finished.stdout and "training" in finished.stderr


def test_the_log_keeps_the_two_parts_of_the_loss_and_xlrs_apart(small_run):
    folder, _ = small_run
    for row in rows(folder, "train"):
        assert row["reg"] == pytest.approx(max(0, row["xlrs"] - 0.3))
        assert row["loss"] > 0 and row["lr"] == pytest.approx(1e-3 * min(1, row["step"] / 2))
    assert [row["step"] for row in rows(folder, "eval")] == [0, 2, 4, 6]


def test_a_run_lowers_the_loss_and_the_regulariser_lowers_xlrs(small_run, tmp_path):
    folder, _ = small_run
    finished = script("train.py", "--reg", 0, *SMALL, "--out", tmp_path / "plain")
    assert finished.returncode == 0, finished.stderr
    mean = {name: [scoring.mean(row["xlrs"].values()) for row in rows(path, "eval")]
            for name, path in (("reg", folder), ("plain", tmp_path / "plain"))}
    assert mean["reg"][0] == mean["plain"][0]
    assert mean["reg"][-1] < mean["plain"][-1], (
        f"expected XLRS to end lower with the regulariser, from {mean['reg'][0]:.3f} found "
        f"{mean['reg'][-1]:.3f} with it and {mean['plain'][-1]:.3f} without")
    losses = [row["dev_loss"] for row in rows(tmp_path / "plain", "eval")]
    assert losses[-1] < 0.9 * losses[0]


def test_select_marks_the_lowest_xlrs_and_eval_scores_the_run_again(small_run):
    folder, _ = small_run
    finished = script("select.py", folder)
    assert finished.returncode == 0, finished.stderr
    trained = [row for row in rows(folder, "eval") if row["step"]]
    lowest = min(trained, key=lambda row: scoring.mean(row["xlrs"].values()))["step"]
    chosen = json.loads((folder / "selected.json").read_text())
    assert chosen["step"] == lowest and chosen["by"] == "xlrs"
    assert [line for line in finished.stdout.splitlines() if "chosen" in line][0].split()[0] == str(
        lowest)
    before = (folder / "scores.json").read_text()
    finished = script("eval.py", folder)
    assert finished.returncode == 0, finished.stderr
    assert (folder / "scores.json").read_text() == before


@pytest.mark.parametrize("similarity, words", [(0.31, False), (0.29, True)])
def test_select_says_when_the_base_is_below_the_floor_already(tmp_path, capsys, similarity, words):
    folder = write_run(tmp_path / "run")
    log = (folder / "log.jsonl").read_text().replace('{"de": 0.5}', f'{{"de": {similarity}}}')
    (folder / "log.jsonl").write_text(log)
    selecting().main([str(folder)])
    assert ("not above --reg-floor 0.3" in capsys.readouterr().out) == words
    selecting().main([str(folder), "--by", "dev"])
    assert "floor" not in capsys.readouterr().out


def test_a_run_goes_on_to_the_same_weights_after_it_was_cut_off(small_run, tmp_path):
    folder, _ = small_run
    cut_off = tmp_path / "cut"
    cut_off.mkdir()
    for name in ("args.json", "step_000000.pt", "step_000002.pt"):
        (cut_off / name).write_bytes((folder / name).read_bytes())
    log = (folder / "log.jsonl").read_text()
    (cut_off / "log.jsonl").write_text(log[:len(log) * 2 // 3])  # a torn line at its end
    finished = script("train.py", "--reg", 0.1, *SMALL, "--out", cut_off, "--resume")
    assert finished.returncode == 0, finished.stderr
    same_weights(folder, cut_off)
    assert [row["step"] for row in rows(cut_off, "train")] == [1, 2, 3, 4, 5, 6]
    assert (cut_off / "scores.json").read_text() == (folder / "scores.json").read_text()


def test_a_run_goes_on_that_was_killed_before_its_first_checkpoint(small_run, tmp_path):
    folder, _ = small_run
    (tmp_path / "args.json").write_bytes((folder / "args.json").read_bytes())
    finished = script("train.py", "--reg", 0.1, *SMALL, "--out", tmp_path, "--resume")
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "scores.json").read_text() == (folder / "scores.json").read_text()


def test_xlrs_of_the_toy_base_by_layer():
    model, tokenizer = load(train.TOY_BASE)
    args, layers, measured = train.parse_args([]), model.encoder.layers, []
    _, sentences = data.parallel_texts(args)
    for depth in range(len(layers) + 1):
        model.encoder.layers = layers[:depth]
        vectors = scoring.vectors_by_language(model.eval(), tokenizer, sentences, args)
        measured.append(scoring.mean(scoring.language_similarity(vectors).values()))
    for found in (answer("xlrs_by_layer", [0.365, 0.640, 0.713]), measured):
        assert found == pytest.approx([0.365, 0.640, 0.713], abs=0.002), (
            f"after no layer, one, two: expected 0.365, 0.640, 0.713, found {found}; the last is "
            "the base's in README. Cut off layers and keep the norm; model.eval(); the second "
            "result of data.parallel_texts; mean over sentences, then over the five languages")


def test_scores_of_a_run_with_other_arguments_go_where_they_are_asked_to(small_run, tmp_path):
    folder, _ = small_run
    before = (folder / "scores.json").read_bytes()
    finished = script("eval.py", folder, "--test", "de", "--test-size", 2, "--out", tmp_path / "de")
    assert finished.returncode == 0, finished.stderr
    assert (folder / "scores.json").read_bytes() == before
    assert list(json.loads((tmp_path / "de" / "scores.json").read_text())["scores"]) == ["de"]


def test_a_frozen_part_keeps_its_weights(tmp_path):
    words = ("--steps", 1, "--train-size", 8, "--eval-size", 2, "--test-size", 2, "--test", "de")
    finished = script("train.py", *words, "--freeze", "decoder", "head", "--out", tmp_path / "run")
    assert finished.returncode == 0, finished.stderr
    old, new = (mt5.read_checkpoint(path)["model"] for path in
                (train.TOY_BASE, tmp_path / "run" / "step_000001.pt"))
    changed = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"embedding", "encoder"}


def test_pretraining_from_new_lowers_the_loss_and_leaves_a_base(tmp_path):
    finished = script("train.py", "--pretrain", "--train", "en", "de", "--parallel", "en", "de",
                      "--steps", 12, "--eval-every", 12, "--batch-size", 8, "--vocab-size", 1500,
                      "--warmup", 2, "--out", tmp_path / "base")
    assert finished.returncode == 0, finished.stderr
    first, last = rows(tmp_path / "base", "eval")
    assert last["dev_loss"] < first["dev_loss"] - 1
    model, tokenizer = mt5.load(tmp_path / "base" / "base.pt")
    assert len(tokenizer) == model.config.vocab_size


def test_users_files_train_a_new_model_in_any_script(tmp_path):
    texts = {"en": "the {} is small", "th": "{} นั้นเล็ก", "ar": "ال{} صغير", "zh": "{}很小",
             "hi": "{} छोटा है"}
    for lang, text in texts.items():
        lines = [text.format(i) for i in range(40)]
        (tmp_path / f"{lang}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        objects = [json.dumps({"text": line, "title": line[:5]}) + "\n" for line in lines]
        (tmp_path / f"{lang}.jsonl").write_text("".join(objects))
    pairs = [f"{lang}={tmp_path / lang}.jsonl" for lang in texts]
    finished = script("train.py", "--init", "new", "--vocab-size", 600, "--fields", "text,title",
                      "--train", pairs[0], "--dev", pairs[0], "--test", *pairs, "--parallel",
                      *(f"{lang}={tmp_path / lang}.txt" for lang in texts), "--reg", 0.1, "--steps",
                      2, "--batch-size", 4, "--eval-size", 4, "--max-target", 8, "--test-size", 5,
                      "--out", tmp_path / "run")
    assert finished.returncode == 0, finished.stderr
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())["scores"]
    assert {lang: kinds["n"] for lang, kinds in scores.items()} == dict.fromkeys(texts, 5)


@pytest.mark.parametrize("words, parts", [
    (["--train", "xx"], ["toy language", "'xx'"]),
    (["--train", "en=nowhere.jsonl"], ["nowhere.jsonl", "No such file"]),
    (["--train", "en=requirements.txt,requirements.txt", "--reg", "0.1"], ["--reg", "--parallel"]),
    (["--train", "xyz=requirements.txt,requirements.txt"], ["does not know xyz"]),
    (["--train", "en="], ["LANG=FILE", "'en='"]),
    (["--parallel", "en"], ["at least two languages"]),
    (["--init", "README.md"], ["README.md", "expected", "found"]),
    (["--reg", "-1"], ["--reg", "-1"]), (["--reg", "nan"], ["--reg", "nan"]),
    (["--reg", "much"], ["--reg", "much"]), (["--batch-size", "0"], ["--batch-size", "at least 1"]),
    (["--fields", "text"], ["--fields", "SOURCE,TARGET"]),
    (["--device", "foo"], ["--device foo"]), (["--train", "en", "en"], ["each language once"]),
    (["--train", "en=requirements.txt,requirements.txt", "--dev", "en"], ["tasks", "--task"]),
    (["--dtype", "float16"], ["--dtype", "float16", "overflow"]),
    (["--seed", str(2**70)], ["--seed", "at most"]), (["--resume"], ["--out"])])
def test_train_answers_a_mistake_in_one_line(tmp_path, capsys, words, parts):
    out = [] if words == ["--resume"] else ["--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        train.main([*words, *out])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2
    for part in parts:
        assert part in line
    assert not (tmp_path / "run").exists()


def test_keep_bounds_the_checkpoints_but_spares_base_and_best(tmp_path):
    finished = script("train.py", *SMALL[:2], "--eval-every", 1, *SMALL[4:], "--keep", 1, "--out",
                      tmp_path / "run")
    assert finished.returncode == 0, finished.stderr
    trained = [row for row in rows(tmp_path / "run", "eval") if row["step"]]
    best = {min(trained, key=key)["step"] for key in
            (lambda row: scoring.mean(row["xlrs"].values()), lambda row: row["dev_loss"])}
    kept = {int(path.stem[5:]) for path in (tmp_path / "run").glob("step_*.pt")}
    assert kept == {0, 6} | best


def test_unlabelled_text_takes_its_share_of_each_group():
    both = data.blend(lambda group, count: ["a"] * count, lambda group, count: ["b"] * count, 0.25)
    assert sorted(both(0, 8)) == ["a"] * 6 + ["b"] * 2


def test_an_occupied_folder_and_changed_arguments_are_refused(small_run):
    folder, _ = small_run
    again = script("train.py", *SMALL, "--out", folder)
    fails_in_one_line(again, "holds a run already", "--resume")
    fails_in_one_line(script("train.py", *SMALL, "--reg", 0.2, "--out", folder, "--resume"),
                      "--reg was 0.1", "now it is 0.2")


def shape(text):
    """Return the words of each line of a report; numbers are 0, what a system answers is left out.

    So is the mark of the chosen checkpoint: on another machine it may stand a line later.
    """
    text = re.sub(r"(?m)^(    (?:base|--reg 0|this run)) .*", r"\1", text).replace("<- chosen", "")
    return [re.sub(r"-?\d+(\.\d+)?", "0", line).split() for line in text.strip().splitlines()]


def test_the_two_commands_of_the_readme_print_what_it_shows(tmp_path):
    readme, out = (HERE / "README.md").read_text(), "runs/completion-en-reg0.1"
    blocks = readme.split("```")[1::2]
    for command, name in (("train.py", "train.py --reg 0.1"), ("select.py", f"select.py {out}")):
        shown = next(after for before, after in zip(blocks, blocks[1:]) if name in before)
        words = [word.replace(out, str(tmp_path / "run")) for word in name.split()]
        words += ["--out", tmp_path / "run", "--device", "cpu"] if command == "train.py" else []
        finished = script(*words)
        assert finished.returncode == 0, finished.stderr
        found = finished.stdout.replace(str(tmp_path / "run"), out)
        assert shape(found) == shape(shown), f"README, {name}: expected what it prints now, {found}"


def test_select_and_eval_answer_a_missing_run_in_one_line(tmp_path):
    fails_in_one_line(script("select.py", tmp_path), "args.json", "train.py")
    fails_in_one_line(script("eval.py", tmp_path / "nothing"), "nothing")


def test_runs_are_compared_with_intervals_and_the_tables_can_be_printed_again(small_run, tmp_path):
    folder, _ = small_run
    finished = script("eval.py", "--compare", folder, folder, "--out", tmp_path / "runs.json")
    assert finished.returncode == 0, finished.stderr
    again = script("eval.py", "--compare", tmp_path / "runs.json")
    assert again.stdout == finished.stdout and "--reg 0.1" in again.stdout
    last = rows(folder, "eval")[-1]["test"]
    expected = scoring.mean(last[lang]["rougeL"] for lang in ("de", "ru"))
    assert f"{expected:.1f} ± 0.0" in finished.stdout


def test_the_headline_is_the_mean_over_tasks_of_seeds_that_have_them_all():
    def row(task, reg, seed, english, rouge):
        scores = dict(rougeL=rouge, wrong_language=english, source_language=english, mixed=0.,
                      loops=0.)
        run = dict(task=task, train=["en"], reg=reg, reg_floor=0.3, freeze=[], mix=[], seed=seed)
        return run, dict(test={"en": scores, "de": scores}, xlrs={"de": 0.5},
                         xlrs_mismatched={"de": 0.4})

    rows = [row("title", 0, 1, 40., 50.), row("summary", 0, 1, 20., 70.),
            row("title", 0.1, 1, 6., 60.), row("summary", 0.1, 1, 0., 72.),
            row("title", 0.1, 2, 99., 1.)]  # a seed without summaries
    seeds, english, share, wrong, rouge, *_ = scoring.headline(rows, "--reg 0.1")
    assert seeds == 1 and english == "-90 %" and share == wrong == "30.0 -> 3.0 (-27.0)"
    assert rouge == "60.0 -> 66.0 (6.0)"


def write_run(folder, languages=("en", "de", "ru")):
    """Write a run folder of two checkpoints, as far as select.py and --compare read it."""
    scores = {"rougeL": 12.5, "wrong_language": 3.0, "source_language": 2.0, "mixed": 1.0,
              "loops": 0.0, "n": 8}
    measured = {"xlrs": {"de": 0.5}, "xlrs_mismatched": {"de": 0.1}, "dev_loss": 2.5,
                "test": dict.fromkeys(languages, scores)}
    lines = [{"kind": "train", "step": 1, "xlrs": None}, *(
        {"kind": "eval", "step": step, **measured} for step in (0, 2, 4))]
    folder.mkdir(exist_ok=True)
    args = vars(train.parse_args(["--test", *languages]))
    (folder / "args.json").write_text(json.dumps({"arguments": args}))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "selected.json").write_text('{"step": 4}')
    return folder


@pytest.mark.parametrize("name, old, new, words", [
    ("args.json", "{", "[" * 5000, ["args.json", "expected JSON"]),
    ("args.json", '{"arguments": ', '{"x": ', ["args.json", "arguments"]),
    ("args.json", '{"arguments": ', '{"arguments": 5, "x": ', ["args.json", "arguments", "5"]),
    ("args.json", '"train": ["en"]', '"train": [3]', ["args.json", "arguments.train.0", "3"]),
    ("args.json", '"train": ["en"]', '"train": []', ["args.json", "arguments.train"]),
    ("args.json", '"test": ["en"', '"test": ["e\\nn"', ["args.json", "arguments.test.0"]),
    ("args.json", '"eval_size": 100', '"eval_size": "100"', ["args.json", "eval_size", "'100'"]),
    ("log.jsonl", "kind", "k\udcff", ["log.jsonl:1", "expected JSON"]),
    ("log.jsonl", '"step": 2', '"step": "2"', ["log.jsonl:3", "as step", "'2'"]),
    ("log.jsonl", '"step": 2', '"step": -2', ["log.jsonl:3", "as step", "-2"]),
    ("log.jsonl", '{"de": 0.5}', "0.5", ["log.jsonl:2", "an object as xlrs", "0.5"]),
    ("log.jsonl", '{"de": 0.5}', '{"d\\ne": 0.5}', ["log.jsonl:2", "name in xlrs"]),
    ("log.jsonl", '"rougeL": 12.5', '"rougeL": null', ["log.jsonl:2", "test.en.rougeL", "None"]),
    ("log.jsonl", '"rougeL": 12.5', '"rougeL": 1' + "0" * 400, ["log.jsonl:2", "test.en.rougeL"]),
    ("log.jsonl", '"xlrs": {"de": 0.5}', '"xlrs": {}', ["finite 'xlrs'"])])
def test_a_damaged_run_is_refused_with_file_and_line_and_left_as_it_was(tmp_path, capsys, name, old,
                                                                        new, words):
    folder = write_run(tmp_path / "run")
    content = (folder / name).read_text()
    assert old in content
    (folder / name).write_text(content.replace(old, new), errors="surrogateescape")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for main, arguments in ((selecting().main, [str(folder)]),
                            (scoring.main, ["--compare", str(folder)])):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1, error
        assert str(folder) in error and all(word in error for word in words), error
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("content", [
    b"", b"[]", b"5", b"{}", b"[" * 5000, b"\xff", b'[{"task": "title"}]', b'[{"lr": []}]'])
def test_what_compare_did_not_write_is_refused_in_one_line(tmp_path, content, capsys):
    path = tmp_path / "runs.json"
    path.write_bytes(content)
    code, error = run_main(capsys, "--compare", path, "--out", tmp_path / "out.json")
    assert code == 2 and str(path) in error and error.count("\n") == 1, error
    assert not (tmp_path / "out.json").exists()


def test_a_damaged_choice_of_checkpoint_is_refused_in_one_line(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    for content in ('{"step": "4"}', '{"step": 4.5}', '{"step": null}', '{"step": []}', "[4]", "{"):
        (folder / "selected.json").write_text(content)
        code, error = run_main(capsys, folder, "--device", "cpu")
        assert code == 2 and "selected.json" in error and error.count("\n") == 1, error


def test_runs_that_were_tested_in_different_languages_can_be_compared(tmp_path, capsys):
    write_run(tmp_path / "one", ("en", "de"))
    write_run(tmp_path / "two", ("en", "fr"))
    scoring.main(["--compare", str(tmp_path / "one"), str(tmp_path / "two")])
    assert "de ROUGE-L" in capsys.readouterr().out


def selecting():
    """Return select.py as a module; under its own name an import would get Python's `select`."""
    spec = importlib.util.spec_from_file_location("selecting", ours("select.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_runs_are_drawn_from_folders_and_from_what_compare_wrote(tmp_path, capsys, monkeypatch):
    folder, drawn = str(write_run(tmp_path / "run")), str(tmp_path / "runs.svg")
    scoring.main(["--compare", folder, "--out", str(tmp_path / "runs.json")])
    for run in (folder, str(tmp_path / "runs.json")):
        selecting().main([run, "--plot", drawn])
        assert drawn in capsys.readouterr().out
        assert "<svg" in Path(drawn).read_text()
        os.remove(drawn)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    with pytest.raises(SystemExit) as stop:
        selecting().main([folder, "--plot", drawn])
    assert stop.value.code == 2 and "pip install matplotlib" in capsys.readouterr().err


def test_an_interval_is_students():
    assert scoring.interval([1.0, 2.0, 3.0]) == "2.0 ± 2.5"  # 4.30 * 1 / sqrt(3)
    assert scoring.interval([5.0]) == "5.0"


def test_a_loop_is_three_tokens_that_come_again():
    assert scoring.loops("and the hat and the hat and the hat")
    assert not scoring.loops("and the hat and the bag") and not scoring.loops("")


# Runs that die -----------------------------------------------------------------------------------


def same_weights(one, other, step=6):
    """Assert that two runs wrote the same bytes into every weight."""
    one, other = (mt5.read_checkpoint(path / f"step_{step:06d}.pt")["model"]
                  for path in (one, other))
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def log_grows(folder, process, rows):
    """Wait until a run's log has so many rows or its process has ended."""
    log = folder / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= rows):
        time.sleep(0.01)


def test_a_run_killed_again_and_again_ends_with_the_bytes_of_an_unbroken_one(small_run, tmp_path):
    folder, _ = small_run
    command = [sys.executable, ours("train.py"), "--reg", "0.1", *map(str, SMALL), "--out",
               str(tmp_path / "run"), "--resume"]
    for rows_before in (1, 4, 6):
        process = subprocess.Popen(command, cwd=HERE, stderr=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL)
        log_grows(tmp_path / "run", process, rows_before)
        process.kill()
        process.wait()
    finished = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    same_weights(folder, tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run", "train")] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows(tmp_path / "run", "eval")] == [0, 2, 4, 6]
    assert not list((tmp_path / "run").glob(".*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_last_finished_step(small_run, tmp_path, monkeypatch, capsys, number):
    folder, _ = small_run
    schedule = train.schedule

    def interrupted(step, args):
        if step == 4:
            os.kill(os.getpid(), number)
        return schedule(step, args)

    words = ["--reg", "0.1", *map(str, SMALL), "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(train, "schedule", interrupted)
        train.main(words)
    assert stopped.value.code == 130
    assert "--resume" in capsys.readouterr().err.splitlines()[-1]
    assert read_checkpoint(tmp_path / "run" / "step_000003.pt")["step"] == 3
    train.main([*words, "--resume"])
    same_weights(folder, tmp_path / "run")


def test_a_signal_waits_for_the_end_of_an_update():
    finished = False
    with pytest.raises(KeyboardInterrupt):
        with train.undisturbed():
            os.kill(os.getpid(), signal.SIGINT)
            finished = True
    assert finished


def test_a_foreign_checkpoint_in_the_folder_is_named_when_a_run_goes_on(small_run, tmp_path):
    folder, _ = small_run
    for name in ("args.json", "log.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "step_000004.pt").write_bytes(train.TOY_BASE.read_bytes())
    fails_in_one_line(script("train.py", "--reg", 0.1, *SMALL, "--out", tmp_path, "--resume"),
                      "step_000004.pt", "remove it")


def test_numbers_that_are_not_finite_stop_the_run_before_they_reach_the_weights(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main([*map(str, SMALL), "--lr", "1e30", "--out", str(tmp_path / "run")])
    line = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and "step 2: expected finite numbers" in line
    assert "learning rate 1e+30" in line and "nonfinite.jsonl" in line
    texts = [json.loads(text) for text in open(tmp_path / "run" / "nonfinite.jsonl")]
    assert len(texts) == 8 and "In the end" in texts[0]["target"]
    assert (tmp_path / "run" / "step_000000.pt").exists()


def test_a_full_disk_gives_one_line_and_keeps_the_last_checkpoint(tmp_path):
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10**7, 10**7)); " \
              "import train; train.main(sys.argv[1:])"  # a checkpoint with AdamW's state is larger
    finished = script("-c", limited, *SMALL, "--out", tmp_path / "run")
    fails_in_one_line(finished, "step_000002.pt: could not be written", "make room")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"args.json", "log.jsonl", "step_000000.pt"}
    read_checkpoint(tmp_path / "run" / "step_000000.pt")


def torchrun(*words, **settings):
    """Return the process of `torchrun … train.py WORDS…`, started on two processes."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         ours("train.py"), "--reg", "0.1", *map(str, SMALL), *map(str, words)], cwd=HERE, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, **settings)


def test_two_processes_learn_as_one_and_one_goes_on_where_two_stopped(small_run, tmp_path):
    folder, _ = small_run
    process = torchrun("--out", tmp_path / "two")
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert printed.count("mean but en") == 1  # one process reports
    for one, two in zip(rows(folder, "train"), rows(tmp_path / "two", "train"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert two["xlrs"] == pytest.approx(one["xlrs"], abs=1e-4)
    for path in (tmp_path / "two").glob("step_00000[46].pt"):
        path.unlink()
    finished = script("train.py", "--reg", 0.1, *SMALL, "--out", tmp_path / "two", "--resume")
    assert finished.returncode == 0, finished.stderr
    assert rows(tmp_path / "two", "train")[-1]["loss"] == pytest.approx(
        rows(folder, "train")[-1]["loss"], rel=1e-3)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a process by /proc")
def test_a_process_that_dies_ends_the_others_and_the_run_can_go_on(tmp_path):
    process = torchrun("--steps", 500, "--out", tmp_path / "run")
    log_grows(tmp_path / "run", process, 5)
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
            if str(tmp_path / "run").encode() in words and b"RANK=1" in environment:
                os.kill(int(folder.name), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and (tmp_path / "run").exists(), errors
    assert any(line.startswith("train.py: ") and "--resume" in line
               for line in errors.splitlines()), errors
    steps = [row["step"] for row in rows(tmp_path / "run", "train")]
    assert read_checkpoint(sorted((tmp_path / "run").glob("step_*.pt"))[-1])["step"] == steps[-1]


def test_what_the_processes_cannot_divide_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="--reg-batch that 3 divides"):
        train.join(torch.device("cpu"), argparse.Namespace(batch_size=8, reg_batch=8))


# Damaged files of every kind ----------------------------------------------------------------------

INSERTED = [b"\0", b"\xff", b"\xed\xa0\x80", b"\n", b"\t", b",", b'"', b"{", b"]", b"[" * 2000,
            b"null", b"NaN", b"-1", b"1e999", b"9" * 400, b"9" * 5000, b"\\ud800", b"\\n",
            b"x" * 10**5, b"\xff\xff\xff\x7f", b"cos\nsystem\n(S'touch harm'\ntR"]


def damaged(raw, rng):
    """Return raw with bytes changed, cut off, taken out, put in or repeated in a few places."""
    raw = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 5])):
        start = rng.randrange(len(raw) + 1)
        end = min(len(raw), start + rng.choice([1, 4, 100, len(raw)]))
        raw[start:end] = rng.choice([
            b"", raw[start:end] * 2, rng.choice(INSERTED) + raw[start:end],
            rng.randbytes(1) + raw[start + 1:end]])
    return bytes(raw)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory, pieces):
    """A folder with a small valid file of each kind; {name: the function that reads it}."""
    folder = write_run(tmp_path_factory.mktemp("seeds"))
    config = MT5Config(vocab_size=500, d_model=8, d_kv=4, d_ff=8, num_layers=1,
                       num_decoder_layers=1, num_heads=2)
    model = MT5(config)
    save(folder / "x.pt", model, Tokenizer(pieces))
    names = mt5.published_names(config)
    hub = {theirs: model.state_dict()[ours] for ours, theirs in names.items()}
    torch.save(hub, folder / "new.bin")
    torch.save(hub, folder / "old.bin", _use_new_zipfile_serialization=False)
    with open(folder / "x.safetensors", "wb") as file:
        mt5.write_safetensors(hub, file)
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    (folder / "spiece.model").write_bytes(pieces)
    (folder / "runs.json").write_text(json.dumps([scoring.summarise(folder)]))
    (folder / "newstest2019-ref.deu.txt").write_text("ab ab\n")
    (folder / "a.jsonl").write_text('{"source": "a\\u0301", "target": "b"}\n' * 3)
    (folder / "a.tsv").write_text('source\ttarget\n"a, ""a"""\tb\n' * 2)
    (folder / "a.csv").write_text('source,target\n"a\n""a""",b\n' * 2)
    scoring.train_lid(folder, folder / "table.bin")
    return folder, {
        **dict.fromkeys(["a.jsonl", "a.tsv", "a.csv"], data.read_pairs),
        "newstest2019-ref.deu.txt": data.read_lines,
        "runs.json": lambda path: scoring.compare([path]),
        "args.json": lambda path: data.read_arguments(path.parent),
        "selected.json": lambda path: data.parse(path.read_bytes(), path, {"step": data.NUMBER}),
        "log.jsonl": lambda path: data.read_log(path.parent),
        "config.json": lambda path: mt5.infer_config(
            data.parse(path.read_bytes(), path), hub, path.parent),
        "spiece.model": lambda path: mt5.read_tokenizer(path, config).encode("ab ก ﬁ\0"),
        "x.pt": load, "new.bin": mt5.read_pickle, "old.bin": mt5.read_pickle,
        "x.safetensors": mt5.read_safetensors, "table.bin": scoring.read_table}


@pytest.mark.parametrize("name", [
    "a.jsonl", "a.tsv", "a.csv", "newstest2019-ref.deu.txt", "args.json", "log.jsonl",
    "selected.json", "runs.json", "config.json", "spiece.model", "x.pt", "new.bin", "old.bin",
    "x.safetensors", "table.bin"])
def test_damaged_bytes_are_read_or_refused_in_one_line_with_the_files_name(tmp_path, seeds, name):
    folder, readers = seeds
    good, rng, path = (folder / name).read_bytes(), random.Random(name), tmp_path / name
    path.write_bytes(good)
    readers[name](path)
    for _ in range(200):
        path.write_bytes(damaged(good, rng))
        try:
            readers[name](path)
        except (ValueError, OSError) as error:
            assert len(str(error).splitlines()) == 1 and str(tmp_path) in str(error), str(error)
    assert [file.name for file in tmp_path.iterdir()] == [name] and not Path("harm").exists()


# Figures: python test_xlrs.py --bench -------------------------------------------------------------
# The arguments of a bench_… are flags; those without a default are data that is not in here.


def show(figure, ours, theirs=None):
    """Print a line: figure, our number, theirs, theirs / ours (above 1: ours is the smaller)."""
    beside = "" if theirs is None else f"{theirs:11.4g}{theirs / ours if ours else math.nan:13.2f}"
    print(f"{figure:64}{ours:11.4g}{beside}", flush=True)


def alternate(functions, repeats):
    """Return the median seconds of each function, called in turn after a round to warm up."""
    rounds = [[timeit.timeit(f, number=1) for f in functions] for _ in range(repeats + 1)]
    return [statistics.median(seconds) for seconds in zip(*rounds[1:])]


def peak_memory():
    """Return this process's peak, GB (Linux; getrusage would count its parent's as well)."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def peak_of(code):
    """Return the peak memory, GB, of a process of its own that runs code with this file's names."""
    finished = script("-c", f"from test_xlrs import *; {code}; print(peak_memory())")
    finished.check_returncode()
    return float(finished.stdout.split()[-1])


def rivals(config=SIZES["small"]):
    """Return (our model, transformers') with the same random weights, in the same memory."""
    weights = hub_weights(config)
    ours = mt5.build(config, {name: weights[published] for name, published
                              in mt5.published_names(config).items()})
    with torch.device("meta"):
        theirs = transformers.MT5ForConditionalGeneration(transformers.MT5Config(**asdict(config)))
    theirs.lm_head.weight = torch.nn.Parameter(weights["lm_head.weight"])  # untied
    theirs.load_state_dict(weights, assign=True)
    theirs.encoder.embed_tokens = theirs.decoder.embed_tokens = theirs.shared
    return ours, theirs.eval()


def step_of(model, update=False, low=False, pairs=8):
    """Return a training step of either model: ragged pairs, up to 128 source, 32 target tokens.

    It returns its loss. update: with AdamW's update; low: in bf16 autocast.
    """
    ids, mask, labels = batch(model.config.vocab_size, pairs, 128, 32, shortest=1 / 4)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True) if update else None
    model.train()

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = (model(ids, mask, labels) if isinstance(model, MT5) else
                    model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss)
        loss.backward()
        if update:
            optimizer.step()
        model.zero_grad()
        return loss.item()
    return step


def outputs_of(model, ids, mask, longest, beams):
    """Return the generated ids of either model, (B, longest), PAD after EOS."""
    found = (model.generate(ids, mask, longest, beams) if isinstance(model, MT5) else
             model.generate(input_ids=ids, attention_mask=mask.long(), max_new_tokens=longest,
                            num_beams=beams, do_sample=False)[:, 1:])
    ended = (found == EOS).cumsum(1) - (found == EOS).long() > 0
    return torch.nn.functional.pad(found.masked_fill(ended, PAD), (0, longest - found.shape[1]))


@torch.no_grad()
def bench_parity():
    """The largest relative differences to transformers; errors of bf16; padding's effect."""
    for name, shape in SHAPES.items():
        config = SIZES["small"] if name == "mT5-small" else MT5Config(vocab_size=2000, **shape)
        ours, theirs = rivals(config)
        ids, mask, labels = batch(config.vocab_size, 4, 128, 32)
        real = labels != IGNORE
        inputs = dict(input_ids=ids, attention_mask=mask.long(), labels=labels)
        found, expected = ours.logits(ids, mask, labels)[real], theirs(**inputs)
        exact, loss = expected.logits[real], expected.loss.item()
        show(f"{name}: logits", relative(found, exact))
        show(f"{name}: loss", abs(ours(ids, mask, labels).item() / loss - 1))
        wide = ours.encode(*(torch.nn.functional.pad(x, (17, 5)) for x in (ids, mask)))
        show(f"{name}: states in a wider batch", relative(wide[:, 17:-5], ours.encode(ids, mask)))
        with torch.autocast("cpu", torch.bfloat16):
            low = [ours.logits(ids, mask, labels)[real], theirs(**inputs).logits[real]]
        show(f"{name}: logits in bf16, root mean square", *(
            ((x.float() - exact).square().mean() / exact.square().mean()).sqrt() for x in low))


def bench_step(repeats):
    """Seconds and peak memory of a training step of mT5-small."""
    show("training step, s", *alternate([step_of(model) for model in rivals()], repeats))
    show("training step, peak GB", *(
        peak_of(f"step = step_of(rivals()[{i}]); step(), step()") for i in (0, 1)))


def bench_bf16(repeats):
    """Seconds and loss of our training step in bf16 autocast, beside float32's."""
    ours, _ = rivals()
    steps = [step_of(ours, low=True), step_of(ours)]
    show("training step in bf16 autocast beside float32, both ours, s", *alternate(steps, repeats))
    ours.eval()
    show("its loss without dropout, bf16 beside float32", *(step() for step in steps))


def bench_scaling(repeats):
    """Seconds of a training step of mT5-small at 1, 2, 4 and 8 times the tokens, beside theirs."""
    ours, theirs = rivals()
    for factor in (1, 2, 4, 8):
        show(f"training step, {factor} x 4 pairs of up to 128 and 32 tokens, s", *alternate(
            [step_of(model, pairs=4 * factor) for model in (ours, theirs)], repeats))


def bench_generate(repeats):
    """Seconds of greedy and 4-beam generation of mT5-small; the outputs that differ."""
    models, (ids, mask, _) = rivals(), batch(250112, 8, 128, 32, shortest=1 / 4)
    for beams in (1, 4):
        ours, theirs = (outputs_of(model, ids, mask, 64, beams) for model in models)
        lengths = (ours != PAD).sum(1).tolist()
        show(f"{beams} beams: outputs that differ, of lengths {min(lengths)} to {max(lengths)}",
             int((ours != theirs).any(1).sum()))
        show(f"{beams} beams: generation, s", *alternate(
            [lambda m=m: outputs_of(m, ids, mask, 64, beams) for m in models], repeats))


FIRST_STEP = """
import time; began = time.time()
import sys, train
def log(self, **row):
    if row["kind"] == "train":
        print(time.time() - began)
        sys.exit()
train.Run.log = log
train.main(sys.argv[1:])
"""


def bench_run(repeats):
    """The whole: seconds to the first step, of scoring 10,000 outputs; memory of a million pairs.

    Before the first step the base is measured, here on one text a language. The outputs are toy
    titles and summaries, a fifth of them English instead of German.
    """
    with tempfile.TemporaryDirectory() as folder:
        def run(*words):
            finished = script(*words, "--out", Path(folder) / str(time.time()))
            finished.check_returncode()
            return finished.stdout
        few = ["--eval-size", 1, "--test-size", 1]
        show("from import to the end of the first step, s", statistics.median(
            float(run("-c", FIRST_STEP, *few).split()[-1]) for _ in range(repeats)))
        show("python train.py --reg 0.1, s", *alternate([lambda: run("train.py", "--reg", 0.1)], 3))
        told = {lang: [" ".join([data.toy_pair(story, lang, task)[1] for task in data.TASKS[:2]])
                       for story in data.stories("dev", 10_000)] for lang in ("de", "en")}
        outputs = [told["en" if i % 5 == 0 else "de"][i] for i in range(10_000)]
        show("ROUGE-L, language, mixing and loops of 10,000 outputs, s", *alternate([
            lambda: scoring.score(outputs, told["de"], "de", "en", scoring.identifier())], repeats))
        path = Path(folder) / "million.jsonl"
        with open(path, "w") as file:
            for i in range(10**6):
                row = {"source": f"{i} {told['de'][i % 10_000]}" * 3, "target": f"{i} in the end"}
                file.write(json.dumps(row) + "\n")
        show("this file's imports alone, peak GB", peak_of("pass"))
        show(f"reading a million pairs, a file of {path.stat().st_size / 1e9:.2f} GB, peak GB",
             peak_of(f"pairs = data.read_pairs({str(path)!r})"))


def bench_convert():
    """Peak memory of converting a hub folder of mT5-small, beside the size of its weights' file."""
    show("this file's imports alone, peak GB", peak_of("pass"))
    with tempfile.TemporaryDirectory() as folder:
        few = data.train_tokenizer(TEXTS * 20, 480).model
        for form in FORMS[:2]:
            source = hub_folder(Path(folder) / form, few, SIZES["small"], form)
            peak = peak_of(f"convert({str(source)!r}, {str(Path(folder) / 'x.pt')!r})")
            show(f"converting {form}, peak GB (theirs: the file)", peak,
                 (source / form).stat().st_size / 1e9)


def bench_trim(repeats, pieces, ntrex):
    """mT5-small, whole and trimmed to ten languages, beside transformers': sizes, step, peak."""
    codes = "src.eng ref.deu ref.fra ref.spa ref.ita ref.por ref.nld ref.pol ref.tur ref.zho-CN"
    texts = [Path(ntrex) / f"newstest2019-{code}.txt" for code in codes.split()]
    with tempfile.TemporaryDirectory() as folder:
        source = hub_folder(Path(folder) / "hub", Path(pieces).read_bytes(), SIZES["small"])
        files = [Path(folder) / "whole.pt", Path(folder) / "trimmed.pt"]
        for file, trim in zip(files, ([], texts)):
            convert(source, file, trim)
        peaks = [peak_of(f"step = step_of({model}, update=True); step(), step()") for model in (
            *(f"load({str(file)!r})[0]" for file in files), "rivals()[1]")]
        models = [*(load(file)[0] for file in files), rivals()[1]]
        times = alternate([step_of(model, update=True) for model in models], repeats)
        counts = [sum(p.numel() for p in model.parameters()) / 1e6 for model in models]
        for i, file in enumerate(files):
            show(f"{file.stem}: million parameters", counts[i], counts[2])
            show(f"{file.stem}: training step with AdamW, s", times[i], times[2])
            show(f"{file.stem}: training step with AdamW, peak GB", peaks[i], peaks[2])


def bench_tokenizer(pieces, ntrex):
    """Lines of NTREX whose ids, of mT5's real pieces, differ from those of transformers."""
    ours, found = Tokenizer(Path(pieces).read_bytes()), collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        save(f"{folder}/x.pt", MT5(MT5Config(vocab_size=len(ours), **TINY)), ours)
        export(f"{folder}/x.pt", f"{folder}/hub")
        theirs = transformers.AutoTokenizer.from_pretrained(f"{folder}/hub")
    for path in Path(ntrex).glob("newstest2019-*.txt"):
        for line in data.read_lines(path)[:100]:
            ids = ours.encode(line)
            found[any(map(ours.pieces.is_byte, ids)), ids == theirs(line).input_ids] += 1
    show(f"lines that differ, of {found[False, True] + found[False, False]:,}", found[False, False])
    show("others, with bytes where transformers has <unk>", found[True, True] + found[True, False])


def bench_rouge(repeats, ntrex):
    """Seconds of 2,000 pairs of up to 60 tokens beside rouge_score; difference; large inputs."""
    from rouge_score.rouge_scorer import RougeScorer
    text = " ".join(data.read_lines(Path(ntrex) / "newstest2019-src.eng.txt"))
    words, rng = text.encode("ascii", "ignore").decode().split(), random.Random(0)
    a, b = ([" ".join(words[i:i + rng.randint(1, 60)]) for i in rng.choices(
        range(len(words) - 60), k=2000)] for _ in range(2))
    scorer = RougeScorer(["rougeL"])
    theirs = lambda: [scorer.score(y, x)["rougeL"].fmeasure for x, y in zip(a, b)]  # noqa: E731
    show("ROUGE-L, 2,000 pairs, s", *alternate([lambda: scoring.rouge_l(a, b), theirs], repeats))
    show("the largest difference", (scoring.rouge_l(a, b) - torch.tensor(theirs())).abs().max())
    before = peak_memory()
    show("ROUGE-L, 100,000 pairs, s", *alternate([lambda: scoring.rouge_l(a * 50, b * 50)], 1))
    long = [" ".join(words[:5000])], [" ".join(words[20_000:25_000])]
    show("ROUGE-L, a pair of 5,000 words, s", *alternate([lambda: scoring.rouge_l(*long)], repeats))
    show("peak memory grew by, GB", peak_memory() - before)


def read_texts(folder):
    """Return {language: sentences and questions} of XQuAD's files or a folder of CODE.txt."""
    found = {path.stem: data.read_lines(path) for path in Path(folder).glob("*.txt")
             if path.stem in scoring.LANGUAGES.values()}
    for path in Path(folder).glob("xquad.*.json"):
        found[path.suffixes[0][1:]] = [
            sentence for article in json.loads(path.read_text("utf-8-sig"))["data"]
            for p in article["paragraphs"]
            for text in (p["context"], *(question["question"] for question in p["qas"]))
            for sentence in re.split(r"(?<=[.!?।])\s+|(?<=。)", text.replace("\n", " "))
            if len(sentence) > 15]
    return found


def with_pairs(texts):
    """Return {kind: {language: texts}}: the sentences, and pairs of words, 6 letters or more.

    Where a language has no spaces a pair is 4 characters.
    """
    def pairs_of(sentence):
        words = sentence.split()
        found = ([f"{a} {b}" for a, b in zip(words[::2], words[1::2])] if len(words) > 2 else
                 [sentence[i:i + 4] for i in range(0, len(sentence) - 3, 8)])
        return [x for x in found if sum(map(str.isalpha, x)) >= (6 if " " in x else 2)]
    return {"sentences": texts, "word pairs": {
        language: sorted({pair for sentence in side for pair in pairs_of(sentence)})
        for language, side in texts.items()}}


def accuracy(predict, texts):
    """Return (macro % right of 200 texts a language, [(share, true, answered)] from the worst)."""
    wrong, right = [], []
    for language, side in texts.items():
        side = random.Random(2).sample(side, min(200, len(side)))
        found = collections.Counter(predict(side))
        right.append(100 * found.pop(language, 0) / len(side))
        wrong += [(n / len(side), language, code) for code, n in found.items()]
    return scoring.mean(right), sorted(wrong, reverse=True)


def other_identifiers(fasttext):
    """Return {name: (predict, languages)} of fastText and lingua, where they are at hand."""
    found, ours = {}, set(scoring.LANGUAGES.values())
    try:
        from fasttext import load_model
        label, same = load_model(fasttext).predict, {"no": "nb", "arz": "ar"}
        short = lambda text: label(text)[0][0].removeprefix("__label__")  # noqa: E731
        found["fastText"] = lambda texts: [same.get(x, x) for x in map(short, texts)], ours
    except (ImportError, TypeError, ValueError) as error:
        print(f"fastText is left out; it needs fasttext and --fasttext lid.176.ftz ({error})")
    try:
        from lingua import Language, LanguageDetectorBuilder
        code = lambda x: x.iso_code_639_1.name.lower() if x else "und"  # noqa: E731
        known = [x for x in Language.all() if code(x) in ours]
        detect = LanguageDetectorBuilder.from_languages(*known).build().detect_language_of
        found["lingua"] = lambda texts: list(map(code, map(detect, texts))), set(map(code, known))
    except ImportError as error:
        print(f"lingua is left out ({error})")
    return found


def bench_lid(repeats, texts, fasttext=None):
    """% right (mean of languages) and speed, beside fastText and lingua; the table's size."""
    ours, others = scoring.LanguageIdentifier(), other_identifiers(fasttext)
    codes = set.intersection(set(ours.languages), *(known for _, known in others.values()))
    restricted, texts = functools.partial(ours.predict, candidates=codes), read_texts(texts)
    for kind, side in with_pairs(texts).items():
        show(f"{kind}, {len(side)} languages of {len(ours.languages)}: % right",
             accuracy(ours.predict, side)[0])
        side = {code: side[code] for code in sorted(side.keys() & codes)}
        for name, (predict, _) in others.items():
            show(f"{kind}, {len(side)} languages of {len(codes)}, {name}: % right",
                 *(accuracy(f, side)[0] for f in (restricted, predict)))
    many, threads = [s for side in texts.values() for s in side[:500]], torch.get_num_threads()
    torch.set_num_threads(1)
    for name, (predict, _) in others.items():
        times = alternate([lambda f=f: f(many) for f in (ours.predict, predict)], repeats)
        show(f"one thread, microseconds a sentence, {name}", *(s / len(many) * 1e6 for s in times))
    torch.set_num_threads(threads)
    show(f"table of {len(ours.languages)} languages, MB", scoring.LID.stat().st_size / 1e6)
    show("loading it, s", *alternate([scoring.LanguageIdentifier], repeats))


def bench_lid_unseen(ntrex):
    """Accuracy on NTREX's documents that a table of the other half did not see; confusions."""
    documents, unseen = (Path(ntrex) / "DOCUMENT_IDS.tsv").read_text().split(), {}
    names = sorted(set(documents))
    half = set(random.Random(0).sample(names, len(names) // 2))
    with tempfile.TemporaryDirectory() as folder:
        for path in Path(ntrex).glob("newstest2019-*.txt"):
            lines = list(zip(data.read_lines(path), documents, strict=True))
            language = scoring.LANGUAGES[path.name.split(".")[-2].split("-")[0]]
            unseen.setdefault(language, []).extend(x for x, name in lines if name not in half)
            data.write_file(Path(folder) / path.name,
                            "".join(f"{x}\n" for x, name in lines if name in half))
        scoring.train_lid(folder, Path(folder) / "table.bin")
        identifier = scoring.LanguageIdentifier(Path(folder) / "table.bin")
    for kind, texts in with_pairs(unseen).items():
        right, wrong = accuracy(identifier.predict, texts)
        show(f"NTREX, unseen {kind}, {len(texts)} languages: % right", right)
        print("  as", ", ".join(f"{a}→{b} {share:.0%}" for share, a, b in wrong[:20]))


def bench_mixed(texts):
    """Words of clean text that count as those of another language, in the worst target language."""
    texts = read_texts(texts)
    for source in ("en", "de"):
        share, target = max((100 * scoring.identifier().mixed(x, target, source).mean(), target)
                            for target, x in texts.items())
        show(f"words of {source} in clean text, at most ({target}), %", share)


def main(argv=None):
    benches = {name[6:]: f for name, f in globals().items() if name.startswith("bench_")}
    flags = {name: inspect.signature(f).parameters for name, f in benches.items()}
    needs = {name: [word for word, flag in found.items()
                    if flag.default is flag.empty and word != "repeats"]
             for name, found in flags.items()}
    parser = argparse.ArgumentParser(
        description="Print the project's figures. The tests: python -m pytest.",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog="\n".join(
            f"  {name:11}{f.__doc__.splitlines()[0]}{''.join(f' --{x}' for x in needs[name])}"
            for name, f in benches.items()))
    parser.add_argument("--bench", nargs="*", metavar="NAME", choices=benches, required=True,
                        help="figures to print; no name: all whose data are given")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, of which the median (5)")
    for word, text in {"ntrex": "folder of NTREX-128's newstest2019-*.txt",
                       "pieces": "mT5's spiece.model", "fasttext": "fastText's lid.176.ftz",
                       "texts": "folder of held-out text: xquad.CODE.json or CODE.txt"}.items():
        parser.add_argument(f"--{word}", metavar="PATH", help=text)
    args = parser.parse_args(argv)
    ready = [name for name in benches if all(getattr(args, word) for word in needs[name])]
    for name in set(args.bench) - set(ready):
        parser.error(f"{name} needs {' and '.join(f'--{word}' for word in needs[name])}")
    print(f"{'figure':64}{'ours':>11}{'theirs':>11}{'theirs/ours':>13}")
    for name in args.bench or ready:
        benches[name](**{word: getattr(args, word) for word in flags[name]})


if __name__ == "__main__":
    main()
