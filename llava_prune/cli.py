"""The `llava-prune` command."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterator, Sequence

from .console import stderr
from .parsers import make_parser

# commands ---------------------------------------------------------------------------------------------------------


def _quiet() -> None:
    """Turn off the progress bars and hints of transformers; the commands print their own."""
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()
    theirs.disable_progress_bar()


def _eval(args: argparse.Namespace) -> int:
    from .eval import command

    _quiet()
    return command.evaluate(args)


def _table(args: argparse.Namespace) -> int:
    if args.published:
        from .report.formats import show
        from .report.published import read_table
        from .report.tables import published_table, sheet

        found = published_table(read_table(args.table))
        show(sheet(found), args.format, args.json, found)
        return 0
    from .eval import tables

    _quiet()
    return tables.table(args)


def _sweep(args: argparse.Namespace) -> int:
    from .eval.sweep import sweep

    _quiet()
    return sweep(args)


def _bench(args: argparse.Namespace) -> int:
    from .bench.command import bench

    _quiet()
    return bench(args)


def _score(args: argparse.Namespace) -> int:
    from .eval.offline import score

    return score(args)


def _data(args: argparse.Namespace) -> int:
    from .eval.offline import data

    return data(args)


def _methods(args: argparse.Namespace) -> int:
    from .bench.tables import methods

    return methods(args)


def _flops(args: argparse.Namespace) -> int:
    from .bench.tables import flops

    return flops(args)


def _run(args: argparse.Namespace) -> int:
    from .llava_programs import command

    return command(args)


def _results(args: argparse.Namespace) -> int:
    from .report.results import results

    return results(args)


def _figure(args: argparse.Namespace) -> int:
    from .report.figures import draw

    return draw(args)


def _show(args: argparse.Namespace) -> int:
    from .eval.kept import show

    _quiet()
    return show(args)


def _demo(args: argparse.Namespace) -> int:
    from .eval.demo import demo

    _quiet()
    return demo(args)


def _report(args: argparse.Namespace) -> int:
    from .eval.run_images import thumbnails
    from .report.html import report

    return report(args, thumbnails)


def _vlmevalkit(args: argparse.Namespace) -> int:
    from .integrations.vlmevalkit import command

    return command(args)


def _completion(args: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError as error:
        raise ValueError("completion needs shtab; pip install 'llava-prune[completion]'") from error
    sys.stdout.write(shtab.complete(make_parser({}), args.shell) + "\n")
    return 0


COMMANDS = {
    "eval": _eval,
    "table": _table,
    "sweep": _sweep,
    "bench": _bench,
    "score": _score,
    "data": _data,
    "methods": _methods,
    "flops": _flops,
    "results": _results,
    "figure": _figure,
    "report": _report,
    "show": _show,
    "demo": _demo,
    "run": _run,
    "vlmevalkit": _vlmevalkit,
    "completion": _completion,
}
"""Name of a command -> function that runs it and returns the exit status."""


_NO_FOLDER = "; a part of this path is a file or a broken link, give another path"
WAYS_OUT = {
    errno.ENOTDIR: _NO_FOLDER,
    errno.EEXIST: _NO_FOLDER,
    errno.EISDIR: "; this is a folder, give the path of a file",
    errno.EACCES: "; give another path, or change the permissions of this one",
    errno.EROFS: "; give a path on a disk that can be written to",
}
"""Number of a file error -> what to do about it."""


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Print log records on stderr during a command, unless the process already has a log handler.

    The handler keeps the stderr stream of the start, since a program of `run` may replace sys.stderr by a stream that
    logs.
    """
    from rich.console import Console
    from rich.logging import RichHandler

    root = logging.getLogger()
    if root.handlers:
        yield
        return
    handler = RichHandler(console=Console(file=sys.stderr), show_path=False)
    handler.setFormatter(logging.Formatter("%(message)s"))
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    The status is 0 for success, 1 for an error, 2 for wrong usage and 130 after an interruption.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    args = make_parser(os.environ).parse_args(argv)
    args.argv = argv
    err = stderr()
    try:
        with _logging():
            return COMMANDS[args.command](args)
    except KeyboardInterrupt:
        message, status = "interrupted; run the same command to resume", 130
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        message, status = f"{error.strerror or error}{where}{WAYS_OUT.get(error.errno or 0, '')}", 1
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"no space left on the disk{where}; free some and run the same command, which resumes"
    except MemoryError:
        message, status = "out of memory; use a smaller batch or model", 1
    except ValueError as error:
        message, status = str(error), 1
    except RuntimeError as error:
        kind = type(error).__name__
        if kind in ("DistNetworkError", "DistStoreError"):
            message, status = "lost the connection to the first process; run the same command to resume", 1
        elif kind == "OutOfMemoryError" or "can't allocate memory" in str(error):
            message, status = "out of memory with a single sample; use a smaller --dtype or another --device", 1
        else:
            raise
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f"process {rank}: "
    err.print(f"llava-prune: {where}{message}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
