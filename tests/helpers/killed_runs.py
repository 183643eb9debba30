"""Kill training runs with SIGKILL at many moments, resume them, and compare them with runs that nobody killed.

A moment is the time right before or right after an event: a file gets its final name, a file is sent to the disk, a
line of the log is written (by half, if the kill comes first), a step is taken, an epoch is validated, a state is
chosen. The moments of a whole run are numbered, and the kills are spread evenly over the numbers. Every run is a child
of this process. This process trains a short run first: the command imports many libraries only when it needs them, and
a child would have to import them again.

Run as a script: python tests/helpers/killed_runs.py FOLDER MOMENTS
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from drrho_clip.cli import main
from drrho_clip.files.checkpoint import load_arrays
from drrho_clip.run import Run
from drrho_clip.run.kept_states import KeptStates
from drrho_clip.trainer import Trainer

SMALL = "--data digits --backend numpy --epochs 3 --width 4 --feature-dim 8 --checkpoint-every 3 --log-every 1"
# By the name of the run: its options. The first run chooses a reference state and becomes the reference of the second,
# whose estimates are in a file. The third goes on with more epochs after its end.
RUNS = {
    "reference": f"{SMALL} --method clip",
    "steered": f"{SMALL} --method drrho --estimator file",
    "longer": f"{SMALL} --method sogclr --patience 1",
}
MORE_EPOCHS = "5"


def in_child(work: Callable[[], int]) -> int:
    """Do the work in a child process, whose standard output is dropped; return the status of `os.waitpid`."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


class Events:
    """Count the events of a run, and kill the process at one of them.

    Parameters
    ----------
    fatal : int or None
        Number of the moment, from 0: the moments before and after event k have the numbers 2k and 2k + 1. With None
        nothing is killed.
    """

    def __init__(self, fatal: int | None) -> None:
        self.count = 0
        self._fatal = fatal

    def moment(self) -> None:
        """Pass one moment."""
        if self.count == self._fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def around(self, place: Any, name: str) -> None:
        """Let the calls of a function be events."""
        call = getattr(place, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.moment()
            result = call(*args, **kwargs)
            self.moment()
            return result

        setattr(place, name, watched)

    def watch(self) -> None:
        """Let all kinds of events be counted."""
        for place, name in ((os, "replace"), (os, "fsync"), (Trainer, "take_step"), (KeptStates, "add")):
            self.around(place, name)
        self.around(Trainer, "end_of_epoch")
        write_line = Run.log

        def log(run: Run, record: Any) -> None:
            # If the process is to die within this line, half of the line is in the file.
            if self.count == self._fatal:
                with run.metrics.open("a") as file:
                    file.write(json.dumps(record)[:20])
            self.moment()
            write_line(run, record)
            self.moment()

        Run.log = log  # type: ignore[method-assign]


def train(arguments: Sequence[str], *, fatal: int | None = None, counted: Path | None = None) -> int:
    """Run the command in a child; die at the moment `fatal`, or write the number of moments into the file `counted`."""

    def work() -> int:
        events = Events(fatal)
        events.watch()
        code = main(list(arguments))
        if counted is not None:
            counted.write_text(str(events.count))
        return code

    return in_child(work)


def differences(run: Path, expected: Path) -> list[str]:
    """Return the names of the files in which two runs differ, and the names of files that only one of them has."""
    names = {path.name for folder in (run, expected) for path in folder.iterdir()} - {"writer.lock", "estimator.bin"}
    return sorted(name for name in names if _content(run / name) != _content(expected / name))


def _content(path: Path) -> Any:
    """Return what has to be equal: not the times, and not the paths of the two folders."""
    if not path.exists():
        return None
    if path.suffix == ".safetensors":
        kind = {"checkpoint": "checkpoint", "training": "training-images", "reference": "reference-features"}
        word = path.name.replace("-", "_").replace(".", "_").split("_")[0]
        arrays, state = load_arrays(path, kind[word])
        return {name: (array.dtype, array.tobytes()) for name, array in arrays.items()}, state | {"seconds": 0}
    if path.name == "results.json":
        return [row | {"seconds": 0} for row in json.loads(path.read_text())]
    if path.name == "config.json":
        return json.loads(path.read_text()) | {"places": {}}
    return path.read_text()


def finish(out: Path, arguments: Sequence[str], *, fatal: int | None = None) -> None:
    """Bring a run to its end: start it, resume it, or start it again if it was killed before the first checkpoint."""
    resumable = (out / "checkpoint.safetensors").exists() and (out / "config.json").exists()
    if not resumable:
        shutil.rmtree(out, ignore_errors=True)
    command = ["train", "--resume", "--out", str(out)] if resumable else [*arguments, "--out", str(out)]
    status = train(command, fatal=fatal)
    expected = 0 if fatal is None else signal.SIGKILL
    if status != expected:
        raise SystemExit(f"{' '.join(command)}: ended with status {status}, expected {expected}")


def import_all(out: Path) -> None:
    """Import in this process all that the children need, with a run of one epoch."""
    options = SMALL.replace("--epochs 3", "--epochs 1")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        code = main(["train", *options.split(), "--method", "clip", "--out", str(out)])
    if code != 0:
        raise SystemExit("the first run, for the imports, failed")


def attack(folder: Path, moments: int) -> list[str]:
    """Kill and resume runs at a number of moments, and return a line for each run that differs."""
    import_all(folder / "imports")
    failures: list[str] = []
    shares = [moments // len(RUNS) + (place < moments % len(RUNS)) for place in range(len(RUNS))]
    for (name, options), share in zip(RUNS.items(), shares, strict=True):
        arguments = ["train", *options.split()]
        if name == "steered":
            arguments += ["--reference", str(folder / "reference")]
        whole, counted = folder / name, folder / f"{name}.count"
        if train([*arguments, "--out", str(whole)], counted=counted) != 0:
            raise SystemExit(f"the run {name} failed")
        phases = [(int(counted.read_text()), None)]
        if name == "longer":
            # The second phase begins with a copy of the finished run.
            finished = folder / "finished"
            shutil.copytree(whole, finished)
            more = ["train", "--resume", "--epochs", MORE_EPOCHS, "--out"]
            if train([*more, str(whole)], counted=counted) != 0:
                raise SystemExit("the run did not go on")
            phases = [(int(counted.read_text()), finished)]
        for total, start in phases:
            for place in range(share):
                fatal = round((place + 0.5) * total / share)
                out = folder / f"{name}-{fatal}"
                if start is None:
                    finish(out, arguments, fatal=fatal)
                else:
                    shutil.copytree(start, out)
                    status = train([*more, str(out)], fatal=fatal)
                    if status != signal.SIGKILL:
                        raise SystemExit(f"{out}: ended with status {status} instead of a kill")
                    # If the kill came before the new number of epochs was written, the run is still finished.
                    train([*more, str(out)])
                finish(out, arguments)
                failures += [f"{out.name}: {file} differs" for file in differences(out, whole)]
                shutil.rmtree(out)
                print(f"{name}: killed at moment {fatal} of {total}", flush=True)
    return failures


if __name__ == "__main__":
    target, number = Path(sys.argv[1]), int(sys.argv[2])
    found = attack(target, number)
    print("\n".join(found) or f"{number} runs were killed, and all ended as the runs without interruption")
    sys.exit(bool(found))
