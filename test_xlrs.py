"""All tests: `python -m pytest`. Formulas against numbers that can be redone on paper, properties,
parity with the tools in use, and each script as a user starts it.

`XLRS_IMPL=my_folder python -m pytest -k NAME` runs them on a student's files: those of my_folder
stand in for ours of the same name, in imports and as scripts (lab/EXERCISES.md)."""

import os

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}  # before torch; train.py says why

import argparse
import doctest
import functools
import gzip
import io
import itertools
import json
import math
import random
import re
import subprocess
import sys
import time
import unicodedata
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import safetensors.torch
import sentencepiece
import torch
import transformers
from torch.nn import functional as F

HERE = Path(__file__).parent
NAMES = "xlrs.py train.py model.py data.py eval.py select.py pretrain.py answers.py".split()
sys.path.insert(1, str(HERE / "lab"))


def students_files(folder):
    """Return {name: path} of a student's files in folder, after putting them before ours."""
    found = {name: folder / name for name in NAMES if (folder / name).is_file()}
    if not found:
        raise FileNotFoundError(f"XLRS_IMPL={folder}: expected {' or '.join(NAMES)}, found none")
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

import captions
import claims
import identifier
import pretrain

import data
import eval as scoring
import model as mt5
import train
import xlrs
from data import EOS, IGNORE, PAD, Tokenizer
from model import MT5, SIZES, MT5Config, convert, export, load, read_checkpoint, save

for path in THEIRS.values():  # in place of what was asked for, ours would pass every test
    if path.stem in sys.modules and path.name != "select.py":
        assert Path(sys.modules[path.stem].__file__) == path


@pytest.fixture(scope="session", autouse=True)
def whose(pytestconfig):
    """Say once which files are tested in place of ours."""
    if THEIRS:
        capture = pytestconfig.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print("\nXLRS_IMPL:", *THEIRS.values(), "in place of ours")


def script(*words, code=0):
    """Return the finished process of `python WORDS…`, as a user starts it in our folder."""
    words = [str(THEIRS.get(word, word)) for word in words]
    finished = subprocess.run([sys.executable, *words], cwd=HERE, capture_output=True, text=True,
                              timeout=300)
    assert finished.returncode == code, finished.stderr
    return finished


def fails_in_one_line(code, stderr, *parts):
    """Assert that a script stopped as it should for a user's mistake: exit code 2, one line."""
    assert code == 2 and "Traceback" not in stderr, stderr
    line = stderr.strip().splitlines()[-1]
    assert all(part in line for part in parts), line


def refuses(capsys, parts, main, *words):
    """Assert that main(*words) stops the same way in this process, with all parts in its line."""
    with pytest.raises(SystemExit) as stopped:
        main(*words)
    fails_in_one_line(stopped.value.code, capsys.readouterr().err, *parts)


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


def test_pooling_a_sentence_without_a_token_gives_zeros():
    found = xlrs.pool(torch.ones(1, 2, 3), torch.zeros(1, 2, dtype=torch.bool)).tolist()
    assert found == [[0] * 3], f"expected zeros, not a division by no token, found {found}"


@pytest.mark.parametrize("a, b, cosine", [
    ([1., 0.], [1., 1.], 1 / math.sqrt(2)), ([3., 4.], [4., 3.], 24 / 25),
    ([1., 2.], [-2., -4.], -1.), ([1., 0.], [0., 5.], 0.)])
def test_similarity_is_the_cosine(a, b, cosine):
    found = xlrs.similarity(torch.tensor([a]), torch.tensor([b]))
    dot, lengths = sum(x * y for x, y in zip(a, b)), f"{math.hypot(*a):.3f} · {math.hypot(*b):.3f}"
    assert found.tolist() == pytest.approx([cosine], abs=1e-6), (
        f"{a}, {b}: expected {dot:g} / ({lengths}) = {cosine:.3f}, found {found.tolist()}")
    nothing = xlrs.similarity(torch.zeros(1, len(a)), torch.tensor([a])).item()
    assert nothing == 0, f"zeros, a sentence without tokens: expected 0, found {nothing}"
    found = xlrs.similarity(torch.tensor([[a]]), torch.tensor([[b], [b]]))  # as xlrs() calls it
    assert found.shape == (2, 1), f"(1, 1, D) and (2, 1, D): expected (2, 1), found {found.shape}"


def test_the_regulariser_is_the_sum_of_the_languages_xlrs_above_the_floor():
    pooled = torch.tensor([[[1., 0.]], [[1., 0.]], [[0., 1.]]])  # cosines 1 and 0
    for floor, term in ((0, 1), (0.2, 0.6), (0.6, 0), (-1, 3)):
        found = xlrs.regulariser(pooled, floor).item()
        assert found == pytest.approx(term), (
            f"cosines 1 and 0, floor {floor}: expected max(0, (1 - {floor}) + (0 - {floor})) = "
            f"{term}, found {found:.3g}")


def test_the_mean_cosine_of_all_pairs_of_six_has_a_lowest_value():
    corners = torch.eye(6) - 1 / 6  # of a regular simplex: as far apart as six vectors can be
    pairs = itertools.combinations(corners, 2)
    lowest = scoring.mean(xlrs.similarity(a[None], b[None]).item() for a, b in pairs)
    for found in (answer("pairs_of_six", lowest), lowest):
        assert found == pytest.approx(-0.2, abs=1e-4), (
            f"expected -0.2, found {found}: how long is the sum of the six vectors, squared?")


def test_a_step_against_the_regularisers_gradient_lowers_xlrs_in_every_language_to_the_floor():
    pooled = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)) + 1
    pooled.requires_grad_()
    xlrs.regulariser(pooled, -1).backward()
    reached = (pooled.grad.abs().sum(dim=(1, 2)) > 0).tolist()
    assert all(reached), ("XLRS is above the floor: expected a gradient in each language, the "
                          f"source first, found {reached}")
    before, after = (xlrs.xlrs(vectors).mean().item() for vectors in (
        pooled.detach(), pooled.detach() - pooled.grad))
    assert after < before, (
        "loss = … + λ · term is minimised: expected a step against the term's gradient to lower "
        f"XLRS, found it go from {before:.3f} to {after:.3f}; see the term's sign")
    pooled = torch.tensor([[[1., 0.]], [[-1., 0.1]]], requires_grad=True)
    xlrs.regulariser(pooled, 0).backward()
    found = pooled.grad.flatten().tolist()
    assert not any(found), f"cosine -0.995, floor 0: expected no gradient, found {found}"
    with pytest.raises(ValueError, match="at least 2, found 1"):
        xlrs.regulariser(pooled[:1])


def test_the_rule_takes_the_lowest_xlrs_or_development_loss_and_says_what_it_lacks():
    rows = [dict(step=1, xlrs=0.4, dev_loss=0.9), dict(step=2, xlrs=0.1, dev_loss=0.5),
            dict(step=3, xlrs=0.1, dev_loss=0.2)]
    assert xlrs.choose(rows, floor=-1)["step"] == 2  # the earlier of equals
    assert xlrs.choose(rows, by="dev_loss")["step"] == 3, "a loss has no floor"
    assert xlrs.choose(rows, floor=0.5)["step"] == 1, "XLRS below the floor is no merit"
    assert xlrs.choose(rows, floor=0.2)["step"] == 2
    for bad, by, message in (([], "xlrs", "at least one checkpoint"), (rows, "dev", "'dev_loss'"),
                             ([dict(step=7, xlrs=math.nan)], "xlrs", "step 7"),
                             ([dict(step=7, xlrs=0.1)], "dev_loss", "finite 'dev_loss'")):
        with pytest.raises(ValueError, match=message):
            xlrs.choose(bad, by)


def test_the_examples_in_the_docstrings_print_what_they_show():
    found = doctest.testmod(xlrs)
    assert found.failed == 0 and found.attempted >= 8, found


# model.py: parity with transformers, its parts, its checkpoints -----------------------------------
TEXTS = ["The cat sat on the mat.", "Die Katze saß auf der Matte.", "Кошка сидела на ковре.",
         "Le chat était assis sur le tapis.", "猫はマットの上に座った。", "แมวนั่งบนเสื่อ", ""]
TINY = MT5Config(vocab_size=500, d_model=64, d_kv=16, d_ff=96, num_layers=3, num_decoder_layers=1,
                 num_heads=4)
SHAPES = {"width unlike heads": replace(TINY, d_model=96, d_ff=80, num_decoder_layers=3),
          "unequal depth": TINY, "mT5-small": replace(SIZES["small"], vocab_size=500)}


def spread(config):
    """Return a model whose positions, norms and head are such that outputs depend on them."""
    torch.manual_seed(0)
    model = MT5(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "positions" in name:
                weight += torch.randn_like(weight) / (10 if "norm" in name else 1)
        model.head.weight.normal_(std=3 * config.d_model ** -0.5)
        model.head.weight[EOS] *= 2.5  # a likely end: outputs differ in length
    return model.eval()


@pytest.fixture(scope="module", params=SHAPES)
def pair(request):
    """Our model and transformers' with the same weights."""
    ours = spread(SHAPES[request.param])
    theirs = transformers.MT5ForConditionalGeneration(
        transformers.MT5Config(**asdict(ours.config))).eval()
    theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.clone())  # untied
    for name, published in mt5.published_names(ours.config).items():
        theirs.get_parameter(published).data = ours.get_parameter(name).data.clone()
    return ours, theirs


def batch(sentences=5, side="right"):
    """Return ids (…, 37), mask and labels (…, 11) of ragged lengths."""
    generator = torch.Generator().manual_seed(1)
    def ragged(width):
        lengths = torch.randint(2, width + 1, (sentences, 1), generator=generator)
        lengths[0] = width
        ids = torch.randint(3, 400, (sentences, width), generator=generator)
        return ids, torch.arange(width) < lengths
    (ids, mask), (labels, kept) = ragged(37), ragged(11)
    ids = ids.masked_fill(~mask, PAD)
    if side == "left":
        ids, mask = ids.flip(1), mask.flip(1)
    return ids, mask, labels.masked_fill(~kept, IGNORE)


def inputs(ids, mask, labels):
    """Return a batch as transformers wants it."""
    return dict(input_ids=ids, attention_mask=mask.long(), labels=labels)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_loss_and_gradients_equal_those_of_transformers(pair, side):
    ours, theirs = pair
    ids, mask, labels = batch(side=side)
    real, expected = labels != IGNORE, theirs(**inputs(ids, mask, labels))
    with torch.no_grad():
        assert relative(ours.logits(ids, mask, labels)[real], expected.logits[real]) < 2e-5
        states = expected.encoder_last_hidden_state
        assert relative(ours.encode(ids, mask)[mask], states[mask]) < 2e-5
        assert ours(ids, mask, labels).item() == pytest.approx(expected.loss.item(), rel=2e-6)
    (ours(ids, mask, labels) * 2).backward()  # a factor, as the regulariser's λ might be one
    (expected.loss * 2).backward()
    for name, published in mt5.published_names(ours.config).items():
        one, other = ours.get_parameter(name), theirs.get_parameter(published)
        assert relative(one.grad, other.grad) < 2e-5, name
        one.grad = other.grad = None


@pytest.mark.parametrize("beams", [1, 4])
def test_generated_tokens_equal_those_of_transformers(pair, beams):
    ours, theirs = pair
    ids, mask, _ = batch(sentences=8)
    found = ours.generate(ids, mask, 24, beams)
    expected = theirs.generate(input_ids=ids, attention_mask=mask.long(), max_new_tokens=24,
                               num_beams=beams, do_sample=False)[:, 1:]
    ended = (expected == EOS).cumsum(1) - (expected == EOS).long() > 0
    expected = expected.masked_fill(ended, PAD)  # its beam search fills up with </s>
    found, expected = (F.pad(x, (0, 24 - x.shape[1])) for x in (found, expected))
    differ = [f"sentence {row}: expected {y}, found {x}" for row, (x, y) in enumerate(
        zip(found.tolist(), expected.tolist())) if x != y]
    assert not differ, f"{len(differ)} differ; ids, {PAD} after the end {EOS}, of {differ[0]}"
    assert len(set((found != PAD).sum(1).tolist())) > 1, "the lengths should differ"


def test_ended_sentences_leave_by_quarters_and_the_source_stays_aligned(pair, monkeypatch):
    ours, copied, strides = pair[0], [], []
    rows_of, forward = mt5.rows_of, ours.decoder.forward
    monkeypatch.setattr(mt5, "rows_of", lambda past, rows: copied.append(
        len(rows) / len(past[0][0])) or rows_of(past, rows))
    monkeypatch.setattr(ours.decoder, "forward", lambda x, source, past: strides.append(
        source[1].stride()[0]) or forward(x, source, past))
    ours.generate(*batch(sentences=32)[:2], 60)
    assert copied and max(copied) <= 3 / 4, "copied for less than a quarter"
    assert set(strides) == {40}, "37 numbers a sentence, in rows of a multiple of eight"


@pytest.mark.parametrize("left, right", [(0, 9), (9, 0), (4, 70)])
def test_padding_changes_neither_states_nor_loss_nor_outputs(pair, left, right):
    ours, _ = pair
    ids, mask, labels = batch(sentences=1)
    wide, wide_mask = (F.pad(x, (left, right)) for x in (ids, mask))
    with torch.no_grad():
        found = ours.encode(wide, wide_mask)[:, left:left + ids.shape[1]]
        assert relative(found, ours.encode(ids, mask)) < 1e-5
        found = ours(wide, wide_mask, F.pad(labels, (0, right), value=IGNORE)).item()
        assert found == pytest.approx(ours(ids, mask, labels).item(), rel=1e-6)
        assert ours.encode(ids, torch.zeros_like(mask)).isfinite().all(), "nothing but padding"
    for beams in (1, 4):
        assert torch.equal(ours.generate(wide, wide_mask, 20, beams),
                           ours.generate(ids, mask, 20, beams))


def test_bf16_is_as_close_to_float32_as_in_transformers(pair):
    ours, theirs = pair
    ids, mask, labels = batch(sentences=16)
    real = labels != IGNORE
    with torch.no_grad():
        exact = theirs(**inputs(ids, mask, labels)).logits[real]
        with torch.autocast("cpu", torch.bfloat16):
            found = ours.logits(ids, mask, labels)[real]
            expected = theirs(**inputs(ids, mask, labels)).logits[real]
            loss = ours(ids, mask, labels)
    def error(logits):
        return (logits.float() - exact).square().mean().sqrt().item()
    assert error(found) < 1.05 * error(expected)
    assert loss.item() == pytest.approx(ours(ids, mask, labels).item(), rel=2e-3)
    assert loss != loss.bfloat16(), "a loss without gradient should not be rounded"


@pytest.mark.parametrize("both_ways, distances, expected", [
    # By hand. Both ways: 16 a side, 8 exact, then 8 + floor(8 · ln(d / 8) / ln(128 / 8)).
    (True, [0, -1, -7, -8, -11, -12, -31, -32, -63, -64, -127, -128, 1, 7, 16, 64, 91],
     [0, 1, 7, 8, 8, 9, 11, 12, 13, 14, 15, 15, 17, 23, 26, 30, 31]),
    (False, [5, 1, 0, -1, -15, -16, -18, -19, -31, -32, -113, -999],  # all 32 behind: 16 exact
     [0, 0, 0, 1, 15, 16, 16, 17, 21, 21, 31, 31])])
def test_buckets_equal_a_table_by_hand_and_those_of_transformers(both_ways, distances, expected):
    theirs = transformers.models.mt5.modeling_mt5.MT5Attention._relative_position_bucket
    expected = expected + theirs(torch.arange(-600, 601), both_ways, 32, 128).tolist()
    distances = [*distances, *range(-600, 601)]
    found = mt5.bucket(torch.tensor(distances), both_ways).tolist()
    differ = [f"distance {distance}: expected {right}, found {wrong}"
              for distance, right, wrong in zip(distances, expected, found) if right != wrong]
    assert not differ, f"both ways: {both_ways}, {len(differ)} differ: {'; '.join(differ[:8])}"


@pytest.mark.parametrize("low, tolerance", [(False, 1e-5), (True, 0.02)])
def test_the_loss_in_parts_has_the_plain_ones_gradient_and_dropout_its_seed(low, tolerance):
    torch.manual_seed(0)
    model, losses = MT5(TINY).eval(), []
    ids, mask, labels = batch(sentences=64)  # more than one part of 256
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        found = model(ids, mask, labels)
        logits = model.logits(ids, mask, labels).float()
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert found.dtype == torch.float32
    found, expected = ([loss, *torch.autograd.grad(3 * loss, list(model.parameters()))]
                       for loss in (found, expected))
    for a, b in zip(found, expected):
        assert (a - b).norm() <= tolerance * b.norm()
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model.train()(ids, mask, labels).item())
    assert losses[0] == losses[1] != losses[2]


def test_each_weight_starts_at_mesh_tensorflows_scale_and_the_sizes_are_as_published():
    torch.manual_seed(0)
    model = MT5(MT5Config(vocab_size=500, d_model=96, d_kv=16, d_ff=200, num_heads=4))
    std = {"embedding": 1, "q": (96 * 16) ** -0.5, "o": 64 ** -0.5, "down": 200 ** -0.5}
    for name, weight in model.named_parameters():
        name = name.split(".")[-2]
        expected = 0 if "norm" in name else std.get(name, 96 ** -0.5)
        tolerance = 0.35 if name == "positions" else 0.06  # few numbers, many numbers
        assert weight.std().item() == pytest.approx(expected, rel=tolerance)
    with torch.device("meta"):
        found = [sum(map(torch.numel, MT5(size).parameters())) for size in SIZES.values()]
    assert found == [300_176_768, 582_401_280, 1_229_581_312, 3_742_619_648, 12_921_057_280]


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


@pytest.fixture
def saved(tmp_path, pieces):
    """The path of a checkpoint and the model in it."""
    model = MT5(TINY)
    save(tmp_path / "x.pt", model, Tokenizer(pieces), args={"lr": 1e-3, "test": ["de", None]})
    return tmp_path / "x.pt", model


def test_a_checkpoint_returns_what_was_saved_and_a_loaded_model_learns_without_changing_it(saved):
    path, model = saved
    before, (loaded, tokenizer) = path.read_bytes(), load(path)
    assert read_checkpoint(path)["args"] == {"lr": 1e-3, "test": ["de", None]}
    assert not loaded.training and loaded.config == model.config
    assert all(torch.equal(a, b) and b.requires_grad
               for a, b in zip(model.parameters(), loaded.parameters()))
    with torch.no_grad():
        loaded.head.weight.add_(1)
    assert path.read_bytes() == before
    save(path, loaded, tokenizer)  # onto the file it came from
    assert torch.equal(load(path)[0].head.weight, loaded.head.weight)


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("harm"),)


@pytest.mark.parametrize("damage, words", [
    ({"x": Harmful()}, "UnpicklingError"), ({"format": "xlrs-mt5 99"}, "'xlrs-mt5 99'"),
    ({"config": {"depth": 3}}, "depth"), (None, "convert")])  # None: half of the file
def test_another_file_than_a_checkpoint_is_refused_in_one_line(saved, capsys, damage, words):
    path, _ = saved
    if damage:
        torch.save(torch.load(path, weights_only=True) | damage, path)
    else:
        path.write_bytes(path.read_bytes()[:9999])
    refuses(capsys, ["model.py: ", str(path), words], mt5.main,
            ["export", str(path), str(path.parent / "hub")])
    assert not Path("harm").exists()


# data.py ------------------------------------------------------------------------------------------
def test_every_story_can_be_told_in_every_language_without_a_slot_left_over():
    for story in data.stories("dev", 300, seed=5):
        for language in data.TOY_LANGUAGES:
            told = data.tell(story, language)
            assert len(told["story"]) == 3 and all(len(told[task]) >= 3 for task in data.TASKS)
            for text in itertools.chain(*told.values()):
                assert not set("{}|?[]") & set(text) and "  " not in text, text
                assert text[0].upper() == text[0]


def test_a_story_reads_as_it_should_in_german_and_russian():
    hero = next(i for i, entry in enumerate(data.world("en")["hero"]) if entry[""] == "Anna")
    story = dict(hero=hero, object=1, helper=0, place=0, day=0, link=1, plot="broken", helped=False,
                 n=3, opening="opening_1")
    german, russian = data.tell(story, "de"), data.tell(story, "ru")
    assert german["title"][0] == "Anna und die kaputte Lampe"
    assert " ".join(german["story"]) == (
        "Am Montag war Anna im Park. Plötzlich beschädigte sie die Lampe. "
        "Ihr Bruder arbeitete 3 Stunden lang, konnte sie aber nicht reparieren.")
    assert russian["story"][2] == "Брат работал 3 часа, но не смог её починить."
    assert data.tell(story | {"n": 7}, "ru")["story"][2].startswith("Брат работал 7 часов")
    assert russian["completion"][0] == "В конце концов Анна заплакала и пошла домой с братом."


@pytest.mark.parametrize("task", data.TASKS)
def test_a_story_draws_one_of_its_right_answers_the_same_in_each_language(task):
    drawn = []
    for story in data.stories("dev", 100):
        places = {data.tell(story, language)[task].index(data.toy_pair(story, language, task)[1])
                  for language in data.TOY_LANGUAGES}
        assert len(places) == 1
        drawn += places
    assert len(set(drawn)) >= 4 and max(map(drawn.count, drawn)) < 50


def test_the_splits_share_no_story_whatever_the_seed_and_a_seed_draws_the_same_again():
    found = {split: {json.dumps(story) for seed in range(3)
                     for story in data.stories(split, 300, seed)} for split in data.SPLITS}
    assert sum(map(len, found.values())) == len(set().union(*found.values()))
    first = data.stories("train", 300, seed=1)
    assert first == data.stories("train", 300, seed=1) != data.stories("train", 300, seed=2)
    assert len(set(map(json.dumps, first))) == 300


LETTERS = argparse.Namespace(encode=lambda text, n: [*map(ord, text[:n - 1]), EOS])  # an id each


def test_batches_are_padded_see_each_pair_once_an_epoch_and_can_start_anywhere():
    input_ids, mask, labels = data.collate([([5, 6, 1], [7, 1]), ([8, 1], [9, 9, 1])])
    assert input_ids.tolist() == [[5, 6, 1], [8, 1, 0]]
    assert mask.tolist() == [[True] * 3, [True, True, False]]
    assert labels.tolist() == [[7, 1, -100], [9, 9, 1]]
    pairs = [(chr(100 + i) * (1 + i % 5), "a") for i in range(64)]
    args = argparse.Namespace(batch_size=4, reg_batch=5, seed=1, max_source=9, max_target=9)
    seen, later = ([ids[:, 0].tolist() for ids, _, _ in itertools.islice(
        data.batches(pairs, LETTERS, args, start), 32 - start)] for start in (0, 11))
    assert sorted(sum(seen[:16], [])) == sorted(sum(seen[16:], [])) == list(range(100, 164))
    assert seen[:16] != seen[16:] and later == seen[11:]
    sides = {"en": [chr(100 + i) for i in range(9)], "de": [chr(200 + i) * 3 for i in range(9)]}
    ids, mask = next(data.parallel_batches(sides, LETTERS, args, start=3))
    assert ids.shape == mask.shape == (5, 2, 4)  # languages beside each other, padded
    assert (ids[:, 0, 0] + 100 == ids[:, 1, 0]).all() and (ids[:, 0, 2:] == PAD).all()
    assert mask.sum(dim=2).tolist() == [[2, 4]] * 5
    first, *_, third = itertools.islice(data.parallel_batches(sides, LETTERS, args), 4)
    assert torch.equal(third[0], ids) and not torch.equal(first[0], ids)


PAIRS = [('Größe, "so"', "ขนาด"), ("мир", "दुनिया")]
FORMATS = {  # of the README's table: the words that read files -> what stands in these, as it comes
    "--train en=english_train.jsonl --fields text,summary": [
        "".join(json.dumps({"id": 1, "text": s, "summary": t}) + "\n\n" for s, t in PAIRS)],
    "--train en=train.tsv --fields text,headline": [
        'category\theadline\ttext\nnews\tขนาด\t"Größe, ""so"""\nnews\tदुनिया\tмир\n'],
    "--train en=xglue.ntg.en.src.train,xglue.ntg.en.tgt.train": [
        '\ufeffGröße, "so"\nмир\n', "ขนาด\r\nदुनिया"]}
PARALLEL = ["en=newstest2019-src.eng.txt de=newstest2019-ref.deu.txt",
            "en=eng_Latn.dev de=deu_Latn.dev", "en=NAME.de-en.en de=NAME.de-en.de",
            "en=tatoeba.deu-eng.eng de=tatoeba.deu-eng.deu"]


def test_every_format_of_the_readme_is_read_as_it_says_line_breaks_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, contents in FORMATS.items():
        args = train.parse_args(words.split())
        for path, content in zip(args.train[0].removeprefix("en=").split(","), contents):
            Path(path).write_bytes(content.encode())
        assert data.task_pairs(args.train, args, "train", None) == {"en": PAIRS}, words
    for words in PARALLEL:
        args = train.parse_args(["--train", "en=a.jsonl", "--parallel", *words.split()])
        for word, lines in zip(args.parallel, ("One.\r\n\r\nTwo.\r\n", "Eins.\nnichts\nZwei.")):
            Path(word[3:]).write_bytes(lines.encode())
        assert data.parallel_texts(args) == ({"en": ("Two.",), "de": ("Zwei.",)},
                                             {"en": ("One.",), "de": ("Eins.",)}), words
    readme = (HERE / "README.md").read_text()
    assert [words for words in [*FORMATS, *PARALLEL] if words not in readme] == []
    for name, separator in (("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ",")):
        text = f'source{separator}target\r\n"one\ntwo"{separator}{"x" * 200_000}\r\n'.encode()
        Path(name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        assert data.read_pairs(name) == [("one\ntwo", "x" * 200_000)]


@pytest.mark.parametrize("name, content, parts", [
    ("a.jsonl", b'{"source": "a", "target": "b"}\n{"source": "a"\n', ["a.jsonl:2", "JSON"]),
    ("a.jsonl", b'{"text": "a", "target": "b"}\n', ["a.jsonl:1", "text, target", "--fields"]),
    ("a.tsv", b"source\ttarget\na\t \n", ["a.tsv:2", "'target'", "mend or remove"]),
    ("a.csv", b"", ["a.csv", "at least one pair"]), ("a.txt", b"x\n", ["a.txt", ".jsonl"]),
    ("a.csv", b"source,target\na,\xff\n", ["a.csv:2", "UTF-8", "0xff"]),
    ("a.csv", b"source,target\na,b\na,b,c\n", ["a.csv:3", "2 columns"]),
    ("a.csv", b"source,target\na,b\na\rb,c\n", ["a.csv:3", "carriage return"]),
    ("a.tsv", b'source\ttarget\n"a" b\tc\n', ["a.tsv:2", "double its own quotes"]),
    ("a.tsv", b'source\ttarget\none\t"eins\ntwo\tzwei\nthree\tdrei"\n', ["a.tsv:4", "literal"]),
    ("a.jsonl", b'\n{"source": "a", "target": "b\\ud83d"}\n', ["jsonl:2", "can't encode", "ud83d"]),
    ("a.jsonl", b"[[1]]\n", ["expected a JSON object"]), ("a.jsonl", b"[" * 99999, ["recursion"]),
    ("a.jsonl", b'{"source": [%s1], "%s": 2}' % (b"1, " * 9999, b"x" * 9999), ["[1, 1, 1", ", xx"]),
    ("a.tsv.gz", gzip.compress(b"source\ttarget\na\tb")[:-9], ["a.tsv.gz", "ended before"]),
    ("en.jsonl,de", b'{"a": "b"}\n|a\n', ["en.jsonl: expected a text a line"]),
    ("en,de.TSV", b"a\n|a\n", ["de.TSV: expected a text a line"]),
    ("en,de", b'a\n|[{\n', ["de: expected"]), ("en,de", b"a\nb\n|a\n", ["en has 2, de has 1"])])
def test_a_reader_names_file_and_line_of_what_is_wrong(tmp_path, monkeypatch, name, content, parts):
    monkeypatch.chdir(tmp_path)
    for path, lines in zip(name.split(","), content.split(b"|")):
        Path(path).write_bytes(lines)
    with pytest.raises(ValueError) as caught:
        data.read_pairs(name)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 500 and all(part in line for part in parts), line


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda number: calls.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda old, new: calls.append(Path(old).read_text()))
    data.write_file(tmp_path / "a", "text")
    with pytest.raises(UnicodeEncodeError):
        data.write_file(tmp_path / "b", "half an emoji \ud83d")
    assert calls == ["fsync", "text"] and not any(tmp_path.iterdir()), "no temporary file stays"


def test_sentinels_and_padding_are_no_text():
    _, tokenizer = load(scoring.TOY_BASE)
    ids = tokenizer.encode("Am Ende war Omar traurig.")
    assert tokenizer.decode([tokenizer.sentinels[0], *ids, PAD, 9]) == "Am Ende war Omar traurig."
    assert tokenizer.encode("Am Ende war Omar traurig.", 3) == ids[:2] + [EOS]
    assert len(tokenizer.sentinels) == 100


# eval.py: ROUGE-L and the language identifier -----------------------------------------------------

SIX = "en de fr es tr ru".split()
GREETINGS = {"en": "The weather is nice today.", "de": "Heute ist das Wetter schön.",
    "fr": "Il fait beau aujourd’hui.", "es": "Hoy hace muy buen tiempo.",
    "tr": "Bugün hava çok güzel.", "ru": "Сегодня хорошая погода.",
    "el": "Σήμερα ο καιρός είναι καλός.", "ar": "الطقس جميل اليوم.", "he": "מזג האוויר יפה היום.",
    "hi": "आज मौसम बहुत अच्छा है।", "th": "วันนี้อากาศดีมาก", "zh": "今天天气很好。",
    "ja": "今日はとても天気がいいです。", "ko": "오늘 날씨가 아주 좋습니다.",
    "vi": "Hôm nay thời tiết rất đẹp.", "ka": "დღეს კარგი ამინდია.", "am": "ዛሬ አየሩ ጥሩ ነው።",
    "my": "ဒီနေ့ ရာသီဥတု ကောင်းတယ်။", "lo": "ມື້ນີ້ອາກາດດີຫຼາຍ", "km": "ថ្ងៃនេះអាកាសធាតុល្អណាស់",
    "bo": "དེ་རིང་གནམ་གཤིས་ཡག་པོ་འདུག"}


@pytest.fixture(scope="module")
def three_words(tmp_path_factory):
    """A table of three words: German "ab" twice, English "ba"."""
    folder = tmp_path_factory.mktemp("table")
    identifier.train({"de": ["ab ab " * 10], "en": ["ba " * 10]}, folder / "table.bin")
    return folder


@pytest.mark.parametrize("prediction, reference, score", [
    ("a b c d", "A, c! e", 4 / 7),  # a c in common: 2 · 2 / (4 + 3)
    ("b a", "a b", 1 / 2),  # order counts: either token, 2 · 1 / (2 + 2)
    ("a a a", "a", 2 / 4),  # a token is used once
    ("l´avion d´Anna", "l'avion d'Anna", 1), ("<extra_id_0>", "extra id 0", 0),
    ("İSTANBUL'DA deprem oldu", "istanbul'da deprem oldu", 1),
    ("او به خانه می رود", "او به خانه می\u200cرود", 1), ("ക് ഷ", "ക്\u200dഷ", 1),  # mT5's spaces
    ("Schiff\xadfahrt", "schifffahrt", 1), ("1️⃣ bread", "1 bread", 1), ("a\u20e3", "a", 1),
    ("a\u034fb", "a b", 1)])
def test_rouge_l_is_the_fraction_worked_by_hand(prediction, reference, score):
    assert scoring.rouge_l([prediction], [reference]).tolist() == pytest.approx([score])


def test_rouge_l_equals_rouge_score_on_ascii_text():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    rng = random.Random(0)
    a, b = (["".join(rng.choices("aabC    __.,-'\"1\t", k=rng.randrange(200)))
             for _ in range(400)] for _ in "ab")
    expected = [scorer.score(y, x)["rougeL"].fmeasure for x, y in zip(a, b)]
    assert scoring.rouge_l(a, b).tolist() == pytest.approx(expected, abs=1e-6)
    assert max(expected) > .3


def test_lcs_of_a_padded_batch_is_the_textbook_table():
    rng, wrong = random.Random(1), []
    pairs = [[[rng.randrange(6) for _ in range(rng.randrange(40))] for _ in "ab"] for _ in "x" * 30]
    pairs += [[[5], [5, 5]], [[5, 5], [5, 5, 5]]]  # short enough to follow with a pencil
    a, b = (torch.tensor([pair[side] + [-1 - side] * (40 - len(pair[side])) for pair in pairs])
            for side in (0, 1))
    for (x, y), *found in zip(pairs, scoring.lcs(a, b).tolist(), scoring.lcs(b, a).tolist()):
        table = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
        for i, j in itertools.product(range(len(x)), range(len(y))):
            table[i + 1][j + 1] = (table[i][j] + 1 if x[i] == y[j]
                                   else max(table[i][j + 1], table[i + 1][j]))
        if found != [table[-1][-1]] * 2:
            wrong.append((len(x) + len(y), f"{x}, {y}: {table[-1][-1]}, {found}"))
    assert not wrong, f"two texts, their LCS, what was found, both ways round: {min(wrong)[1]}"


def test_identical_texts_score_1_in_every_script_and_empty_ones_0():
    texts = list(GREETINGS.values())
    assert min(len(scoring.tokens(text)) for text in texts) > 2
    assert scoring.rouge_l(texts, texts).tolist() == [1] * len(texts)
    assert scoring.rouge_l(["", "a", "…"], ["a", "", "…"]).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="found 2 references for 1"):
        scoring.rouge_l(["a"], ["a", "b"])


def test_tokens_keep_marks_split_scripts_without_spaces_and_drop_control_tokens():
    assert scoring.tokens("Ｆｕｌｌ-width, ﬁne_x 2½") == ["full", "width", "fine", "x", "21", "2"]
    assert scoring.tokens("हिन्दी में! Мой ёж ดีมาก") == "हिन्दी में мой ёж ดี ม า ก".split()
    assert scoring.tokens("东京 2020年, ok می\u200cخواهم") == "东 京 2020 年 ok می خواهم".split()
    assert scoring.tokens("l´avion") == scoring.tokens("l'avion") == ["l", "avion"]
    assert scoring.tokens("<extra_id_0> Кот <extra_id_12>спит</s>") == ["кот", "спит"]
    assert scoring.tokens("") == scoring.tokens("—!?") == scoring.tokens("<extra_id_0>") == []
    for token in scoring.tokens("´a a ́b \u0301x ¨ü¸c ﷼ ﹰ"):
        assert unicodedata.category(token[0])[0] != "M", "a token never begins with a mark"


def test_a_loop_is_found_in_every_script_and_a_sentence_that_says_all_once_is_none():
    once = [*GREETINGS.values(), "人工智能专家说人工智能很重要", "", "bye bye"]
    assert [text for text in once if scoring.loops(text)] == []
    loops = ["ha ha ha ha", "哈哈哈哈", "ははははは", "ฮ่าฮ่าฮ่าฮ่า", "ຮ່າຮ່າຮ່າຮ່າ", "ហាហាហាហា",
             "ဟားဟားဟားဟား", "ཧ་ཧ་ཧ་ཧ་ཧ", "la función continua de la función continua",
             *(f"{text} {text}" for text in GREETINGS.values())]
    assert [text for text in loops if not scoring.loops(text)] == []


def test_the_identifier_is_naive_bayes_worked_by_hand_on_three_words(three_words):
    # German shows 40 letters, English 20: counts are scaled by 3/4 and 3/2, the mean being 30.
    # "ab" in German, 20 times, 16 as a power of two: 8 n-grams ("a" "b" " a" "ab" "b " " ab" "ab "
    # " ab ") and the word; English knows "a" and "b", 10 times, rounded 8. All scale to 12.
    nats = math.log((12 + .02) / .02)
    tiny = scoring.LanguageIdentifier(three_words / "table.bin")
    assert tiny.languages == ["de", "en"]
    _, _, whole, scores = (found[1:] for found in tiny.words(["ab ba c"]))  # without the first: ""
    own, other = (8 / 16 + 1 / 4) * nats, 2 / 16 * nats
    assert torch.allclose(scores, torch.tensor([[own, other], [other, own], [0, 0]]), atol=.05)
    assert torch.allclose(whole, torch.tensor([[nats, 0], [0, nats], [0, 0]]), atol=.05)
    mean = (math.exp(own) + math.exp(other)) / 2
    ab, inf = [math.log(.9 * math.exp(x) / mean + .1) for x in (own, other)], math.inf
    expected = [[(scoring.FIRST + scoring.NAME) * x for x in ab], [-inf, -inf]]
    assert torch.allclose(tiny.evidence(["ab AB", "c"]), torch.tensor(expected), atol=.05)
    assert tiny.predict(["ab, AB.", "ba", "c", "аб"]) == ["de", "en", "und", "und"]


@pytest.mark.parametrize("texts, expected, right", [
    (["Это тестовое предложение", "นี่คือประโยคทดสอบ", "Bu akşam hava çok güzel",
      "Ella vive en una casa pequeña"], ["en", "de"], ["ru", "th", "tr", "es"]),
    (["我有一個夢想", "Trumps Entwurf will US-Ressorts sparen"], None, ["zh", "de"]),
    *((["苹果公司发布了 iPhone 15 Pro Max", "请下载 Google Chrome 浏览器",
        "حمّل متصفح Google Chrome",
        "애플이 iPhone 15 Pro Max를 출시했다", "Пожалуйста, установите Google Chrome"], expected,
       ["zh", "zh", "ar", "ko", "ru"]) for expected in (SIX, ["en"], None)),
    (["<extra_id_0>", "<extra_id_0> Кот спит", "", "42", "?!", "ଓଡ଼ିଆ ଭାଷା", "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ"], SIX,
     ["und", "ru", "und", "und", "und", "und", "und"]),
    (["Anna und der verlorene Hut", "Anna ve kayıp şapka", "Anna et le chapeau perdu",
      "Anna y el sombrero perdido", "Анна и потерянная шляпа", "Anna and the lost hat"], SIX,
     ["de", "tr", "fr", "es", "ru", "en"]),
    (["锁门", "猫", "42", "12.05.2021", "👍", "Emma Stone, Emma Watson", "anna@web.example"],
     ["en", "de", "zh"], ["zh", "zh", *["und"] * 5]),
    (["Siehe https://en.example.org/wiki/List_of_the_cities", "#weather: Heute regnet es",
      "Die Brücke ist offen: www.zeltro.example/news/bridge-reopens-after-heavy-storm",
      "Danke an @the_new_house und news.example.com/the/best"], ["en", "de"], ["de"] * 4),
    (["Jennifer Lawrence, Anna Cooke Maroney sind verlobt", "Troy Hunt a créé Let's Dance",
      "die Steam Community"], ["en", "de", "fr"], ["de", "fr", "de"]),
    (["Менинг бир ўғлим ва бир қизим бор."], ["en", "uz"], ["tg"]),  # Uzbek, but never English
    (list(GREETINGS.values()), None, list(GREETINGS)), ([], None, [])])
def test_the_language_of_a_text_is_its_own_whatever_is_expected(texts, expected, right):
    assert scoring.identifier().predict(texts, expected) == right


@pytest.mark.parametrize("text, target, source, share", [
    ("The mala relación entre dos partidos", "es", "en", 1 / 6),
    ("The лекарства вызывают близорукость", "ru", "en", 1 / 4),
    ("Он сказал bonjour tout le monde", "ru", "en", 0), ("Цена 5 kg и 3 km", "ru", "en", 0),
    ("tum kahaan ja rahe ho", "hi", "en", 0), ("<extra_id_0> Кот спит", "ru", "en", 0),
    ("Hugo und der neue Hut", "de", "en", 0), ("Hugo und the lost Hut", "de", "en", 2 / 5),
    ("Хуго и the новая шляпа", "ru", "en", 1 / 5), ("今天 is 好", "zh", "en", 1 / 4),
    ("Who ist der Mann", "de", "en", 1 / 4), ("Wright wohnt hier", "de", "en", 0),
    ("The mala relación", "es", "en", 1 / 3), ("why Wetter so", "de", "en", 1 / 3),
    ("Thomas Müller", "de", "en", 0), ("Manchester City gewinnt", "de", "en", 0),
    ("Он живёт в New York", "ru", "en", 0), ("#the: Siehe www.the.example", "de", "en", 0),
    ("the hat", "en", "en", 0), ("", "de", "en", 0),
    *((text, language, "de" if language == "en" else "en", 0)
      for language, text in GREETINGS.items())])
def test_words_count_as_mixed_in_only_where_the_source_explains_them_best(
        text, target, source, share):
    found = scoring.identifier().mixed([text], target, source)
    assert found.tolist() == pytest.approx([share])


@pytest.mark.parametrize("output, reference, language, wrong", [
    ("contexto político", "x", "es", 0), ("vitamina E", "x", "pt", 0), ("Firmenlogo", "x", "de", 0),
    ("what Wetter in Ulm", "x", "de", 0), ("tratado de Basilea", "x", "es", 0),
    ("where ist der kleine Zeh", "x", "de", 0), ("Merkel ist Europas First Lady", "x", "de", 0),
    ("The weather is nice today", "x", "de", 1), ("42", "Es ist 42", "de", 1),
    *((text, text, "de", 0) for text in ("42", "12.05.2021", "👍")), ("", "Es ist 42", "de", 1),
    ("<extra_id_0>", "Es ist 42", "de", 1), ("Emma Stone, Emma Watson", "Es ist 42", "de", 1)])
def test_in_doubt_an_output_is_in_its_target_and_in_none_where_its_reference_is(
        output, reference, language, wrong):
    for expected in (None, "de en es fr it pt".split()):
        found = scoring.score([output], [reference], language, "en", scoring.identifier(), expected)
        assert found["wrong_language"] == 100 * wrong


def test_scores_count_empty_outputs_as_wrong_and_nothing_as_accidental_in_the_source():
    outputs = ["Hugo und der neue Hut", "Wo ist the Hut", "Hugo and the new hat", "<extra_id_0>"]
    score = functools.partial(scoring.score, outputs, outputs[:1] * 4,
                              identifier=scoring.identifier(), expected=SIX)
    found = score("de", "en")
    assert found["rougeL"] == pytest.approx(100 * (1 + 2 / 9 + 1 / 5 + 0) / 4)
    assert (found["wrong_language"], found["source_language"], found["n"]) == (50, 25, 4)
    assert found["mixed"] == pytest.approx(100 * (0 + 1 / 4) / 2) and found["loops"] == 0
    for source in ("de", None):  # the run's own language
        found = score("de", source)
        assert found["source_language"] == found["mixed"] == 0 and found["wrong_language"] == 50
    assert "mixed" not in score("ru", "en"), "a mean over no output is left out"
    assert set(score("de", "lg")) == {"rougeL", "wrong_language", "loops", "n"}  # lg is not known
    with pytest.raises(ValueError, match="lg"):
        scoring.identifier().mixed(["x"], "de", "lg")
    assert set(score("pcm", "en")) == {"rougeL", "loops", "n"}
    assert scoring.score([], [], "de", "en", scoring.identifier())["wrong_language"] == 0


def test_outputs_in_files_are_expected_in_their_language_and_unknown_codes_are_said(
        tmp_path, capsys):
    (tmp_path / "hr").write_text("Danas je lijepo vrijeme.\nGdje je moja knjiga?\n", "utf-8")
    words = ["--hyp", str(tmp_path / "hr"), "--ref", str(tmp_path / "hr"), "--lang"]
    scoring.main([*words, "hr"])
    assert capsys.readouterr().out.split()[-6:] == ["100.0", "0.0", "0.0", "0.0", "0.0", "2"]
    scoring.main([*words, "no", "--expected", "ger", "eng"])
    assert "lacks eng ger no: " in (said := capsys.readouterr().out) and "nb or nn" in said


def test_training_twice_gives_the_same_bytes_also_from_files_with_crlf(three_words):
    (three_words / "newstest2019-ref.deu.txt").write_bytes(b"ab ab " * 10 + b"\r\n\r\n")
    (three_words / "newstest2019-src.eng.txt").write_text("ba " * 10 + "\n")
    finished = script("lab/identifier.py", three_words, three_words / "again.bin")
    assert finished.returncode == 0, finished.stderr
    assert (three_words / "again.bin").read_bytes() == (three_words / "table.bin").read_bytes()


def test_the_shipped_table_is_small_and_knows_100_languages_by_iso_code():
    languages = scoring.identifier().languages
    assert scoring.LID.stat().st_size <= 8e6 and len(languages) >= 100
    assert {x.split("/")[0] for x in identifier.LANGUAGES.values()} == set(languages)


def test_a_table_that_is_missing_or_damaged_is_refused_in_one_line(three_words):
    with pytest.raises(FileNotFoundError, match="none.bin: .*python lab/identifier.py"):
        scoring.LanguageIdentifier(three_words / "none.bin")
    good = (three_words / "table.bin").read_bytes()
    for bad in (b"", b"7\n" + good, good[:-9], good.replace(b"[[", b"[", 1)):
        (three_words / "bad.bin").write_bytes(bad)
        with pytest.raises(ValueError, match="bad.bin: .*python lab/identifier.py"):
            scoring.LanguageIdentifier(three_words / "bad.bin")


# train.py, select.py, eval.py: a run --------------------------------------------------------------
SMALL = ("--steps 6 --eval-every 2 --warmup 2 --batch-size 8 --eval-size 8 --train-size 64 "
         "--test-size 8 --test en de ru --parallel en de ru --lr 1e-3").split()


def learn(folder, *words):
    """Start train.py on SMALL and further words in this process; return the run's folder."""
    train.main([str(word) for word in (*SMALL, *words, "--out", folder)])
    return folder


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """The folder of a run of six steps with the regulariser."""
    return learn(tmp_path_factory.mktemp("run") / "small", "--reg", 0.1)


def rows(folder, kind):
    return [row for row in scoring.read_log(folder) if row["kind"] == kind]


def test_a_run_leaves_what_the_contract_names(small_run):
    names = {path.name for path in small_run.iterdir()}
    assert names == {"args.json", "log.jsonl", "selected.json", "scores.json", "outputs.jsonl",
                     "last.pt", *(f"step_{step:06d}.pt" for step in (0, 2, 4, 6))}
    assert "optimizer" not in read_checkpoint(small_run / "step_000006.pt")
    assert scoring.read_run(small_run)[0].init is None, "the toy base, wherever it is: it may move"
    assert scoring.SHIPPED.items() <= vars(train.parse_args([])).items(), "no longer the defaults"
    scores = json.loads((small_run / "scores.json").read_text())
    assert scores["task"] == "title" and set(scores["xlrs"]) == {"de", "ru"}
    for kinds in scores["scores"].values():
        assert set(kinds) | {"mixed"} == {"rougeL", "wrong_language", "source_language", "mixed",
                                          "loops", "n"}
    outputs = (small_run / "outputs.jsonl").read_text().splitlines()
    assert len(outputs) == 3 * 8 and json.loads(outputs[0])["language"] == "en"


def test_a_run_lowers_the_loss_the_regulariser_xlrs_and_both_are_told(small_run, tmp_path, capsys):
    plain = learn(tmp_path / "plain")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    reg, without = ([scoring.mean(row["xlrs"].values()) for row in rows(path, "eval")]
                    for path in (small_run, plain))
    assert reg[0] == pytest.approx(without[0], abs=1e-5)
    assert reg[-1] < without[-1], ("expected XLRS to end lower with the regulariser, found with it "
                                   f"{reg}, without {without}")
    losses = [row["dev_loss"] for row in rows(plain, "eval")]
    assert losses[-1] < 0.9 * losses[0]
    assert all(row["term"] == 0 for row in rows(plain, "train"))
    first = rows(small_run, "train")[0]
    assert first["term"] > 0.1 and first["lr"] == pytest.approx(5e-4)  # half of --lr, warming up
    assert [line.split()[:2] for line in told] == [["step", step] for step in "0246"]
    assert "loss" not in told[0].replace("dev loss", "")
    loss = scoring.mean(row["loss"] for row in rows(plain, "train")[4:])
    assert f"loss {loss:.3f}  XLRS" in told[3]
    shown = script("select.py", plain).stdout.splitlines()
    for line, row in zip(told, shown[1:]):  # the same numbers, between the columns' names
        numbers = [word for word in line.split() if re.fullmatch(r"-?[\d.]+", word)]
        assert numbers == [word for word in row.split() if word[-1].isdigit()]


def test_the_objective_is_the_cross_entropy_and_the_hinge_on_the_parallel_sentences():
    model, tokenizer = load(scoring.TOY_BASE)
    batch = data.collate([(tokenizer.encode("Anna was in the park."), tokenizer.encode("Yes."))])
    texts = ["Anna cried.", "Anna weinte.", "Anna a pleuré."]
    ids, mask = data.pad_source([tokenizer.encode(text) for text in texts * 2])
    parallel = ids.unflatten(0, (2, 3)), mask.unflatten(0, (2, 3))  # the same sentence twice
    loss, term = train.objective(model, batch, parallel, floor=0.1)
    assert loss.item() == pytest.approx(model(*batch).item())
    english, *others = (xlrs.pool(model.encode(*side), side[1]) for side in
                        (data.pad_source([tokenizer.encode(text)]) for text in texts))
    cosines = [torch.cosine_similarity(english, other).item() for other in others]
    assert term.item() == pytest.approx(sum(cosines) - 2 * 0.1, abs=1e-6)
    assert train.objective(model, batch, (), floor=0.1)[1].item() == 0


def test_select_marks_the_lowest_xlrs_and_eval_scores_it(small_run, tmp_path, capsys, monkeypatch):
    table = script("select.py", small_run).stdout.splitlines()
    lowest = min(rows(small_run, "eval")[1:], key=lambda row: scoring.mean(row["xlrs"].values()))
    chosen = json.loads((small_run / "selected.json").read_text())
    assert (chosen["step"], chosen["by"]) == (lowest["step"], "xlrs")
    assert [line.split()[0] for line in table if "<- chosen" in line] == [str(lowest["step"])]
    before = (small_run / "scores.json").read_text()
    scoring.main([str(small_run)])
    assert "usual way" not in capsys.readouterr().out, "shown only beside runs made as it was"
    for path in (small_run, scoring.TOY_BASE):  # other scores go where they are told to
        scoring.main([str(path), *"--test de --test-size 2 --num-beams 2 --out".split(),
                      str(tmp_path / path.name)])
        found = json.loads((tmp_path / path.name / "scores.json").read_text())["scores"]
        assert list(found) == ["de"] and found["de"]["n"] == 2
    monkeypatch.chdir(tmp_path)
    Path("runs/eval/scores.json").mkdir(parents=True)
    for words, part in (([small_run, "--test", "de"], "test is not the run's"),
                        ([small_run, "--eval-size", "9"], "eval_size is not"),
                        ([scoring.TOY_BASE], "without scores, found runs/eval"),
                        ([scoring.TOY_BASE, "--out", small_run], "without scores")):
        refuses(capsys, ["--out", part], scoring.main, [str(word) for word in words])
    assert (small_run / "scores.json").read_text() == before


def write_run(folder, rouge=12.5, **content):
    """Write a run folder of two checkpoints, as far as select.py and --compare read it."""
    folder.mkdir()
    args = vars(train.parse_args(["--out", str(folder)]))
    (folder / "args.json").write_text(json.dumps({"arguments": args}))
    scores = dict(rougeL=rouge, wrong_language=3., source_language=2., mixed=1., loops=0., n=8)
    log = [{"kind": "eval", "step": step, "xlrs": {"de": 0.5}, "dev_loss": 2.5,
            "test": {"en": scores, "de": scores}} for step in (0, 10)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (folder / "scores.json").write_text(json.dumps(
        {"task": "title", "step": 10, "xlrs": {"de": 0.5}, "scores": log[0]["test"], **content}))
    return folder


def test_runs_scored_alike_are_compared_and_a_mean_without_a_number_is_blank(tmp_path, capsys):
    a, b = (write_run(tmp_path / name, rouge=rouge, texts=1)
            for name, rouge in (("a", 12.5), ("b", 14.5)))
    scoring.main(["--compare", str(a), str(b)])
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[1:] for line in table[1:]] == [
        [rouge, "3.0", "2.0", "1.0", "0.50"] for rouge in ("12.5", "14.5")]
    assert table[0].startswith("mean of de ")
    other = write_run(tmp_path / "other", texts=2)
    refuses(capsys, [f"{other}: expected scores on the texts of {a}"], scoring.main,
            ["--compare", str(a), str(other)])
    scores = {"de": {"rougeL": 20.}, "fr": {"rougeL": 30., "wrong_language": 1.}}
    for languages, right in (("de", [20., "", "", "", .5]), ("fr", [30., 1., "", "", ""]),
                             ("de fr", [25., "", "", "", ""])):
        assert scoring.columns({"scores": scores, "xlrs": {"de": .5}}, languages.split()) == right


def test_xlrs_of_the_toy_base_by_layer():
    model, tokenizer = load(scoring.TOY_BASE)
    args, layers, measured = train.parse_args([]), model.encoder.layers, []
    _, sentences = data.parallel_texts(args)
    for depth in range(len(layers) + 1):
        model.encoder.layers = layers[:depth]
        found = scoring.similarities(model.eval(), tokenizer, sentences, args)
        measured.append(scoring.mean(found.values()))
    for found in (answer("xlrs_by_layer", [0.322, 0.434, 0.449]), measured):
        assert found == pytest.approx([0.322, 0.434, 0.449], abs=0.002), (
            f"after no layer, one, two: expected 0.322, 0.434, 0.449, found {found}; the last is "
            "the base's in README. Cut off layers and keep the norm; model.eval(); the second "
            "result of data.parallel_texts; mean over sentences, then over the five languages")


def test_a_text_is_shown_that_is_mended_and_one_that_is_not():
    texts = ["Am Ende lachte Anna."] * 2 + ["In the end Anna laughed."] * 2
    runs = {"usual way": {"outputs": {"de": texts[1:]}}, "this run": {"outputs": {"de": texts[:3]}}}
    found = scoring.examples(runs, ["de"], ["en", "de"])
    assert found == {"mended": ("de", 1), "not mended": ("de", 2)}


def test_a_frozen_part_keeps_its_weights_and_recomputing_changes_no_byte(tmp_path):
    words = ("--reg", 0.1, "--steps", 2, "--freeze", "decoder", "head")
    kept, again = learn(tmp_path / "kept", *words), learn(tmp_path / "again", *words, "--recompute")
    old, new = (read_checkpoint(kept / f"step_00000{step}.pt")["model"] for step in (0, 2))
    changed = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"embedding", "encoder"}
    assert (kept / "step_000002.pt").read_bytes() == (again / "step_000002.pt").read_bytes()


def test_users_files_in_any_script_and_unidentified_languages(tmp_path, capsys, monkeypatch):
    def objective(*words, known=train.objective):  # what was read at the start is what is scored
        for lang in texts:
            (tmp_path / lang).unlink(missing_ok=True)
        return known(*words)
    monkeypatch.setattr(train, "objective", objective)
    texts = {"en": "the {} is small", "th": "{} นั้นเล็ก", "ar": "ال{} صغير", "zh": "{}很小",
             "pcm": "di {} small"}
    for lang, text in texts.items():
        (tmp_path / lang).write_text("".join(text.format(i) + "\n" for i in range(40)), "utf-8")
    pairs = [f"{lang}={tmp_path / lang},{tmp_path / lang}" for lang in texts]
    folder = learn(tmp_path / "run", "--train", pairs[0], "--dev", pairs[0], "--test", *pairs,
                   "--parallel", *(pair.partition(",")[0] for pair in pairs), "--steps", 1)
    scores = json.loads((folder / "scores.json").read_text())["scores"]
    assert {lang: kinds["n"] for lang, kinds in scores.items()} == dict.fromkeys(texts, 8)
    assert "wrong_language" in scores["th"] and "wrong_language" not in scores["pcm"]
    assert "the language identifier lacks pcm" in capsys.readouterr().out


@pytest.mark.parametrize("words, parts", [
    (["--train", "xx"], ["toy language", "'xx'"]), (["--resume"], ["--out"]),
    (["--train", "en=nowhere.jsonl"], ["nowhere.jsonl", "No such file"]),
    (["--train", "en=a.jsonl", "--reg", "0.1"], ["--reg", "--parallel"]),
    (["--train", "en="], ["LANG=FILE", "en="]), (["--train", "en", "en"], ["each language once"]),
    (["--parallel", "en"], ["--parallel", "others"]),
    (["--init", "nowhere.pt"], ["nowhere.pt: expected a checkpoint"]),
    (["--init", "toy"], ["toy: expected a checkpoint", "model.py convert"]),
    (["--batch-size", "0"], ["--batch-size", "from 1"]), (["--device", "foo"], ["--device foo"]),
    (["--seed", "-1"], ["--seed", "from 0"]), (["--dtype", "float16"], ["--dtype", "float16"]),
    (["--dev", "de"], ["--dev", "source language en"]),
    (["--freeze", *train.PARTS], ["empty parameter list"])])
def test_train_answers_a_mistake_in_one_line(tmp_path, capsys, words, parts):
    out = [] if words == ["--resume"] else ["--out", str(tmp_path / "run")]
    refuses(capsys, parts, train.main, ["--steps", "1", "--test-size", "1", *words, *out])
    assert not (tmp_path / "run").exists()


def test_an_occupied_folder_and_changed_arguments_are_refused(small_run, capsys):
    log = (small_run / "log.jsonl").read_text()
    for words, part in (([], "holds files already"),
                        (["--reg", 0.2, "--resume"], "reg was 0.1, is 0.2"),
                        (["--reg", 0.1, "--steps", 5, "--resume"], "--steps of at least 6")):
        refuses(capsys, [part], learn, small_run, *words)
    chosen = scoring.choose_checkpoint(small_run)["step"]
    (small_run / "log.jsonl").write_text(log.partition("\n")[2])  # without the base's row
    assert scoring.choose_checkpoint(small_run)["step"] == chosen, "the first left is no base"
    (small_run / "log.jsonl").write_text(log)
    descriptor = os.open(small_run, os.O_RDONLY)  # as another process that resumes it has it
    pytest.importorskip("fcntl").flock(descriptor, 2)
    refuses(capsys, ["another process"], learn, small_run, "--reg", 0.1, "--resume")
    os.close(descriptor)
    assert (small_run / "log.jsonl").read_text() == log


@pytest.mark.parametrize("words, parts", [
    (["select.py", "toy"], ["args.json", "train.py"]), (["eval.py", "nothing"], ["nothing"]),
    (["select.py", "RUN"], ["log.jsonl", "broken"]),
    ("eval.py --lang de --hyp RUN/args.json --ref RUN/args.json".split(), ["a text a line"]),
    (["lab/claims.py", "RUN/args.json"], ["args.json: expected a run"]),
    (["lab/captions.py", "RUN", "RUN"], ["a clone of Multi30k"])])
def test_a_missing_or_damaged_run_is_answered_in_one_line(tmp_path, words, parts):
    with open(write_run(tmp_path / "run") / "log.jsonl", "a") as log:
        log.write("{\n")
    finished = script(*(word.replace("RUN", str(tmp_path / "run")) for word in words), code=2)
    fails_in_one_line(finished.returncode, finished.stderr, *parts)


def test_a_run_killed_again_and_again_ends_with_the_bytes_of_an_unbroken_one(small_run, tmp_path):
    again, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    command = [sys.executable, THEIRS.get("train.py", "train.py"), "--reg", "0.1",
               *SMALL, "--out", again, "--resume"]
    for rows_before in (1, 4, 6):
        with subprocess.Popen(command, cwd=HERE, stderr=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and not (
                    log.exists() and log.read_bytes().count(b"\n") >= rows_before):
                time.sleep(0.01)
            process.kill()
    with open(log, "a") as file:  # a step after the last checkpoint, a line torn off
        file.write('{"kind": "train", "step": 6, "loss": 1.5}\n{"kind": "train", "st')
    learn(again, "--reg", 0.1, "--resume")
    for path in small_run.glob("step_*.pt"):
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    assert [row["step"] for row in rows(again, "train")] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows(again, "eval")] == [0, 2, 4, 6]
    assert (again / "scores.json").read_text() == (small_run / "scores.json").read_text()


@pytest.mark.parametrize("message", ["CUDA out of memory.", "MPS backend out of memory (MPS)",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"])
def test_a_full_memory_saves_the_last_finished_step(tmp_path, monkeypatch, capsys, message):
    def full(*words):
        raise RuntimeError(message)
    steps = iter([train.objective] * 3)
    monkeypatch.setattr(train, "objective", lambda *words: next(steps, full)(*words))
    refuses(capsys, ["memory is full", "--recompute"], learn, tmp_path / "run")
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 3


def test_an_update_that_fails_is_not_saved_and_its_run_goes_on(tmp_path, monkeypatch, capsys):
    refuses(capsys, ["step 2, rate 1e+30: expected finite"], learn, tmp_path / "a", "--lr", 1e30)
    assert read_checkpoint(tmp_path / "a" / "last.pt")["step"] == 0
    def full(self):  # with the states of one weight made, in part
        self.state[self.param_groups[0]["params"][0]] = {"step": torch.tensor(1.)}
        raise torch.OutOfMemoryError("out of memory")
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", full)
        refuses(capsys, ["memory is full"], learn, tmp_path / "run")
    assert read_checkpoint(tmp_path / "run" / "last.pt")["optimizer"]["state"] == {}
    learn(tmp_path / "run", "--resume", "--steps", 2)
    assert [row["step"] for row in rows(tmp_path / "run", "train")] == [1, 2]


def test_the_report_begins_when_weights_and_optimiser_have_left_the_memory(tmp_path, monkeypatch):
    made, left, step = [], [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: made.append(self) or step(self))
    monkeypatch.setattr(scoring, "score_run", lambda *words: left.append(
        sum(map(torch.numel, made[0].param_groups[0]["params"])) + len(made[0].state)))
    learn(tmp_path / "run", "--steps", 1)
    assert left == [0]


def test_beams_bound_a_batch_and_each_process_has_a_row_of_it(monkeypatch, capsys):
    args = argparse.Namespace(num_beams=4, max_source=99)
    texts, device = ["a" * 31] * 300, torch.device("cpu")
    assert [len(mask) for *_, mask in scoring.in_batches(texts, LETTERS, args, device)] == [
        25] * 12  # 100 beams; 8,192 source tokens would be 256 texts
    monkeypatch.setenv("WORLD_SIZE", "4")
    for flag in ("--batch-size", "--reg-batch"):
        refuses(capsys, [flag, "each of 4 processes, found 3"], train.main, [flag, "3"])


def test_a_full_disk_gives_one_line_and_keeps_the_last_checkpoint(tmp_path):
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10**7, 10**7)); " \
              "import train; train.main(sys.argv[1:])"  # last.pt with AdamW's state is larger
    finished = script("-c", limited, *SMALL, "--out", tmp_path / "run", code=2)
    fails_in_one_line(2, finished.stderr, "last.pt: could not be written", "make room")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"args.json", "log.jsonl", "last.pt", "step_000000.pt", "step_000002.pt"}
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 0


def test_two_processes_learn_as_one_and_one_goes_on_where_two_stopped(tmp_path):
    # Dropout differs from process to process; a high rate would magnify how the means differ.
    same = ("--reg", 0.1, "--dropout", 0, "--lr", 2e-4)
    learn(tmp_path / "one", *same)
    finished = script("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
                      "train.py", *SMALL, *same, "--out", tmp_path / "two")
    assert finished.stdout.count("mean of de ru") == 1  # one process reports
    one, two = (rows(tmp_path / name, "eval") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):  # up to how the means are taken
        assert b["dev_loss"] == pytest.approx(a["dev_loss"], rel=0.003)
    learn(tmp_path / "two", *same, "--steps", 8, "--resume")
    assert [row["step"] for row in rows(tmp_path / "two", "train")] == list(range(1, 9))


# model.py: conversion from and to the hub's folders -----------------------------------------------
FORMS = ["pytorch_model.bin", "model.safetensors", "pytorch_model-{}-of-2.bin",
         "model-{}-of-2.safetensors"]
BESIDE = ["pytorch_model.fp16.bin", "pytorch_model.bin", "pytorch_model-1-of-3.bin",
          "model-2-of-3.safetensors"]  # of an earlier save or in another precision: never read
Q = "encoder.block.1.layer.0.SelfAttention.q.weight"


@pytest.fixture
def hub(tmp_path, pieces):
    """A function that writes a folder like those of the hub and returns it.

    form: the weights' file, {} for the number of a shard; changes to weights, None takes one away;
    files: {name: bytes or JSON value} to write as well; settings of config.json.
    """
    weights_of = spread(TINY).state_dict()
    published = {theirs: weights_of[ours] for ours, theirs in mt5.published_names(TINY).items()}

    def write(form=FORMS[0], weights=(), files=(), missing=None, **settings):
        folder, safe = tmp_path / "hub", form.endswith("safetensors")
        folder.mkdir(exist_ok=True)
        copies = {} if safe else dict.fromkeys(mt5.ALIASES, published["shared.weight"])
        content = published | copies | dict(weights)
        content = [(name, tensor) for name, tensor in content.items() if tensor is not None]
        shards = sorted({form.format(1), form.format(2)})  # one, or two
        for i, name in enumerate(shards):
            write_shard = safetensors.torch.save_file if safe else torch.save
            write_shard(dict(content[i::len(shards)]), folder / name)
        settings = {**asdict(TINY), "model_type": "mt5", "feed_forward_proj": "gated-gelu",
                    "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1,
                    "decoder_start_token_id": 0, **settings}
        index = {name: shards[i % 2] for i, (name, _) in enumerate(content)} if shards[1:] else {}
        written = {f"{FORMS[safe]}.index.json": {"weight_map": index}} if index else {}
        written |= {"config.json": settings, "spiece.model": pieces, **dict(files)}
        for name, value in written.items():
            value = value if isinstance(value, bytes) else json.dumps(value).encode()
            (folder / name).write_bytes(value)
        if missing:
            (folder / missing).unlink()
        return folder
    return write


@pytest.mark.parametrize("form, beside, missing", [
    *((form, beside, None) for form, beside in zip(FORMS, BESIDE)), *((FORMS[i], None, (
        f"{FORMS[i - 2]}.index.json")) for i in (2, 3))])  # shards without an index, of one save
def test_every_form_of_hub_folder_converts(hub, tmp_path, pieces, form, beside, missing, capsys):
    folder = hub(form, {mt5.STRAY: torch.zeros(32, 4)}, missing=missing, model_type="t5",
                 vocab_size=7, num_heads=99)
    if beside:
        torch.save({"shared.weight": torch.zeros(500, 64)}, folder / beside)
    mt5.main(["convert", str(folder), str(tmp_path / "x.pt")])
    printed = capsys.readouterr().out
    assert f"ignored: {mt5.STRAY}" in printed
    assert "contradicts the weights" in printed and "num_heads 99 (weights: 4)" in printed
    model, tokenizer = load(tmp_path / "x.pt")
    assert (model.config, tokenizer.model) == (TINY, pieces)
    expected = spread(TINY).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("form", FORMS[:2])
def test_a_tied_head_and_other_precisions_convert_each_to_memory_of_its_own(hub, tmp_path, form):
    head = torch.randn(500, 64)  # one form has it twice, in the same memory, the other once
    weights = {"shared.weight": head, "lm_head.weight": head if form == FORMS[0] else None,
               Q: torch.randn(64, 64).bfloat16(), Q.replace("q.w", "k.w"): torch.eye(64).double(),
               Q.replace("q.w", "v.w"): torch.randn(64, 64).half(), **dict.fromkeys(mt5.ALIASES)}
    folder = hub(form, weights, tie_word_embeddings=True)
    convert(folder, tmp_path / "x.pt")
    ours = load(tmp_path / "x.pt")[0]
    assert ours.embedding.weight.equal(head) and ours.head.weight.equal(head)
    places = [weight.untyped_storage().data_ptr() for weight in ours.parameters()]
    assert len(set(places)) == len(places)
    theirs = transformers.MT5ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(**inputs(*batch())).loss.item()
        assert ours(*batch()).item() == pytest.approx(expected, rel=1e-5)


def damaged(count, offsets, more):
    """Return a safetensors file of 16 bytes; more: what is wrong in the header's length."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [count], "data_offsets": offsets}}).encode()
    return (len(header) + more).to_bytes(8, "little") + header + bytes(16)


REFUSED = [  # what hub() is given, what the message says
    *(({name: 7}, f"{name} {right!r}, as mT5 has it, found 7") for name, right in {
        "model_type": "mt5", "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new",
        "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1,
        "forced_bos_token_id": None, "is_gated_act": True}.items()),
    (dict(files={"generation_config.json": {"eos_token_id": 2}}), "generation_config"),
    (dict(files={"added_tokens.json": {"<hl>": 500, "<extra_id_0>": 501}}), "found '<hl>'"),
    (dict(files={"tokenizer_config.json": {"added_tokens_decoder": {
        "0": {"content": "<pad>"}, "500": {"content": "<sep>"}}}}), "found '<sep>'"),
    (dict(files={"tokenizer.json": {"added_tokens": [{"id": 500, "content": "<hl>"}]}}), "<hl>"),
    (dict(weights={Q: torch.full((64, 64), math.nan)}), f"{Q} has numbers that are not finite"),
    (dict(weights={Q: None}), "layers.1.attention.q.weight"),
    (dict(weights={"x": Harmful()}), "UnpicklingError"),
    (dict(weights={mt5.ALIASES[0]: torch.zeros(500, 64)}), mt5.ALIASES[0]),
    (dict(weights={Q.replace("q.w", "relative_attention_bias.w"): torch.ones(32, 4)}), "umT5"),
    (dict(weights={"encoder.block.0.layer.1.DenseReluDense.wi_0.weight": None}), "T5 1.0"),
    (dict(weights={"shared.weight": torch.zeros(400, 64), mt5.ALIASES[0]: None, "lm_head.weight":
                   torch.zeros(400, 64), mt5.ALIASES[1]: None}), "at most 400 pieces"),
    (dict(missing="config.json"), "config.json"),
    (dict(missing="spiece.model"), "copy it from the model that this one was tuned from"),
    (dict(missing="pytorch_model.bin"), "expected model.safetensors or pytorch_model.bin"),
    (dict(files={"config.json": [1]}), "config.json: expected a JSON object"),
    (dict(model_type="t5", tie_word_embeddings=True), "scale_decoder_outputs False, as mT5 has it"),
    (dict(model_type="t5", tie_word_embeddings=None), "scale_decoder_outputs False"),
    (dict(files={"tokenizer_config.json": {"added_tokens_decoder": None}}), "added tokens as obj"),
    (dict(files={"tokenizer.json": {"added_tokens": ["<hl>"]}}), "expected added tokens as obj"),
    (dict(files={"tokenizer.json": {"added_tokens": [{"content": "\n"}]}}), "found '\\n'"),
    *((dict(files={name: "version https://git-lfs.github.com/spec/v1"}), "git lfs pull")
      for name in ("pytorch_model.bin", "spiece.model")),
    (dict(form=FORMS[2], missing="pytorch_model-2-of-2.bin"), "pytorch_model-2-of-2.bin"),
    (dict(form=FORMS[2], files={"pytorch_model-1-of-3.bin": 0},
          missing="pytorch_model.bin.index.json"), "shards and their index"),
    (dict(form=FORMS[2], files={"pytorch_model.bin.index.json": {}}), "an index of shards"),
    *((dict(form=FORMS[1], files={FORMS[1]: damaged(*numbers)}), f"{FORMS[1]}: expected weights")
      for numbers in ((4, [0, 20], 0), (5, [0, 20], 0), (4, [-16, 16], 0), (3, [0, 16], 0),
                      (4, [0, 16], 99)))]


@pytest.mark.parametrize("form, words", REFUSED, ids=[words for _, words in REFUSED])
def test_what_would_give_other_outputs_is_refused_by_name(hub, tmp_path, form, words, capsys):
    refuses(capsys, ["model.py: ", words], mt5.main,
            ["convert", str(hub(**form)), str(tmp_path / "x.pt")])
    assert not (tmp_path / "x.pt").exists()


def test_an_exported_folder_gives_the_same_logits_and_ids_or_no_ids_at_all(tmp_path, pieces):
    tokenizer, model = Tokenizer(pieces), spread(replace(TINY, dropout_rate=0.2))
    save(tmp_path / "x.pt", model, tokenizer)
    folder = tmp_path / "deep" / "folder"
    export(tmp_path / "x.pt", folder)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    real = batch()[2] != IGNORE
    with torch.no_grad():
        expected = theirs(**inputs(*batch())).logits
        assert relative(model.logits(*batch())[real], expected[real]) < 2e-5
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(their_tokenizer) == len(tokenizer), "no sentinels added to those it has"
    for text in TEXTS[:4]:  # transformers' has no byte fallback: it writes <unk>
        assert their_tokenizer(text).input_ids == tokenizer.encode(text), text
    their_tokenizer.save_pretrained(folder)  # lists tokens in its own way: none too many
    assert (folder / "tokenizer.json").exists()
    convert(folder, tmp_path / "y.pt")
    assert load(tmp_path / "y.pt")[0].config == model.config
    finished = script("model.py", "export", scoring.TOY_BASE, tmp_path / "toy")
    assert "no tokenizer is written" in finished.stdout, "a vocabulary of byte pairs"
    assert len(list((tmp_path / "toy").iterdir())) == 2, "config.json, pytorch_model.bin alone"
    with pytest.raises(ValueError, match="toy: expected an empty or a new folder, found config"):
        export(scoring.TOY_BASE, tmp_path / "toy")  # what lies there might be read instead


def test_trimming_keeps_segmentation_states_and_scores(hub, tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0], encoding="utf-8")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(f"{TEXTS[3]}\n{TEXTS[1]}\n".encode()))
    convert(hub(), tmp_path / "full.pt")
    convert(hub(), tmp_path / "small.pt", trim=[tmp_path / "a.txt", str(tmp_path / "b.csv.gz")])
    (full, tokenizer), (small, trimmed) = load(tmp_path / "full.pt"), load(tmp_path / "small.pt")
    kept = tokenizer.needed(TEXTS[:2])  # a column's name is no text
    assert len(trimmed) == len(kept) == small.config.vocab_size < len(tokenizer)
    for text in TEXTS[:2]:
        ids, few = (torch.tensor([one.encode(text)]) for one in (tokenizer, trimmed))
        assert torch.tensor(kept)[few].equal(ids)
        everywhere = torch.ones_like(ids, dtype=torch.bool)
        with torch.no_grad():
            assert relative(small.encode(few, everywhere), full.encode(ids, everywhere)) < 1e-6
            assert relative(small.logits(few, everywhere, few),
                            full.logits(ids, everywhere, ids)[:, :, kept]) < 1e-6
    for text in TEXTS:  # any text can still be written
        assert trimmed.decode(trimmed.encode(text)) == tokenizer.decode(tokenizer.encode(text))


# select.py beside Python's own select, and the README's commands ----------------------------------
@pytest.mark.parametrize("code", [
    "import torch", "import selectors, subprocess, torch; selectors.DefaultSelector().select(0)",
    "import select; assert not hasattr(select, 'show'); select.select([], [], [], 0)",
    *["import concurrent.futures, threading; together = threading.Barrier(8)\n"  # all at once
      "def own(_): return together.wait(), __import__('select').select\n"
      "list(concurrent.futures.ThreadPoolExecutor(8).map(own, range(8)))"] * 3])
def test_python_finds_its_own_select_from_this_folder(code):
    script("-c", code)


def shape(text):
    """Return the words of each line; numbers are 0, texts, answers, the chosen mark left out."""
    names = "mended|not mended|reference|usual way|usual, --lr 1e-4|this run|upper bound"
    text = re.sub(rf"(?m)^({names})[, ]+[^\d\s-].*", r"\1", text).replace("<- chosen", "")
    return [re.sub(r"-?\d+(\.\d+)?", "0", line).split() for line in text.strip().splitlines()]


def test_the_two_commands_of_the_readme_print_what_it_shows(tmp_path):
    blocks, out = (HERE / "README.md").read_text().split("```")[1::2], "runs/title-en-reg0.1"
    for command, *more in (("train.py --reg 0.1", "--out", tmp_path / "run", "--device", "cpu"),
                           (f"select.py {out}",)):
        shown = next(after for before, after in zip(blocks, blocks[1:]) if command in before)
        finished = script(*command.replace(out, str(tmp_path / "run")).split(), *more)
        found = finished.stdout.replace(str(tmp_path / "run"), out)
        assert shape(found) == shape(shown), f"README, {command}: expected what it prints, {found}"


def test_the_loop_of_the_readme_has_the_loss_of_ours(pair):
    ours, theirs = pair
    (ids, mask, _), one = batch(sentences=6), batch()
    parallel = [{"input_ids": ids[i::3], "attention_mask": mask[i::3].long()} for i in range(3)]
    names = dict(vars(xlrs), torch=torch, model=theirs, batch=inputs(*one), parallel=parallel)
    exec((HERE / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    loss, term = train.objective(ours, one, [x.unflatten(0, (2, 3)) for x in (ids, mask)], -0.5)
    assert term > 0 and names["loss"].item() == pytest.approx((loss + 0.1 * term).item(), rel=1e-5)


# lab/ ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("x, y, rho", [
    ([1, 2, 3, 4], [10, 20, 30, 40], 1), ([1, 2, 3, 4], [4, 3, 2, 1], -1),
    ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),  # 1 - 6 * 4 / (5 * 24)
    ([1, 1, 2, 2], [1, 2, 3, 4], 4 / math.sqrt(20)),  # ranks ½ ½ 2½ 2½ and 0 1 2 3
    ([1, 1, 1], [1, 2, 3], math.nan), ([1], [2], math.nan)])  # a constant, one point: undefined
def test_spearman_is_the_correlation_of_ranks_with_ties_averaged(x, y, rho):
    assert claims.spearman(x, y) == pytest.approx(rho, nan_ok=True)


def test_the_claims_of_four_tiny_runs_are_as_worked_by_hand(tmp_path, capsys):
    def run(reg, seed, *rows):
        base, *checkpoints = [{"step": step, "xlrs": {"de": xlrs}, "dev_loss": dev_loss,
             "test": {"de": dict.fromkeys(claims.SCORES.values(), english) | {"rougeL": rouge}}}
            for step, (xlrs, dev_loss, rouge, english) in enumerate([(0.5, 9, 10, 0), *rows])]
        return dict(task="title", train=["en"], reg=reg, reg_floor=-0.5, freeze=[], lr=5e-4,
                    steps=2, seed=seed, base=base, checkpoints=checkpoints)
    runs = [run(0.0, 1, (0.6, 2.0, 60.0, 10.0), (0.7, 1.0, 40.0, 40.0)),
            run(0.0, 2, (0.6, 2.0, 62.0, 10.0), (0.9, 1.0, 40.0, 40.0)),
            run(0.1, 1, (-0.6, 2.0, 70.0, 5.0), (-0.7, 1.0, 65.0, 10.0)),
            run(0.1, 2, (-0.6, 2.0, 72.0, 5.0), (-0.7, 1.0, 65.0, 10.0))]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    claims.main([str(tmp_path / "runs.json"), "--out", str(tmp_path / "again.json")])
    table = capsys.readouterr().out.split("\n\n")[0].splitlines()[3:]
    assert [line.split("  ")[-1].strip() for line in table] == [
        "open 0.300 ± 1.271",  # Student's t for two seeds, 12.71, times s / √2 = 0.1
        "open 0.300 ± 1.271", "holds -1.00 ± 0.00",
        *["holds 75 ± 0 %", "holds 25.0 ± 0.0", "holds -30.0 ± 0.0"] * 2,
        "holds 50 ± 0 %", "holds 10.0 ± 0.0", "holds -5.0 ± 0.0",  # by XLRS step 1: the floor
        "holds 75 ± 0 %", "holds 25.0 ± 0.0", "holds -30.0 ± 0.0",  # both reach a loss of 1
        "holds 21.0 ± 12.7"]
    assert json.loads((tmp_path / "again.json").read_text()) == runs


@pytest.mark.parametrize("words, shown", [
    ("train.py --help", "\\u03bb"), ("select.py RUN", "\\u0142"), (
        "eval.py toy/base.pt --test ru --test-size 1 --parallel en ru --out RUN/x", "\\u0431")])
def test_a_console_shows_what_it_lacks_as_an_escape(monkeypatch, tmp_path, words, shown):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert shown in script(*words.replace("RUN", str(write_run(tmp_path / "ł"))).split()).stdout


@pytest.mark.parametrize("name", ["grid", "captions"])
def test_the_shipped_runs_give_claims_in_few_lines_and_a_figure(tmp_path, monkeypatch, name):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    finished = script("lab/claims.py", f"lab/results/{name}.json", "--plot", tmp_path / "runs.svg")
    first = finished.stdout.split("\n\n")[0].splitlines()
    assert [line[0] for line in first[3:]] == list("1123333333333334")
    assert finished.stdout.count("\n") <= 100 and "<svg" in (tmp_path / "runs.svg").read_text()


def test_masked_spans_go_to_the_target_in_order():
    source, target = pretrain.mask_spans([10, 11, 12, 13, 14, 15], [(1, 3), (5, 6)], [99, 98, 97])
    assert source == [10, 99, 13, 14, 98, EOS], (
        f"source: expected 99 in place of 11 12, 98 in place of 15, {EOS} (</s>) at the end")
    assert target == [99, 11, 12, 98, 15, EOS], (
        f"target: expected 99 before 11 12, 98 before 15, {EOS} (</s>) at the end")
    assert pretrain.mask_spans([10, 11], [(0, 1)], [99, 98]) == ([99, 11, 1], [99, 10, 1]), (
        "a span at the start: expected nothing before its sentinel")


def test_pretraining_lowers_the_loss_and_leaves_a_base(tmp_path):
    base = tmp_path / "base.pt"
    told = script("lab/pretrain.py", "--steps", 8, 4, "--batch-size", 8, "--out", base)
    assert json.loads(told.stdout)["dev_loss"] < math.log(len(mt5.load(base)[1])) - 1  # a guess's


def test_a_task_of_captions_is_as_made_by_hand():
    assert captions.completion("A man in a red hat sleeps.") == ("A man in", "a red hat sleeps.")
    assert captions.completion("Two dogs play outside.") is None, "too short to be halved"
    caption = "Ein Mann mit Hut schläft dort."
    assert captions.keywords(caption) == ("Mann schläft mit dort", caption)
    assert captions.summary(["A", "A cat on a bed.", "A cat.", "A black cat.", "Cat"]) == (
        "A cat on a bed. A black cat. A cat.", "A")


def test_captions_make_a_base_and_the_tasks_of_the_other_pictures(tmp_path):
    texts = {"en": "A {} dog runs over the green grass.", "de": "Ein {} Hund rennt schnell davon.",
             "fr": "Un chien {} court dans l’herbe.", "cs": "Pes {} běží po zelené trávě."}
    names = ["task1/raw/train", "task1/raw/val", "task1/raw/test_2016_flickr"]
    names += [f"task2/raw/{part}.{i}" for part in ("train", "val", "test_2016") for i in range(6)]
    for name, (lang, text) in itertools.product(names, texts.items()):
        path = tmp_path / "data" / f"{name}.{lang}.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ["" if name[-1] in "123" else text.format(f"{name[10:]} {i}") for i in range(12)]
        path.write_bytes(gzip.compress("\n".join([*lines, ""]).encode()))  # some say nothing
    finished = script("lab/captions.py", tmp_path, tmp_path / "out", "--read", 8, "--steps", 4,
                      "--batch-size", 4)
    assert set(json.loads(finished.stdout.splitlines()[-1])["right language, %"]) == set(texts)
    pairs = data.read_pairs(tmp_path / "out" / "keywords.train.fr.jsonl")
    assert [target for _, target in pairs] == [
        f"Un chien train {i} court dans l’herbe." for i in range(8, 12)], "not those it has read"
    assert len(list((tmp_path / "out").glob("*.jsonl"))) == 3 * (4 + 4 + 2)
