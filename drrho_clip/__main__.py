"""The start of the process ``drrho``: signals are caught before the commands and their libraries are imported."""

from __future__ import annotations

import sys

from drrho_clip.terminal.guard import Command, guarded


def start() -> int:
    """Run the command line of the process and return the exit code; `drrho_clip.cli.main` is for other callers."""

    # The import takes some tenths of a second, in which a Ctrl-C would end in a traceback.
    def prepare() -> Command:
        from drrho_clip.cli import read_command

        return read_command(sys.argv[1:])

    return guarded(prepare, ends_process=True)


if __name__ == "__main__":
    sys.exit(start())
