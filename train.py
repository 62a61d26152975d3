"""Fine-tunes mT5 on one language and watches, or regularises, its representation of others.

    loss = cross-entropy on the task + λ · max(0, mean cosine of source and other languages − floor)

`python train.py --reg 0.1` shows the effect in the toy world. `--pretrain` rebuilds the toy base.

Shapes: B sentences, S source tokens, T target tokens, L languages, D width; N processes.
"""

import argparse
import contextlib
import datetime
import hashlib
import itertools
import json
import math
import os
import platform
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import eval as scoring
from model import MT5, SIZES, MT5Config, load, read_checkpoint, save
from xlrs import pool, regulariser, xlrs

TOY_BASE = data.TOY / "base.pt"
TOY_SIZE = MT5Config(d_model=128, d_kv=32, d_ff=256, num_layers=2, num_decoder_layers=2,
                     num_heads=4, dropout_rate=0.0)
PARTS = ("embedding", "encoder", "decoder", "head")
UNSEEN = 10**6  # number of a group beyond any step (data.batches): pre-training's development set


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Fine-tune mT5 in one language; measure and regularise XLRS.",
        epilog="TEXT is LANG for the toy world, LANG=FILE, or LANG=SOURCE_FILE,TARGET_FILE.")
    positive, share = scoring.bounded(int, 1), scoring.bounded(float, 0, 1)
    task = parser.add_argument_group("task and text")
    task.add_argument("--task", choices=[*data.TASKS, "files"],
                      help="task of the toy world (default completion; files where --train names "
                           "some)")
    task.add_argument("--train", nargs="+", metavar="TEXT", default=["en"],
                      help="training pairs; the first language is the source (default en)")
    task.add_argument("--dev", nargs="+", metavar="TEXT",
                      help="development pairs in the source language (default, toy: that language)")
    task.add_argument("--test", nargs="+", metavar="TEXT",
                      help="test pairs (default, toy: every toy language)")
    task.add_argument("--parallel", nargs="+", metavar="TEXT",
                      help="parallel text, for XLRS and the regulariser: aligned lines, a file a "
                           "language, first the source (default, toy: every toy language)")
    task.add_argument("--train-size", type=positive, metavar="N",
                      help="training pairs a language (default: all of a file, 4000 toy stories)")
    task.add_argument("--test-size", type=positive, metavar="N",
                      help="test texts a language (default: all of a file, 200 toy stories)")
    task.add_argument("--fields", metavar="SOURCE,TARGET", default="source,target",
                      help="column names in JSONL, TSV and CSV files (default source,target)")
    task.add_argument("--max-source", type=scoring.bounded(int, 2), default=512, metavar="N",
                      help="longest source in tokens; longer ones are cut (default %(default)s)")
    task.add_argument("--max-target", type=scoring.bounded(int, 2), metavar="N",
                      help="longest target in tokens, also in generation (default 64, toy 32)")
    task.add_argument("--num-beams", type=positive, default=1, metavar="N",
                      help="beams in generation (default %(default)s: greedy)")
    model = parser.add_argument_group("model")
    model.add_argument("--init", metavar="CHECKPOINT",
                       help="checkpoint to start from, or 'new': random weights and a vocabulary "
                            "trained on --train and --parallel (default the toy base; with "
                            "--pretrain new)")
    model.add_argument("--size", choices=["toy", *SIZES], default="toy",
                       help="size of a new model (default toy)")
    model.add_argument("--vocab-size", type=scoring.bounded(int, 500), default=3200, metavar="N",
                       help="pieces of a new vocabulary (default %(default)s)")
    method = parser.add_argument_group("method")
    method.add_argument("--reg", type=scoring.bounded(float, 0), default=0.0, metavar="λ",
                        help="weight of the regulariser, nats per cosine of 1 (default 0: none)")
    method.add_argument("--reg-floor", type=scoring.bounded(float, -1, 1), default=scoring.FLOOR,
                        metavar="COSINE", help="similarity that is low enough, for the "
                        "regulariser and for choosing (default %(default)s; -1: no floor)")
    method.add_argument("--reg-batch", type=positive, default=8, metavar="N",
                        help="parallel sentences a step, each in every language (default "
                             "%(default)s)")
    method.add_argument("--freeze", nargs="+", choices=PARTS, default=[], metavar="PART",
                        help=f"parts that do not learn: {', '.join(PARTS)} (default none)")
    method.add_argument("--mix", nargs="+", default=[], metavar="TEXT",
                        help="unlabelled text mixed in as span corruption: LANG for toy pages, or "
                             "LANG=FILE of lines (default none)")
    method.add_argument("--mix-share", type=share, default=0.25, metavar="SHARE",
                        help="share of examples that are of --mix (default %(default)s)")
    method.add_argument("--pretrain", action="store_true",
                        help="span corruption instead of a task; --train names the text")
    method.add_argument("--bilingual", type=share, default=0.5, metavar="SHARE",
                        help="share of bilingual pages in toy pre-training (default %(default)s)")
    steps = parser.add_argument_group("optimisation")
    steps.add_argument("--lr", type=scoring.bounded(float, 0), metavar="LR",
                       help="AdamW's learning rate (default 5e-4, with --pretrain 2e-3; 1e-4 is "
                            "usual for mT5-small)")
    steps.add_argument("--steps", type=positive, metavar="N",
                       help="updates (default 100, with --pretrain 12000)")
    steps.add_argument("--warmup", type=scoring.bounded(int, 0), default=20, metavar="N",
                       help="steps of linear warm-up (default %(default)s)")
    steps.add_argument("--batch-size", type=positive, default=32, metavar="N",
                       help="pairs a step (default %(default)s)")
    steps.add_argument("--dropout", type=scoring.bounded(float, 0, 0.99), metavar="P",
                       help="dropout in training, a probability (default that of the checkpoint)")
    steps.add_argument("--seed", type=scoring.bounded(int, 0, 2**63 - 1), default=0, metavar="N",
                       help="of all that is random (default %(default)s)")
    run = parser.add_argument_group("run")
    run.add_argument("--eval-every", type=positive, metavar="N",
                     help="steps between checkpoints (default: a tenth of --steps)")
    run.add_argument("--eval-size", type=positive, default=100, metavar="N",
                     help="sentences a language scored at each checkpoint (default %(default)s)")
    run.add_argument("--keep", type=positive, metavar="N",
                     help="keep the last N checkpoints, the base and the best (default all)")
    run.add_argument("--out", metavar="FOLDER", help="run folder (default runs/NAME)")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out")
    run.add_argument("--device", help="cpu, cuda, … (default cuda where there is one)")
    run.add_argument("--dtype", type=scoring.precision, metavar="float32|bfloat16",
                     help="precision of the matrix products; weights stay float32 (default "
                          "bfloat16 on a GPU that has it, else float32; float16 is not offered: "
                          "mT5's states overflow it)")
    run.add_argument("--compile", action="store_true", help="compile the model (torch.compile)")
    args = parser.parse_args(argv)
    if args.resume and not args.out:
        parser.error("--resume: expected --out FOLDER, the run to go on with")
    if args.pretrain and args.mix:
        parser.error("--mix: of no use with --pretrain; name the text with --train")
    return complete(args)


def complete(args):
    """Return args with the defaults that depend on other arguments."""
    first = args.train[0]
    args.task = args.task or ("files" if "=" in first else
                              "title" if args.pretrain else "completion")  # title: whole stories
    args.init = args.init or ("new" if args.pretrain else str(TOY_BASE))
    if args.lr is None:
        args.lr = 2e-3 if args.pretrain else 5e-4
    args.steps = args.steps or (12000 if args.pretrain else 100)
    args.eval_every = args.eval_every or max(1, args.steps // 10)
    args.max_target = args.max_target or (64 if "=" in first else 32)
    if "=" not in first:
        everywhere = [first, *(lang for lang in data.TOY_LANGUAGES if lang != first)]
        if args.pretrain and len(args.train) == 1:
            args.train = everywhere
        args.dev = args.dev or [first]
        args.test = args.test or everywhere
        args.parallel = args.parallel or everywhere
    return args


def train(args):
    """The whole of a run: load, learn, measure, choose, report."""
    device, dtype, why = scoring.pick_device(args.device, args.dtype)
    rank, world_size = join(device, args)
    if rank == 0:
        print(f"device {device}, {dtype} ({why})")
    torch.manual_seed(args.seed)
    texts = data.load_texts(args)
    scoring.identifier().choice(data.languages(args))  # ValueError for a language it doesn't know
    model, tokenizer = start(args, texts)
    model.to(device)
    if args.compile:
        model.forward, model.encode = torch.compile(model.forward), torch.compile(model.encode)
    trainable = freeze(model, args.freeze)
    optimizer = torch.optim.AdamW(trainable, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    run = Run(args, model, tokenizer, optimizer, rank, device=str(device), dtype=dtype, why=why)
    objective = Objective(model, args.reg_floor)
    if world_size > 1:
        objective = DistributedDataParallel(objective)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    draw = draw_examples(texts, tokenizer, args)
    batches = data.batches(draw, args.batch_size, args.seed, run.done)
    parallel_batches = (data.parallel_batches(texts.parallel, tokenizer, args, run.done)
                        if args.reg else itertools.repeat(None))

    def measure_if_due():
        """Save and measure the present checkpoint, if one is due that the log lacks."""
        if run.lacks_measurement():
            run.save()
            run.log(kind="eval", step=run.done,
                    **measure(model, tokenizer, texts, draw, args, autocast))
            run.remove_old_checkpoints()

    try:
        measure_if_due()
        steps = tqdm(range(run.done + 1, args.steps + 1), initial=run.done, total=args.steps,
                     desc="training", disable=rank > 0)
        for step, batch, parallel in zip(steps, batches, parallel_batches):
            began = time.perf_counter()
            model.train()
            torch.manual_seed(seed_of(args.seed, step, rank))  # of this step's dropout
            optimizer.param_groups[0]["lr"] = lr = args.lr * schedule(step, args)
            with autocast:
                loss, term, similarity = objective(rows_of(batch, device),
                                                   rows_of(parallel, device))
            total = loss + args.reg * term
            optimizer.zero_grad()
            (world_size * total).backward()  # DistributedDataParallel divides by it
            norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            loss, term, similarity, norm = (
                x.item() for x in (summed(loss), term, similarity, norm))
            if not math.isfinite(loss + norm):
                run.refuse(step, batch, loss=loss, norm=norm, lr=lr)
            with undisturbed():
                optimizer.step()
                run.done = step
                run.log(kind="train", step=step, loss=loss, reg=term, lr=lr,
                        xlrs=similarity if args.reg else None,
                        tokens_per_s=int(batch[1].sum() / (time.perf_counter() - began)))
            steps.set_postfix(loss=f"{loss:.3f}", refresh=False)
            measure_if_due()
    except (KeyboardInterrupt, *lost_contact()):  # of SIGTERM or Ctrl-C, see main()
        with undisturbed():
            run.save()  # the last finished step
        raise
    if rank > 0:
        return
    if args.pretrain:
        save(run.folder / "base.pt", model, tokenizer)
        print(f"wrote {run.folder / 'base.pt'}")
    else:
        scoring.choose_checkpoint(run.folder)
        if texts.test:
            scoring.score_run(run.folder, texts.test, args, device, autocast)


class Objective(torch.nn.Module):
    """The two parts of what a step minimises, `loss = cross-entropy + λ · term`."""

    def __init__(self, model, floor):
        super().__init__()
        self.model, self.floor = model, floor

    def forward(self, batch, parallel):
        """Return (cross-entropy in nats a token, the regulariser's term, XLRS), scalars.

        batch: (input_ids (B, S), mask (B, S), labels (B, T)); parallel: (input_ids (L, B, S),
        mask), the source language first, or None. In one process these are plain means; of several
        each has its rows, the cross-entropy is its share of the mean, the other two are of all.
        """
        count = (batch[2] != data.IGNORE).sum()
        loss = self.model(*batch) * (count / summed(count))
        if parallel is None:
            return loss, loss.new_zeros(()), loss.new_zeros(())
        input_ids, mask = parallel
        rows = mask.flatten(0, 1)  # (L * B, S)
        states = self.model.encode(input_ids.flatten(0, 1), rows)  # (L * B, S, D)
        pooled = gathered(pool(states, rows).unflatten(0, mask.shape[:2]))  # (L, B, D)
        return loss, regulariser(pooled, self.floor), xlrs(pooled).mean()


def start(args, texts):
    """Return (model, tokenizer): of the checkpoint --init, or new ones."""
    if args.init == "new":
        tokenizer = data.train_tokenizer(vocabulary_text(texts), args.vocab_size)
        model = MT5(replace(SIZES.get(args.size, TOY_SIZE), vocab_size=len(tokenizer)))
        copy_at_first(model)
    else:
        model, tokenizer = load(args.init)
    if args.dropout is not None:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = args.dropout
    return model, tokenizer


def vocabulary_text(texts):
    """Yield the lines that a new vocabulary is trained on: --train and --parallel."""
    for language, content in texts.train.items():
        if content is None:
            for story in data.stories("pretrain", 3000):
                yield from data.document(story, language)
        else:
            for row in content:
                yield from [row] if isinstance(row, str) else row
    for sentences in texts.parallel.values():
        yield from sentences


def copy_at_first(model):
    """Let each attention start as a copier: O = Vᵀ with orthogonal V, where they are square (ours).

    What a token attends to then arrives unchanged, so that a small model learns to copy sooner.
    """
    for module in model.modules():
        if hasattr(module, "v") and module.v.in_features == module.v.out_features:
            torch.nn.init.orthogonal_(module.v.weight)
            with torch.no_grad():
                module.o.weight.copy_(module.v.weight.T)


def freeze(model, parts):
    """Return the parameters that learn, after those of the named parts have been stopped."""
    if set(parts) == set(PARTS):
        raise ValueError("--freeze: expected a part that learns, found all four frozen")
    for part in parts:
        getattr(model, part).requires_grad_(False)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def schedule(step, args):
    """Return the learning rate's factor: a warm-up, then 1; in pre-training a cosine to 5 %."""
    rise = min(1.0, step / max(1, args.warmup))
    if not args.pretrain:
        return rise
    past = max(0, step - args.warmup) / max(1, args.steps - args.warmup)
    return rise * (0.525 + 0.475 * math.cos(math.pi * past))


def draw_examples(texts, tokenizer, args):
    """Return the function from which `data.batches` draws the training examples."""
    if args.pretrain:
        return data.corruption(data.pages(texts.train, args.bilingual), tokenizer, args)
    pairs = [pair for language in texts.train.values() for pair in language]
    draw = data.epochs(pairs, lambda pair: data.encode_pair(pair, tokenizer, args), args.seed)
    if not args.mix:
        return draw
    unlabelled = data.corruption(data.pages(texts.mix, bilingual=0), tokenizer, args)
    return data.blend(draw, unlabelled, args.mix_share)


@torch.no_grad()
def measure(model, tokenizer, texts, draw, args, autocast):
    """Return what is known of a checkpoint: XLRS by language, development and test scores."""
    model.eval()
    row = {}
    with autocast:
        if texts.held_out:
            vectors = scoring.vectors_by_language(model, tokenizer, texts.held_out, args)
            row["xlrs"] = scoring.language_similarity(vectors)
            row["xlrs_mismatched"] = scoring.language_similarity(vectors, shift=1)
            row["retrieval"] = {lang: scoring.retrieval(vectors[texts.source], vectors[lang])
                                for lang in row["xlrs"]}
        if args.pretrain:
            row["dev_loss"] = scoring.mean_loss(model, draw(UNSEEN, 256))
        if texts.dev:
            pairs = texts.dev[texts.source][:args.eval_size]
            examples = [data.encode_pair(pair, tokenizer, args) for pair in pairs]
            row["dev_loss"] = scoring.mean_loss(model, examples)
            scores, _ = scoring.score_tests(model, tokenizer, {texts.source: pairs}, args)
            row["dev_rougeL"] = scores[texts.source]["rougeL"]
        if texts.test:
            few = {lang: pairs[:args.eval_size] for lang, pairs in texts.test.items()}
            row["test"], _ = scoring.score_tests(model, tokenizer, few, args)
    return row


class Run:
    """A run's folder: args.json, log.jsonl and a `step_NNNNNN.pt` at each measurement.

    done: how many steps are finished. Of several processes only that of rank 0 writes.
    """

    def __init__(self, args, model, tokenizer, optimizer, rank, **facts):
        self.args, self.model, self.tokenizer, self.optimizer = args, model, tokenizer, optimizer
        self.rank, self.done, self.measured = rank, 0, set()
        self.folder = Path(args.out) if args.out else free_folder(args)
        self.log_path = self.folder / "log.jsonl"
        exists = (self.folder / "args.json").exists()
        if exists and not args.resume and rank == 0:
            raise ValueError(f"{self.folder} holds a run already: go on with --resume, or choose "
                             "another --out")
        if exists and args.resume:
            self.compare_arguments()
            self.resume()
        elif rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            facts |= {"versions": {"python": platform.python_version(), "torch": torch.__version__},
                      "parent": file_hash(args.init)}
            data.write_file(self.folder / "args.json",
                            json.dumps({"arguments": vars(args), **facts}, indent=1) + "\n")

    def compare_arguments(self):
        """Raise ValueError where the arguments are not those of the run that goes on."""
        old, new = data.read_arguments(self.folder), vars(self.args)
        for name in sorted(set(old) | set(new)):
            if old.get(name) != new.get(name) and name not in ("resume", "out", "device"):
                raise ValueError(f"{self.folder}: --{name.replace('_', '-')} was {old.get(name)}, "
                                 f"now it is {new.get(name)}; resume with the same arguments")

    def resume(self):
        """Restore the last checkpoint, if there is one yet, and cut the log off after it."""
        found = sorted(self.folder.glob("step_*.pt"))
        if found:
            state = read_checkpoint(found[-1])
            try:
                self.model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
                self.done = int(state["step"])
            except (KeyError, TypeError, ValueError, RuntimeError):
                raise ValueError(f"{found[-1]}: expected a checkpoint of this run, found another "
                                 "model or no optimiser's state; remove it, and --resume goes on "
                                 "from the one before") from None
        if self.rank > 0:
            return
        rows = data.read_log(self.folder) if found else []
        rows = [row for row in rows if row["step"] <= self.done]
        self.measured = {row["step"] for row in rows if row["kind"] == "eval"}
        data.write_file(self.log_path, "".join(json.dumps(row) + "\n" for row in rows))
        for left_by_a_kill in self.folder.glob(".*.tmp"):
            left_by_a_kill.unlink()

    def log(self, **row):
        """Append a row to the log; rows of measurements reach the disk before this returns."""
        if self.rank > 0:
            return
        with open(self.log_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            if row["kind"] == "eval":
                self.measured.add(row["step"])
                file.flush()
                os.fsync(file.fileno())

    def lacks_measurement(self):
        """Return whether this process is to measure the model now."""
        due = self.done % self.args.eval_every == 0 or self.done == self.args.steps
        return self.rank == 0 and due and self.done not in self.measured

    def save(self):
        """Write the checkpoint of the last finished step, with all that a resume needs.

        No random state: whatever is random in a step depends on the seed and its number alone.
        """
        path = self.folder / f"step_{self.done:06d}.pt"
        if self.rank == 0 and not path.exists():
            save(path, self.model, self.tokenizer, step=self.done,
                 optimizer=self.optimizer.state_dict())

    def remove_old_checkpoints(self):
        """Keep the last --keep checkpoints, the base, and the best by either rule."""
        if not self.args.keep:
            return
        _, rows = scoring.read_run(self.folder)
        best = {scoring.best_row(rows, by, self.args.reg_floor)["step"]
                for by, field in scoring.MEASURES.items() if len(rows) > 1 and field in rows[0]}
        for path in sorted(self.folder.glob("step_*.pt"))[1:-self.args.keep]:
            if int(path.stem.removeprefix("step_")) not in best:
                path.unlink()

    def refuse(self, step, batch, lr, **numbers):
        """Write the batch of a step that is not finite, and raise ValueError; it was not taken."""
        path = self.folder / "nonfinite.jsonl"
        texts = [{"source": self.tokenizer.decode(source), "target": self.tokenizer.decode(target)}
                 for source, target in zip(batch[0].tolist(), batch[2].tolist())]
        if self.rank == 0:
            data.write_file(path, "".join(json.dumps(text) + "\n" for text in texts))
        found = ", ".join(f"{name} {number}" for name, number in numbers.items())
        raise ValueError(f"step {step}: expected finite numbers, found {found} at learning rate "
                         f"{lr:g}; its {len(texts)} texts are in {path}, the checkpoints before "
                         "stand; try a lower --lr")


def free_folder(args):
    """Return a folder below runs/ that does not hold a run yet, named after the arguments."""
    languages = "-".join(data.by_language(args.train))
    name = "pretrain" if args.pretrain else f"{args.task}-{languages}-reg{args.reg:g}"
    for number in itertools.count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if not folder.exists():
            return folder


def file_hash(path):
    """Return the SHA-256 of a file in hexadecimal, None of a new model."""
    if path == "new":
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seed_of(*numbers):
    """Return one seed for torch of several numbers ≥ 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# Being stopped.

@contextlib.contextmanager
def undisturbed():
    """Let a signal that arrives inside wait until its end, then raise KeyboardInterrupt."""
    arrived = []
    old = {number: signal.signal(number, lambda *_: arrived.append(True))
           for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        if arrived:
            raise KeyboardInterrupt


# Several processes, started by torchrun. Each draws the same batch and takes every N-th row of it;
# DistributedDataParallel makes the mean of their gradients.

def join(device, args):
    """Return (rank of this process, number of processes), after all have found each other."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count > 1:
        if args.batch_size < count or args.reg_batch % count:
            raise ValueError(f"expected --batch-size of at least {count} and a --reg-batch that "
                             f"{count} divides, the number of processes, found {args.batch_size} "
                             f"and {args.reg_batch}")
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        patience = datetime.timedelta(days=1)  # while one process measures the others wait
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                       timeout=patience)
    return process()


def process():
    """Return (rank of this process, number of processes)."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def lost_contact():
    """Return the errors that tell of another process's death."""
    return (RuntimeError,) if distributed.is_initialized() else ()


def rows_of(tensors, device):
    """Return this process's rows, B / N of (…, B, S) tensors, on the device; None of None."""
    rank, count = process()
    return tensors and [tensor[..., rank::count, :].to(device) for tensor in tensors]


def summed(x):
    """Return the sum over all processes of a tensor, without gradient."""
    x = x.detach().clone()
    if distributed.is_initialized():
        distributed.all_reduce(x)
    return x


def gathered(pooled):
    """Return the vectors (L, B, D) of all processes, this one's with their gradient."""
    if not distributed.is_initialized():
        return pooled
    rank, count = process()
    parts = [torch.empty_like(pooled) for _ in range(count)]
    distributed.all_gather(parts, pooled.detach().contiguous())
    parts[rank] = pooled
    return torch.cat(parts, dim=1)


def main(argv=None):
    args = parse_args(argv)
    folder = args.out or "FOLDER"
    # Both raise KeyboardInterrupt; a shell starts background jobs with SIGINT ignored.
    old = {number: signal.signal(number, signal.default_int_handler)
           for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        train(args)
    except (ValueError, OSError) as error:
        fail(error)
    except torch.OutOfMemoryError:
        fail("the device's memory is full; try a smaller --batch-size, --reg-batch, --max-source "
             "or --max-target, or a vocabulary cut down by: python model.py convert --trim")
    except lost_contact() as error:
        fail(f"lost contact with another process ({str(error).partition(chr(10))[0]}); start all "
             f"again with --out {folder} --resume")
    except KeyboardInterrupt:
        fail(f"stopped after the last finished step; go on with the same command, --out {folder} "
             "and --resume", code=130)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def fail(message, code=2):
    """End the process with the message and exit code; 2 is a user's mistake."""
    print(f"train.py: {message}", file=sys.stderr)
    raise SystemExit(code) from None


if __name__ == "__main__":
    main()
