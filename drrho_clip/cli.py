"""The command ``drrho``: its table of commands, its entry point, and its errors.

The exit code is 0 after success, 1 if a check failed, and 2 after bad usage, bad input or an error of the surroundings
(disks, permissions, memory). With code 2, one line on standard error explains the error; `drrho_clip.terminal.guard`
has the other codes.
Progress goes to standard error, tables go to standard output. Each command is a dataclass in the package
`drrho_clip.commands`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from drrho_clip.commands.bench import Bench
from drrho_clip.commands.demo import Demo
from drrho_clip.commands.encode import Encode
from drrho_clip.commands.evaluate import Evaluate
from drrho_clip.commands.export import Export
from drrho_clip.commands.index import Index
from drrho_clip.commands.replay import Replay
from drrho_clip.commands.report import Report
from drrho_clip.commands.reproduce import Reproduce
from drrho_clip.commands.search import Search
from drrho_clip.commands.suspects import Suspects
from drrho_clip.commands.train import Train
from drrho_clip.commands.vectors import Vectors
from drrho_clip.commands.verify import Verify
from drrho_clip.errors import BadInput
from drrho_clip.options import parse
from drrho_clip.processes.place import place_of_launcher
from drrho_clip.terminal.guard import Command, guarded

# The help lists the commands in this order.
COMMANDS: dict[str, type] = {
    "demo": Demo,
    "index": Index,
    "train": Train,
    "encode": Encode,
    "evaluate": Evaluate,
    "suspects": Suspects,
    "search": Search,
    "report": Report,
    "reproduce": Reproduce,
    "export": Export,
    "replay": Replay,
    "verify": Verify,
    "vectors": Vectors,
    "bench": Bench,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        The words after ``drrho``; by default the words with which the process was started.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    return guarded(lambda: read_command(words), ends_process=arguments is None)


def read_command(words: Sequence[str]) -> Command:
    """Return the command that the words after ``drrho`` describe, or raise BadInput."""
    command: Command = parse(
        words, COMMANDS, prog="drrho", description="Steer the training of a model with a reference model."
    )
    place = place_of_launcher()
    # Several processes would write the same files.
    if place is not None and place.size > 1 and not getattr(command, "takes_processes", False):
        raise BadInput(f"drrho {words[0]} must be started as one process, got {place.size} processes")
    return command


if __name__ == "__main__":
    sys.exit(main())
