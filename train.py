"""Fine-tunes mT5 on one language or more and watches, or regularises, its representation of others.

    loss = cross-entropy on the task + λ · max(0, Σ over the other languages of (XLRS − floor))

`python train.py --reg 0.1` shows the effect in the toy world.

Shapes: B sentences, S source tokens, T target tokens, L languages, D width.
"""

import os

# Before torch: threads that wait sleep, or two runs would slow each other more than tenfold; but
# they look 2,000 times before, or a run that is alone would take half as long again. What the
# user has set stays.
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000", **os.environ}

import argparse
import contextlib
import datetime
import functools
import itertools
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

import data
import eval as scoring
from model import load, read_checkpoint, save
from xlrs import FLOOR, pool, regulariser

PARTS = ("embedding", "encoder", "decoder", "head")
FULL = "out of memory|ALLOC_FAILED|allocate memory"  # how devices say that their memory is full
HELD = contextlib.ExitStack()  # what main() lets go of at its end: the lock on a run's folder
MAY_CHANGE = ("steps", "eval_every", "out", "resume", "device", "compile", "recompute")


def train(args):
    """The whole of a run: load, learn, measure, choose, report."""
    rank, processes = join_processes()
    device, autocast = scoring.pick_device(args)
    texts = data.load_texts(args)
    scoring.say_unidentified(data.languages(args))
    model, tokenizer = load(args.init or scoring.TOY_BASE)
    learner, trainable = prepare(model, args, device, processes)
    optimizer = torch.optim.AdamW(trainable, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    folder = claim_folder(args, rank)
    start = resume(folder, model, optimizer, rank, args.steps) if args.resume else 0
    batches = data.batches(texts.train, tokenizer, args, start)
    parallel_batches = (data.parallel_batches(texts.parallel, tokenizer, args, start)
                        if args.reg else itertools.repeat([]))  # nothing: no term
    try:
        for step in tqdm(range(start, args.steps + 1), desc="training", initial=start,
                         total=args.steps, disable=rank > 0):
            # step: updates done. Also at start: a last.pt of a full memory has no measurement yet.
            if rank == 0 and (step % args.eval_every == 0 or step in (start, args.steps)):
                save(folder / f"step_{step:06d}.pt", model, tokenizer)
                log(folder, "eval", step, **measure(model, tokenizer, texts, args, autocast))
                save_last(folder, model, tokenizer, optimizer, step)
                told = scoring.progress(args, scoring.read_run(folder)[1][-1])  # this measurement
                tqdm.write("  ".join(f"{name} {text}" for name, text in told.items()))
            if step == args.steps:
                break  # the last round only measures
            # Dropout, too, depends on seed, step and rank alone.
            torch.manual_seed(np.random.default_rng([args.seed, step, rank]).integers(2**63))
            lr = optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / args.warmup)
            batch = [rows[rank::processes].to(device) for rows in next(batches)]
            parallel = [rows[rank::processes].to(device) for rows in next(parallel_batches)]
            with autocast:
                loss, term = objective(learner, batch, parallel, args.reg_floor)
            (loss + args.reg * term).backward()
            norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            loss, term, norm = torch.stack([loss, term, norm]).tolist()  # one wait for the device
            if not math.isfinite(loss + term + norm):
                raise ValueError(f"step {step + 1}, rate {lr:g}: expected finite numbers, found "
                                 f"loss {loss}, term {term}, norm {norm}; try a lower --lr")
            optimizer.step()
            optimizer.zero_grad()  # now, so that the next forward pass has their memory
            if rank == 0:
                log(folder, "train", step + 1, loss=loss, term=term, lr=lr)
    except RuntimeError as error:
        # Not in a first step: AdamW makes its states there, and last.pt would get some of them.
        if rank == 0 and step > start and re.search(FULL, str(error)):
            save_last(folder, model, tokenizer, optimizer, step)
        raise
    optimizer.state.clear()
    for weight in model.parameters():
        weight.data = weight.new_empty(0)  # memory for the models that the report loads
    if rank == 0:
        scoring.choose_checkpoint(folder)  # by XLRS, else dev loss, else the last; never the base
        if texts.test:
            scoring.score_run(folder, texts.test, texts.held_out, args, device, autocast)
    if processes > 1:
        torch.distributed.destroy_process_group()


def objective(model, batch, parallel, floor):
    """Return the two parts of `loss = cross-entropy + λ · term`, scalars.

    batch: (input_ids (B, S), mask (B, S), labels (B, T)); parallel: (input_ids (B, L, S), mask
    (B, L, S)), sentences in each language, the source first, or nothing: then the term is 0.
    """
    loss = model(*batch)
    if not parallel:
        return loss, torch.zeros_like(loss)
    input_ids, mask = (tensor.flatten(0, 1) for tensor in parallel)  # (B * L, S)
    pooled = pool(model.encode(input_ids, mask), mask).unflatten(0, parallel[0].shape[:2])
    return loss, regulariser(pooled.transpose(0, 1), floor)  # of (B, L, D) as (L, B, D)


def measure(model, tokenizer, texts, args, autocast):
    """Return what is known of a checkpoint: XLRS by language, development and test scores."""
    model.eval()
    row, source = {}, data.languages(args)[0]
    with autocast:
        if texts.held_out:
            row["xlrs"] = scoring.similarities(model, tokenizer, texts.held_out, args)
        if texts.dev:
            examples = [data.encode_pair(pair, tokenizer, args) for pair in texts.dev[source]]
            row["dev_loss"] = scoring.mean_loss(model, examples)
        if texts.test:
            few = {lang: pairs[:args.eval_size] for lang, pairs in texts.test.items()}
            row["test"], _ = scoring.score_tests(model, tokenizer, few, args)
    model.train()
    return row


def prepare(model, args, device, processes):
    """Return (what the loss calls: the model, or DDP around it; the weights that learn)."""
    model.to(device).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and args.dropout is not None:
            module.p = args.dropout
    for part in args.freeze:
        getattr(model, part).requires_grad_(False)
    if args.recompute:  # compute activations again in the backward pass instead of keeping them
        for layer in (*model.encoder.layers, *model.decoder.layers):
            layer.forward = functools.partial(recompute, layer.forward, use_reentrant=False)
    if args.compile:
        model.forward, model.encode = torch.compile(model.forward), torch.compile(model.encode)
    learner = model
    if processes > 1:
        learner = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        learner.encode = model.encode  # past DDP: it waits until both parts' gradients are summed
    return learner, [weight for weight in model.parameters() if weight.requires_grad]


# Several processes, started by torchrun. Each draws the same batch and takes its rows of it;
# torch's DistributedDataParallel makes the mean of their gradients. So the loss is the mean of the
# processes' means, where one process takes one mean over all tokens and one max(0, …). The log has
# the first process's.

def join_processes():
    """Return (rank of this process, number of processes), after all have found each other."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1:
        return 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(timeout=datetime.timedelta(days=1))  # as one measures
    return torch.distributed.get_rank(), processes


# The run's folder: args.json, log.jsonl, step_NNNNNN.pt at each measurement, and last.pt, from
# which --resume goes on. What is random in a step depends on --seed, the step, the rank and the
# number of processes alone: on the same CPU a run that was stopped ends with the weights of an
# unbroken one, bit for bit. A GPU sums the loss's gradient in no fixed order (index_add_), so that
# there no two runs are quite the same.

def claim_folder(args, rank):
    """Return the run's folder with its arguments in it; ValueError where it has a run's already.

    To --resume with the same arguments goes on. No other train.py can claim the folder until main()
    or this process ends, by a kill too. Only the first process claims; others but read it.
    """
    name = f"runs/{args.task}-{'-'.join(data.files_by_language(args.train))}-reg{args.reg:g}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    folder = Path(args.out or next(path for path in names if not Path(path).exists()))
    if rank > 0:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl  # Windows has none, and some network disks have no locks
        HELD.callback(os.close, descriptor := os.open(folder, os.O_RDONLY))
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder}: another process is at work on this run; let it end") from None
    except (ImportError, OSError) as error:
        print(f"{folder} cannot be locked ({error}): do not resume a run that is going on")
    if any(folder.iterdir()):
        if not args.resume:
            raise ValueError(f"{folder}: holds files already; add --resume, or name another --out")
        old = vars(scoring.read_run(folder)[0])
        changed = [f"{flag} was {old.get(flag)!s:.60}, is {value!s:.60}" for flag, value
                   in vars(args).items() if flag not in MAY_CHANGE and old.get(flag) != value]
        if changed:
            raise ValueError(f"{folder}: expected the run's arguments, but {'; '.join(changed)}")
    content = {"arguments": vars(args), "torch": torch.__version__}
    data.write_file(folder / "args.json", json.dumps(content, indent=1) + "\n")
    return folder


def resume(folder, model, optimizer, rank, steps):
    """Return how many steps the run in the folder has finished, after going back to the last.

    Log rows of later steps are removed, and this step's measurement, which is made again. A run
    without a checkpoint begins anew.
    """
    finished = 0
    if (folder / "last.pt").exists():
        state = read_checkpoint(folder / "last.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        finished = state["step"]
    if finished > steps:
        raise ValueError(f"{folder}: expected --steps of at least {finished}, which are done")
    if rank == 0:
        rows = [row for row in scoring.read_log(folder)
                if row["step"] < finished or (row["step"] == finished and row["kind"] == "train")]
        data.write_file(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return finished


def log(folder, kind, step, **numbers):
    """Append a row to the run's log."""
    with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": kind, "step": step, **numbers}) + "\n")


def save_last(folder, model, tokenizer, optimizer, step):
    """Write last.pt: all that a resume after this step needs."""
    save(folder / "last.pt", model, tokenizer, optimizer=optimizer.state_dict(), step=step)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Fine-tune mT5; measure and regularise XLRS.")
    positive = scoring.positive
    scoring.add_texts(parser)
    add = parser.add_argument_group("training").add_argument
    add("--dev", nargs=1, metavar="TEXT", help="source-language development pairs (toy: stories)")
    add("--train-size", type=positive, metavar="N", help="pairs a language (all; toy: 4000)")
    add("--init", metavar="CHECKPOINT", help="where to start (the toy base)")
    add("--reg", type=float, default=0.0, metavar="λ",
        help="weight of the regulariser, nats per cosine of 1 of each other language (0: none)")
    add("--reg-floor", type=float, default=FLOOR, metavar="COSINE",
        help="low enough, for the regulariser and for choosing (%(default)s; -1: no floor)")
    add("--reg-batch", type=positive, default=8, metavar="N", help="parallel sentences a step (8)")
    add("--freeze", nargs="+", choices=PARTS, default=[], help="parts that do not learn (none)")
    add("--lr", type=float, default=5e-4, metavar="LR", help="rate (5e-4; for mT5 1e-4 is usual)")
    add("--steps", type=positive, default=100, metavar="N", help="updates (%(default)s)")
    add("--warmup", type=positive, default=20, metavar="N", help="steps until the rate is LR (20)")
    add("--batch-size", type=positive, default=32, metavar="N", help="pairs a step (%(default)s)")
    add("--dropout", type=float, metavar="P", help="in training (that of the checkpoint)")
    add("--seed", type=functools.partial(positive, least=0), default=0, metavar="N",
        help="of all that is random (0)")
    add("--eval-every", type=positive, metavar="N", help="steps between checkpoints (--steps / 10)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--compile", action="store_true", help="compile the model (torch.compile)")
    add("--recompute", action="store_true", help="activations again in backward: less memory")
    args = scoring.complete(parser.parse_args(argv))
    source, in_files, _ = args.train[0].partition("=")
    args.dev = args.dev or (None if in_files else [source])
    args.eval_every = args.eval_every or max(1, args.steps // 10)
    if args.dev and args.dev[0].partition("=")[0] != source:
        parser.error(f"--dev: expected pairs in the source language {source}, found {args.dev[0]}")
    if args.reg and not args.parallel:
        parser.error("--reg: expected --parallel LANG=FILE …, found none")
    for flag, rows in (("--batch-size", args.batch_size), ("--reg-batch", args.reg_batch)):
        if rows < (processes := int(os.environ.get("WORLD_SIZE", 1))):
            parser.error(f"{flag}: expected a row for each of {processes} processes, found {rows}")
    if args.resume and not args.out:
        parser.error("--resume: expected --out FOLDER, found none")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        with HELD:
            return train(args)
    except (ValueError, OSError) as error:
        message = error
    except RuntimeError as error:
        if not re.search(FULL, str(error)):
            raise
        message = ("the device's memory is full: go on with --out, --resume and --recompute; or "
                   "start anew with a smaller --batch-size, --reg-batch or --eval-size, or after "
                   "model.py convert --trim")
    print(f"train.py: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # whatever the console can show
    main()
