"""The command ``drrho encode``."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from drrho_clip.commands.common import (
    allow_unfinished_option,
    build_backend,
    device_option,
    say_unreadable,
    train_setting,
)
from drrho_clip.commands.model import backend_option
from drrho_clip.commands.place import coordinator_option, place_among, process_option, processes_option
from drrho_clip.config import TrainConfig
from drrho_clip.options import PATH, TEXT, at_least, choice, number, setting
from drrho_clip.table_defaults import preset
from drrho_clip.terminal.printing import say
from drrho_core.backend import Backend, default_backend

if TYPE_CHECKING:
    from drrho_clip.processes.protocol import Processes
    from drrho_clip.run import Run

# Settings of training that decide which pairs the data are.
_DATA = (
    "image_column",
    "caption_column",
    "label_column",
    "data_seed",
    "train_size",
    "swapped_fraction",
    "max_unreadable",
)


@dataclass(frozen=True)
class Encode:
    """Encode all pairs of a data set with a model, and write the features into a cache.

    The cache serves as --reference of drrho train, so that a large reference model runs only once. A killed encoding
    continues with the same command. The cache records the content of model, preprocessing, tokenizer and data, and is
    refused if they differ. Training may use any part of the encoded pairs: a pair is recognised by its content.

    For example:
      drrho encode --model hf:clip --data pairs.csv --out caches/clip
      drrho encode --model runs/reference --data pairs.csv --out caches/reference --dtype float16
      drrho train --data pairs.csv --method drrho --reference caches/clip --out runs/steered
    """

    takes_processes: ClassVar[bool] = True

    model: str = setting(
        rule=TEXT,
        metavar="MODEL",
        help="The model: the folder of a run, hf:DIR (a CLIP or SigLIP directory of Hugging Face), open_clip:NAME, "
        "open_clip:NAME/PRETRAINED or features:CACHE.",
    )
    data: str = setting(rule=TEXT, metavar="DATA", help="The data, as drrho train takes them; all pairs are encoded.")
    out: Path = setting(rule=PATH, metavar="CACHE", help="Folder of the cache.")
    dtype: str = setting(
        "float32",
        rule=choice("float32", "float16"),
        help="Dtype of the files; float16 needs half the space and rounds the features.",
    )
    batch_size: int = setting(256, rule=at_least(1), help="Pairs that are encoded at a time.")
    state: str = setting(
        "reference", rule=choice("best", "last", "reference"), help="State of a run, if the model is a run."
    )
    image_column: str | None = train_setting("image_column")
    caption_column: str | None = train_setting("caption_column")
    label_column: str | None = train_setting("label_column")
    data_seed: int = train_setting("data_seed")
    train_size: int = train_setting("train_size")
    swapped_fraction: float | None = setting(
        None,
        rule=number("in [0, 1]", lambda value: 0 <= value <= 1),
        shown="that of drrho train",
        help="Share of the training captions of built-in data and of IDX files that are swapped with each other.",
    )
    max_unreadable: float = train_setting("max_unreadable")
    backend: str | None = backend_option()
    allow_unfinished: bool = allow_unfinished_option("A run after --model")
    device: str | None = device_option()
    coordinator: str | None = coordinator_option()
    processes: int | None = processes_option()
    process: int | None = process_option()
    rank_timeout: float = train_setting("rank_timeout")

    def run(self) -> int:
        """Encode the pairs, then print what the cache holds."""
        from drrho_clip.encoders import check_model_name, is_run
        from drrho_clip.files.outputs import check_folder
        from drrho_clip.processes.opening import opened_processes, telling_others
        from drrho_clip.processes.together import of_first
        from drrho_clip.run.resume import open_finished_run

        place = place_among(self.coordinator, self.processes, self.process)
        with telling_others(place):
            check_model_name(self.model, "model")
            run = None
            if is_run(self.model):
                run = open_finished_run(self.model, "model", allow_unfinished=self.allow_unfinished)
            own = (default_backend(), "float32") if run is None else (run.config.backend, run.config.dtype)
            backend = build_backend(self.backend or own[0], self.device, own[1], place)
        # Processes with other batches would wait for batches that never come.
        facts = {"dtype": self.dtype, "batch_size": self.batch_size}
        with opened_processes(backend, place, facts=facts, rank_timeout=self.rank_timeout) as processes:
            of_first(processes, partial(check_folder, self.out, "out"))
            self._encode(backend, run, processes)
        return 0

    def _encode(self, backend: Backend, run: Run | None, processes: Processes) -> None:
        """Encode the pairs with a model, which may be a run, together with other processes."""
        from drrho_clip.data.splits import open_all_pairs
        from drrho_clip.encoders import open_model
        from drrho_clip.features import encode_pairs
        from drrho_clip.processes.facts import require_same_model
        from drrho_clip.processes.together import together
        from drrho_clip.terminal.progress import Reporter

        encoder = together(processes, partial(open_model, self.model, backend=backend, state=self.state, run=run))
        of_data: dict[str, Any] = {name: getattr(self, name) for name in _DATA}
        if self.swapped_fraction is None:
            # The default depends on the kind of data, as in training.
            del of_data["swapped_fraction"]
            of_data |= {name: value for name, value in preset(self.data).items() if name == "swapped_fraction"}
        config = TrainConfig(self.data, method="clip", backend=backend.name, **of_data)
        dataset = together(processes, partial(open_all_pairs, config))
        require_same_model(processes, encoder, {"data": dataset}, backend)
        title, reporters = f"encoding {len(dataset):,} pairs of {self.data}", list[Reporter]()

        def show(done: int) -> None:
            # The bar begins when the folder has been checked, at the rows that an earlier process has encoded.
            if reporters:
                reporters[0].move_to(done)
            else:
                reporters.append(stack.enter_context(Reporter(title, len(dataset), done=done)))

        with contextlib.ExitStack() as stack:
            manifest = encode_pairs(
                encoder,
                dataset,
                self.out,
                data_name=self.data,
                dtype=self.dtype,
                batch_size=self.batch_size,
                after_rows=show,
                processes=processes,
            )
        say_unreadable(dataset, "encoded as black images")
        width, text_width = manifest.feature_dims
        say(
            f"{self.out} holds features of {manifest.num_pairs:,} pairs ({width} numbers per image, {text_width} per "
            f"caption, {manifest.dtype}) by {manifest.model['name']}"
        )
