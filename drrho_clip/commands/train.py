"""The command ``drrho train``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

from drrho_clip.commands.common import allow_unfinished_option, build_backend, check_new_file, device_option, write_json
from drrho_clip.commands.place import coordinator_option, place_among, process_option, processes_option
from drrho_clip.commands.table import print_table
from drrho_clip.config import BUILT_IN_DATA, TrainConfig
from drrho_clip.config_file import PRESETS, read_preset, read_settings
from drrho_clip.errors import BadInput
from drrho_clip.files.outputs import has_checkpoint
from drrho_clip.options import FLAG, PATH, choice, setting
from drrho_clip.plan.options import PlanOptions
from drrho_clip.processes.place import Place
from drrho_clip.setting_rules import check_used, dropped_of_preset
from drrho_clip.table_defaults import defaults_for, preferred_architecture, preset, selection_defaults
from drrho_clip.terminal.printing import say
from drrho_core.backend import Backend

_SIZES_OF_IMAGES = ("architecture", "image_size", "resize")
_NO_TABLE = "pairs.csv"
_SIZES_OF_TOWERS = ("feature_dim", "width", "depth")


def _sizes_of(model: str) -> tuple[str, ...]:
    """Return the settings of the encoders that a model of the setting `model` has itself."""
    return _SIZES_OF_IMAGES + (() if model.startswith("features:") else _SIZES_OF_TOWERS)


@dataclass(frozen=True)
class Train:
    """Train a pair of encoders, one for images and one for texts; the method drrho also reads a reference model.

    The data are a table with a column of image paths (relative to the table) and a column of captions, a folder of
    images with text files beside them, or built in.

    For example:
      drrho train --data pairs.csv --method clip --out runs/reference
      drrho train --data pairs.csv --method drrho --reference runs/reference --out runs/steered
      drrho train --data pairs.csv --method drrho --reference hf:clip --out runs/steered
      drrho train --resume --out runs/steered
      drrho train --resume --out runs/steered --epochs 60
      drrho train --config run.yaml --out runs/steered --dry-run
      drrho train --config run.yaml --out runs/steered --dry-run --world-size 8 --bandwidth 25
    """

    takes_processes: ClassVar[bool] = True

    out: Path = setting(rule=PATH, help="Folder of the run; a folder that holds a run is refused without --resume.")
    resume: bool = setting(
        False,
        rule=FLAG,
        help="Continue from the last checkpoint in --out; settings named again must have the values of the run, "
        "except those that do not change the results, such as --workers and --max-unreadable. A finished run continues "
        "if --epochs is larger.",
    )
    config: Path | None = setting(
        None,
        rule=PATH,
        metavar="FILE",
        help="A YAML file with settings, or the config.json of a run; the options of the command line come first.",
    )
    preset: str | None = setting(
        None,
        rule=choice(*PRESETS),
        help="Settings of a published run on this data set; --config and the options of the command line come first.",
    )
    dry_run: bool = setting(
        False,
        rule=FLAG,
        help="Print pairs, steps, parameters and memory of the run, and with --world-size its traffic and time; train "
        "nothing and write nothing.",
    )
    allow_unfinished: bool = allow_unfinished_option("A run after --reference or --init")
    device: str | None = device_option()
    coordinator: str | None = coordinator_option()
    processes: int | None = processes_option()
    process: int | None = process_option()
    json: Path | None = setting(None, rule=PATH, help="A file to which the results are written as well.")
    planned: Mapping[str, Any] = field(default_factory=dict, metadata={"options": PlanOptions})
    settings: Mapping[str, Any] = field(default_factory=dict, metadata={"options": TrainConfig})

    def can_resume(self) -> bool:
        """Return whether the folder holds a checkpoint."""
        return has_checkpoint(self.out)

    @cached_property
    def named(self) -> Mapping[str, Any]:
        """The settings that the user has named, in the file or on the command line."""
        settings = {} if self.config is None else read_settings(self.config)
        # The config.json of a run with a model also has sizes, which that run has ignored.
        if settings.get("model") is not None and self.config is not None and self.config.suffix == ".json":
            own = _sizes_of(settings["model"])
            settings = {name: value for name, value in settings.items() if name not in own}
        # The command line comes first, so that a file can serve several runs that differ in a few settings.
        published = {} if self.preset is None else read_preset(self.preset)
        named = {**settings, **self.settings}
        # Another method or temperature scheme than that of the published run need not use all settings of that run.
        dropped = dropped_of_preset(*({**published, **named}.get(name) for name in ("method", "temperature_scheme")))
        return {**{name: value for name, value in published.items() if name not in dropped}, **named}

    def run(self) -> int:
        """Train, then print the table; or print the plan of a dry run."""
        from drrho_clip.processes.facts import facts_of_settings
        from drrho_clip.processes.opening import check_batch_size, opened_processes, telling_others
        from drrho_clip.processes.together import together, written_by_first
        from drrho_clip.run import refuse_existing
        from drrho_clip.run.resume import is_over
        from drrho_clip.train import train

        if self.dry_run:
            return self._planned()
        for name, value in self.planned.items():
            raise BadInput(f"{name} must be left out without dry_run, got {value}")
        place = place_among(self.coordinator, self.processes, self.process)
        with telling_others(place):
            config, backend = self._resumed(place) if self.resume else self._chosen(place)
        inputs = [self.config, *map(self.named.get, ("data", "validation"))]
        facts, timeout = facts_of_settings(config, resume=self.resume), config.rank_timeout
        with opened_processes(backend, place, facts=facts, rank_timeout=timeout) as processes:
            if not self.resume:
                written_by_first(processes, partial(refuse_existing, self.out))
            written_by_first(processes, partial(check_new_file, "json", self.json, *inputs, run=self.out))
            splits = None
            if not self.resume:
                config, splits = together(processes, partial(self._opened, config, backend))
            check_batch_size(config.batch_size, processes)
            over = self.resume and together(processes, partial(is_over, self.out, config))
            outcome = train(
                config,
                self.out,
                resume=self.resume,
                backend=backend,
                splits=splits,
                allow_unfinished=self.allow_unfinished,
                processes=processes,
            )
            # The file comes first, so that a closed pipe behind the table does not cost the results.
            written_by_first(processes, partial(write_json, self.json, [outcome.row]))
        print_table([outcome.row])
        say(f"{self.out} is finished; --epochs with a larger number continues" if over else f"wrote {self.out}")
        return 0

    def _planned(self) -> int:
        """Print what the run would do."""
        from drrho_clip.data.splits import open_splits
        from drrho_clip.plan.run import plan_of_size, plan_run, print_plan
        from drrho_clip.run import refuse_existing
        from drrho_clip.train import check_other_runs

        for name in ("resume", "json", "coordinator", "processes", "process"):
            if getattr(self, name):
                raise BadInput(f"{name} must be left out with dry_run, got {getattr(self, name)}")
        refuse_existing(self.out)
        options = PlanOptions.of(self.planned)
        if options.num_pairs is not None:
            config, backend = self._imagined(options.num_pairs)
            check_other_runs(config, allow_unfinished=self.allow_unfinished)
            print_plan(plan_of_size(config, backend, options), device=backend.device)
            return 0
        config, backend = self._chosen()
        config, splits = self._opened(config, backend)
        check_other_runs(config, allow_unfinished=self.allow_unfinished)
        splits = open_splits(config) if splits is None else splits
        plan = plan_run(config, backend, splits, share_left_out=_share_left_out(config), options=options)
        print_plan(plan, device=backend.device)
        return 0

    def _imagined(self, num_pairs: int) -> tuple[TrainConfig, Backend]:
        """Return settings and backend of a run whose data do not exist yet."""
        from drrho_clip.exchange.chosen_model import check_model

        if "data" in self.named:
            raise BadInput(f"data must be left out with num_pairs, got {self.named['data']}")
        # The settings need the name of a table; the plan does not print the name.
        sized = defaults_for(num_pairs, as_reference=self.named.get("as_reference", False))
        config = TrainConfig(**(preset(_NO_TABLE) | sized | {"data": _NO_TABLE} | dict(self.named)))
        check_used(config)
        backend = build_backend(config.backend, self.device, config.dtype)
        check_model(config, backend)
        return config, backend

    def _resumed(self, place: Place | None) -> tuple[TrainConfig, Backend]:
        """Return settings and backend of a run to resume, and check the user's options."""
        from drrho_clip.run import open_run
        from drrho_clip.run.resume import in_numbers, require_same

        # An option that the user repeats with another value would be ignored silently, so it is refused. `train`
        # decides about the number of epochs, which may grow once the run is finished.
        run = open_run(self.out)
        config, settings = run.config, in_numbers(run, self.named)
        require_same(config, {name: value for name, value in settings.items() if name != "epochs"})
        return replace(config, **settings), build_backend(config.backend, self.device, config.dtype, place)

    def _chosen(self, place: Place | None = None) -> tuple[TrainConfig, Backend]:
        """Return settings and backend of a new run, before defaults that depend on data and backend are known."""
        from drrho_clip.run import refuse_run

        # All other checks come before the data are read, because reading the data may take long. Only the first process
        # writes, so the folders of other machines may hold anything.
        if place is None or place.rank == 0:
            refuse_run(self.out)
        if "data" not in self.named:
            raise BadInput(f"data must be a table, a folder or one of {', '.join(BUILT_IN_DATA)}, got none")
        config = TrainConfig(**(preset(self.named["data"]) | dict(self.named)))
        check_used(config)
        return config, build_backend(config.backend, self.device, config.dtype, place)

    def _opened(self, config: TrainConfig, backend: Backend) -> tuple[TrainConfig, Any]:
        """Return settings and data (None: not opened) of a new run; defaults depend on data and backend."""
        from drrho_clip.data.splits import open_splits
        from drrho_clip.exchange.chosen_model import check_model
        from drrho_clip.exchange.start_values import with_start_values

        check_model(config, backend)
        config = with_start_values(config)
        if config.model is not None:
            # The model has sizes of its own, so another size would be ignored silently.
            for name in _sizes_of(config.model):
                if name in self.named:
                    raise BadInput(f"{name} must be left out with model, which has it, got {self.named[name]!r}")
        # The default architecture depends on the backend; some defaults depend on the size of the table.
        if "architecture" not in self.named:
            config = replace(config, architecture=preferred_architecture(config.architecture, backend))
        if config.data in BUILT_IN_DATA and config.super_batch == 1:
            return config, None
        splits = open_splits(config)
        used_share = 1.0 - _share_left_out(config)
        if config.data in BUILT_IN_DATA:
            sized = selection_defaults(config, round(used_share * len(splits.train)))
        else:
            sized = defaults_for(
                len(splits.train),
                used_share=used_share,
                as_reference=config.as_reference,
                super_batch=config.super_batch,
            )
        return replace(config, **{name: value for name, value in sized.items() if name not in self.named}), splits


def _share_left_out(config: TrainConfig) -> float:
    """Return the share of the training pairs that the run will leave out, as far as it is known before training."""
    from drrho_clip.encoders import is_run
    from drrho_clip.reference import recorded_shares
    from drrho_clip.reference.memorisation import suspect_share
    from drrho_clip.run import open_run

    if config.drop_suspects is None or config.reference is None:
        return 0.0
    if not isinstance(config.drop_suspects, str):
        return config.drop_suspects
    # Only a run has recorded shares.
    if not is_run(config.reference):
        return 0.0
    # The run measures the shares again, on its own pairs; for a default the shares of the reference run are enough.
    shares = recorded_shares(open_run(config.reference))
    return 0.0 if shares is None else suspect_share(shares)
