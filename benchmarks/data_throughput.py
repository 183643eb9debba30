"""Samples per second of a training run that reads tar shards, divided by those of the same run from memory.

    python benchmarks/data_throughput.py [--rounds 7] [--pairs 2048] [--json FILE]

The pictures are rendered scenes of 64 pixels, as PNG and as JPEG files in shards; the run from memory has the decoded
pictures of the same shards, so that all batches are equal, which the program checks. The encoders are a Hugging Face
CLIP whose towers have width 64 and 2 layers, and convolutions of width 64; the array library is torch, the method
sogclr.

The runs alternate in one process. Each round starts every run anew and trains two epochs, without validation. In the
first epoch every picture is read and decoded; the second epoch takes the decoded pictures from the cache in memory
(limit: 2 GiB). A ratio compares the two runs of a round, by the time on the clock and by the time of all processors.
On a machine that other programs use at the same time, the second ratio is the steadier figure: it counts decoding in
full, even if a free processor decodes beside the training step. The first round is left out.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from drrho_clip.config import TrainConfig
from drrho_clip.data import ArrayDataset, DataSplits, scenes
from drrho_clip.data.splits import open_splits
from drrho_clip.train import described
from drrho_clip.trainer import Trainer
from drrho_core.backend import Backend, get_backend

SIDE = 64
PAIRS_PER_SHARD = 512
TOWER = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"
}  # fmt: skip
CLIP = {
    "model_type": "clip",
    "projection_dim": 64,
    "vision_config": TOWER | {"image_size": SIDE, "patch_size": 8},
    "text_config": TOWER | {"max_position_embeddings": 32, "vocab_size": 1024},
}


class Cost(NamedTuple):
    """Seconds of an epoch: on the clock, and of all processors together."""

    wall: float
    cpu: float


def write_shards(folder: Path, suffix: str, num_pairs: int) -> str:
    """Write rendered scenes with their captions into shards, and return the text that names the shards."""
    data = scenes(num_pairs, seed=0, image_size=SIDE)
    options: dict[str, Any] = {"format": "PNG"} if suffix == "png" else {"format": "JPEG", "quality": 90}
    from PIL import Image

    last = (num_pairs - 1) // PAIRS_PER_SHARD
    for number in range(last + 1):
        with tarfile.open(folder / f"{suffix}-{number:03}.tar", "w") as archive:
            for row in range(number * PAIRS_PER_SHARD, min(num_pairs, (number + 1) * PAIRS_PER_SHARD)):
                picture = io.BytesIO()
                Image.fromarray(data.images[row]).save(picture, **options)
                for name, content in ((suffix, picture.getvalue()), ("txt", data.captions[row].encode())):
                    member = tarfile.TarInfo(f"{row:06}.{name}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return str(folder / f"{suffix}-{{000..{last:03}}}.tar")


def in_memory(splits: DataSplits) -> DataSplits:
    """Return the same training pairs with decoded pictures."""
    train = splits.train
    rows = [train[row] for row in range(len(train))]
    images = np.stack([row.image for row in rows])
    return splits._replace(train=ArrayDataset("memory", images, [row.caption for row in rows]))


def epoch_cost(trainer: Trainer, epoch: int) -> Cost:
    """Take the steps of an epoch, and return the time that they took."""
    config = trainer.run.config
    wall, cpu = time.perf_counter(), time.process_time()
    for batch in trainer.source.epoch(config.batch_size, seed=config.seed, epoch=epoch):
        trainer.take_step(batch, epoch=epoch)
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def require_equal_batches(first: Trainer, second: Trainer) -> None:
    """Raise an error unless two runs get the same batches in the first epoch."""
    batches = [trainer.source.epoch(trainer.run.config.batch_size, seed=0, epoch=0) for trainer in (first, second)]
    for one, other in zip(*batches, strict=True):
        if not all(np.array_equal(a, b) for a, b in zip(one[:3], other[:3], strict=True)):
            raise RuntimeError("the runs must get equal batches")


def measure(
    folder: Path, encoders: dict[str, Any], places: dict[str, str], backend: Backend, options: argparse.Namespace
) -> dict[str, list[list[Cost]]]:
    """Return the costs of the two epochs of every round, by the kind of the data."""
    configs, splits = {}, {}
    for name, place in places.items():
        configs[name] = TrainConfig(
            data=place, method="sogclr", backend="torch", batch_size=options.batch_size, epochs=2,
            log_every=10**6, **encoders,
        )  # fmt: skip
        splits[name] = open_splits(configs[name])
        configs[f"memory {name}"], splits[f"memory {name}"] = configs[name], in_memory(splits[name])

    # The first step writes a line of metrics.
    (folder / "run").mkdir(exist_ok=True)

    def started(name: str) -> Trainer:
        run = described(folder / "run", configs[name], splits[name]).run
        return Trainer(run, backend, splits[name])

    for name in places:
        require_equal_batches(started(name), started(f"memory {name}"))
    costs: dict[str, list[list[Cost]]] = {name: [] for name in splits}
    for number in range(options.rounds + 1):
        # The order alternates, so that no kind of data always runs first.
        for name in list(costs) if number % 2 else reversed(list(costs)):
            trainer = started(name)
            measured = [epoch_cost(trainer, epoch) for epoch in (0, 1)]
            # The first round allocates memory and imports modules.
            if number:
                costs[name].append(measured)
    return costs


def ratios(costs: dict[str, list[list[Cost]]], name: str, epoch: int, clock: str) -> list[float]:
    """Return the samples per second from shards, divided by those from memory, of every round."""
    pairs = zip(costs[f"memory {name}"], costs[name], strict=True)
    return [getattr(memory[epoch], clock) / getattr(shards[epoch], clock) for memory, shards in pairs]


def rows_of(encoders: str, costs: dict[str, list[list[Cost]]], names: list[str], samples: int) -> list[dict[str, Any]]:
    """Return a row of figures per kind of file and epoch."""
    rows = []
    for name in names:
        for epoch, source in ((0, "decoded"), (1, "cache")):
            row: dict[str, Any] = {"encoders": encoders, "files": name, "epoch": epoch + 1, "pictures": source}
            for place, label in ((f"memory {name}", "memory"), (name, "shards")):
                row[f"{label}_samples_per_second"] = round(
                    samples / statistics.median(c[epoch].wall for c in costs[place])
                )
            for clock in Cost._fields:
                found = sorted(ratios(costs, name, epoch, clock))
                row[clock] = [round(value, 3) for value in (statistics.median(found), found[0], found[-1])]
            rows.append(row)
    return rows


def main() -> None:
    """Measure all runs, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    backend = get_backend("torch")
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    print(f"OMP_NUM_THREADS {threads}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}\n")
    print("| encoders | files | epoch | pictures | memory, pairs/s | shards, pairs/s | ratio by clock | by processor |")
    print("|---|---|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        places = {suffix: write_shards(folder, suffix, options.pairs) for suffix in ("png", "jpg")}
        (folder / "clip.json").write_text(json.dumps(CLIP), encoding="utf-8")
        models: dict[str, dict[str, Any]] = {
            "ViT, width 64": {"model": str(folder / "clip.json")},
            "conv, width 64": {"architecture": "conv", "image_size": SIDE, "width": 64},
        }
        for title, encoders in models.items():
            costs = measure(folder, encoders, places, backend, options)
            train = len(open_splits(TrainConfig(data=places["png"], method="clip", backend="torch", **encoders)).train)
            rows += rows_of(title, costs, list(places), train // options.batch_size * options.batch_size)
            for row in rows[-4:]:
                spread = ["{} ({} to {})".format(*row[clock]) for clock in Cost._fields]
                figures = [row[key] for key in ("encoders", "files", "epoch", "pictures")]
                speeds = [row["memory_samples_per_second"], row["shards_samples_per_second"]]
                print("| " + " | ".join(map(str, [*figures, *speeds, *spread])) + " |", flush=True)
    if options.json:
        described_as = {"threads": threads, "processors": os.cpu_count(), "load": os.getloadavg()[0], "rows": rows}
        options.json.write_text(json.dumps(described_as, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
