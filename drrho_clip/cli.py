"""The command ``drrho``: demo, train, evaluate, verify, vectors, bench.

Each command is a dataclass: the docstring is the text of the help, the fields are the options, and `run` does the work
and returns the exit code. The exit code is 0 after success, 1 if a check failed, and 2 after bad usage or bad input. In
the last case one line on standard error explains the error. Progress goes to standard error, tables go to standard
output. The commands import heavy libraries only when they run, so that ``drrho --help`` is quick.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

from drrho_clip.config import BUILT_IN_DATA, TrainConfig, preferred_architecture, preset
from drrho_clip.errors import BadInput, MissingExtra
from drrho_clip.options import FLAG, PATH, TEXT, as_typed, at_least, choice, parse, setting
from drrho_core.backend import Backend, backend_names, default_backend, get_backend


def _device() -> Any:
    return setting(
        None,
        rule=TEXT,
        shown="the library's default device",
        help="Device, by the name that the array library gives it, such as cuda:0.",
    )


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
    device: str | None = _device()
    quick: bool = setting(
        False,
        rule=FLAG,
        help="Train small models for a few steps. This shows that every part works, but not which method is best.",
    )
    seeds: tuple[int, ...] = setting(
        (0,), rule=at_least(0), several="+", help="Seeds. The demo compares all methods once per seed."
    )
    resume: bool = setting(False, rule=FLAG, help="Continue an interrupted demo.")

    def run(self) -> int:
        """Train, then print the table."""
        from drrho_clip.demo import run_demo
        from drrho_clip.table import print_table

        # The scenes are made for convolutions; the digits are small enough for perceptrons.
        backend = _build_backend(self.backend or default_backend(), self.device, "float32")
        data = "scenes" if "conv" in backend.architectures else "digits"
        rows = run_demo(self.out, backend=backend, data=data, seeds=self.seeds, quick=self.quick, resume=self.resume)
        print_table(rows)
        print(f"wrote {self.out / 'results.json'} and {self.out / 'report.html'}")
        return 0


@dataclass(frozen=True)
class Train:
    """Train a pair of encoders, one for images and one for texts; the method drrho also reads a reference model.

    The data are a CSV or TSV table with the columns image and caption (paths relative to the table), or built in.

    For example:
      drrho train --data pairs.csv --method clip --out runs/reference
      drrho train --data pairs.csv --method drrho --reference runs/reference --out runs/steered
      drrho train --resume --out runs/steered
    """

    out: Path = setting(rule=PATH, help="Folder of the run; a folder that holds a run is refused without --resume.")
    resume: bool = setting(
        False,
        rule=FLAG,
        help="Continue from the last checkpoint in --out; settings named again must have the values of the run.",
    )
    device: str | None = _device()
    json: Path | None = setting(None, rule=PATH, help="A file to which the results are written as well.")
    settings: Mapping[str, Any] = field(default_factory=dict, metadata={"options": TrainConfig})

    def run(self) -> int:
        """Train, then print the table."""
        from drrho_clip.table import print_table
        from drrho_clip.train import train

        config, backend, splits = self._resumed() if self.resume else self._started()
        outcome = train(config, self.out, resume=self.resume, backend=backend, splits=splits)
        print_table([outcome.row])
        _write_json(self.json, [outcome.row])
        print(f"wrote {self.out}")
        return 0

    def _resumed(self) -> tuple[TrainConfig, Backend, Any]:
        """Return settings, backend and None (no opened data) of a run to resume, and check the user's options."""
        from drrho_clip.run import open_run

        # An option that the user repeats with another value would be ignored silently, so it is refused.
        config = open_run(self.out).config
        for name, value in self.settings.items():
            if getattr(config, name) != value:
                raise BadInput(f"{name} must be that of the run to resume ({getattr(config, name)!r}), got {value!r}")
        return config, _build_backend(config.backend, self.device, config.dtype), None

    def _started(self) -> tuple[TrainConfig, Backend, Any]:
        """Return settings, backend and data (None if built in) of a new run; defaults depend on data and backend."""
        from drrho_clip.data import pair_splits
        from drrho_clip.run import refuse_existing

        # All other checks come before the data are read, because reading the data may take long.
        refuse_existing(self.out)
        if "data" not in self.settings:
            raise BadInput(f"data must be a CSV or TSV file or one of {', '.join(BUILT_IN_DATA)}, got none")
        config = TrainConfig(**(preset(self.settings["data"]) | dict(self.settings)))
        backend = _build_backend(config.backend, self.device, config.dtype)
        # The default architecture depends on the backend, the default batch size on the size of the table.
        if "architecture" not in self.settings:
            config = replace(config, architecture=preferred_architecture(config.architecture, backend))
        if config.data in BUILT_IN_DATA:
            return config, backend, None
        splits = pair_splits(config.data, seed=config.data_seed)
        if "batch_size" not in self.settings:
            config = replace(config, batch_size=_batch_size_for(len(splits.train)))
        return config, backend, splits


@dataclass(frozen=True)
class Evaluate:
    """Measure a run on held-out pairs: retrieval among 200 pairs, and zero-shot accuracy if the data have classes.

    For example:
      drrho evaluate runs/steered
      drrho evaluate runs/steered --split validation --json figures.json
      drrho evaluate runs/steered --data other.csv
    """

    folder: Path = setting(rule=PATH, metavar="RUN", positional=True, help="Folder of the run.")
    data: str | None = setting(
        None,
        rule=TEXT,
        metavar="FILE|NAME",
        shown="the run's own",
        help="Another built-in data set, or another table. All pairs of that table are evaluated.",
    )
    split: str = setting(
        "test", rule=choice("test", "validation"), help="Part of the data to evaluate; ignored if --data names a table."
    )
    backend: str | None = setting(None, rule=TEXT, shown="the run's own", help="Array library.")
    device: str | None = _device()
    json: Path | None = setting(None, rule=PATH, help="A file to which the results are written as well.")

    def run(self) -> int:
        """Evaluate, then print the table."""
        from drrho_clip.data import read_pairs
        from drrho_clip.encode import Encoder
        from drrho_clip.evaluate import evaluate
        from drrho_clip.run import open_run
        from drrho_clip.splits import open_splits
        from drrho_clip.table import print_table

        # Another backend may evaluate the run, because every backend reads the checkpoints of all others.
        run = open_run(self.folder)
        backend = _build_backend(self.backend or run.config.backend, self.device, run.config.dtype)
        if self.data is None or self.data in BUILT_IN_DATA:
            name = self.data or run.config.data
            splits = open_splits(replace(run.config, data=name))
            dataset = splits.test if self.split == "test" else splits.validation
        else:
            # Only the data of the run itself are split; of another table all pairs are evaluated.
            name, dataset = self.data, read_pairs(self.data)
        row = {
            "method": run.config.method,
            "dataset": name,
            "seed": run.config.seed,
            "metrics": evaluate(Encoder.load(run, backend), dataset),
        }
        print_table([row])
        _write_json(self.json, [row])
        return 0


@dataclass(frozen=True)
class Verify:
    """Compare drrho_core with the oracle, a slow NumPy implementation, on every array library that is installed.

    All cases run in float64 and in float32. For each library the command prints a table: the number of compared fields
    that passed, the largest error (relative, and in ulps, which are units in the last place), and every failure. The
    exit code is 1 if a case fails or cannot run.

    For example:
      drrho verify
      drrho verify --backend numpy
      drrho verify --device cuda:0 --json errors.json
    """

    backend: tuple[str, ...] = setting(
        (), rule=TEXT, several="append", shown="all that are installed", help="Array library; may be repeated."
    )
    device: str | None = _device()
    json: Path | None = setting(None, rule=PATH, help="A file to which the command also writes all cases and errors.")

    def run(self) -> int:
        """Check every library; return 1 if a library fails."""
        import drrho_reference

        import drrho_core

        reports, passed = {}, True
        for name, (xp, device, device_name) in self._libraries().items():
            report = drrho_reference.conformance.check(drrho_core, xp=xp, device=device)
            reports[name] = {"device": device_name, **report.to_json()}
            # A library that cannot run all cases, for example because it has no float64, has neither failed nor passed.
            complete = report.complete
            verdict = "passed" if complete else "FAILED" if report.verdict == "failed" else "INCOMPLETE"
            print(f"{name} on {device_name}: {verdict}\n{report.table()}\n", flush=True)
            passed = passed and complete
        _write_json(self.json, reports)
        return 0 if passed else 1

    def _libraries(self) -> dict[str, tuple[Any, Any, str]]:
        """Return namespace, device and name of the device of the libraries to check."""
        import array_api_compat
        import numpy as np

        libraries = {}
        for name in self.backend or backend_names():
            try:
                # Some libraries have float64 only if the process enables float64 before it makes the first array.
                backend = get_backend(name, device=self.device, dtype="float64")
            except (ValueError, ImportError) as error:
                # A library that the user named must work; any other library that does not work is left out.
                if name in self.backend:
                    raise BadInput(str(error)) from error
                continue
            array = backend.asarray(np.zeros(1))
            libraries[name] = array_api_compat.array_namespace(array), array_api_compat.device(array), backend.device
        if not libraries:
            raise BadInput(f"device must be one that an installed library has, got {self.device!r}")
        return libraries


@dataclass(frozen=True)
class Vectors:
    """Write test vectors: inputs and the oracle's results in files that a program in any language can read.

    The oracle is a slow NumPy implementation of the same functions. The folder gets a .safetensors file per function,
    an index vectors.json with the rules of comparison, and the JSON Schema of the index. Repeating the command writes
    the same bytes.

    For example:
      drrho vectors --out vectors
      drrho vectors --out vectors --dtype float32
    """

    out: Path = setting(rule=PATH, help="A new or an empty folder.")
    dtype: tuple[str, ...] = setting(
        (),
        rule=choice("float64", "float32"),
        several="append",
        shown="float64 and float32",
        help="Dtype of the inputs; may be repeated.",
    )

    def run(self) -> int:
        """Write the files; the index comes last, so a folder that has an index is complete."""
        import drrho_reference

        import drrho_core
        from drrho_clip.checkpoint import write_atomic

        # The folder must be empty, so that every file in it belongs to the index.
        if self.out.exists() and not self.out.is_dir():
            raise BadInput(f"out must be a folder, got the file {self.out}")
        present = sorted(path.name for path in self.out.iterdir()) if self.out.exists() else []
        if present:
            raise BadInput(f"out must be a new or an empty folder, got {self.out} with {', '.join(present[:3])}")
        dtypes = self.dtype or ("float64", "float32")
        content = drrho_reference.vectors.files(library_version=drrho_core.__version__, dtypes=dtypes)
        self.out.mkdir(parents=True, exist_ok=True)
        for name, data in content.items():
            write_atomic(self.out / name, data)
        count = len(json.loads(content[drrho_reference.vectors.INDEX])["cases"])
        size = sum(map(len, content.values())) / 1e6
        print(f"wrote {count} cases, {len(content)} files, {size:.1f} MB: {self.out}")
        return 0


@dataclass(frozen=True)
class Bench:
    """Compare the time and memory of the contrastive step (loss and gradient of one batch) with three alternatives.

    The alternatives are the library's own automatic differentiation of the same loss, CLIP's loss, and matrix products
    alone. Every figure is the ratio of two candidates, for example of two times. One process measures the candidates in
    turns, so that a slow change of the machine's speed cancels in the ratio. With --out the command writes the figures,
    a page and plots. The default sizes take some minutes per library. The benchmark is in the repository but not in the
    installed package, so run the command in a clone of the repository.

    For example:
      drrho bench --backend numpy --sizes 1024 4096 --memory-sizes 4096
      drrho bench --out docs/benchmarks/contrastive
      drrho bench --check docs/benchmarks/contrastive/contrastive.json
    """

    backend: tuple[str, ...] = setting(
        (), rule=TEXT, several="append", shown="all that are installed", help="Array library; may be repeated."
    )
    device: str | None = _device()
    dtype: str = setting(
        "float32", rule=choice("float32", "float64", "bfloat16", "float16"), help="Dtype of the features."
    )
    sizes: tuple[int, ...] = setting(
        (256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
        rule=at_least(2),
        several="+",
        help="Batch sizes at which the time is measured.",
    )
    memory_sizes: tuple[int, ...] = setting(
        (4096, 8192, 16384, 32768),
        rule=at_least(0),
        several="+",
        help="Batch sizes at which the memory is measured; 0 for none.",
    )
    rounds: int = setting(
        5,
        rule=at_least(1),
        help="Least number of measurements per candidate; small batch sizes are measured more often.",
    )
    threads: int = setting(1, rule=at_least(1), help="Number of threads of each library.")
    out: Path | None = setting(
        None,
        rule=PATH,
        help="A folder for contrastive.json, README.md and plots; files of an earlier measurement are replaced.",
    )
    check: Path | None = setting(
        None,
        rule=PATH,
        help="The contrastive.json of an earlier measurement; the exit code is 1 if a ratio falls by more than 15 %.",
    )

    def run(self) -> int:
        """Measure, write and compare; return 1 if a ratio has fallen by more than 15 %."""
        from drrho_clip.bench import contrastive_benchmark

        # The fields have the names of the arguments of `measure_and_write`.
        options = {option.name: getattr(self, option.name) for option in fields(self) if option.name != "backend"}
        names = self.backend or [name for name in backend_names() if importlib.util.find_spec(name)]
        code: int = contrastive_benchmark().measure_and_write(names, **options, command=as_typed("drrho bench", self))
        return code


# The help lists the commands in this order.
COMMANDS: dict[str, type] = {
    "demo": Demo,
    "train": Train,
    "evaluate": Evaluate,
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


def _build_backend(name: str, device: str | None, dtype: str) -> Backend:
    try:
        return get_backend(name, device=device, dtype=dtype)
    except (ValueError, ImportError) as error:
        raise BadInput(str(error)) from error


def _batch_size_for(num_samples: int) -> int:
    """Return the largest power of two, from 2 to 256, with at least four batches per epoch, or 2 if no power has."""
    size = 256
    while size > 2 and size * 4 > num_samples:
        size //= 2
    return size


def _write_json(path: Path | None, content: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> None:
    if path is not None:
        from drrho_clip.checkpoint import write_atomic

        write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
