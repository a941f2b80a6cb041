"""The `agreement` command: train for many steps with each loss, and compare the loss curves."""

from ..errors import need
from ..sft import command as sft
from ..sft.losses import EVERY_TITLE


def add_arguments(parser):
    sft.add_run_arguments(parser)
    add = parser.add_argument
    add("--results", metavar="DIR", help="write the record to DIR/agreement/<device>.json too")
    parser.set_defaults(
        steps=200, seq_length=128, out="bench-out/agreement", loss=list(EVERY_TITLE)
    )


def run(args):
    need("rich")
    from .report import Report

    return sft.train_and_report(args, Report(args.results))
