"""The command ``drrho train``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from drrho_clip.commands.common import allow_unfinished_option, build_backend, check_new_file, device_option, write_json
from drrho_clip.commands.table import print_table
from drrho_clip.config import BUILT_IN_DATA, TrainConfig, preferred_architecture, preset
from drrho_clip.errors import BadInput
from drrho_clip.files.outputs import has_checkpoint
from drrho_clip.options import FLAG, PATH, setting
from drrho_clip.table_defaults import defaults_for
from drrho_clip.terminal.printing import say
from drrho_core.backend import Backend

# The settings of the encoders that a model of the setting `model` has itself.
_SIZES = ("architecture", "image_size", "resize", "feature_dim", "width", "depth")


@dataclass(frozen=True)
class Train:
    """Train a pair of encoders, one for images and one for texts; the method drrho also reads a reference model.

    The data are a table with a column of image paths (relative to the table) and a column of captions, a folder of
    images with text files beside them, or built in.

    For example:
      drrho train --data pairs.csv --method clip --out runs/reference
      drrho train --data pairs.csv --method drrho --reference runs/reference --out runs/steered
      drrho train --resume --out runs/steered
      drrho train --resume --out runs/steered --epochs 60
    """

    out: Path = setting(rule=PATH, help="Folder of the run; a folder that holds a run is refused without --resume.")
    resume: bool = setting(
        False,
        rule=FLAG,
        help="Continue from the last checkpoint in --out; settings named again must have the values of the run. A "
        "finished run continues if --epochs is larger.",
    )
    allow_unfinished: bool = allow_unfinished_option("A run after --reference or --init")
    device: str | None = device_option()
    json: Path | None = setting(None, rule=PATH, help="A file to which the results are written as well.")
    settings: Mapping[str, Any] = field(default_factory=dict, metadata={"options": TrainConfig})

    def can_resume(self) -> bool:
        """Return whether the folder holds a checkpoint."""
        return has_checkpoint(self.out)

    def run(self) -> int:
        """Train, then print the table."""
        from drrho_clip.run.resume import is_over
        from drrho_clip.train import train

        inputs = [self.settings.get(name) for name in ("data", "validation")]
        check_new_file("json", self.json, *inputs, run=self.out)
        config, backend, splits = self._resumed() if self.resume else self._started()
        over = self.resume and is_over(self.out, config)
        allowed = self.allow_unfinished
        outcome = train(config, self.out, resume=self.resume, backend=backend, splits=splits, allow_unfinished=allowed)
        # The file comes first, so that a closed pipe behind the table does not cost the results.
        write_json(self.json, [outcome.row])
        print_table([outcome.row])
        say(f"{self.out} is finished; --epochs with a larger number continues" if over else f"wrote {self.out}")
        return 0

    def _resumed(self) -> tuple[TrainConfig, Backend, Any]:
        """Return settings, backend and None (no opened data) of a run to resume, and check the user's options."""
        from drrho_clip.run import open_run
        from drrho_clip.run.resume import in_numbers, require_same

        # An option that the user repeats with another value would be ignored silently, so it is refused. `train`
        # decides about the number of epochs, which may grow once the run is finished.
        run = open_run(self.out)
        config, settings = run.config, in_numbers(run, self.settings)
        require_same(config, {name: value for name, value in settings.items() if name != "epochs"})
        return replace(config, **settings), build_backend(config.backend, self.device, config.dtype), None

    def _started(self) -> tuple[TrainConfig, Backend, Any]:
        """Return settings, backend and data (None if built in) of a new run; defaults depend on data and backend."""
        from drrho_clip.data.splits import open_splits
        from drrho_clip.exchange.chosen_model import check_model
        from drrho_clip.run import refuse_existing

        # All other checks come before the data are read, because reading the data may take long.
        refuse_existing(self.out)
        if "data" not in self.settings:
            raise BadInput(f"data must be a table, a folder or one of {', '.join(BUILT_IN_DATA)}, got none")
        config = TrainConfig(**(preset(self.settings["data"]) | dict(self.settings)))
        backend = build_backend(config.backend, self.device, config.dtype)
        check_model(config, backend)
        if config.model is not None:
            # The model has sizes of its own, so another size would be ignored silently.
            for name in _SIZES:
                if name in self.settings:
                    raise BadInput(f"{name} must be left out with model, which has it, got {self.settings[name]!r}")
        # The default architecture depends on the backend; some defaults depend on the size of the table.
        if "architecture" not in self.settings:
            config = replace(config, architecture=preferred_architecture(config.architecture, backend))
        if config.data in BUILT_IN_DATA:
            return config, backend, None
        splits = open_splits(config)
        used_share = 1.0 - _share_left_out(config)
        sized = defaults_for(len(splits.train), used_share=used_share, as_reference=config.as_reference)
        config = replace(config, **{name: value for name, value in sized.items() if name not in self.settings})
        return config, backend, splits


def _share_left_out(config: TrainConfig) -> float:
    """Return the share of the training pairs that the run will leave out, as far as it is known before training."""
    from drrho_clip.reference import recorded_shares
    from drrho_clip.reference.memorisation import suspect_share
    from drrho_clip.run import open_run

    if config.drop_suspects is None or config.reference is None:
        return 0.0
    if not isinstance(config.drop_suspects, str):
        return config.drop_suspects
    # The run measures the shares again, on its own pairs; for a default the shares of the reference run are enough.
    shares = recorded_shares(open_run(config.reference))
    return 0.0 if shares is None else suspect_share(shares)
