"""The `sft` command: arguments, data, the two runs, the report."""

import argparse
import os

from .. import interrupts, machine
from ..errors import UserError, need, need_installed, writable_folder


def add_arguments(parser):
    parser.add_argument("--tp", type=int, default=1, help="processes that share the vocabulary")
    parser.add_argument("--steps", type=_positive, default=12, help="optimizer steps of each run")
    parser.add_argument("--data", metavar="FILE.jsonl", help=DATA_HELP)
    parser.add_argument("--out", default="bench-out/sft", metavar="DIR", help="for JSON and PNG")
    parser.add_argument("--seq-length", type=_positive, default=256)
    parser.add_argument("--micro-batch-size", type=_positive, default=2)
    parser.add_argument("--layers", type=_positive, default=2)
    parser.add_argument("--hidden", type=_positive, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the data's order")
    parser.add_argument(
        "--inplace",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ours: let the gradient overwrite the logits",
    )


DATA_HELP = (
    'lines of {"prompt": ..., "response": ...} or {"messages": [{"role": ..., "content": ...}]}; '
    "without it: functions of Python's standard library"
)
HEAD = 32  # width of an attention head


def run(args):
    _check(args)
    folder = writable_folder(args.out)
    need("rich")
    need("matplotlib")
    need_installed("megatron.core", "megatron-core")
    from . import report
    from .train import Settings

    batches, data = _load(args)
    settings = Settings(
        tp=args.tp,
        layers=args.layers,
        hidden=args.hidden,
        heads=max(args.hidden // HEAD, args.tp),
        vocab=data["vocabulary"],
        seq_length=args.seq_length,
        learning_rate=args.learning_rate,
        warmup=min(4, args.steps),
        inplace=args.inplace,
        seed=args.seed,
        threads=max(1, machine.usable_cores() // args.tp),
    )
    with interrupts.raised():
        ranks = _train(settings, batches)
    record = report.build(ranks, batches, settings, data, machine.arguments())
    report.show(record)
    report.write(record, folder)
    return report.verdict(record)


def _check(args):
    if args.tp not in (1, 2, 4, 8):
        raise UserError(f"--tp: expected 1, 2, 4 or 8, got {args.tp}")
    if args.hidden % (HEAD * args.tp):
        raise UserError(
            f"--hidden: expected a multiple of {HEAD * args.tp} (heads of {HEAD} for --tp "
            f"{args.tp}), got {args.hidden}"
        )
    if args.seq_length < 2:
        raise UserError(f"--seq-length: expected at least 2, got {args.seq_length}")


def _load(args):
    """(batches, where they come from)."""
    from . import data
    from .tokenizer import Tekken, make_batches

    conversations = data.json_lines(args.data) if args.data else data.standard_library(args.seed)
    tokenizer = Tekken()
    batches, used, left_out = make_batches(
        conversations, tokenizer, args.steps, args.micro_batch_size, args.seq_length, args.seed
    )
    return batches, {
        "source": args.data or "functions of Python's standard library",
        "conversations": used,
        "left_out": left_out,
        "tokenizer": tokenizer.file,
        "vocabulary": tokenizer.vocab,
    }


def _train(settings, batches):
    """Every rank's results, with progress shown."""
    from ..ranks import RankError, run_ranks
    from . import report, train

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a run on the CPU, also where there is a GPU
    with report.Progress(len(batches)) as progress:
        try:
            return run_ranks(
                settings.tp,
                train.run,
                settings,
                batches,
                timeout=3600.0,
                threads=settings.threads,
                on_message=progress.update,
            )
        except RankError as error:
            raise UserError(f"the training processes failed\n{error}") from error


def _positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {value}")
    return value
