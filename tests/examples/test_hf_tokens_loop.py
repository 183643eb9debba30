"""A causal language model with DRRho's risk over tokens: few changed lines, the right gradient, less harm by noise."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from drrho_core import CappedKLPenalty, CVaR, KLPenalty, worst_case
from helpers.examples import EXAMPLES, changed_lines, load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SETS = [CVaR(0.6), KLPenalty(0.7), CappedKLPenalty(0.7, 0.4)]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return load("loops/hf_tokens.py", monkeypatch)


def write_sentences(folder: Path, clean: int, noisy: int) -> list[str]:
    """Write sentences; return the paths of clean, noisy and test sentences."""
    from sentences import write_sentences as write

    for seed, (name, size) in enumerate((("clean", clean), ("noisy", noisy), ("test", 128))):
        write(folder / f"{name}.npy", size, 0.4 if name == "noisy" else 0.0, seed=seed)
    return [str(folder / f"{name}.npy") for name in ("clean", "noisy", "test")]


def test_fewer_than_ten_lines_change_and_the_page_tells_their_number() -> None:
    number = changed_lines("loops/hf_tokens_before.py", "loops/hf_tokens.py")
    assert number < 10
    page = (EXAMPLES.parent / "docs" / "your-loop.md").read_text(encoding="utf-8")
    assert f"[`hf_tokens.py`](../examples/loops/hf_tokens.py) differs in {number} lines" in page


def test_training_on_noisy_sentences_lowers_the_clean_loss_far_more_than_the_usual_loss_does(
    example: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, noisy, test = write_sentences(tmp_path, 384, 768)
    plain = load("loops/hf_tokens_before.py", monkeypatch)["main"]
    losses = {
        name: main(data, test, str(tmp_path / name)).evaluate()["eval_loss"]
        for name, main, data in (
            ("reference", plain, clean),
            ("usual", plain, noisy),
            ("learner", example["main"], noisy),
        )
    }
    # A model that knows nothing has a loss of log 32 = 3.47.
    assert losses["learner"] < 3.47 - 1.4
    assert losses["learner"] < losses["usual"] - 0.25


@pytest.mark.parametrize("weights", SETS, ids=lambda s: type(s).__name__)
def test_gradient_of_accumulated_batches_is_the_worst_case_weighted_mean_of_token_gradients(
    example: dict[str, Any], tmp_path: Path, weights: Any
) -> None:
    _, noisy, test = write_sentences(tmp_path, 8, 16)
    trainer = example["make_trainer"](noisy, test, str(tmp_path / "run"), batch_size=4, accumulate=2)
    model = trainer.model
    torch.manual_seed(1)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    trainer.steer(reference, weights)
    rows = torch.tensor([trainer.train_dataset[row]["input_ids"].tolist() for row in range(8)])
    labels = rows.clone()
    labels[:, 12:] = -100  # padding
    labels[1, :5] = -100  # a prompt
    # Dropout would give the second pass another model.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tokens = (labels[:, 1:] != -100).sum()
    for half in (slice(0, 4), slice(4, 8)):
        batch = {"input_ids": rows[half], "labels": labels[half]}
        trainer.training_step(model, batch, num_items_in_batch=tokens)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]

    model.zero_grad()
    for half in (slice(0, 4), slice(4, 8)):
        targets = labels[half, 1:].reshape(-1)
        logits, reference_logits = (m(rows[half]).logits[:, :-1].reshape(len(targets), -1) for m in (model, reference))
        counts = targets != -100
        losses, reference_losses = (
            torch.nn.functional.cross_entropy(x[counts], targets[counts], reduction="none")
            for x in (logits, reference_logits)
        )
        excess = (losses - reference_losses).detach().double()
        token_weights = worst_case(excess, weights).weights.float()
        (token_weights @ losses * counts.sum() / tokens).backward()
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert float((gradient - parameter.grad).abs().max()) <= 1e-5 * max(1e-2, float(parameter.grad.abs().max()))


def test_without_a_reference_model_it_is_the_usual_trainer(example: dict[str, Any], tmp_path: Path) -> None:
    _, noisy, test = write_sentences(tmp_path, 8, 16)
    trainer = example["make_trainer"](noisy, test, str(tmp_path / "run"))
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[1, 2, 3]])}
    usual = transformers.Trainer.compute_loss(trainer, trainer.model.eval(), dict(batch))
    assert torch.equal(trainer.compute_loss(trainer.model, dict(batch)), usual)
    trainer.steer(copy.deepcopy(trainer.model), CVaR(0.5))
    with torch.no_grad():
        assert torch.equal(trainer.compute_loss(trainer.model, dict(batch)), usual)
    # The excess over a reference with the same weights is 0.
    assert abs(trainer.compute_loss(trainer.model, dict(batch)).item()) < 1e-6


def test_wrong_arguments_are_named(example: dict[str, Any], tmp_path: Path) -> None:
    _, noisy, test = write_sentences(tmp_path, 8, 16)
    trainer = example["make_trainer"](noisy, test, str(tmp_path / "run"))
    for arguments, options, error, message in (
        (
            (torch.nn.Identity(), CVaR(0.5)),
            {},
            TypeError,
            "reference_model must be a model of transformers, got Identity",
        ),
        ((trainer.model, 0.6), {}, TypeError, "ambiguity_set must be an AmbiguitySet, such as CVaR"),
        ((trainer.model, CVaR(0.5)), {"reference_weight": -1.0}, ValueError, "reference_weight must be .*, got -1"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            trainer.steer(*arguments, **options)
