"""Time of a drrho training step divided by the time of a clip step; the steps alternate in one process.

    python benchmarks/step_ratio.py [--backend torch] [--steps 60]

Both methods train the demo's encoders on the demo's data: rendered scenes with torch and JAX, scikit-learn's digits
with NumPy and CuPy. The reference features are computed before training, as in a run. The program prints the median
times and the median ratio of neighbouring steps. Slow changes of the machine's speed do not change this ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from drrho_clip.data.splits import open_splits
from drrho_clip.demo import demo_configs
from drrho_clip.run import describe_run
from drrho_clip.train import train
from drrho_clip.trainer import Trainer
from drrho_core.backend import get_backend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    backend = get_backend(options.backend)
    data = "digits" if options.backend in ("numpy", "cupy") else "scenes"
    with tempfile.TemporaryDirectory() as folder:
        configs = demo_configs(data, options.backend, seed=0, quick=False, runs=Path(folder))
        small = {"train_size": 2048, "epochs": 1}
        train(replace(configs["reference"], **small), Path(folder) / "reference", backend=backend, quiet=True)
        # The drrho trainer needs a finished reference run. This run may be short: a step takes the same time.
        trainers = {}
        for method in ("clip", "drrho"):
            config = replace(configs[method], train_size=2048)
            splits = open_splits(config)
            trainers[method] = Trainer(describe_run(Path(folder) / method, config, splits.train), backend, splits)
            (Path(folder) / method).mkdir()
        batch = next(trainers["clip"].source.epoch(config.batch_size, seed=0, epoch=0))
        times: dict[str, list[float]] = {"clip": [], "drrho": []}
        for step in range(options.steps + 5):
            # The order alternates, so that neither method always runs second.
            for method in ("clip", "drrho") if step % 2 else ("drrho", "clip"):
                began = time.perf_counter()
                trainers[method].take_step(batch, epoch=0)
                # The first 5 steps compile, allocate memory and fill the caches.
                if step >= 5:
                    times[method].append(time.perf_counter() - began)
    ratios = [d / c for c, d in zip(times["clip"], times["drrho"], strict=True)]
    figures = {name: round(1e3 * statistics.median(values), 2) for name, values in times.items()}
    print(
        json.dumps({"backend": options.backend, "milliseconds": figures, "ratio": round(statistics.median(ratios), 3)})
    )


if __name__ == "__main__":
    main()
