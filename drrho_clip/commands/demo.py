"""The command ``drrho demo``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from drrho_clip.commands.common import build_backend, device_option
from drrho_clip.commands.table import print_table
from drrho_clip.config import SEED
from drrho_clip.files.outputs import has_checkpoint
from drrho_clip.options import FLAG, PATH, TEXT, setting
from drrho_clip.terminal.printing import say
from drrho_core.backend import default_backend


@dataclass(frozen=True)
class Demo:
    """Show that a reference model helps: train such a model, CLIP, SogCLR and DRRho-CLIP on built-in data, in minutes.

    The data are rendered scenes with captions if the backend has convolutions, and scikit-learn's digits
    if not.
    The command writes results.json and a self-contained report.html.

    For example:
      drrho demo --out demo
      drrho demo --out demo --backend numpy
      drrho demo --out demo --seeds 0 1 2
    """

    out: Path = setting(rule=PATH, help="A new folder.")
    backend: str | None = setting(
        None, rule=TEXT, shown="the preferred library of those installed", help="Array library."
    )
    device: str | None = device_option()
    quick: bool = setting(
        False,
        rule=FLAG,
        help="Train small models for a few steps. This shows that every part works, but not which method is best.",
    )
    seeds: tuple[int, ...] = setting(
        (0,), rule=SEED, several="+", help="Seeds. The demo compares all methods once per seed."
    )
    resume: bool = setting(False, rule=FLAG, help="Continue an interrupted demo.")

    def can_resume(self) -> bool:
        """Return whether one of the runs of the demo has a checkpoint."""
        return any(has_checkpoint(file.parent) for file in self.out.glob("runs/*/*/config.json"))

    def run(self) -> int:
        """Train, then print the table."""
        from drrho_clip.demo import run_demo

        # The scenes are made for convolutions; the digits are small enough for perceptrons.
        backend = build_backend(self.backend or default_backend(), self.device, "float32")
        data = "scenes" if "conv" in backend.architectures else "digits"
        rows = run_demo(self.out, backend=backend, data=data, seeds=self.seeds, quick=self.quick, resume=self.resume)
        print_table(rows)
        say(f"wrote {self.out / 'results.json'} and {self.out / 'report.html'}")
        return 0
