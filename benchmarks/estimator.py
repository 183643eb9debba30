"""Time to read and write the stored estimates of a batch, relative to the time of the step that uses them.

The estimators store two numbers per sample: on the device, in the memory of the host, or in a file. `gather` reads the
numbers of a batch, and `scatter` writes them.

python benchmarks/estimator.py [--samples 10000000] [--batch 4096] [--features 512] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--samples", type=int, default=10_000_000, help="samples of the estimators in memory")
parser.add_argument("--file-samples", type=int, default=1_000_000_000, help="samples in the file, which is sparse")
parser.add_argument("--batch", type=int, default=4096)
parser.add_argument("--features", type=int, default=512)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--json", help="write the figures to this file, too")
options = parser.parse_args()
os.environ.update(OMP_NUM_THREADS=str(options.threads), OPENBLAS_NUM_THREADS=str(options.threads))

import jax.numpy as jnp  # noqa: E402  (after the number of threads is set)
import numpy as np  # noqa: E402
import torch  # noqa: E402
from drrho_jax import DonatingEstimator  # noqa: E402
from drrho_numpy import MemoryMappedEstimator  # noqa: E402
from drrho_torch import HostEstimator  # noqa: E402

from drrho_core import InnerEstimator, contrastive_step  # noqa: E402


def main() -> None:
    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(0)
    n, b = options.samples, options.batch
    features = rng.standard_normal((4, b, options.features)).astype("float32")
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    with tempfile.TemporaryDirectory() as folder:
        file = MemoryMappedEstimator(Path(folder) / "estimator", options.file_samples)
        kinds: dict[str, tuple[Any, int, Callable[[Any], Any]]] = {
            "InnerEstimator, numpy": (InnerEstimator(n, like=features), n, np.asarray),
            "InnerEstimator, torch": (InnerEstimator(n, like=torch.from_numpy(features)), n, torch.from_numpy),
            "HostEstimator, torch cpu": (HostEstimator(n, device="cpu"), n, torch.from_numpy),
            "InnerEstimator, jax": (InnerEstimator(n, like=jnp.asarray(features)), n, jnp.asarray),
            "DonatingEstimator, jax": (DonatingEstimator(n, like=jnp.asarray(features)), n, jnp.asarray),
            "MemoryMappedEstimator": (file, options.file_samples, np.asarray),
            "the same, pages in memory": (file, options.file_samples, np.asarray),
        }
        times: dict[str, list[float]] = {name: [] for name in (*kinds, "step, torch")}
        images, texts, *references = torch.from_numpy(features)
        seen = np.arange(b)
        # The first round allocates memory and compiles; the medians below leave it out.
        for _ in range(options.rounds + 1):
            for name, (estimator, size, convert) in kinds.items():
                # Row ids without repeats, in random order.
                index = np.unique(rng.integers(0, size, b + b // 8))
                index = rng.permutation(index)[:b]
                # The previous rows are used again: the system still has their pages of the file in memory.
                if name == "the same, pages in memory":
                    index = seen
                seen, rows = index, convert(rng.standard_normal(b).astype("float32"))
                index = convert(index)
                start = time.perf_counter()
                estimator.gather(index)
                after = estimator.scatter(index, rows, rows)
                # JAX returns before the rows are computed, so a row is read to wait for the result.
                np.asarray(after.gather(index[:1])[0])
                times[name].append(time.perf_counter() - start)
                kinds[name] = (after, size, convert)
            old = torch.zeros(b)
            start = time.perf_counter()
            contrastive_step(images, texts, old, old, temperature=0.05, gamma=0.5, reference_features=tuple(references))
            times["step, torch"].append(time.perf_counter() - start)
        # The file is sparse: pages that were never written take no room on the disk.
        used = os.stat(file.path).st_blocks * 512
        file.close()
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    report = {**vars(options), "load": os.getloadavg()[0], "file_bytes_on_disk": used, "seconds": median}
    print(
        f"n = {n}, in the file {options.file_samples}; b = {b}, d = r = {options.features}, load {report['load']:.1f}"
    )
    for name, value in median.items():
        print(f"{name:30} {1e3 * value:9.2f} ms  {value / median['step, torch']:8.2%} of a step")
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
