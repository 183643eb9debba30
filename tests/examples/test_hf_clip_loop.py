"""transformers' Trainer with DRRho's loss: few changed lines, the right gradient, estimates in checkpoints only."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drrho_core import contrastive_step, cosine_gamma, recommended_gamma_min
from helpers.examples import EXAMPLES, changed_lines, load

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

PAIRS = 128


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    names = load("loops/hf_clip.py", monkeypatch)
    names["write_pairs"](tmp_path / "pairs.npz", PAIRS)
    return names


def test_fewer_than_ten_lines_change_and_the_page_tells_their_number() -> None:
    number = changed_lines("loops/hf_clip_before.py", "loops/hf_clip.py")
    assert number < 10
    page = (EXAMPLES.parent / "docs" / "your-loop.md").read_text(encoding="utf-8")
    assert f"[`hf_clip.py`](../examples/loops/hf_clip.py) differs in {number} lines" in page


def tables(trainer: Any) -> list[Any]:
    loss = trainer.compute_loss_func.contrastive_loss
    return [table.clone() for table in (loss.log_inner_image, loss.log_inner_text)]


def test_training_lowers_the_loss_and_a_resumed_run_ends_bit_for_bit_the_same(
    example: dict[str, Any], tmp_path: Path
) -> None:
    trainer = example["main"](str(tmp_path / "pairs.npz"), str(tmp_path / "run"), epochs=12)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 24
    assert np.mean(losses[-4:]) < 0.85 * losses[0]
    # The schedule has arrived in its last epoch.
    gamma = cosine_gamma(11, num_epochs=12, gamma_min=recommended_gamma_min(12))
    assert trainer.compute_loss_func.contrastive_loss.gamma == gamma < 1

    from safetensors.torch import load_file

    exported = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert exported.keys() == trainer.model.state_dict().keys()
    assert sorted(path.name for path in (tmp_path / "run" / "export").iterdir()) == [
        "config.json",
        "model.safetensors",
        "training_args.bin",
    ]
    # The other run stops after eleven epochs: later checkpoints are gone.
    (tmp_path / "stopped").mkdir()
    shutil.copytree(tmp_path / "run" / "checkpoint-22", tmp_path / "stopped" / "checkpoint-22")
    resumed = example["main"](str(tmp_path / "pairs.npz"), str(tmp_path / "stopped"), resume=True, epochs=12)
    assert all(torch.equal(*pair) for pair in zip(tables(resumed), tables(trainer), strict=True))
    assert all(
        torch.equal(value, resumed.model.state_dict()[name]) for name, value in trainer.model.state_dict().items()
    )

    before = tables(trainer)
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert all(torch.equal(*pair) for pair in zip(tables(trainer), before, strict=True))

    (tmp_path / "stopped" / "checkpoint-24" / "estimates.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"^checkpoint must be a folder with estimates.safetensors, got .*-24"):
        example["main"](str(tmp_path / "pairs.npz"), str(tmp_path / "stopped"), resume=True, epochs=13)


def test_gradient_of_accumulated_batches_is_a_mean_of_contrastive_steps(
    example: dict[str, Any], tmp_path: Path
) -> None:
    trainer = example["make_trainer"](str(tmp_path / "pairs.npz"), str(tmp_path / "run"), batch_size=8, accumulate=2)
    model, loss = trainer.model, trainer.compute_loss_func.contrastive_loss
    loss.gamma = 0.7
    for table, ends in ((loss.log_inner_image, (-3.0, 1.0)), (loss.log_inner_text, (0.0, -4.0))):
        table.copy_(torch.linspace(*ends, PAIRS))
    reference = np.load(tmp_path / "pairs.npz.npy").astype(float)
    old = [table.double().numpy().copy() for table in tables(trainer)]
    batches = [example["collate"]([trainer.train_dataset[row] for row in rows]) for rows in np.split(np.arange(16), 2)]
    for batch in batches:
        trainer.training_step(model, dict(batch), num_items_in_batch=torch.tensor(16))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert "logit_scale" in gradients
    model.zero_grad()
    for batch in batches:
        rows = batch.pop("labels").numpy()
        outputs, tau = model(**batch), torch.exp(-model.logit_scale)
        sides = outputs["image_embeds"], outputs["text_embeds"]
        step = contrastive_step(
            *(side.detach().double().numpy() for side in sides),
            *(table[rows] for table in old),
            temperature=float(tau.detach().double()),
            gamma=0.7,
            radius=2.0,
            reference_features=tuple(reference[:, rows]),
        )
        surrogate = sum(
            (side * torch.from_numpy(slope).float()).sum()
            for side, slope in zip(sides, (step.image_gradient, step.text_gradient), strict=True)
        )
        (0.5 * (surrogate + float(step.temperature_gradient) * tau)).backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            error = float((gradients[name] - parameter.grad).abs().max())
            assert error <= 1e-5 * max(1e-3, float(parameter.grad.abs().max())), name


def test_labels_are_required(example: dict[str, Any], tmp_path: Path) -> None:
    trainer = example["make_trainer"](str(tmp_path / "pairs.npz"), str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"^labels must hold the row of every pair, got None"):
        trainer.compute_loss_func({}, None)
