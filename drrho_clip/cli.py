"""The command ``drrho``: demo, train, evaluate, verify, vectors, bench.

Exit codes: 0; 1 where a check failed; 2 for bad usage or bad input with one clear line on standard error. Progress goes
to standard error, tables to standard output. Everything heavy is imported inside the commands, so that ``drrho --help``
is quick.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro

from drrho_clip.errors import BadInput, MissingExtra


def _option(metavar: str, default: str) -> Any:
    """Show a default that depends on other options; None in the code means that the user named nothing."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


BackendName = Annotated[str | None, _option("NAME", "torch where it is installed, else numpy")]
Device = Annotated[str | None, _option("NAME", "the library's own choice")]


@dataclass(frozen=True)
class Demo:
    """Show that a reference model helps: train it, CLIP, SogCLR and DRRho-CLIP on embedded data, in minutes.

    With torch or jax the data are rendered scenes with captions, with numpy scikit-learn's digits. Writes results.json
    and a self-contained report.html.

    For example:
      drrho demo --out demo
      drrho demo --out demo --backend numpy
      drrho demo --out demo --seeds 0 1 2

    Attributes
    ----------
    out
        A new folder.
    backend
        Array library.
    device
        In the library's own words, such as cuda:0.
    quick
        Small and short: a look at the plumbing, not at the order of the methods.
    seeds
        One full comparison per seed.
    resume
        Go on with an interrupted demo.
    """

    out: Path
    backend: BackendName = None
    device: Device = None
    quick: bool = False
    seeds: tuple[int, ...] = (0,)
    resume: bool = False


@dataclass(frozen=True)
class Train:
    """Train a pair of encoders, steered by a reference model where the method is drrho.

    Data are a CSV or TSV file with the columns image and caption (paths relative to the file), or one of scenes,
    scenes:reference, digits, digits:reference.

    For example:
      drrho train --data pairs.csv --method clip --out runs/reference
      drrho train --data pairs.csv --method drrho --reference runs/reference --out runs/steered
      drrho train --resume --out runs/steered

    Attributes
    ----------
    out
        Folder of the run; one that holds a run is refused without --resume.
    data
        A table of images and captions, or a built-in data set.
    method
        clip, sogclr or drrho.
    reference
        Folder of the reference model's run, for drrho.
    resume
        Go on from the last checkpoint of --out; options that are named must be those of the run.
    backend
        Array library.
    device
        In the library's own words, such as cuda:0.
    dtype
        float32 or float64.
    epochs
        Passes over the training data.
    batch_size
        Pairs per step; the last short batch of an epoch is dropped.
    learning_rate
        Peak of a linear warm-up and a cosine to 0.
    warmup_steps
        Steps of the warm-up.
    weight_decay
        AdamW's.
    temperature
        tau; where it starts if it is learned.
    temperature_scheme
        fixed, global (one, learned) or per_sample (one per sample and direction, learned).
    temperature_learning_rate
        Of a learned temperature; one per sample wants about ten times as much.
    temperature_min
        Lower bound of a learned temperature.
    temperature_max
        Upper bound of a learned temperature.
    radius
        Of a learned temperature, for sogclr and drrho: above 0, below the logarithm of the batch size.
    gamma_min
        Where the cosine of gamma ends: the weight of a new estimate, 1 = no memory.
    reference_weight
        lambda: 0 ignores the reference model, 1 is DRRho.
    eps
        Added to the inner estimate.
    architecture
        conv (convolutions and a transformer; torch and jax) or mlp (any backend).
    image_size
        Side of the images that the encoder reads.
    feature_dim
        Size of the features.
    width
        Scale of the encoders.
    depth
        Blocks of the text transformer, or hidden layers of an MLP.
    seed
        Seed of initial parameters and batch order.
    data_seed
        Seed of built-in data and of the held-out split.
    train_size
        Number of scenes to train on.
    swapped_fraction
        Share of the captions of built-in data that are swapped.
    checkpoint_every
        Steps between checkpoints.
    log_every
        Steps between lines of metrics.jsonl.
    json
        Write the results into this file, too.
    """

    out: Path
    data: Annotated[str | None, _option("FILE|NAME", "none; required without --resume")] = None
    method: Annotated[str | None, _option("{clip,sogclr,drrho}", "drrho")] = None
    reference: Annotated[str | None, _option("RUN", "none")] = None
    resume: bool = False
    backend: BackendName = None
    device: Device = None
    dtype: Annotated[str | None, _option("{float32,float64}", "float32")] = None
    epochs: Annotated[int | None, _option("INT", "8; digits 60; a table 30")] = None
    batch_size: Annotated[int | None, _option("INT", "256; digits 128; less for a small table")] = None
    learning_rate: Annotated[float | None, _option("NUMBER", "0.001")] = None
    warmup_steps: Annotated[int | None, _option("INT", "50; digits 20")] = None
    weight_decay: Annotated[float | None, _option("NUMBER", "0.1")] = None
    temperature: Annotated[float | None, _option("NUMBER", "0.07")] = None
    temperature_scheme: Annotated[str | None, _option("{fixed,global,per_sample}", "fixed")] = None
    temperature_learning_rate: Annotated[float | None, _option("NUMBER", "0.0001")] = None
    temperature_min: Annotated[float | None, _option("NUMBER", "0.01")] = None
    temperature_max: Annotated[float | None, _option("NUMBER", "1")] = None
    radius: Annotated[float | None, _option("NUMBER", "0")] = None
    gamma_min: Annotated[float | None, _option("NUMBER", "0.5")] = None
    reference_weight: Annotated[float | None, _option("NUMBER", "1")] = None
    eps: Annotated[float | None, _option("NUMBER", "0")] = None
    architecture: Annotated[str | None, _option("{conv,mlp}", "conv; mlp for digits, numpy and cupy")] = None
    image_size: Annotated[int | None, _option("INT", "32; digits 8; a table 64")] = None
    feature_dim: Annotated[int | None, _option("INT", "64")] = None
    width: Annotated[int | None, _option("INT", "32")] = None
    depth: Annotated[int | None, _option("INT", "2")] = None
    seed: Annotated[int | None, _option("INT", "0")] = None
    data_seed: Annotated[int | None, _option("INT", "0")] = None
    train_size: Annotated[int | None, _option("INT", "20000")] = None
    swapped_fraction: Annotated[float | None, _option("NUMBER", "0.3")] = None
    checkpoint_every: Annotated[int | None, _option("INT", "200")] = None
    log_every: Annotated[int | None, _option("INT", "10")] = None
    json: Annotated[Path | None, _option("FILE", "none")] = None


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained run on held-out pairs: retrieval in galleries of 200 and, where there are classes, zero-shot.

    For example:
      drrho evaluate runs/steered
      drrho evaluate runs/steered --split validation --json figures.json
      drrho evaluate runs/steered --data other.csv

    Attributes
    ----------
    run
        Folder of the run.
    data
        Another table or built-in data set; all pairs of a table are used then.
    split
        test or validation.
    backend
        Array library.
    device
        In the library's own words, such as cuda:0.
    json
        Write the results into this file, too.
    """

    run: tyro.conf.Positional[Path]
    data: Annotated[str | None, _option("FILE|NAME", "the run's own")] = None
    split: Annotated[str, tyro.conf.arg(metavar="{test,validation}")] = "test"
    backend: Annotated[str | None, _option("NAME", "the run's own")] = None
    device: Device = None
    json: Annotated[Path | None, _option("FILE", "none")] = None


@dataclass(frozen=True)
class Verify:
    """Hold drrho_core against the oracle, in float64 and float32, on every array library that is installed.

    Prints a table per library: how many fields passed, the worst error, relative and in ulps, and what is wrong. The
    exit code is 1 where a case fails or is missing.

    For example:
      drrho verify
      drrho verify --backend numpy --backend torch
      drrho verify --backend torch --device cuda:0 --json errors.json

    Attributes
    ----------
    backend
        Array library; may be repeated.
    device
        In the library's own words, such as cuda:0.
    json
        Write all cases and errors into this file, too.
    """

    backend: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], _option("NAME", "all that are installed")] = ()
    device: Device = None
    json: Annotated[Path | None, _option("FILE", "none")] = None


@dataclass(frozen=True)
class Vectors:
    """Write test vectors: inputs and the oracle's answers as files that a program in any language can read.

    One .safetensors file per function, an index vectors.json with the rules of comparison, and the index's JSON Schema.
    The same command writes the same bytes.

    For example:
      drrho vectors --out vectors
      drrho vectors --out vectors --dtype float32

    Attributes
    ----------
    out
        A new or an empty folder.
    dtype
        Of the inputs; may be repeated.
    """

    out: Path
    dtype: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], _option("{float64,float32}", "both")] = ()


@dataclass(frozen=True)
class Bench:
    """Measure the contrastive step against dense autograd, CLIP's loss and the library's own matrix products.

    Ratios within one process, in turns, so that a machine whose speed drifts does not matter. With --out it writes the
    figures, a page and plots. All sizes take some minutes per library.

    For example:
      drrho bench --backend torch --sizes 1024 4096 --memory-sizes 4096
      drrho bench --out docs/benchmarks/contrastive
      drrho bench --check docs/benchmarks/contrastive/contrastive.json

    Attributes
    ----------
    backend
        Array library; may be repeated.
    device
        In the library's own words, such as cuda:0.
    dtype
        float32, float64, bfloat16 or float16.
    sizes
        Batch sizes to time.
    memory_sizes
        Batch sizes to measure the memory of; 0 for none.
    rounds
        How often every candidate takes its turn at least; at small batch sizes it is oftener.
    threads
        Of each library.
    out
        A folder: contrastive.json, README.md and plots; those of an earlier measurement are replaced.
    check
        Figures of an earlier measurement; the exit code is 1 where a ratio is more than 15 % below them.
    """

    backend: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], _option("NAME", "all that are installed")] = ()
    device: Device = None
    dtype: str = "float32"
    sizes: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    memory_sizes: tuple[int, ...] = (4096, 8192, 16384, 32768)
    rounds: int = 5
    threads: int = 1
    out: Annotated[Path | None, _option("DIR", "none")] = None
    check: Annotated[Path | None, _option("FILE", "none")] = None


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Vectors, tyro.conf.subcommand("vectors")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        What follows ``drrho``; those of the process when left out.
    """
    try:
        command = _parse(sys.argv[1:] if arguments is None else list(arguments))
        if isinstance(command, Demo):
            _demo(command)
        elif isinstance(command, Train):
            _train(command)
        elif isinstance(command, Evaluate):
            _evaluate(command)
        elif isinstance(command, Vectors):
            _vectors(command)
        elif isinstance(command, Bench):
            return _bench(command)
        else:
            return _verify(command)
    except (BadInput, MissingExtra) as error:
        print(f"drrho: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("drrho: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: list[str]) -> Demo | Train | Evaluate | Verify | Vectors | Bench:
    """Parse; a usage error becomes one line instead of tyro's panel."""
    panel = io.StringIO()
    try:
        with contextlib.redirect_stderr(panel):
            return tyro.cli(
                Command,
                prog="drrho",
                description="Steer the training of a model with a reference model.",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise BadInput(_one_line(panel.getvalue())) from None


def _one_line(panel: str) -> str:
    """Return the message inside tyro's panel: its lines up to the first rule, without the frame."""
    words = []
    for line in panel.splitlines()[1:]:
        text = line.strip("│╰╯ ")
        if text.startswith("─"):
            break
        words.append(text)
    return f"{' '.join(' '.join(words).split())} (see drrho --help)"


def _demo(command: Demo) -> None:
    from drrho_clip.demo import run_demo

    if not command.seeds:
        raise BadInput("seeds must hold at least one seed, got none")
    backend = _backend(command.backend or default_backend(), command.device, "float32")
    data = "scenes" if backend.name in ("torch", "jax") else "digits"
    rows = run_demo(
        command.out,
        backend=backend,
        data=data,
        seeds=command.seeds,
        quick=command.quick,
        resume=command.resume,
    )
    _print_table(rows)
    print(f"wrote {command.out / 'results.json'} and {command.out / 'report.html'}")


def _train(command: Train) -> None:
    from drrho_clip.config import BUILT_IN_DATA, TrainConfig, preset
    from drrho_clip.data import pair_splits
    from drrho_clip.run import open_run, refuse_existing
    from drrho_clip.train import train

    options = {field.name: getattr(command, field.name) for field in fields(command)}
    named = {name: value for name, value in options.items() if value is not None}
    for name in ("out", "resume", "device", "json"):
        named.pop(name, None)
    if command.resume:
        config = open_run(command.out).config
        for name, value in named.items():
            if getattr(config, name) != value:
                raise BadInput(f"{name} must be that of the run to resume ({getattr(config, name)!r}), got {value!r}")
        splits = None
    else:
        refuse_existing(command.out)
        if command.data is None:
            raise BadInput(f"data must be a CSV or TSV file or one of {', '.join(BUILT_IN_DATA)}, got none")
        backend_name = command.backend or default_backend()
        settings = {"backend": backend_name} | preset(command.data, backend_name) | named
        config = TrainConfig(**settings)
        splits = None
        if command.data not in BUILT_IN_DATA:
            splits = pair_splits(command.data, seed=config.data_seed)
            if command.batch_size is None:
                settings["batch_size"] = _batch_size_for(len(splits.train))
                config = TrainConfig(**settings)
    backend = _backend(config.backend, command.device, config.dtype)
    outcome = train(config, command.out, resume=command.resume, backend=backend, splits=splits)
    _print_table([outcome.row])
    _write_json(command.json, [outcome.row])
    print(f"wrote {command.out}")


def _evaluate(command: Evaluate) -> None:
    from dataclasses import replace

    from drrho_clip.config import BUILT_IN_DATA
    from drrho_clip.data import read_pairs
    from drrho_clip.run import Encoder, open_run
    from drrho_clip.train import evaluate, open_splits

    run = open_run(command.run)
    if command.split not in ("test", "validation"):
        raise BadInput(f"split must be test or validation, got {command.split!r}")
    backend = _backend(command.backend or run.config.backend, command.device, run.config.dtype)
    if command.data is None or command.data in BUILT_IN_DATA:
        name = command.data or run.config.data
        splits = open_splits(replace(run.config, data=name))
        dataset = splits.test if command.split == "test" else splits.validation
    else:
        name, dataset = command.data, read_pairs(command.data)
    row = {
        "method": run.config.method,
        "dataset": name,
        "seed": run.config.seed,
        "metrics": evaluate(Encoder.load(run, backend), dataset),
    }
    _print_table([row])
    _write_json(command.json, [row])


def _verify(command: Verify) -> int:
    """Check every library; return 1 where one fails."""
    import drrho_reference

    import drrho_core

    reports, passed = {}, True
    for name, (xp, device, described) in _libraries(command).items():
        report = drrho_reference.conformance.check(drrho_core, xp=xp, device=device)
        reports[name] = {"device": described, **report.to_json()}
        complete = report.complete
        verdict = "passed" if complete else "FAILED" if report.verdict == "failed" else "INCOMPLETE"
        print(f"{name} on {described}: {verdict}\n{report.table()}\n", flush=True)
        passed = passed and complete
    _write_json(command.json, reports)
    return 0 if passed else 1


def _libraries(command: Verify) -> dict[str, tuple[Any, Any, str]]:
    """Return namespace, device and the device's name of the libraries to check: those named, else all that load."""
    import array_api_compat
    import numpy as np

    from drrho_core.backend import backend_names, get_backend

    found = {}
    for name in command.backend or backend_names():
        try:
            # float64 first: JAX has it only where it was asked for.
            backend = get_backend(name, device=command.device, dtype="float64")
        except (ValueError, ImportError) as error:
            if name in command.backend:
                raise BadInput(str(error)) from error
            continue
        array = backend.asarray(np.zeros(1))
        found[name] = array_api_compat.array_namespace(array), array_api_compat.device(array), backend.device
    if not found:
        raise BadInput(f"device must be one that an installed library has, got {command.device!r}")
    return found


def _vectors(command: Vectors) -> None:
    """Write the test vectors, the index last: a folder with an index is whole."""
    import drrho_reference

    import drrho_core
    from drrho_clip.checkpoint import write_atomic

    if command.out.exists() and not command.out.is_dir():
        raise BadInput(f"out must be a folder, got the file {command.out}")
    present = sorted(path.name for path in command.out.iterdir()) if command.out.exists() else []
    if present:
        raise BadInput(f"out must be a new or an empty folder, got {command.out} with {', '.join(present[:3])}")
    dtypes = command.dtype or ("float64", "float32")
    try:
        content = drrho_reference.vectors.files(library_version=drrho_core.__version__, dtypes=dtypes)
    except ValueError as error:
        raise BadInput(str(error)) from error
    command.out.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        write_atomic(command.out / name, data)
    count = len(json.loads(content[drrho_reference.vectors.INDEX])["cases"])
    size = sum(map(len, content.values())) / 1e6
    print(f"wrote {count} cases, {len(content)} files, {size:.1f} MB: {command.out}")


def _bench(command: Bench) -> int:
    from drrho_clip.bench import contrastive_benchmark

    options = {field.name: getattr(command, field.name) for field in fields(command) if field.name != "backend"}
    code: int = contrastive_benchmark().measure_and_write(command.backend, **options, command=_as_typed(command))
    return code


def _as_typed(command: Bench) -> str:
    """Return the command line that gives this command."""
    words = ["drrho bench"]
    for field in fields(command):
        value = getattr(command, field.name)
        if value == field.default or value is None:
            continue
        option = f"--{field.name.replace('_', '-')}"
        if field.name == "backend":
            words += [f"{option} {name}" for name in value]
        else:
            words.append(f"{option} {' '.join(map(str, value)) if isinstance(value, tuple) else value}")
    return " ".join(words)


def default_backend() -> str:
    """Return ``"torch"`` where it is installed, else ``"numpy"``."""
    return "torch" if importlib.util.find_spec("torch") else "numpy"


def _backend(name: str, device: str | None, dtype: str) -> Any:
    from drrho_core.backend import get_backend

    try:
        return get_backend(name, device=device, dtype=dtype)
    except (ValueError, ImportError) as error:
        raise BadInput(str(error)) from error


def _batch_size_for(num_samples: int) -> int:
    """Return the largest power of two that fits four times into the data, from 2 to 256."""
    size = 256
    while size > 2 and size * 4 > num_samples:
        size //= 2
    return size


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print results rows as a table, the best figure of every column in bold."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    names = {
        "retrieval_r1": "R@1",
        "retrieval_r5": "R@5",
        "retrieval_r10": "R@10",
        "zero_shot_accuracy": "zero-shot",
    }
    shown = [name for name in names if any(name in row["metrics"] for row in rows)]
    best = {name: max(row["metrics"].get(name, 0.0) for row in rows) for name in shown}
    timed = any("seconds" in row for row in rows)
    table = Table(box=box.SIMPLE, collapse_padding=True, pad_edge=False)  # narrow: nothing is cut off in eighty columns
    for title in ("method", "data", "seed"):
        table.add_column(title)
    for name in shown:
        table.add_column(names[name], justify="right")
    if timed:
        table.add_column("seen", justify="right")
        table.add_column("seconds", justify="right")
    for row in rows:
        cells = [row["method"], row["dataset"], str(row["seed"])]
        for name in shown:
            value = row["metrics"].get(name)
            bold = len(rows) > 1 and value == best[name]
            cells.append("" if value is None else f"[bold]{value:.3f}[/bold]" if bold else f"{value:.3f}")
        if timed:
            cells += [f"{row['samples_seen']:,}", f"{row['seconds']:.1f}"]
        table.add_row(*cells)
    Console().print(table)


def _write_json(path: Path | None, rows: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> None:
    if path is not None:
        from drrho_clip.checkpoint import write_atomic

        write_atomic(path, (json.dumps(rows, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
