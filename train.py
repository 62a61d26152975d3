"""Fine-tunes mT5 on one language and watches, or regularises, its representation of others.

    loss = cross-entropy on the task + λ · max(0, mean cosine of source and other languages − floor)

`python train.py --reg 0.1` shows the effect in the toy world. `--pretrain` rebuilds the toy base.
"""

import argparse
import hashlib
import itertools
import json
import math
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import data
import eval as scoring
from model import MT5, SIZES, Dropout, MT5Config, load, read_checkpoint, save
from xlrs import pool, regulariser, xlrs

TOY_BASE = data.TOY / "base.pt"
TOY_SIZE = MT5Config(d_model=128, d_kv=32, d_ff=256, num_layers=2, num_decoder_layers=2,
                     num_heads=4, dropout_rate=0.0)
PARTS = ("embedding", "encoder", "decoder", "head")
UNSEEN = 10**6  # a group of batches that no pre-training reaches: its development set


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Fine-tune mT5 in one language; measure and regularise XLRS.",
        epilog="TEXT is LANG for the toy world, LANG=FILE, or LANG=SOURCE_FILE,TARGET_FILE.")
    task = parser.add_argument_group("task and text")
    task.add_argument("--task", choices=[*data.TASKS, "files"],
                      help="task of the toy world (default completion; files where --train names "
                           "some)")
    task.add_argument("--train", nargs="+", metavar="TEXT", default=["en"],
                      help="training pairs; the first language is the source (default en)")
    task.add_argument("--dev", nargs="+", metavar="TEXT",
                      help="development pairs in the source language (default, toy: en)")
    task.add_argument("--test", nargs="+", metavar="TEXT",
                      help="test pairs (default, toy: every toy language)")
    task.add_argument("--parallel", nargs="+", metavar="TEXT",
                      help="parallel text, for XLRS and the regulariser: aligned lines, a file a "
                           "language, first the source (default, toy: every toy language)")
    task.add_argument("--train-size", type=scoring.whole(1), metavar="N",
                      help="training pairs a language (default: all of a file, 4000 toy stories)")
    task.add_argument("--test-size", type=scoring.whole(1), metavar="N",
                      help="test texts a language (default: all of a file, 200 toy stories)")
    task.add_argument("--fields", metavar="SOURCE,TARGET", default="source,target",
                      help="column names in JSONL, TSV and CSV files (default source,target)")
    task.add_argument("--max-source", type=scoring.whole(2), default=512, metavar="N",
                      help="longest source in tokens; longer ones are cut (default 512)")
    task.add_argument("--max-target", type=scoring.whole(2), metavar="N",
                      help="longest target in tokens, also in generation (default 64, toy 32)")
    task.add_argument("--num-beams", type=scoring.whole(1), default=1, metavar="N",
                      help="beams in generation (default 1: greedy)")
    model = parser.add_argument_group("model")
    model.add_argument("--init", metavar="CHECKPOINT",
                       help="checkpoint to start from, or 'new': random weights and a vocabulary "
                            "trained on --train and --parallel (default the toy base; with "
                            "--pretrain new)")
    model.add_argument("--size", choices=["toy", *SIZES], default="toy",
                       help="size of a new model (default toy)")
    model.add_argument("--vocab-size", type=scoring.whole(500), default=3200, metavar="N",
                       help="pieces of a new vocabulary (default 3200)")
    method = parser.add_argument_group("method")
    method.add_argument("--reg", type=scoring.real(0), default=0.0, metavar="λ",
                        help="weight of the regulariser, cosine per nat (default 0: none)")
    method.add_argument("--reg-floor", type=scoring.real(-1, 1), default=0.0, metavar="COSINE",
                        help="similarity that is low enough (default 0; -1: no floor)")
    method.add_argument("--reg-batch", type=scoring.whole(1), default=8, metavar="N",
                        help="parallel sentences a step, each in every language (default 8)")
    method.add_argument("--freeze", nargs="+", choices=PARTS, default=[], metavar="PART",
                        help=f"parts that do not learn: {', '.join(PARTS)} (default none)")
    method.add_argument("--mix", nargs="+", default=[], metavar="TEXT",
                        help="unlabelled text mixed in as span corruption: LANG for toy pages, or "
                             "LANG=FILE of lines (default none)")
    method.add_argument("--mix-share", type=scoring.real(0, 1), default=0.25, metavar="SHARE",
                        help="share of examples that are of --mix (default 0.25)")
    method.add_argument("--pretrain", action="store_true",
                        help="span corruption instead of a task; --train names the text")
    method.add_argument("--bilingual", type=scoring.real(0, 1), default=0.5, metavar="SHARE",
                        help="share of bilingual pages in toy pre-training (default 0.5)")
    steps = parser.add_argument_group("optimisation")
    steps.add_argument("--lr", type=scoring.real(0), metavar="LR",
                       help="AdamW's learning rate (default 1e-3, with --pretrain 2e-3; 1e-4 is "
                            "usual for mT5-small)")
    steps.add_argument("--steps", type=scoring.whole(1), metavar="N",
                       help="updates (default 100, with --pretrain 12000)")
    steps.add_argument("--warmup", type=scoring.whole(0), default=20, metavar="N",
                       help="steps of linear warm-up (default 20)")
    steps.add_argument("--batch-size", type=scoring.whole(1), default=32, metavar="N",
                       help="pairs a step (default 32)")
    steps.add_argument("--dropout", type=scoring.real(0, 0.99), metavar="P",
                       help="dropout in training, a probability (default that of the checkpoint)")
    steps.add_argument("--seed", type=scoring.whole(0), default=0, help="of all that is random")
    run = parser.add_argument_group("run")
    run.add_argument("--eval-every", type=scoring.whole(1), metavar="N",
                     help="steps between checkpoints (default: a fifth of --steps)")
    run.add_argument("--eval-size", type=scoring.whole(1), default=100, metavar="N",
                     help="sentences a language scored at each checkpoint (default 100)")
    run.add_argument("--keep", type=scoring.whole(1), metavar="N",
                     help="keep the last N checkpoints, the base and the best (default all)")
    run.add_argument("--out", metavar="FOLDER", help="run folder (default runs/NAME)")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out")
    run.add_argument("--device", help="cpu, cuda, … (default cuda where there is one)")
    run.add_argument("--dtype", choices=["float32", "bfloat16"],
                     help="precision of the matrix products; weights stay float32 (default "
                          "bfloat16 on a GPU that has it, else float32)")
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
                              "title" if args.pretrain else "completion")
    args.init = args.init or ("new" if args.pretrain else str(TOY_BASE))
    if args.lr is None:
        args.lr = 2e-3 if args.pretrain else 1e-3
    args.steps = args.steps or (12000 if args.pretrain else 100)
    args.eval_every = args.eval_every or max(1, args.steps // 5)
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
    print(f"device {device}, {dtype} ({why})")
    torch.manual_seed(args.seed)
    texts = data.load_texts(args)
    scoring.identifier().choice(data.languages(args))
    model, tokenizer = start(args, texts)
    model.to(device)
    if args.compile:
        model.forward, model.encode = torch.compile(model.forward), torch.compile(model.encode)
    learning = freeze(model, args.freeze)
    optimizer = torch.optim.AdamW(learning, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    run = Run(args, model, tokenizer, optimizer, device=str(device), dtype=dtype, why=why)
    done = run.resume() if args.resume else 0
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    draw = draw_examples(texts, tokenizer, args)
    pair_batches = data.batches(draw, args.batch_size, args.seed, done)
    parallel_batches = (data.parallel_batches(texts.parallel, tokenizer, args, done) if args.reg
                        else itertools.repeat(None))
    if not done:
        run.checkpoint(0, measure(model, tokenizer, texts, draw, args, autocast))

    steps = tqdm(range(done + 1, args.steps + 1), initial=done, total=args.steps, desc="training")
    for step, pair_batch, parallel_batch in zip(steps, pair_batches, parallel_batches):
        began = time.perf_counter()
        model.train()
        optimizer.param_groups[0]["lr"] = lr = args.lr * schedule(step, args)
        with autocast:
            loss = model(*(tensor.to(device) for tensor in pair_batch))
            term, similarity = torch.zeros(()), None
            if parallel_batch is not None:
                input_ids, mask = (tensor.to(device) for tensor in parallel_batch)  # (L * B, S)
                pooled = pool(model.encode(input_ids, mask), mask)
                pooled = pooled.unflatten(0, (len(texts.parallel), -1))  # (L, B, D)
                term = regulariser(pooled, args.reg_floor)
                similarity = xlrs(pooled).mean().item()
        total = loss + args.reg * term
        if not math.isfinite(total.item()):
            raise ValueError(f"step {step}: the loss is {total.item()}; the last checkpoint "
                             f"stands; try a learning rate below --lr {args.lr:g}")
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        steps.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        speed = int(pair_batch[1].sum() / (time.perf_counter() - began))
        run.log(kind="train", step=step, loss=loss.item(), reg=term.item(), xlrs=similarity, lr=lr,
                tokens_per_s=speed)
        if step % args.eval_every == 0 or step == args.steps:
            run.checkpoint(step, measure(model, tokenizer, texts, draw, args, autocast))

    if args.pretrain:
        save(run.folder / "base.pt", model, tokenizer)
        print(f"wrote {run.folder / 'base.pt'}")
    else:
        scoring.choose_checkpoint(run.folder)
        if texts.test:
            scoring.score_run(run.folder, args, device, autocast)


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
            if isinstance(module, Dropout):
                module.rate = args.dropout
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
    """A run's folder: args.json, log.jsonl and a `step_NNNNNN.pt` at each measurement."""

    def __init__(self, args, model, tokenizer, optimizer, **facts):
        self.args, self.model, self.tokenizer, self.optimizer = args, model, tokenizer, optimizer
        self.folder = Path(args.out) if args.out else free_folder(args)
        self.log_path = self.folder / "log.jsonl"
        if self.log_path.exists() and not args.resume:
            raise ValueError(f"{self.folder} holds a run already: go on with --resume, or choose "
                             "another --out")
        if args.resume:
            self.compare_arguments()
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        facts |= {"versions": {"python": platform.python_version(), "torch": torch.__version__},
                  "parent": file_hash(args.init)}
        data.write_file(self.folder / "args.json",
                        json.dumps({"arguments": vars(args), **facts}, indent=1) + "\n")

    def compare_arguments(self):
        """Raise ValueError where the arguments are not those of the run that goes on."""
        path = self.folder / "args.json"
        old, new = data.read_json(path, "arguments")["arguments"], vars(self.args)
        for name in sorted(set(old) | set(new)):
            if old.get(name) != new.get(name) and name not in ("resume", "out", "device"):
                raise ValueError(f"{path}: --{name.replace('_', '-')} was {old.get(name)}, now it "
                                 f"is {new.get(name)}; resume with the same arguments")

    def log(self, **row):
        with open(self.log_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def checkpoint(self, step, row):
        """Write the log's evaluation row, then the checkpoint, with all that a resume needs."""
        self.log(kind="eval", step=step, **row)
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        save(self.folder / f"step_{step:06d}.pt", self.model, self.tokenizer, step=step,
             optimizer=self.optimizer.state_dict(), random=[torch.get_rng_state(), *cuda])
        if self.args.keep:
            self.remove_all_but(self.args.keep)

    def remove_all_but(self, count):
        """Remove checkpoints but for the last count, the base, and the best by either rule."""
        _, rows = scoring.read_run(self.folder)
        best = {scoring.best_row(rows, by)["step"] for by, field in scoring.MEASURES.items()
                if len(rows) > 1 and field in rows[0]}
        for path in sorted(self.folder.glob("step_*.pt"))[1:-count]:
            if int(path.stem.removeprefix("step_")) not in best:
                path.unlink()

    def resume(self):
        """Restore the last checkpoint; return its step, 0 where there is none yet."""
        found = sorted(self.folder.glob("step_*.pt"))
        done = 0
        if found:
            state = read_checkpoint(found[-1])
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random"][0])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state["random"][1:])
            done = state["step"]
        rows = [row for row in data.read_log(self.folder) if row["step"] <= done] if found else []
        data.write_file(self.log_path, "".join(json.dumps(row) + "\n" for row in rows))
        return done


def free_folder(args):
    """Return a folder below runs/ that does not hold a run yet, named after the arguments."""
    languages = "-".join(data.named(word)[0] for word in args.train)
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


def main(argv=None):
    args = parse_args(argv)
    try:
        train(args)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("train.py: stopped; go on with the same command, --out FOLDER and --resume",
              file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
