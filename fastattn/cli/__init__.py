"""The command `fastattn`: parse the arguments, call the library, print."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence

import fastattn
from fastattn.cli import (
    accelerate,
    answer,
    bench,
    chat,
    classify,
    demo,
    doctor,
    evaluate,
    generate,
    plan,
    serve,
    train,
    translate,
    tune,
)
from fastattn.cli.pipe import quietly


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit code.

    0: done. 1: a user error, printed in a line, or a result that breaks a promise. 2: a command
    line that cannot be read (argparse exits). 130: ended by Ctrl-C. 141: ended because nobody reads
    the output any more (pipe.py). The latter two are what a shell reports for a
    tool that the signals SIGINT and SIGPIPE end.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a character shows its code.
            stream.reconfigure(errors="backslashreplace")
    return quietly(lambda: _run(_parser().parse_args(argv)))


def _run(arguments: argparse.Namespace) -> int:
    try:
        code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        print("fastattn: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        if arguments.debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"fastattn: {message} (--debug shows where)", file=sys.stderr)
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastattn", description="Custom-kernel attention, norms and feed-forward for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"fastattn {fastattn.__version__}")
    _add_debug(parser, default=False)
    commands = parser.add_subparsers(metavar="command", required=True)
    for module in (
        train,
        plan,
        evaluate,
        generate,
        chat,
        serve,
        classify,
        answer,
        translate,
        accelerate,
        demo,
        doctor,
        tune,
        bench,
    ):
        name = module.__name__.rpartition(".")[2]
        description = (module.__doc__ or "").strip()
        command = commands.add_parser(
            name,
            help=description.splitlines()[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        # Before or after the command; suppressed, so that the one after does not reset the other.
        _add_debug(command, default=argparse.SUPPRESS)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _add_debug(parser: argparse.ArgumentParser, default: bool | str) -> None:
    parser.add_argument(
        "--debug", action="store_true", default=default, help="show the traceback of an error"
    )
