"""All tests: `python -m pytest`. Formulas against numbers that can be redone on paper, properties,
parity with the tools in use, and each script as a user starts it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval as scoring
import model as mt5
import train
import xlrs

HERE = Path(__file__).parent


def script(*words, cwd=HERE):
    """Return the finished process of `python WORDS…`, as a user starts it."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True,
                          text=True, timeout=300)


def fails_in_one_line(finished, *parts):
    """Assert that a script stopped as it should for a user's mistake: one line, exit code 2."""
    assert finished.returncode == 2, finished.stderr
    assert "Traceback" not in finished.stderr
    line = finished.stderr.strip().splitlines()[-1]
    for part in parts:
        assert part in line, line


# xlrs.py ------------------------------------------------------------------------------------------


def test_pooling_is_the_mean_over_real_tokens():
    states = torch.tensor([[[2., 0.], [4., 6.], [9., 9.]]])
    mask = torch.tensor([[True, True, False]])
    assert xlrs.pool(states, mask).tolist() == [[3., 3.]]


def test_pooling_does_not_see_what_stands_in_the_padding():
    states, mask = torch.randn(4, 5, 8), torch.arange(5)[None] < torch.tensor([[5], [3], [1], [2]])
    noisy = torch.where(mask[..., None], states, torch.full_like(states, 1e4))
    assert torch.equal(xlrs.pool(states, mask), xlrs.pool(noisy, mask))


def test_a_sentence_without_tokens_pools_to_zeros():
    assert xlrs.pool(torch.ones(1, 2, 3), torch.zeros(1, 2, dtype=torch.bool)).tolist() == [[0] * 3]


@pytest.mark.parametrize("a, b, cosine", [
    ([1., 0.], [1., 1.], 1 / math.sqrt(2)), ([3., 4.], [4., 3.], 24 / 25),
    ([1., 2.], [-2., -4.], -1.), ([1., 0.], [0., 5.], 0.)])
def test_similarity_is_the_cosine(a, b, cosine):
    found = xlrs.similarity(torch.tensor([a]), torch.tensor([b]))
    assert found.item() == pytest.approx(cosine, abs=1e-6)


def test_xlrs_compares_each_language_with_the_source_sentence_by_sentence():
    source = [[1., 0.], [0., 1.]]
    pooled = torch.tensor([source, source, [[0., 1.], [1., 0.]], [[1., 1.], [0., -1.]]])
    expected = [1., 0., (1 / math.sqrt(2) - 1) / 2]
    assert xlrs.xlrs(pooled).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_regulariser_is_the_mean_cosine_above_the_floor():
    pooled = torch.tensor([[[1., 0.]], [[1., 0.]], [[0., 1.]]])  # cosines 1 and 0
    assert xlrs.regulariser(pooled).item() == pytest.approx(0.5)
    assert xlrs.regulariser(pooled, floor=0.2).item() == pytest.approx(0.3)
    assert xlrs.regulariser(pooled, floor=0.6).item() == 0
    assert xlrs.regulariser(pooled, floor=-1).item() == pytest.approx(1.5)


def test_a_step_against_the_regularisers_gradient_lowers_xlrs_and_moves_every_language():
    pooled = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)) + 1
    pooled.requires_grad_()
    before = xlrs.regulariser(pooled)
    before.backward()
    assert (pooled.grad.abs().sum(dim=(1, 2)) > 0).all()  # the source's side too
    assert xlrs.regulariser(pooled.detach() - 0.1 * pooled.grad) < before


def test_the_regulariser_has_no_gradient_below_its_floor():
    pooled = torch.tensor([[[1., 0.]], [[-1., 0.1]]], requires_grad=True)
    xlrs.regulariser(pooled).backward()
    assert pooled.grad.abs().sum() == 0


def test_the_regulariser_needs_two_languages():
    with pytest.raises(ValueError, match="at least 2, found 1"):
        xlrs.regulariser(torch.ones(1, 2, 3))


def test_the_rule_takes_the_lowest_xlrs_or_the_best_development_score():
    rows = [dict(step=1, xlrs=0.4, dev=-0.9), dict(step=2, xlrs=0.1, dev=-0.5),
            dict(step=3, xlrs=0.1, dev=-0.2)]
    assert xlrs.choose(rows)["step"] == 2  # the earlier of equals
    assert xlrs.choose(rows, by="dev")["step"] == 3


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
    assert russian["ending"] == "В конце концов Анна заплакала и пошла домой с братом."


def test_the_splits_of_the_toy_world_share_no_story_whatever_the_seed():
    found = {split: {json.dumps(story) for seed in range(3)
                     for story in data.stories(split, 300, seed)} for split in data.SPLITS}
    assert sum(map(len, found.values())) == len(set().union(*found.values()))


def test_stories_are_distinct_and_the_same_for_the_same_seed():
    first = data.stories("train", 500, seed=3)
    assert first == data.stories("train", 500, seed=3) != data.stories("train", 500, seed=4)
    assert len({json.dumps(story) for story in first}) == 500


def test_a_pretraining_page_is_in_one_language_or_in_two_by_turns():
    rng = np.random.default_rng(0)
    alone = {len(data.page(rng, ["en", "de"], bilingual=0.0)) for _ in range(20)}
    paired = [data.page(rng, ["en", "de"], bilingual=1.0) for _ in range(20)]
    assert alone == {6} == {len(page) for page in paired}
    known = {lang: scoring.LanguageIdentifier().predict([page[side] for page in paired], ["en", "de"])
             for side, lang in enumerate(["first", "second"])}
    assert sum(a != b for a, b in zip(known["first"], known["second"])) >= 18


# data.py: files, batches, masks -------------------------------------------------------------------


def test_pairs_are_read_from_every_layout(tmp_path):
    pairs = [("Größe, \"so\"", "ขนาด"), ("мир", "दुनिया")]
    jsonl, tsv, csv_ = (tmp_path / name for name in ("a.jsonl", "a.tsv", "a.csv"))
    jsonl.write_text("".join(json.dumps({"id": 1, "text": s, "summary": t}) + "\n"
                             for s, t in pairs), encoding="utf-8")
    tsv.write_text('id\ttext\tsummary\n1\t"Größe, ""so"""\tขนาด\n2\tмир\tदुनिया\n', encoding="utf-8")
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
    ("a.jsonl", b'{"source": "a", "target": "b"}\n{"source": "a"\n', ["a.jsonl:2", "JSON object"]),
    ("a.jsonl", b'{"source": "a", "target": null}\n', ["a.jsonl:1", "'target'", "None"]),
    ("a.jsonl", b'{"text": "a", "target": "b"}\n', ["a.jsonl:1", "source and target", "--fields"]),
    ("a.jsonl", b'[1]\n', ["a.jsonl:1", "list"]),
    ("a.tsv", b"source\ttarget\na\t\n", ["a.tsv:2", "'target'"]),
    ("a.tsv", b"text\ttarget\na\tb\n", ["a.tsv:1", "columns source and target"]),
    ("a.csv", b"source,target\n", ["a.csv", "only a header"]),
    ("a.csv", b"", ["a.csv", "empty file"]),
    ("a.csv", b"source,target\na,\xff\n", ["a.csv:2", "UTF-8", "0xff"]),
    ("a.txt", b"x\n", ["a.txt", ".jsonl"])])
def test_a_reader_names_file_and_line_of_what_is_wrong(tmp_path, name, content, parts):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        data.read_pairs(path)
    for part in parts:
        assert part in str(caught.value)


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
    assert source == [10, 99, 13, 14, 98, data.EOS]
    assert target == [99, 11, 12, 98, 15, data.EOS]


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
    assert scores["task"] == "title" and set(scores["xlrs"]) == {"de", "ru"}
    for kinds in scores["scores"].values():
        assert {"rougeL", "wrong_language", "source_language", "mixed", "n"} <= set(kinds)
    outputs = (folder / "outputs.jsonl").read_text().splitlines()
    assert len(outputs) == 3 * 8 and json.loads(outputs[0])["language"] == "en"
    assert "mean but en" in finished.stdout and "training" in finished.stderr


def test_the_log_keeps_the_two_parts_of_the_loss_and_xlrs_apart(small_run):
    folder, _ = small_run
    for row in rows(folder, "train"):
        assert row["reg"] == pytest.approx(max(0, row["xlrs"]))
        assert row["loss"] > 0 and row["lr"] == pytest.approx(1e-3 * min(1, row["step"] / 2))
    assert [row["step"] for row in rows(folder, "eval")] == [0, 2, 4, 6]


def test_a_run_lowers_the_loss_and_the_regulariser_lowers_xlrs(small_run, tmp_path):
    folder, _ = small_run
    finished = script("train.py", "--reg", 0, *SMALL, "--out", tmp_path / "plain")
    assert finished.returncode == 0, finished.stderr
    mean = {name: [scoring.mean(row["xlrs"].values()) for row in rows(path, "eval")]
            for name, path in (("reg", folder), ("plain", tmp_path / "plain"))}
    assert mean["reg"][0] == mean["plain"][0] and mean["reg"][-1] < mean["plain"][-1]
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
    whole, resumed = (mt5.read_checkpoint(path / "step_000006.pt") for path in (folder, cut_off))
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name
    assert [row["step"] for row in rows(cut_off, "train")] == [1, 2, 3, 4, 5, 6]
    assert (cut_off / "scores.json").read_text() == (folder / "scores.json").read_text()


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
        (tmp_path / f"{lang}.jsonl").write_text("".join(json.dumps({"text": line, "title": line[:5]})
                                                        + "\n" for line in lines))
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
    (["--device", "cuda"], ["no GPU"]), (["--resume"], ["--out"])])
def test_train_answers_a_mistake_in_one_line(tmp_path, capsys, monkeypatch, words, parts):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
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
    fails_in_one_line(script("train.py", *SMALL, "--out", folder), "holds a run already", "--resume")
    fails_in_one_line(script("train.py", *SMALL, "--reg", 0.2, "--out", folder, "--resume"),
                      "--reg was 0.1", "now it is 0.2")


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


def test_an_interval_is_students():
    assert scoring.interval([1.0, 2.0, 3.0]) == "2.0 ± 2.5"  # 4.30 * 1 / sqrt(3)
    assert scoring.interval([5.0]) == "5.0"


def test_a_loop_is_three_tokens_that_come_again():
    assert scoring.loops("and the hat and the hat and the hat")
    assert not scoring.loops("and the hat and the bag") and not scoring.loops("")
