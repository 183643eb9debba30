"""The command ``drrho bench``."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, fields
from pathlib import Path

from drrho_clip.commands.common import device_option
from drrho_clip.options import PATH, TEXT, as_typed, at_least, choice, setting
from drrho_core.backend import backend_names


@dataclass(frozen=True)
class Bench:
    """Compare the time and memory of the contrastive step (loss and gradient of one batch) with three alternatives.

    The alternatives are the library's own automatic differentiation of the same loss, CLIP's loss, and matrix products
    alone. Every figure is the ratio of the times or the memory of two candidates. One process measures the candidates
    in turns, so that a slow change of the machine's speed cancels in the ratio. With --out the command writes the
    figures, a page and plots. The default sizes take some minutes per library. The benchmark is in the repository but
    not in the installed package, so run the command in a clone of the repository.

    For example:
      drrho bench --backend numpy --sizes 1024 4096 --memory-sizes 4096
      drrho bench --out docs/benchmarks/contrastive
      drrho bench --check docs/benchmarks/contrastive/contrastive.json
    """

    backend: tuple[str, ...] = setting(
        (), rule=TEXT, several="append", shown="all that are installed", help="Array library; may be repeated."
    )
    device: str | None = device_option()
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
        help="The contrastive.json of an earlier measurement; the exit code is 1 if a ratio falls by more than 15 %, "
        "that is, if the step has become slower compared with an alternative.",
    )

    def run(self) -> int:
        """Measure, write and compare; return 1 if a ratio has fallen by more than 15 %."""
        from drrho_clip.bench import contrastive_benchmark

        # The fields have the names of the arguments of `measure_and_write`.
        options = {option.name: getattr(self, option.name) for option in fields(self) if option.name != "backend"}
        names = self.backend or [name for name in backend_names() if importlib.util.find_spec(name)]
        code: int = contrastive_benchmark().measure_and_write(names, **options, command=as_typed("drrho bench", self))
        return code
