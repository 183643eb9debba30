"""drrho_torch.hugging_face.TrainerSteering in Trainers as new users set them up, with the mistakes that they make."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from drrho_torch import ContrastiveLoss  # noqa: E402
from drrho_torch.hugging_face import TrainerSteering  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

from helpers.ports import free_port  # noqa: E402

PAIRS = 9


class Towers(torch.nn.Module):
    """Two linear towers with the outputs of a CLIP model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = torch.nn.Linear(6, 4), torch.nn.Linear(5, 4)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.6))

    def forward(self, pixel_values: Any, input_ids: Any) -> dict[str, Any]:
        sides = self.image(pixel_values), self.text(input_ids)
        image, text = (torch.nn.functional.normalize(side, dim=-1) for side in sides)
        # DistributedDataParallel expects that the forward pass uses every parameter.
        logits = self.logit_scale.exp() * image @ text.T
        return {"loss": image.sum(), "logits_per_image": logits, "image_embeds": image, "text_embeds": text}


def entries(number: int = PAIRS, labels: bool = True) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    rows = [
        {"pixel_values": torch.randn(6, generator=generator), "input_ids": torch.randn(5, generator=generator)}
        for _ in range(number)
    ]
    return [{**row, "labels": i} for i, row in enumerate(rows)] if labels else rows  # type: ignore[misc]


def make(
    folder: Path, labels: bool = True, steering: Any = None, callbacks: bool = True, model: Any = None, **arguments: Any
) -> Trainer:
    model = model or Towers()
    defaults = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "dataloader_drop_last": True,
    }
    settings = TrainingArguments(
        str(folder),
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{**defaults, "label_names": ["labels"], **arguments},
    )
    if steering is None:
        loss = ContrastiveLoss(PAIRS, temperature=0.07, radius=1.0)
        steering = TrainerSteering(loss, logit_scale=model.logit_scale)
    return Trainer(
        model=model,
        args=settings,
        train_dataset=entries(labels=labels),  # type: ignore[arg-type]
        eval_dataset=entries(5),  # type: ignore[arg-type]
        compute_loss_func=steering,
        callbacks=[steering] if callbacks else [],
    )


def visited(trainer: Any) -> int:
    return int(torch.isfinite(trainer.compute_loss_func.contrastive_loss.log_inner_text).sum())


@pytest.mark.parametrize("batch_size", [8, 1])
def test_a_batch_of_one_pair_is_named_before_the_training(batch_size: int, tmp_path: Path) -> None:
    arguments = {"per_device_train_batch_size": batch_size, "dataloader_drop_last": batch_size == 1}
    trainer = make(tmp_path, **arguments)
    with pytest.raises(ValueError, match=r"at least 2 pairs \(dataloader_drop_last=True .*, got (9 pairs in|a) batch"):
        trainer.train()
    assert visited(trainer) == 0


def test_a_last_batch_of_one_pair_stops_no_evaluation(tmp_path: Path) -> None:
    trainer = make(tmp_path, dataloader_drop_last=False, per_device_train_batch_size=3)
    trainer.train()
    pair = trainer.compute_loss_func
    assert visited(trainer) == PAIRS
    # The evaluation has 5 pairs in batches of 4 and 1. The Trainer weighs the batches by their pairs.
    with torch.no_grad():
        batch = {name: torch.stack([torch.as_tensor(row[name]) for row in entries(4)]) for name in entries(1)[0]}
        labels = batch.pop("labels")
        first = float(pair(trainer.model(**batch), labels))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(first * 4 / 5, rel=1e-5)


def test_missing_labels_name_every_place_that_loses_them(tmp_path: Path) -> None:
    trainer = make(tmp_path, labels=False)
    with pytest.raises(ValueError, match=r"^labels must hold .*evaluation.*collate.*label_names=\['labels'\]"):
        trainer.train()


def test_a_steering_that_is_no_callback_is_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path, callbacks=False)
    with pytest.raises(ValueError, match=r"^callbacks of the Trainer must contain .*callbacks=\[steering\]"):
        trainer.train()
    assert visited(trainer) == 0


def test_a_scale_of_another_model_is_refused(tmp_path: Path) -> None:
    loss = ContrastiveLoss(PAIRS, temperature=0.07, radius=1.0)
    trainer = make(tmp_path, steering=TrainerSteering(loss, logit_scale=Towers().logit_scale))
    with pytest.raises(ValueError, match=r"^logit_scale must be a parameter of the model that the Trainer trains"):
        trainer.train()


@pytest.mark.parametrize(
    "setting", [{"fsdp": True}, {"deepspeed_plugin": object()}, {"parallel_mode": "NOT_DISTRIBUTED", "n_gpu": 2}]
)
def test_untested_ways_to_use_several_devices_are_refused(setting: dict[str, Any]) -> None:
    from transformers.training_args import ParallelMode

    mode = getattr(ParallelMode, setting.pop("parallel_mode", "DISTRIBUTED"))
    arguments = SimpleNamespace(**{"fsdp": None, "deepspeed_plugin": None, "n_gpu": 1, **setting}, parallel_mode=mode)
    steering = TrainerSteering(ContrastiveLoss(PAIRS, temperature=0.07))
    with pytest.raises(ValueError, match=r"^several devices must be used by DistributedDataParallel"):
        steering.on_init_end(arguments, None, None)  # type: ignore[arg-type]


def test_labels_that_are_no_integers_are_refused_before_the_reference_is_read() -> None:
    reference = tuple(torch.eye(PAIRS) for _ in range(2))
    steering = TrainerSteering(ContrastiveLoss(PAIRS, temperature=0.07), reference=reference)
    with pytest.raises(TypeError, match=r"^labels must have an integer dtype, got torch.float32"):
        steering({}, torch.arange(3.0))


# Both processes average their gradients; the first writes what it has learnt.
RANK = """
import sys, torch
sys.path[:0] = sys.argv[1], sys.argv[1] + "/.."
from test_trainer_steering import make, trained
trainer = make(sys.argv[2], num_train_epochs=3, optim="sgd", learning_rate=1.0, ddp_backend="gloo")
trainer.train()
trainer.evaluate()
if trainer.is_world_process_zero():
    torch.save(trained(trainer), sys.argv[2] + "/two.pt")
torch.distributed.destroy_process_group()
"""


def trained(trainer: Any) -> dict[str, Any]:
    return {**trainer.model.state_dict(), **trainer.compute_loss_func.contrastive_loss.state_dict()}


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    one = make(tmp_path, num_train_epochs=3, optim="sgd", learning_rate=1.0, per_device_train_batch_size=8)
    start = {name: value.clone() for name, value in one.model.state_dict().items()}  # type: ignore[union-attr]
    one.train()
    with_ports = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(Path(__file__).parent), str(tmp_path)],
            env={**with_ports, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs
    two = torch.load(tmp_path / "two.pt")
    for name, expected in trained(one).items():
        torch.testing.assert_close(two[name], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(start["image.weight"], two["image.weight"], atol=1e-3)
