"""Choose the demo's learning rates.

    python tools/tune_learning_rates.py --data scenes --backend torch --out runs/tune

Every run of the demo is trained with each of the same three learning rates. A learning rate is judged by R@1 (the share
of queries whose right answer is the nearest) on the validation split after training; the test split is not used. The
reference model of the drrho runs is the reference run with the best validation R@1. The table is written into this
clone's ``drrho_clip/learning_rates.json``, which the demo reads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from drrho_clip.data.splits import open_splits
from drrho_clip.demo import LEARNING_RATES, ROLES, demo_configs, learning_rate_record
from drrho_clip.files.disk import write_atomic
from drrho_clip.run import read_metrics
from drrho_clip.train import train
from drrho_core.backend import default_backend, get_backend

RECORD = Path(__file__).resolve().parents[1] / "drrho_clip" / "learning_rates.json"


def tune(data: str, backend_name: str, out: Path, *, seed: int = 0) -> dict[str, dict[str, float]]:
    """Return validation R@1 by run and learning rate; finished runs in `out` are not trained again."""
    backend = get_backend(backend_name)
    table: dict[str, dict[str, float]] = {}
    best_reference = out
    # The reference runs are first, so that the drrho runs can use the best reference model.
    for role in ROLES:
        table[role] = {}
        for rate in LEARNING_RATES:
            config = demo_configs(data, backend_name, seed=seed, quick=False, runs=out)[role]
            config = replace(config, learning_rate=rate)
            if role == "drrho":
                config = replace(config, reference=str(best_reference))
            folder = out / f"{data}-{role}-{rate:g}"
            resume = (folder / "config.json").exists()
            outcome = train(config, folder, resume=resume, backend=backend, splits=open_splits(config))
            # A learning rate is judged by the last validation of its run.
            curve = [record for record in read_metrics(outcome.run.metrics) if "validation_retrieval_r1" in record]
            table[role][f"{rate:g}"] = round(curve[-1]["validation_retrieval_r1"], 4)
            print(f"{data} {role} learning rate {rate:g}: validation R@1 {table[role][f'{rate:g}']:.4f}", flush=True)
        if role == "reference":
            best = max(table[role], key=lambda rate: table[role][rate])
            best_reference = out / f"{data}-{role}-{float(best):g}"
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("scenes", "digits"), required=True)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    record = learning_rate_record()
    record["validation_r1"][options.data] = tune(options.data, options.backend, options.out)
    # The files of the harness avoid naming array libraries, and the command is stored in such a file. So the command
    # names a backend only if it is not the default.
    backend = "" if options.backend == default_backend() else f" --backend {options.backend}"
    record.setdefault("chosen_with", {})[options.data] = {
        "command": f"python tools/tune_learning_rates.py --data {options.data}{backend} --out DIR",
        "seed": 0,
    }
    write_atomic(RECORD, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
