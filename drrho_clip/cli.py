"""The command ``drrho``: its table of commands, its entry point, and its errors.

The exit code is 0 after success, 1 if a check failed, and 2 after bad usage or bad input. In the last case one line on
standard error explains the error. Progress goes to standard error, tables go to standard output. Each command is a
dataclass in the package `drrho_clip.commands`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

from drrho_clip.commands.bench import Bench
from drrho_clip.commands.demo import Demo
from drrho_clip.commands.evaluate import Evaluate
from drrho_clip.commands.suspects import Suspects
from drrho_clip.commands.train import Train
from drrho_clip.commands.vectors import Vectors
from drrho_clip.commands.verify import Verify
from drrho_clip.errors import BadInput, MissingExtra
from drrho_clip.options import parse

# The help lists the commands in this order.
COMMANDS: dict[str, type] = {
    "demo": Demo,
    "train": Train,
    "evaluate": Evaluate,
    "suspects": Suspects,
    "verify": Verify,
    "vectors": Vectors,
    "bench": Bench,
}


class _Command(Protocol):
    def run(self) -> int: ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        The words after ``drrho``; by default the words with which the process was started.
    """
    try:
        command: _Command = parse(
            sys.argv[1:] if arguments is None else list(arguments),
            COMMANDS,
            prog="drrho",
            description="Steer the training of a model with a reference model.",
        )
        return command.run()
    except (BadInput, MissingExtra) as error:
        print(f"drrho: {error}", file=sys.stderr)
        return 2
    # 130 is the shell's code for a program that Ctrl-C ended.
    except KeyboardInterrupt:
        print("drrho: interrupted; --resume continues from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
