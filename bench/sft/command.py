"""The `sft` command: arguments, data, the runs of all losses, the report.

Without torchrun it starts the processes itself. Under torchrun it is one of them:

    torchrun --nproc-per-node 8 -m bench sft --model llama3-8b --tp 8 --data FILE.jsonl
"""

import argparse
import contextlib
import os

import torch
import torch.distributed as dist

from .. import interrupts, machine
from ..errors import UserError, need, need_installed, writable_folder
from .kept import Kept
from .losses import EVERY_TITLE, TITLES
from .shapes import SHAPES, Shape, columns


def add_arguments(parser):
    add_run_arguments(parser)
    parser.add_argument("--loss", nargs="+", choices=TITLES, default=list(TITLES), help=LOSS_HELP)


def add_run_arguments(parser):
    """All arguments but the losses that train."""
    add = parser.add_argument
    add("--model", choices=SHAPES, help="a real model's shape; default: a small one")
    add("--tp", type=int, default=1, help="processes that share the vocabulary")
    add(
        "--dp", type=_positive, help="data-parallel copies; default: 1, under torchrun what is left"
    )
    add("--steps", type=_positive, default=12, help="optimizer steps of each run")
    add("--data", metavar="FILE.jsonl", help=DATA_HELP)
    add("--out", default="bench-out/sft", metavar="DIR", help="for JSON and PNG")
    add("--seq-length", type=_positive, default=256)
    add("--micro-batch-size", type=_positive, default=2)
    add("--layers", type=_positive, help="default: the model's, or 2")
    add("--hidden", type=_positive, help="default: the model's, or 128")
    add("--device", choices=("cpu", "cuda"), help="default: GPUs if there is one for each process")
    add("--learning-rate", type=float, default=3e-3)
    add("--seed", type=int, default=0, help="of the weights and the data's order")
    add(
        "--inplace",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ours: let the gradient overwrite the logits",
    )


LOSS_HELP = "what trains, a model each, compared step by step; linear: ours without logits"
DATA_HELP = (
    'lines of {"prompt": ..., "response": ...} or {"messages": [{"role": ..., "content": ...}]}; '
    "without it: functions of Python's standard library"
)
HEAD = 32  # width of an attention head of the small model
SMALL = {"layers": 2, "hidden": 128}
BOTH_KINDS = "cpu:gloo,cuda:nccl"  # backend by device of a tensor; on AMD "nccl" is RCCL


def run(args):
    need("rich")
    from . import report

    return train_and_report(args, report)


def train_and_report(args, report):
    """Train as the arguments say. Returns the exit status.

    report: has build, show, write and verdict, as report.py
    """
    world = int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else None
    first = world is None or int(os.environ["RANK"]) == 0
    dp = _check(args, world)
    folder = writable_folder(args.out) if first else None
    need("matplotlib")
    need_installed("megatron.core", "megatron-core")
    batches, data = _load(args, dp)
    settings = _settings(args, dp, data["vocabulary"], world)
    kept = Kept(settings, data)
    with interrupts.raised():
        try:
            ranks = (_train if world is None else _take_part)(settings, batches, kept)
        except KeyboardInterrupt:
            if first:
                kept.write(folder / "result.json")
            raise
    if not first:
        return 0
    record = report.build(ranks, batches, settings, data, machine.arguments())
    report.show(record)
    report.write(record, folder)
    return report.verdict(record)


def _check(args, world):
    """Raise UserError for arguments that do not fit together. Returns the data-parallel size."""
    if args.tp not in (1, 2, 4, 8):
        raise UserError(f"--tp: expected 1, 2, 4 or 8, got {args.tp}")
    dp = args.dp or (1 if world is None else max(1, world // args.tp))
    if world is not None and args.tp * dp != world:
        raise UserError(
            f"expected torchrun to start --tp {args.tp} times --dp {dp} processes, got {world}"
        )
    if args.model and args.hidden:
        raise UserError(
            "--hidden: expected none with --model, whose own it is; --layers may differ"
        )
    if not args.model and (args.hidden or SMALL["hidden"]) % (HEAD * args.tp):
        raise UserError(
            f"--hidden: expected a multiple of {HEAD * args.tp} (heads of {HEAD} for --tp "
            f"{args.tp}), got {args.hidden or SMALL['hidden']}"
        )
    if args.model and SHAPES[args.model].groups % args.tp:
        groups = SHAPES[args.model].groups
        raise UserError(
            f"--tp: expected a divisor of {args.model}'s {groups} key-value heads, got {args.tp}"
        )
    if args.seq_length < 2:
        raise UserError(f"--seq-length: expected at least 2, got {args.seq_length}")
    return dp


def _settings(args, dp, vocabulary, world):
    from .train import Settings

    hidden = args.hidden or SMALL["hidden"]
    heads = max(hidden // HEAD, args.tp)
    small = Shape(SMALL["layers"], hidden, 4 * hidden, heads, heads, HEAD, gated=False)
    shape = SHAPES[args.model] if args.model else small
    processes = args.tp * dp
    gpus = torch.cuda.device_count()
    here = processes if world is None else int(os.environ["LOCAL_WORLD_SIZE"])
    device = args.device or ("cuda" if gpus >= here else "cpu")
    if device == "cuda" and gpus < here:
        raise UserError(f"--device cuda: expected a GPU for each of {here} processes, got {gpus}")
    return Settings(
        losses=tuple(name for name in EVERY_TITLE if name in args.loss),
        device=device,
        tp=args.tp,
        dp=dp,
        **{**vars(shape), "layers": args.layers or shape.layers},
        vocab=vocabulary,
        seq_length=args.seq_length,
        learning_rate=args.learning_rate,
        warmup=min(4, args.steps),
        inplace=args.inplace,
        seed=args.seed,
        threads=max(1, machine.usable_cores() // here),
    )


def _load(args, dp):
    """(batches[step][data-parallel rank], a description of the data)."""
    from . import data
    from .tokenizer import Tekken, make_batches

    conversations = data.json_lines(args.data) if args.data else data.standard_library(args.seed)
    tokenizer = Tekken()
    count, length = args.steps * dp, args.seq_length
    batches, used, left_out = make_batches(
        conversations, tokenizer, count, args.micro_batch_size, length, args.seed
    )
    vocab = columns(args.model, args.tp) if args.model else tokenizer.vocab
    if vocab < tokenizer.vocab:
        batches = [batch.within(vocab) for batch in batches]
    return [batches[i : i + dp] for i in range(0, count, dp)], {
        "source": args.data or "functions of Python's standard library",
        "conversations": used,
        "left_out": left_out,
        "tokenizer": tokenizer.file,
        "vocabulary": vocab,
    }


def _train(settings, batches, kept):
    """Start the processes and show their progress. Returns the results of all ranks."""
    from ..ranks import RankError, run_ranks
    from . import report, train

    if settings.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # hide the GPUs, if there are any
    with report.Progress(len(batches)) as progress:
        tell = _both(kept.add, progress.update)
        try:
            return run_ranks(
                settings.tp * settings.dp,
                train.run,
                settings,
                batches,
                timeout=24 * 3600.0,
                threads=settings.threads,
                backend="gloo" if settings.device == "cpu" else BOTH_KINDS,
                on_message=lambda rank, message: tell(message),
            )
        except RankError as error:
            raise UserError(f"the training processes failed\n{error}") from error


def _both(*listeners):
    """A listener that passes each message on to all of these."""

    def tell(message):
        for listener in listeners:
            listener(message)

    return tell


def _take_part(settings, batches, kept):
    """Train as one of torchrun's processes. Returns all ranks' results on rank 0, else None."""
    from . import report, train

    dist.init_process_group("gloo" if settings.device == "cpu" else BOTH_KINDS)
    first = dist.get_rank() == 0
    with report.Progress(len(batches)) if first else contextlib.nullcontext() as progress:
        tell = _both(kept.add, progress.update) if first else None
        mine = train.run(settings, batches, tell)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    dist.destroy_process_group()
    return everyone if first else None


def _positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {value}")
    return value
