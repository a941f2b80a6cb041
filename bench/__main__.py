"""python -m bench COMMAND: each command is a module with add_arguments(parser) and run(args)."""

import argparse
import importlib
import sys

from . import interrupts
from .errors import UserError

COMMANDS = {
    "sft": (
        "bench.sft.command",
        "a real Megatron SFT run: the reference loss, ours, ours without logits",
    ),
    "kernels": ("bench.kernels.command", "time and memory of the loss, beside every peer"),
    "linear": (
        "bench.linear.command",
        "time and memory of the loss without logits, beside every peer and the bare products",
    ),
    "gpu": (
        "bench.gpu.command",
        "check and measure a GPU in ten minutes: tests, benchmarks, launch tables",
    ),
    "launches": ("bench.gpu.launches", "time other lines of the launch tables"),
    "agreement": (
        "bench.agreement.command",
        "a long SFT run with each loss: how far bf16 runs are from one in fp32",
    ),
    "host": ("bench.host", "what a call costs the host, on logits too small to cost anything"),
    "readme": ("bench.readme", "write the generated parts of README.md and docs/"),
    "codegen": (
        "bench.without_gpu.codegen.command",
        "what compilers made of the GPU kernels; needs no GPU",
    ),
}


def main(argv=None):
    """Run one command and return the exit status: 1 for a UserError, 130 for Ctrl-C.

    Wrong arguments exit with 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        parser, commands = _parsers()
        name = argv[0] if argv else None
        if name in COMMANDS:  # import nothing for the other commands
            module = importlib.import_module(COMMANDS[name][0])
            module.add_arguments(commands[name])
        args = parser.parse_args(argv)
        return module.run(args) or 0
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        interrupts.tell()
        return interrupts.STATUS


def _parsers():
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split(":")[0])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    formatter = argparse.ArgumentDefaultsHelpFormatter
    return parser, {
        name: commands.add_parser(name, help=text, description=text, formatter_class=formatter)
        for name, (_, text) in COMMANDS.items()
    }


if __name__ == "__main__":
    interrupts.exit_at_once()
    sys.exit(main())
