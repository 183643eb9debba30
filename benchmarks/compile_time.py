"""Time to compile the ambiguity sets: the first call under jax.jit and torch.compile, in fresh processes.

    python benchmarks/compile_time.py [--library jax --library torch] [--compiler inductor] [--repeats 3]

Every cell of the table has two medians over the processes: seconds from the first call to its result, without imports,
and processor seconds of all threads and children. On a busy machine only the second figure is meaningful. Caches on
disk are off. The losses are (8, 1024), float32. torch's compiler is inductor if there is a C++ compiler. Otherwise it
is aot_eager, which traces the graph and generates no code.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

SETS = {
    "CVaR": (0.3,),
    "KLPenalty": (0.5,),
    "KLBall": (0.2,),
    "ChiSquarePenalty": (0.5,),
    "ChiSquareBall": (0.3,),
    "CressieReadBall": (3.0, 0.2),
}


def now() -> tuple[float, float]:
    """Return the time, and the processor time of this process and its children."""
    return time.perf_counter(), sum(os.times()[:4])


def since(began: tuple[float, float]) -> tuple[float, float]:
    """Return the seconds and the processor seconds since an earlier result of `now`."""
    wall, processor = now()
    return wall - began[0], processor - began[1]


def first_call(library: str, compiler: str, kind: str) -> tuple[float, float]:
    """Return the seconds and the processor seconds of the first call in this process."""
    import numpy as np

    import drrho_core

    ambiguity_set = getattr(drrho_core, kind)(*SETS[kind])
    losses = np.random.default_rng(0).normal(size=(8, 1024)).astype(np.float32)
    if library == "jax":
        import drrho_jax  # noqa: F401  # registers the loop
        import jax

        x = jax.numpy.asarray(losses)
        # The first compilation of a process also starts the compiler, which is not measured.
        jax.block_until_ready(jax.jit(lambda a: a + 1)(x))
        began = now()
        jax.block_until_ready(jax.jit(lambda a: drrho_core.worst_case(a, ambiguity_set))(x))
        return since(began)
    import array_api_compat.torch as xp
    import drrho_torch  # noqa: F401  # registers the loop
    import torch

    tensor = torch.asarray(losses)
    # As for JAX, the start of the compiler is not measured.
    torch.compile(lambda a: a + 1, fullgraph=True, backend=compiler)(tensor)
    compiled = torch.compile(lambda a: drrho_core.worst_case(a, ambiguity_set, xp=xp), fullgraph=True, backend=compiler)
    began = now()
    compiled(tensor)
    return since(began)


def in_fresh_processes(library: str, compiler: str, kind: str, repeats: int) -> str:
    """Return a cell of the table: the medians over processes, each of which starts with empty caches."""
    # torch's cache is an empty folder and JAX's cache is off, so that every process compiles.
    seconds = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder, "JAX_ENABLE_COMPILATION_CACHE": "false"}
            command = [sys.executable, __file__, "--one", library, compiler, kind]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        seconds.append([float(word) for word in done.stdout.split()[-2:]])
    wall, processor = (statistics.median(column) for column in zip(*seconds, strict=True))
    return f"{wall:.1f} / {processor:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", action="append", choices=["jax", "torch"])
    parser.add_argument("--compiler", default="inductor" if shutil.which("g++") else "aot_eager")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=3, metavar=("LIBRARY", "COMPILER", "SET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    # A fresh process calls this program with a single set.
    if options.one:
        print(*first_call(*options.one))
        return
    libraries = options.library or ["jax", "torch"]
    names = {"jax": "jax.jit", "torch": f"torch.compile, {options.compiler}"}
    print("| seconds | " + " | ".join(names[library] for library in libraries) + " |\n|---|" + "---|" * len(libraries))
    for kind in SETS:
        cells = [in_fresh_processes(library, options.compiler, kind, options.repeats) for library in libraries]
        print(f"| `{kind}` | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
