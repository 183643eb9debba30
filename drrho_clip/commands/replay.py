"""The command ``drrho replay``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from drrho_clip.commands.common import build_backend, device_option
from drrho_clip.options import PATH, setting
from drrho_clip.terminal.printing import say


@dataclass(frozen=True)
class Replay:
    """Take a step whose loss was not finite again, from the dump in the folder of the run, and say what is not finite.

    For example:
      drrho replay runs/steered
    """

    run_folder: Path = setting(rule=PATH, metavar="RUN", positional=True, help="Folder of the run.")
    device: str | None = device_option()

    def run(self) -> int:
        """Replay the step and print what it shows."""
        from drrho_clip.failure import replay
        from drrho_clip.run import open_run

        config = open_run(self.run_folder).config
        replayed = replay(self.run_folder, build_backend(config.backend, self.device, config.dtype))
        say(f"step {replayed.step}: loss {replayed.loss}")
        for what, bad in (
            ("parameters", replayed.bad_parameters),
            ("rows with an image", replayed.bad_images),
            ("rows with a caption", replayed.bad_texts),
        ):
            if bad:
                shown = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
                say(f"{what} that gives numbers that are not finite: {shown}")
        return 0
