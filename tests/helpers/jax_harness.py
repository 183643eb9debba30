"""Runs of the harness on JAX, in one process with several devices and in two processes; a program, as JAX requires.

    python -m helpers.jax_harness FOLDER              one process with four devices: runs on one device and on all
    python -m helpers.jax_harness FOLDER PORT NUMBER  one of two processes; the second is killed in the last run
    python -m helpers.jax_harness command WORDS       the command `drrho`, as one of two processes

FOLDER has the table ``data/pairs.csv``. Every run is a folder ``FOLDER/KIND/CASE``.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NUM_DEVICES, NUM_PROCESSES = 4, 2
SMALL: dict[str, Any] = {
    "backend": "jax", "architecture": "mlp", "image_size": 8, "width": 8, "feature_dim": 8, "dtype": "float64",
    "batch_size": 12, "epochs": 2, "learning_rate": 0.01, "warmup_steps": 2, "log_every": 1, "checkpoint_every": 4,
}  # fmt: skip
"""Settings of a run of a second."""

CASES: dict[str, dict[str, Any]] = {
    "reference": {"method": "clip", "micro_batch": 4},
    "steered": {"method": "drrho", "temperature_scheme": "per_sample", "form": "ring", "radius": 1.0},
    "resumed": {"method": "sogclr"},
}
"""Settings of each case; ``reference`` is the reference run of the next, and ``resumed`` stops after five steps."""


KILLED, STEP = "killed", 6
"""The run of the settings of `steered` in which the second process is killed, and the steps that are done then."""


def settings_of(folder: Path, name: str, kind: str) -> dict[str, Any]:
    """Return all settings of a case."""
    more = {"reference": str(folder / kind / "reference")} if CASES[name]["method"] == "drrho" else {}
    return SMALL | {"data": str(folder / "data" / "pairs.csv")} | CASES[name] | more


def main(arguments: Sequence[str]) -> None:
    """Train all cases."""
    from drrho_clip.processes.opening import connect, open_processes, opened_processes
    from drrho_clip.processes.place import Place
    from drrho_core.backend import get_backend

    folder = Path(arguments[0])
    if arguments[1:]:
        port, number = map(int, arguments[1:])
        place = Place(number, NUM_PROCESSES, 0, f"127.0.0.1:{port}")
        connect("jax", place)
        # An error outside of this context would be printed beside the line of the watch.
        with opened_processes(get_backend("jax", dtype="float64"), place) as processes:
            for name in CASES:
                train_case(folder, "processes", name, processes, stop_after=5 if name == "resumed" else None)
            if number == 1:
                kill_at(STEP)
            train_case(folder, "processes", "steered", processes, out=KILLED)
        return
    devices = open_processes(get_backend("jax", dtype="float64"), Place(0, 1))
    for name in CASES:
        train_case(folder, "alone", name)
    train_case(folder, "devices", "steered", devices)
    # The run of two processes goes on with four devices of one process.
    train_case(folder, "processes", "resumed", devices, resume=True)


def kill_at(step: int) -> None:
    """Let this process be killed when it has done so many steps of a run."""
    from drrho_clip.trainer import Trainer

    take_step = Trainer.take_step

    def fatal(self: Trainer, *arguments: Any, **options: Any) -> Any:
        if self.done == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(self, *arguments, **options)

    Trainer.take_step = fatal  # type: ignore[method-assign]


def train_case(
    folder: Path, kind: str, name: str, processes: Any = None, *, out: str | None = None, **how: Any
) -> None:
    """Train one case; the folder of the run has the name of the case, or the name `out`."""
    from drrho_clip.config import TrainConfig
    from drrho_clip.train import train

    config = TrainConfig(**settings_of(folder, name, "processes" if kind == "processes" else "alone"))
    train(config, folder / kind / (out or name), quiet=True, processes=processes, **how)


if __name__ == "__main__":
    num_devices = 1 if sys.argv[2:] else NUM_DEVICES
    flags = f"--xla_force_host_platform_device_count={num_devices} --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    if sys.argv[1] == "command":
        from drrho_clip.cli import main as command

        sys.argv[1:] = sys.argv[2:]
        sys.exit(command())
    main(sys.argv[1:])
