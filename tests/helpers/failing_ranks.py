"""Let a rank of a training run fail in many ways, and measure how the other ranks end.

A rank is one of the processes that train together. Run as a script, the file makes the table of docs/many-devices.md:

    PYTHONPATH=tests python tests/helpers/failing_ranks.py table FOLDER --size 2 --launcher torchrun

Each case trains with several processes, one of which fails after some steps. The script measures the seconds from the
failure to the end of the last survivor, resumes the run, and compares the parameters with an uninterrupted run.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from helpers.ports import free_port
from helpers.small_pairs import write_two_colours

STEP = 7
"""The number of steps that are done when a rank fails; the last checkpoint is that of step 6."""
HANG = 3.0
"""Seconds without progress after which a rank counts as hanging, in the table."""
OPTIONS = (
    "--method sogclr --backend torch --device cpu --architecture mlp --image-size 8 --width 8 --feature-dim 8 "
    "--batch-size 12 --epochs 3 --learning-rate 0.01 --warmup-steps 2 --log-every 1 --checkpoint-every 3"
)

# By the name of the case: the words of the table, and the rank that fails (-1: the last).
CASES: dict[str, tuple[str, int]] = {
    "settings": ("a setting differs", -1),
    "batch": ("the batch size differs", -1),
    "data": ("the data differ", -1),
    "program": ("the program differs", -1),
    "raises": ("a rank raises an error", -1),
    "killed": ("a rank is killed (`kill -9`)", -1),
    "killed-first": ("rank 0 is killed", 0),
    "hangs": ("a rank hangs", -1),
    "stopped": ("a rank is stopped (SIGSTOP)", -1),
    "interrupted": ("Ctrl-C on one rank", -1),
    "disk": ("the disk is full", 0),
    "repeated": ("two ranks have one sample", -1),
}


# The failing process --------------------------------------------------------------------------------------------------


def run_child(case: str, folder: Path, arguments: list[str]) -> int:
    """Run the command as one of the processes; the process that has to fail does so."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    if rank == CASES[case][1] % size:
        arguments = prepare_failure(case, folder, arguments)
    sys.argv = ["drrho", *arguments]
    from drrho_clip.__main__ import start

    return start()


def prepare_failure(case: str, folder: Path, arguments: list[str]) -> list[str]:
    """Patch the program so that this process fails as the case says; return the arguments of the command."""
    from drrho_clip import trainer
    from drrho_clip.processes import fingerprint, opening

    def mark() -> None:
        (folder / "failed-at").write_text(repr(time.time()))

    def before(place: Any, name: str, act: Callable[..., Any]) -> None:
        call = getattr(place, name)

        def acting(*args: Any, **kwargs: Any) -> Any:
            changed = act(*args, **kwargs)
            return call(*(args if changed is None else changed), **kwargs)

        setattr(place, name, acting)

    def at_step(act: Callable[[], Any]) -> None:
        def take(self: Any, batch: Any, **_: Any) -> None:
            if self.done == STEP:
                mark()
                act()

        before(trainer.Trainer, "take_step", take)

    def fail() -> None:
        raise TypeError("a mistake of ours")

    def full(*_: Any) -> None:
        mark()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "run" / "checkpoint.safetensors"))

    def other_data() -> str:
        write_two_colours(folder / "other", 60, swapped_fraction=0.1, seed=1)
        return str(folder / "other" / "pairs.csv")

    match case:
        case "settings":
            return [*arguments, "--temperature", "0.2"]
        case "batch":
            return [*arguments, "--batch-size", "18"]
        case "data":
            return [other_data() if word.endswith("pairs.csv") else word for word in arguments]
        case "program":
            opening.facts_of_program = lambda names: {**fingerprint.facts_of_program(names), "version": "0.0.9"}
        case "raises":
            at_step(fail)
        case "killed" | "killed-first":
            at_step(lambda: os.kill(os.getpid(), signal.SIGKILL))
        case "hangs":
            at_step(lambda: time.sleep(3600))
        case "stopped":
            at_step(lambda: os.kill(os.getpid(), signal.SIGSTOP))
        case "interrupted":
            at_step(lambda: os.kill(os.getpid(), signal.SIGINT))
        case "disk":
            # The first checkpoints can still be written.
            def save(path: Path, kind: str, arrays: Any, progress: Mapping[str, Any]) -> None:
                if progress["step"] >= STEP:
                    full()

            before(trainer, "save_arrays", save)
        case "repeated":

            def take(self: Any, batch: Any, **_: Any) -> tuple[Any, Any] | None:
                if self.done != STEP:
                    return None
                mark()
                batch.sample_index[0] = batch.whole_index[0]
                return self, batch

            before(trainer.Trainer, "take_step", take)
    return arguments


# The group ------------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """The end of a group of processes: seconds, exit codes and printed lines."""

    seconds: float | None
    codes: list[int]
    lines: list[str]


def launch(size: int, launcher: str, command: Sequence[str], folder: Path, *, timeout: float = 120.0) -> Result:
    """Run a script with several processes, and wait until all but stopped processes have ended."""
    for path in [*folder.glob("pid-*"), folder / "failed-at"]:
        path.unlink(missing_ok=True)
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "tests"), str(root / "backends"), os.environ.get("PYTHONPATH", "")]
    shared = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with open(folder / "errors", "w") as errors, open(folder / "output", "w") as output:
        options: dict[str, Any] = {"stdout": output, "stderr": errors}
        if launcher == "torchrun":
            words = ["--standalone", "--nproc-per-node", str(size), *command]
            processes = [
                subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *words], env=shared, **options)
            ]
        else:
            port = str(free_port())
            places: list[Mapping[str, str]] = [
                {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)} for rank in range(size)
            ]
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            processes = [
                subprocess.Popen([sys.executable, *command], env=shared | dict(place) | address, **options)
                for place in places
            ]
        ended = _wait(processes, size, folder, timeout)
        # A stopped process would outlive its launcher.
        for path in folder.glob("pid-*"):
            if _state(int(path.read_text() or 0)) == "T":
                os.kill(int(path.read_text()), signal.SIGKILL)
        codes = [process.wait() for process in processes]
    failed_at = folder / "failed-at"
    seconds = ended - float(failed_at.read_text()) if failed_at.exists() else None
    lines = [
        line
        for line in (folder / "errors").read_text().splitlines()
        if line.startswith(("drrho: ", "TypeError", "ValueError"))
    ]
    return Result(seconds, codes, lines)


def _wait(processes: Sequence[subprocess.Popen[bytes]], size: int, folder: Path, timeout: float) -> float:
    """Wait until all training processes have ended, except those that are stopped; return the time."""
    end = time.time() + timeout
    while time.time() < end:
        files = sorted(folder.glob("pid-*"))
        states = [_state(int(path.read_text() or 0)) for path in files]
        if len(files) == size and all(state in "ZTX" for state in states):
            return time.time()
        # A launcher may end before all processes have written their numbers.
        if all(process.poll() is not None for process in processes):
            return time.time()
        time.sleep(0.01)
    for process in processes:
        process.kill()
    raise TimeoutError(f"the processes have not ended after {timeout:g} s: {folder}")


def _state(pid: int) -> str:
    """Return the letter of the state of a process: Z for a zombie, T for a stopped process, X for no process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def parameters_of(run: Path) -> dict[str, np.ndarray]:
    """Return the arrays of the last checkpoint of a run."""
    from drrho_clip.files.checkpoint import load_arrays

    return load_arrays(run / "checkpoint.safetensors", "checkpoint")[0]


def equal(run: Path, expected: Path) -> bool:
    """Return whether two runs have the same last checkpoint, to the bit."""
    arrays, others = parameters_of(run), parameters_of(expected)
    return arrays.keys() == others.keys() and all(np.array_equal(arrays[name], others[name]) for name in arrays)


def train_command(folder: Path, case: str | None, *, out: Path, resume: bool = False) -> list[str]:
    """Return the script and the arguments of a process that trains."""
    words = ["train", "--out", str(out), "--rank-timeout", str(HANG)]
    words += ["--resume"] if resume else ["--data", str(folder / "data" / "pairs.csv"), *OPTIONS.split()]
    if case is None:
        return [str(Path(__file__).parent / "failing_ranks.py"), "none", str(folder), *words]
    return [str(Path(__file__)), case, str(folder), *words]


def prepare(folder: Path, size: int, launcher: str) -> None:
    """Write the data, and train the run that nothing interrupts."""
    folder.mkdir(parents=True, exist_ok=True)
    write_two_colours(folder / "data", 60, swapped_fraction=0.1)
    shutil.rmtree(folder / "whole", ignore_errors=True)
    whole = launch(size, launcher, train_command(folder, None, out=folder / "whole"), folder)
    if any(whole.codes):
        raise RuntimeError(f"the run without failures failed: {(folder / 'errors').read_text()}")


def fail(folder: Path, case: str, size: int, launcher: str) -> Result:
    """Start a run anew, in which a rank fails as the case says."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    return launch(size, launcher, train_command(folder, case, out=out), folder)


def measure(folder: Path, case: str, size: int, launcher: str) -> tuple[Result, str]:
    """Let a case fail, resume the run, and return the result with words about the resumed run."""
    out, whole = folder / "run", folder / "whole"
    result = fail(folder, case, size, launcher)
    if not out.exists():
        return result, "nothing was written"
    resumed = launch(size, launcher, train_command(folder, None, out=out, resume=True), folder)
    if any(resumed.codes):
        return result, f"not resumed: {resumed.lines}"
    return result, "equal" if equal(out, whole) else "other numbers"


def print_table(folder: Path, size: int, launcher: str, cases: Sequence[str]) -> None:
    """Measure the cases, and print a line of the table for each."""
    prepare(folder, size, launcher)
    print("| case | seconds | exit codes | lines | resumed |\n|---|---|---|---|---|")
    for case in cases:
        result, resumed = measure(folder, case, size, launcher)
        seconds = "" if result.seconds is None else f"{result.seconds:.2f}"
        lines = "<br>".join(f"{result.lines.count(line)} x `{line}`" for line in dict.fromkeys(result.lines))
        print(f"| {CASES[case][0]} | {seconds} | {result.codes} | {lines} | {resumed} |", flush=True)


def main() -> int:
    """Read the words of the command line, and act."""
    if sys.argv[1] != "table":
        case, folder, *arguments = sys.argv[1:]
        if case == "none":
            sys.argv = ["drrho", *arguments]
            from drrho_clip.__main__ import start

            return start()
        return run_child(case, Path(folder), arguments)
    parser = argparse.ArgumentParser()
    parser.add_argument("table")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=2)
    parser.add_argument("--launcher", choices=["plain", "torchrun"], default="plain")
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    options = parser.parse_args()
    print_table(options.folder, options.size, options.launcher, options.cases)
    return 0


if __name__ == "__main__":
    sys.exit(main())
