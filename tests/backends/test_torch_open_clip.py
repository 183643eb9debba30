"""drrho_torch.OpenClipLoss: announced rows, the schedule of gamma, reference features, and calls that it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from drrho_torch import ContrastiveLoss, OpenClipLoss  # noqa: E402

from drrho_core import cosine_gamma, recommended_gamma_min  # noqa: E402

N, B, D, R = 12, 6, 4, 3
ROWS = torch.tensor([7, 0, 11, 4, 2, 9])
SCALE = torch.tensor(5.0)


def features(rows: int = B, width: int = D, seed: int = 0) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.nn.functional.normalize(torch.randn(2, rows, width, generator=generator), dim=-1))  # type: ignore[return-value]


def loss_module(**options: Any) -> OpenClipLoss:
    contrastive_loss = ContrastiveLoss(N, temperature=0.07, gamma=0.6, radius=1.0)
    contrastive_loss.log_inner_image.copy_(torch.linspace(-2.0, 1.0, N))
    return OpenClipLoss(contrastive_loss, **options)


def tables(loss: OpenClipLoss) -> list[Any]:
    return [table.clone() for table in (loss.contrastive_loss.log_inner_image, loss.contrastive_loss.log_inner_text)]


def test_a_call_is_a_call_of_the_contrastive_loss_at_the_temperature_of_the_scale() -> None:
    loss, plain = loss_module(), loss_module().contrastive_loss
    loss.announce(ROWS)
    assert torch.equal(loss(*features(), SCALE), plain(*features(), ROWS, temperature=1 / SCALE))
    assert all(
        torch.equal(a, b) for a, b in zip(tables(loss), (plain.log_inner_image, plain.log_inner_text), strict=True)
    )


def test_calls_on_collected_batches_store_the_estimates_once_and_give_the_scale_one_gradient() -> None:
    loss, plain = loss_module(), loss_module().contrastive_loss
    before, results = tables(loss), []
    for batch in ROWS.split(2):
        loss.announce(batch)
    scale = SCALE.clone().requires_grad_()
    for _ in range(3):
        assert scale.grad is None or float(scale.grad) == 0.0
        assert all(torch.equal(a, b) for a, b in zip(tables(loss), before, strict=True))
        results.append(loss(*features(), scale))
        results[-1].backward()
    whole = SCALE.clone().requires_grad_()
    expected = plain(*features(), ROWS, temperature=1 / whole)
    expected.backward()
    assert all(torch.equal(result, expected) for result in results)
    assert torch.equal(scale.grad, whole.grad)
    assert torch.equal(tables(loss)[0], plain.log_inner_image)


class Rows:
    """Reference features that are read by NumPy rows, as those of a cache."""

    def __init__(self, sides: tuple[Any, Any]) -> None:
        self.sides = [side.numpy() for side in sides]

    def __getitem__(self, rows: Any) -> tuple[Any, Any]:
        assert isinstance(rows, np.ndarray)
        return self.sides[0][rows], self.sides[1][rows]


@pytest.mark.parametrize("kind", [tuple, Rows])
def test_reference_features_are_those_of_the_announced_rows(kind: Any) -> None:
    reference = features(N, R, seed=1)
    loss, plain = loss_module(reference=kind(reference)), loss_module().contrastive_loss
    loss.announce(ROWS)
    expected = plain(
        *features(), ROWS, temperature=1 / SCALE, reference_features=(reference[0][ROWS], reference[1][ROWS])
    )
    assert torch.equal(loss(*features(), SCALE), expected)


def test_an_epoch_sets_gamma_and_forgets_batches_without_a_loss() -> None:
    loss = loss_module(num_epochs=20)
    loss.announce(ROWS[:2])
    loss.set_epoch(7)
    assert loss.contrastive_loss.gamma == cosine_gamma(7, num_epochs=20, gamma_min=recommended_gamma_min(20))
    loss.announce(ROWS)
    loss(*features(), SCALE)
    constant = loss_module()
    constant.set_epoch(7)
    assert constant.contrastive_loss.gamma == 0.6


@pytest.mark.parametrize("training", [True, False])
def test_processes_exchange_rows_on_the_device_of_the_features(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL exchanges tensors on GPUs only; a loader names its rows on the CPU. The device "meta" stands for a GPU."""

    class Stop(Exception):
        pass

    def exchange(tensor: Any) -> Any:
        assert tensor.device.type == "meta"
        raise Stop

    monkeypatch.setattr("drrho_torch.open_clip.gathered", exchange)
    loss = loss_module().train(training)
    loss.announce(ROWS)
    with pytest.raises(Stop):
        loss(*(side.to("meta") for side in features()), SCALE)


def test_in_eval_a_call_needs_no_rows_and_changes_nothing() -> None:
    loss = loss_module(reference=features(N, R)).eval()
    before = tables(loss)
    expected = loss_module().contrastive_loss.eval()(*features(), ROWS, temperature=1 / SCALE)
    assert torch.equal(loss(*features(), SCALE, output_dict=True)["contrastive_loss"], expected)
    assert all(torch.equal(a, b) for a, b in zip(tables(loss), before, strict=True))


@pytest.mark.parametrize(
    ("announced", "message"),
    [
        ([], "announce must name the rows of the 6 pairs of this call, .* got 0 rows in 0 calls since the last loss"),
        ([4], ".* got 4 rows in 1 calls since the last loss"),
        ([6, 6], ".* got 12 rows in 2 calls since the last loss"),
    ],
)
def test_rows_that_do_not_fit_the_features_are_refused(announced: list[int], message: str) -> None:
    loss = loss_module()
    before = tables(loss)
    for rows in announced:
        loss.announce(ROWS[:rows])
    with pytest.raises(ValueError, match=f"^{message}$"):
        loss(*features(), SCALE)
    assert all(torch.equal(a, b) for a, b in zip(tables(loss), before, strict=True))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: OpenClipLoss(torch.nn.Identity()),
            TypeError,
            "contrastive_loss must be a ContrastiveLoss, got Identity",
        ),
        (lambda: loss_module(reference=3), TypeError, "reference must be a pair of arrays .*, got 3"),
        (lambda: loss_module(reference="x.npy"), TypeError, "reference must be a pair of arrays .*, got 'x.npy'"),
        (lambda: loss_module(reference={}), TypeError, "reference must be a pair of arrays .*, got {}"),
        (lambda: loss_module(reference=features(N - 1)), ValueError, "reference must hold one row .* num_samples = 12"),
        (lambda: loss_module(reference=features(N + 1)), ValueError, "reference must hold one row .* num_samples = 12"),
        (lambda: loss_module().announce(ROWS.float()), TypeError, "sample_index must have an integer dtype, got .*"),
        (lambda: loss_module(gamma_min=0.2), ValueError, "gamma_min must come with num_epochs, .*"),
        (lambda: loss_module(num_epochs=0), ValueError, "num_epochs must be .*, got 0"),
        (lambda: loss_module(num_epochs=3, gamma_min=0.0), ValueError, "gamma_min must be .*, got 0.0"),
        (lambda: loss_module().set_epoch(-1), ValueError, "epoch must be .*, got -1"),
        (lambda: loss_module().announce([1, 2]), TypeError, "sample_index must be a torch tensor .*, got list"),
        (lambda: loss_module().announce(ROWS.reshape(2, 3)), ValueError, "sample_index must have .*"),
        (lambda: loss_module()(*features(), 3.0), TypeError, "logit_scale must be a torch tensor .*, got float"),
        (lambda: loss_module()(*features(), SCALE, SCALE), ValueError, "logit_bias must be None, .*"),
    ],
)
def test_wrong_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_a_learned_scale_without_a_radius_is_refused() -> None:
    loss = OpenClipLoss(ContrastiveLoss(N, temperature=0.07))
    loss.announce(ROWS)
    with pytest.raises(ValueError, match=r"^radius of the ContrastiveLoss must be > 0 if logit_scale is learned"):
        loss(*features(), SCALE.clone().requires_grad_())
    loss(*features(), SCALE)


@pytest.mark.parametrize("row", [N, -1])
def test_a_row_without_reference_features_is_named(row: int) -> None:
    loss = loss_module(reference=features(N, R))
    loss.announce(torch.tensor([7, 0, 11, 4, 2, row]))
    with pytest.raises(ValueError, match=f"^sample_index must hold row ids from 0 to 11 .* got {row} at position 5"):
        loss(*features(), SCALE)


def test_reference_features_without_unit_norm_are_named() -> None:
    image, text = features(N, R)
    with pytest.warns(UserWarning, match=r"^the text features of reference should have norm 1, got norms from 3 to 3:"):
        loss_module(reference=(image, 3 * text))


def test_reference_features_may_be_arrays_that_cannot_be_written_to() -> None:
    arrays = tuple(side.numpy().copy() for side in features(N, R))
    for array in arrays:
        array.flags.writeable = False
    loss, same = loss_module(reference=arrays), loss_module(reference=features(N, R))
    for module in (loss, same):
        module.announce(ROWS)
    assert torch.equal(loss(*features(), SCALE), same(*features(), SCALE))


def test_a_schedule_needs_its_epoch() -> None:
    loss = loss_module(num_epochs=3)
    loss.announce(ROWS)
    with pytest.raises(ValueError, match=r"^set_epoch must be called at the start of every epoch"):
        loss(*features(), SCALE)
    loss.eval()(*features(), SCALE)
