"""drrho_torch.micro_batches against one backward pass over the whole batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")

from drrho_torch import ContrastiveLoss, micro_batches  # noqa: E402

B, N, IMAGE, TEXT, D = 7, 11, 6, 5, 4
INDEX = torch.tensor([7, 0, 10, 4, 2, 9, 1])


class Towers(torch.nn.Module):
    """Two encoders; `norm` keeps running statistics of what it saw."""

    def __init__(self, *, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        middle = [torch.nn.BatchNorm1d(8, dtype=torch.float64)] if norm else []
        self.image = torch.nn.Sequential(
            torch.nn.Linear(IMAGE, 8), *middle, torch.nn.Tanh(), torch.nn.Dropout(dropout), torch.nn.Linear(8, D)
        )
        self.text = torch.nn.Sequential(torch.nn.Linear(TEXT, 8), torch.nn.Dropout(dropout), torch.nn.Linear(8, D))
        self.double()

    def forward(self, images: Any, texts: Any) -> tuple[Any, Any]:
        image, text = self.image(images), self.text(texts)
        return torch.nn.functional.normalize(image), torch.nn.functional.normalize(text)


def batch(rows: int = B) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(rows, d, generator=generator, dtype=torch.float64) for d in (IMAGE, TEXT))  # type: ignore[return-value]


def loss_module() -> ContrastiveLoss:
    temperature = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    loss = ContrastiveLoss(N, temperature=temperature, gamma=0.7, radius=0.5).double()
    loss.log_inner_image.copy_(torch.linspace(-2.0, 1.0, N))
    loss.log_inner_text.copy_(torch.linspace(1.0, -3.0, N))
    return loss


def gradients(*modules: Any) -> list[Any]:
    return [parameter.grad for module in modules for parameter in module.parameters()]


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 100])
def test_gradients_are_those_of_the_whole_batch(size: int, with_reference: bool) -> None:
    reference = tuple(torch.nn.functional.normalize(x[:, :3]) for x in batch()) if with_reference else None
    results = []
    for split in (False, True):
        towers, loss = Towers(), loss_module()
        inputs = tuple(x.requires_grad_() for x in batch())
        calls: list[int] = []

        def objective(image: Any, text: Any, loss: Any = loss, calls: list[int] = calls) -> Any:
            calls.append(len(image))
            return loss(image, text, INDEX, reference_features=reference)

        if split:
            value = micro_batches(towers, inputs, objective, size=size)
            assert not value.requires_grad
        else:
            value = objective(*towers(*inputs))
            value.backward()
        assert calls == [B]
        results.append([value.detach(), *gradients(towers, loss), *(x.grad for x in inputs), *loss.buffers()])
    assert len(results[0]) == 1 + 8 + 1 + 2 + 2
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-15)


def test_gradients_are_added_to_those_that_are_there() -> None:
    towers, loss = Towers(), loss_module().eval()
    for _ in range(2):
        micro_batches(towers, batch(), lambda *features: loss(*features, INDEX), size=3)
    twice = gradients(towers, loss)
    once, other = Towers(), loss_module().eval()
    micro_batches(once, batch(), lambda *features: other(*features, INDEX), size=3)
    for one, two in zip(gradients(once, other), twice, strict=True):
        torch.testing.assert_close(two, 2 * one, rtol=1e-12, atol=1e-15)


def test_dropout_is_replayed_and_the_generator_ends_as_after_one_pass() -> None:
    results = []
    for split in (False, True):
        towers, loss = Towers(dropout=0.4), loss_module()

        def objective(image: Any, text: Any, loss: Any = loss) -> Any:
            return loss(image + 0.01 * torch.rand(D, dtype=torch.float64), text, INDEX)  # draws, too

        inputs = batch()
        torch.manual_seed(3)
        if split:
            value = micro_batches(towers, inputs, objective, size=3)
        else:
            parts = [towers(*(x[start : start + 3] for x in inputs)) for start in (0, 3, 6)]
            value = objective(*(torch.cat(side) for side in zip(*parts, strict=True)))
            value.backward()
        results.append([value.detach(), *gradients(towers, loss), torch.rand(3)])
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-15)
    torch.manual_seed(4)  # other draws: another loss
    other = micro_batches(Towers(dropout=0.4), batch(), lambda *features: loss_module()(*features, INDEX), size=3)
    assert abs(float(other - results[0][0])) > 1e-3


class Method:
    def __init__(self, towers: Towers) -> None:
        self.towers = towers

    def encode(self, images: Any, texts: Any) -> Any:
        return self.towers(images, texts)


@pytest.mark.parametrize("known", ["encode is the module", "encode is its method", "model"])
def test_running_statistics_are_updated_once_per_micro_batch(known: str) -> None:
    results = []
    for split in (False, True):
        towers, loss = Towers(norm=True), loss_module()
        inputs = batch(6)
        objective = lambda image, text, loss=loss: loss(image, text, INDEX[:6])  # noqa: E731
        if split:
            encode = {
                "encode is the module": towers,
                "encode is its method": towers.forward,
                "model": Method(towers).encode,
            }[known]
            micro_batches(encode, inputs, objective, size=3, model=towers if known == "model" else None)
        else:
            parts = [towers(*(x[start : start + 3] for x in inputs)) for start in (0, 3)]
            objective(*(torch.cat(side) for side in zip(*parts, strict=True))).backward()
        results.append([*gradients(towers, loss), *towers.buffers(), *loss.buffers()])
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-15)


def test_the_state_of_a_loss_inside_of_the_model_survives() -> None:
    towers, loss = Towers(), loss_module()
    towers.loss = loss
    before = loss.log_inner_image.clone()
    micro_batches(towers, batch(), lambda *features: loss(*features, INDEX), size=3)
    assert not torch.equal(loss.log_inner_image[INDEX], before[INDEX])


def test_autocast_around_the_call_reaches_both_passes() -> None:
    results = []
    for size in (100, 3):
        towers, loss = Towers().float(), ContrastiveLoss(N, temperature=0.3)
        inputs = tuple(x.float() for x in batch())
        kinds = []

        def encode(*micro_batch: Any, towers: Any = towers, kinds: list[Any] = kinds) -> Any:
            features = towers.image(micro_batch[0]), towers.text(micro_batch[1])
            kinds.append(features[0].dtype)
            return features

        with torch.autocast("cpu", dtype=torch.bfloat16):
            micro_batches(encode, inputs, lambda *features, loss=loss: loss(*features, INDEX), size=size)
            assert torch.is_autocast_enabled("cpu")
        assert set(kinds) == {torch.bfloat16}
        results.append(gradients(towers))
    for whole, parts in zip(*results, strict=True):
        assert parts is not None
        torch.testing.assert_close(parts, whole, rtol=0.05, atol=0.02 * float(whole.abs().max()))


def test_a_gradient_scaler_scales_the_loss() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    results = []
    for size in (3, 100):
        towers, loss = Towers(), loss_module()
        value = micro_batches(towers, batch(), lambda *f, loss=loss: loss(*f, INDEX), size=size, scaler=scaler)
        results.append([value, *(gradient / 1024 for gradient in gradients(towers, loss))])
    towers, loss = Towers(), loss_module()
    value = loss(*towers(*batch()), INDEX)
    value.backward()
    for result in results:
        for got, expected in zip(result, [value.detach(), *gradients(towers, loss)], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


class Synchronised(Towers):
    """Says under which conditions it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.active, self.seen = True, list[tuple[bool, bool]]()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.active = False
        try:
            yield
        finally:
            self.active = True

    def forward(self, images: Any, texts: Any) -> tuple[Any, Any]:
        self.seen.append((torch.is_grad_enabled(), self.active))
        return super().forward(images, texts)


class Sharded(Towers):
    def __init__(self) -> None:
        super().__init__()
        self.active, self.seen = True, list[tuple[bool, bool]]()

    def set_requires_gradient_sync(self, active: bool) -> None:
        self.active = active

    def forward(self, images: Any, texts: Any) -> tuple[Any, Any]:
        self.seen.append((torch.is_grad_enabled(), self.active))
        return super().forward(images, texts)


@pytest.mark.parametrize("kind", [Synchronised, Sharded])
def test_only_the_last_micro_batch_synchronises_gradients(kind: Any) -> None:
    towers, loss = kind(), loss_module()
    micro_batches(towers, batch(), lambda *features: loss(*features, INDEX), size=3, model=towers)
    assert [active for grad, active in towers.seen if grad] == [False, False, True]
    assert [grad for grad, _ in towers.seen] == [False] * 3 + [True] * 3
    assert towers.active


@pytest.mark.slow
def test_distributed_data_parallel_gets_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        towers, loss = Towers(), loss_module()
        model = torch.nn.parallel.DistributedDataParallel(towers)
        for _ in range(2):  # the second step fails if the first has left gradients half exchanged
            towers.zero_grad()
            micro_batches(model, batch(), lambda *f: loss.eval()(*f, INDEX), size=3, model=model)
    finally:
        torch.distributed.destroy_process_group()
    plain, other = Towers(), loss_module()
    other.eval()(*plain(*batch()), INDEX).backward()
    for got, expected in zip(gradients(towers), gradients(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


class Tokens(NamedTuple):
    ids: Any
    mask: Any


def test_inputs_may_be_nested_and_one_encoder_frozen() -> None:
    results = []
    for size in (3, 100):
        towers, loss = Towers(), loss_module()
        towers.image.requires_grad_(False)
        images, texts = batch()

        def encode(images: Any, texts: Any, towers: Any = towers) -> Any:
            assert isinstance(texts, Mapping)
            assert isinstance(texts["tokens"], Tokens)
            return [*towers(images[0], texts["tokens"].ids * texts["tokens"].mask)]

        inputs = ([images], {"tokens": Tokens(texts, torch.ones_like(texts))})
        micro_batches(encode, inputs, lambda *features, loss=loss: loss(*features, INDEX), size=size)
        assert {gradient is None for gradient in gradients(towers.image)} == {True}
        results.append(gradients(towers.text, loss))
    for parts, whole in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-15)


def test_a_loop_with_micro_batches_does_not_warn_of_repeated_rows() -> None:
    towers, loss = Towers(), loss_module()
    optimizer = torch.optim.SGD(towers.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            micro_batches(towers, batch(), lambda *features: loss(*features, INDEX), size=2)
            optimizer.step()


def fine(images: Any, texts: Any) -> Any:
    return images[:, :D], texts[:, :D]


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "size 0": ({"size": 0}, ValueError, "size must be at least 1, got 0"),
    "size of a float": ({"size": 2.0}, TypeError, r"size must be an integer, got 2\.0"),
    "one tensor": ({"inputs": batch()[0]}, TypeError, "inputs must be a tuple of arguments of encode, got Tensor"),
    "no tensor": ({"inputs": ({},)}, ValueError, "inputs must hold at least one tensor, got none"),
    "a number": ({"inputs": (batch()[0], 3)}, TypeError, r"inputs\[1\] must be a tensor, or tuples, .* got int"),
    "a scalar": ({"inputs": (torch.tensor(1.0),)}, ValueError, r"inputs\[0\] must have at least one axis"),
    "rows": (
        {"inputs": (batch()[0], {"ids": batch(6)[1]})},
        ValueError,
        r"inputs\[1\]\['ids'\] must have as many rows as inputs\[0\] \(7\), got 6",
    ),
    "no rows": ({"inputs": batch(0)}, ValueError, r"inputs\[0\] must have at least one row, got 0"),
    "encode": ({"encode": 3}, TypeError, "encode must be callable, got 3"),
    "loss": ({"loss": None}, TypeError, "loss must be callable, got None"),
    "model": ({"model": fine}, TypeError, r"model must be a torch.nn.Module, got function"),
    "one feature": (
        {"encode": lambda x, _: x},
        TypeError,
        r"encode must return a pair \(image features, text features\), got Tensor",
    ),
    "three features": ({"encode": lambda x, y: (x, y, x)}, TypeError, "encode must return a pair .*, got tuple of 3"),
    "no feature": ({"encode": lambda x, _: (x, None)}, TypeError, "encode must return tensors, got NoneType as text"),
    "half the rows": (
        {"encode": lambda x, y: (x, y[:1])},
        ValueError,
        r"encode must return one row per row of its inputs \(3\), got text features of shape \(1, 5\)",
    ),
    "a loss per row": ({"loss": lambda x, _: x[:, 0]}, ValueError, r"loss must return a tensor of shape \(\), got sha"),
    "a number as loss": ({"loss": lambda *_: 1.0}, TypeError, r"loss must return a tensor of shape \(\), got float"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_clear_error(case: str) -> None:
    change, error, message = BAD[case]
    arguments = {"encode": fine, "inputs": batch(), "loss": lambda x, y: (x * y).sum(), "size": 3, **change}
    with pytest.raises(error, match=f"^{message}"):
        micro_batches(arguments.pop("encode"), arguments.pop("inputs"), arguments.pop("loss"), **arguments)


def test_gradients_must_be_enabled() -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"^micro_batches must be called with gradients enabled"):
        micro_batches(fine, batch(), lambda x, y: (x * y).sum(), size=3)
