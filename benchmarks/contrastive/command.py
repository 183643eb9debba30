"""The command ``drrho bench``: check the options, measure, write the figures, compare with an earlier measurement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.contrastive.measure import compare, run
from benchmarks.contrastive.page import markdown, pictures
from drrho_clip.errors import BadInput
from drrho_clip.files.disk import write_atomic
from drrho_clip.files.json_files import read_json
from drrho_clip.files.outputs import check_folder, write_json
from drrho_clip.terminal.printing import say
from drrho_core.backend import get_backend


def measure_and_write(
    backends: Sequence[str],
    *,
    device: str | None,
    dtype: str,
    sizes: Sequence[int],
    memory_sizes: Sequence[int],
    rounds: int,
    threads: int,
    out: Path | None,
    check: Path | None,
    command: str,
) -> int:
    """Measure, write `out` and compare with `check`; return the exit code of ``drrho bench``.

    Parameters
    ----------
    backends : sequence of str
        Names of backends.
    device, dtype, sizes, rounds, threads
        As in `benchmarks.contrastive.measure.run`.
    memory_sizes : sequence of int
        As in `benchmarks.contrastive.measure.run`; zeros are skipped.
    out : Path, optional
        A folder for contrastive.json, README.md and plots; files of an earlier measurement are replaced.
    check : Path, optional
        Figures of an earlier measurement.
    command : str
        The command line, for the page.

    Returns
    -------
    int
        1 if a ratio is more than 15 % below that of `check`, otherwise 0.

    Raises
    ------
    BadInput
        If `check` cannot be read, or a backend or the device cannot be used. Nothing is measured then.
    """
    # The file to compare with is read first, so that a bad file raises an error before the minutes of measuring.
    before = None
    if check is not None:
        try:
            before = read_json(check, "the figures of an earlier measurement")
            compare(before, before)
        except (BadInput, AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise BadInput(f"check must be the figures of an earlier measurement, got {check} ({error})") from None
    if out is not None:
        check_folder(out, "out")
    # All names are checked here, because a wrong name should not raise an error after minutes of measuring.
    for name in backends:
        try:
            get_backend(name, device=device, dtype="float32")
        except (ValueError, ImportError) as error:
            raise BadInput(str(error)) from error
    # The figures are written before they are compared, because the comparison may raise an error.
    figures = run(
        backends,
        device=device,
        dtype=dtype,
        sizes=sizes,
        memory_sizes=[size for size in memory_sizes if size],
        rounds=rounds,
        threads=threads,
        say=say,
    )
    if out is not None:
        write_json(out / "contrastive.json", figures)
        for name, text in pictures(figures).items():
            write_atomic(out / name, text.encode())
        write_atomic(out / "README.md", markdown(figures, command).encode())
        say(f"written: {out}")
    if before is None:
        return 0
    fallen = compare(figures, before)
    say(*(fallen or ["no ratio has fallen by more than 15 %"]))
    return 1 if fallen else 0
