"""The estimates of ContrastiveLoss: their home, the calls that read them, and the warning about a second average."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from drrho_numpy import MemoryMappedEstimator  # noqa: E402
from drrho_torch import ContrastiveLoss, HostEstimator  # noqa: E402

from drrho_core import InnerEstimator, contrastive_step  # noqa: E402

B, D, N = 5, 4, 11
HOMES = ["device", "host", "numpy", "file"]
NEVER = -math.inf


def features(b: int = B, seed: int = 0, dtype: Any = torch.float32) -> Any:
    rows = np.random.default_rng(seed).standard_normal((b, D))
    return torch.tensor(rows / np.linalg.norm(rows, axis=-1, keepdims=True), dtype=dtype)


class Maker:
    """Builds estimators of one kind and closes their files."""

    def __init__(self, home: str, folder: Path) -> None:
        self.home, self.folder = home, folder
        self.made: list[Any] = []

    def __call__(self, n: int = N, dtype: str = "float32") -> Any:
        if self.home == "device":
            made: Any = InnerEstimator(n, like=torch.zeros(1), dtype=getattr(torch, dtype))
        elif self.home == "numpy":
            made = InnerEstimator(n, like=np.zeros(1), dtype=getattr(np, dtype))
        elif self.home == "host":
            made = HostEstimator(n, device="cpu", dtype=getattr(torch, dtype))
        else:
            made = MemoryMappedEstimator(self.folder / f"estimator-{len(self.made)}", n, dtype=dtype)
        self.made.append(made)
        return made


@pytest.fixture(params=HOMES)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Maker]:
    maker = Maker(request.param, tmp_path)
    yield maker
    for made in maker.made:
        if hasattr(made, "close"):
            made.close()


def rows_of(loss: ContrastiveLoss) -> list[list[float]]:
    """Return all rows, whatever their home."""
    if loss.estimator is None:
        return [loss.log_inner_image.tolist(), loss.log_inner_text.tolist()]
    index: Any = np.arange(loss.num_samples)
    if isinstance(getattr(loss.estimator, "log_inner_image", None), torch.Tensor):
        index = torch.asarray(index)
    return [side.tolist() for side in loss.estimator.gather(index)]


def train(loss: ContrastiveLoss, steps: int = 3, start: int = 0) -> list[Any]:
    """Take some steps on rows that overlap and return losses and gradients."""
    results = []
    for step in range(start, start + steps):
        index = torch.tensor(np.random.default_rng(step).permutation(N)[:B])
        images = features(seed=2 * step).requires_grad_()
        value = loss(images, features(seed=2 * step + 1), index)
        value.backward()
        results += [value.detach(), images.grad]
    return results


# --------------------------------------------------------------------------------------------------- estimator objects


def test_an_estimator_gives_the_losses_and_rows_of_buffers(make: Maker) -> None:
    plain = ContrastiveLoss(N, temperature=0.3, gamma=0.7)
    loss = ContrastiveLoss(N, temperature=0.3, gamma=0.7, estimator=make())
    assert loss.num_samples == N
    assert loss.log_inner_image is None
    for one, other in zip(train(loss), train(plain), strict=True):
        assert torch.equal(one, other)
    assert rows_of(loss) == rows_of(plain)
    assert sum(math.isfinite(value) for value in rows_of(loss)[0]) > B
    assert "estimator=" in repr(loss)


def test_float64_rows_give_float64_losses(make: Maker) -> None:
    loss = ContrastiveLoss(N, temperature=0.3, gamma=0.7, estimator=make(dtype="float64"))
    value = loss(features(), features(seed=1), torch.arange(B))
    assert value.dtype == torch.float64
    assert loss.eval()(features(), features(seed=1), torch.arange(B)).dtype == torch.float64


@pytest.mark.parametrize("other", ["buffers", "same"])
def test_state_dict_carries_the_table_into_another_module(make: Maker, other: str) -> None:
    loss = ContrastiveLoss(N, temperature=torch.nn.Parameter(torch.tensor(0.3)), gamma=0.7, estimator=make())
    train(loss)
    parent = torch.nn.Sequential(loss)
    if make.home == "file":
        if other == "buffers":
            assert {"0.estimator.path", "0.estimator.num_samples"} <= set(parent.state_dict())
            return
    else:
        assert list(parent.state_dict()) == ["0.temperature", "0.log_inner_image", "0.log_inner_text"]
    file = io.BytesIO()
    torch.save(parent.state_dict(), file)
    file.seek(0)
    estimator = None if other == "buffers" else make()
    target = ContrastiveLoss(N, temperature=torch.nn.Parameter(torch.tensor(0.9)), gamma=0.7, estimator=estimator)
    torch.nn.Sequential(target).load_state_dict(torch.load(file, weights_only=True))
    assert rows_of(target) == rows_of(loss)
    for one, two in zip(train(target, start=3), train(loss, start=3), strict=True):
        assert torch.equal(one, two)


def test_the_state_of_buffers_can_be_loaded_into_an_estimator(make: Maker) -> None:
    plain = ContrastiveLoss(N, temperature=0.3, gamma=0.7)
    train(plain)
    loss = ContrastiveLoss(N, temperature=0.3, gamma=0.7, estimator=make())
    loss.load_state_dict(plain.double().state_dict())
    assert rows_of(loss) == rows_of(plain.float())


def test_a_state_without_the_table_or_of_another_size_is_refused(make: Maker) -> None:
    loss = ContrastiveLoss(N, temperature=0.3, gamma=0.7, estimator=make())
    train(loss)
    before = rows_of(loss)
    with pytest.raises(RuntimeError, match="Missing key"):
        loss.load_state_dict({})
    assert loss.load_state_dict({}, strict=False).missing_keys
    with pytest.raises(ValueError, match=r"^log_inner_image must have shape \(num_samples,\) = \(11,\), got \(3,\)"):
        loss.load_state_dict(ContrastiveLoss(3, temperature=0.3).state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        loss.load_state_dict(loss.state_dict() | {"log_inner": torch.zeros(N)})
    assert rows_of(loss) == before


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_with_an_estimator_is_independent(make: Maker, how: str) -> None:
    loss = ContrastiveLoss(N, temperature=0.3, gamma=0.7, estimator=make())
    train(loss)
    if make.home == "file":
        with pytest.raises(TypeError, match=r"^a MemoryMappedEstimator must not be copied or pickled, because a file"):
            copy.deepcopy(loss)
        return
    other = copy.deepcopy(loss) if how == "deepcopy" else pickle.loads(pickle.dumps(loss))
    before = rows_of(loss)
    assert rows_of(other) == before
    results = train(other, start=3)
    assert rows_of(loss) == before != rows_of(other)
    for one, two in zip(train(loss, start=3), results, strict=True):
        assert torch.equal(one, two)


def test_a_bad_index_is_refused_before_an_estimator_changes(make: Maker) -> None:
    loss = ContrastiveLoss(N, temperature=0.3, gamma=0.7, estimator=make())
    train(loss)
    before = rows_of(loss)
    for bad in ([0, 1, 2, 3, 11], [0, 1, 2, 3, -1], [0, 1, 2, 3, 3]):
        with pytest.raises(ValueError, match=r"^sample_index must "):
            loss(features(), features(seed=1), torch.tensor(bad))
    with pytest.raises(ValueError, match=r"^image_features must be finite"):
        loss(features() * math.nan, features(seed=1), torch.arange(B))
    assert rows_of(loss) == before


def test_an_estimator_that_does_not_fit_is_refused() -> None:
    import jax.numpy as jnp

    message = r"^estimator must hold num_samples = 11 samples, got one of 3$"
    with pytest.raises(ValueError, match=message):
        ContrastiveLoss(N, temperature=0.3, estimator=HostEstimator(3, device="cpu"))
    message = r"^estimator must be None or an estimator object such as drrho_core.InnerEstimator, got "
    for bad in ("host", torch.zeros(N), HostEstimator):
        with pytest.raises(TypeError, match=message):
            ContrastiveLoss(N, temperature=0.3, estimator=bad)
    with pytest.raises(TypeError, match=r"^estimator must keep torch tensors or NumPy arrays, got InnerEstimator of "):
        ContrastiveLoss(N, temperature=0.3, estimator=InnerEstimator(N, like=jnp.zeros(1)))


def test_vmap_over_an_estimator_in_training_is_refused(make: Maker) -> None:
    loss = ContrastiveLoss(N, temperature=0.3, gamma=0.7, estimator=make())
    images = torch.stack([features(), features(seed=1)])
    with pytest.raises(RuntimeError, match=r"^ContrastiveLoss must be in eval\(\) or have mapped buffers"):
        torch.func.vmap(lambda x: loss(x, features(seed=2), torch.arange(B)))(images)
    assert rows_of(loss) == [[NEVER] * N] * 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools")
def test_a_copy_of_a_loss_compiles_to_a_step_of_its_own() -> None:
    torch._dynamo.reset()
    loss = ContrastiveLoss(N, temperature=0.3, gamma=0.7, estimator=HostEstimator(N, device="cpu"))
    twin = copy.deepcopy(loss)
    torch.compile(twin, backend="aot_eager", fullgraph=True)(features(), features(seed=1), torch.arange(B))
    assert rows_of(loss) == [[NEVER] * N] * 2
    assert rows_of(twin) != rows_of(loss)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools")
def test_a_compiled_loop_with_an_estimator_is_one_graph(make: Maker) -> None:
    torch._dynamo.reset()
    loss = ContrastiveLoss(N, temperature=0.3, gamma=0.7, estimator=make())
    plain = ContrastiveLoss(N, temperature=0.3, gamma=0.7)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for seed in (1, 2):
        images, texts = features().requires_grad_(), features(seed=seed)
        value = compiled(images, texts, torch.arange(B))
        value.backward()
        again = features().requires_grad_()
        expected = plain(again, texts, torch.arange(B))
        expected.backward()
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(images.grad, again.grad)
    assert rows_of(loss) == rows_of(plain)
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------------------- grow


@pytest.mark.parametrize("buffers", [True, False], ids=["buffers", "estimator"])
def test_grow_keeps_the_old_rows_and_makes_room(make: Maker, buffers: bool) -> None:
    loss = ContrastiveLoss(N, temperature=0.3, gamma=0.7, estimator=None if buffers else make())
    train(loss)
    before = rows_of(loss)
    assert loss.grow(N + 3) is loss
    assert loss.num_samples == N + 3
    assert rows_of(loss) == [side + [NEVER] * 3 for side in before]
    loss(features(), features(seed=1), torch.tensor([N + 2, 0, N, 3, 4]))
    assert math.isfinite(rows_of(loss)[0][N + 2])
    for bad, error in ((N, ValueError), (99.0, TypeError)):
        with pytest.raises(error, match=r"^num_samples must be "):
            loss.grow(bad)
    assert loss.num_samples == N + 3


# --------------------------------------------------------------------------------------------------------------- eval


@pytest.mark.parametrize("buffers", [True, False], ids=["buffers", "estimator"])
def test_eval_returns_the_loss_of_the_batch_and_changes_no_row(make: Maker, buffers: bool) -> None:
    loss = ContrastiveLoss(N, temperature=0.3, gamma=0.7, radius=0.1, estimator=None if buffers else make())
    train(loss)
    before = rows_of(loss)
    images = features(seed=8).requires_grad_()
    value = loss.eval()(images, features(seed=9), torch.arange(100, 100 + B))  # a validation set has rows of its own
    value.backward()
    unseen = torch.full((B,), NEVER)
    own = contrastive_step(images.detach(), features(seed=9), unseen, unseen, temperature=0.3, gamma=1.0, radius=0.1)
    assert torch.equal(value.detach(), own.loss)
    assert torch.equal(images.grad, own.image_gradient)
    assert rows_of(loss) == before
    mixed = loss.train()(images, features(seed=9), torch.arange(B))
    assert abs(float((mixed - value).detach())) > 1e-3


def test_gamma_is_1_if_it_is_not_given() -> None:
    plain, memoryless = ContrastiveLoss(N, temperature=0.3), ContrastiveLoss(N, temperature=0.3, gamma=1.0)
    assert plain.gamma == 1.0
    for one, other in zip(train(plain), train(memoryless), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(train(plain)[0], train(ContrastiveLoss(N, temperature=0.3, gamma=0.2), steps=4)[-2])


# ------------------------------------------------------------------------------------------------------ repeated rows

REPEATED = "ContrastiveLoss was called with the rows of the previous call, and no parameter has changed in between"


class Towers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = torch.nn.Linear(D, 3), torch.nn.Linear(D, 3)

    def forward(self, images: Any, texts: Any) -> tuple[Any, Any]:
        return tuple(torch.nn.functional.normalize(x) for x in (self.image(images), self.text(texts)))  # type: ignore[return-value]


def test_an_accumulation_loop_that_calls_the_loss_per_micro_batch_warns_once_and_says_where() -> None:
    towers, loss = Towers(), ContrastiveLoss(N, temperature=0.3, gamma=0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            loss(*towers(features(), features(seed=1)), torch.arange(B)).backward()
    assert len(caught) == 1
    assert str(caught[0].message).startswith(REPEATED)
    assert caught[0].filename == __file__
    assert "micro_batches" in str(caught[0].message)


UPDATES = ["optimizer", "foreach", "by hand", "other rows", "gamma 1", "eval", "no_grad", "new features", "copy"]


@pytest.mark.parametrize("between", UPDATES)
def test_rows_that_repeat_for_a_good_reason_do_not_warn(between: str) -> None:
    towers, loss = Towers(), ContrastiveLoss(N, temperature=0.3, gamma=1.0 if between == "gamma 1" else 0.5)
    optimizer = torch.optim.SGD(towers.parameters(), lr=0.1, foreach=between == "foreach")
    index = torch.arange(B)
    if between == "eval":
        loss.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            if between == "no_grad":
                with torch.no_grad():
                    loss(*towers(features(), features(seed=1)), index)
                continue
            if between == "new features":  # no encoder that could have stayed as it was
                loss(features(seed=step).requires_grad_(), features(seed=1), index).backward()
                continue
            loss(*towers(features(), features(seed=1)), index).backward()
            if between in ("optimizer", "foreach"):
                optimizer.step()
            elif between == "by hand":
                with torch.no_grad():
                    for parameter in towers.parameters():
                        parameter -= 0.1 * parameter.grad
            elif between == "other rows":
                index += 1  # the loader's buffer, refilled
            elif between == "copy":
                loss = copy.deepcopy(loss)


def test_a_loop_with_a_frozen_tower_is_warned_too() -> None:
    towers, loss = Towers(), ContrastiveLoss(N, temperature=0.3, gamma=0.5)
    towers.image.requires_grad_(False)
    loss(*towers(features(), features(seed=1)), torch.arange(B)).backward()
    with pytest.warns(UserWarning, match=REPEATED):
        loss(*towers(features(), features(seed=1)), torch.arange(B)).backward()


def test_a_warning_that_is_an_error_leaves_the_state_unchanged() -> None:
    towers, loss = Towers(), ContrastiveLoss(N, temperature=0.3, gamma=0.5)
    loss(*towers(features(), features(seed=1)), torch.arange(B)).backward()
    before = loss.log_inner_image.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=REPEATED):
            loss(*towers(features(), features(seed=2)), torch.arange(B))
    assert torch.equal(loss.log_inner_image, before)


def test_mapped_buffers_do_not_warn() -> None:
    loss = ContrastiveLoss(N, temperature=0.3, gamma=0.5)
    buffers = {name: torch.stack([value] * 2) for name, value in loss.named_buffers()}
    images = torch.stack([features(), features(seed=2)]).requires_grad_()

    def call(buffers: Any, images: Any) -> Any:
        return torch.func.functional_call(loss, buffers, (images, features(seed=1), torch.arange(B)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            torch.func.vmap(call)(buffers, images).sum().backward()


def test_an_optimizer_of_other_parameters_than_the_first_counts_as_a_change() -> None:
    towers, loss = Towers(), ContrastiveLoss(N, temperature=0.3, gamma=0.5)
    optimizer = torch.optim.Adam([towers.image.weight], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            loss(*towers(features(), features(seed=1)), torch.arange(B)).backward()
            optimizer.step()


# ------------------------------------------------------------------------------------------------- anchor weights


def test_anchor_weights_reach_the_core_as_constants() -> None:
    generator = np.random.default_rng(3)
    weights = [torch.tensor(generator.uniform(0.0, 2.0, B), dtype=torch.float32, requires_grad=True) for _ in range(2)]
    for given in (weights[0], tuple(weights)):
        plain = ContrastiveLoss(N, temperature=0.3, gamma=0.7)
        loss = ContrastiveLoss(N, temperature=0.3, gamma=0.7)
        images = features().requires_grad_()
        value = loss(images, features(seed=1), torch.arange(B), anchor_weight=given)
        value.backward()
        unseen = torch.full((B,), NEVER)
        pair = tuple(w.detach() for w in given) if isinstance(given, tuple) else given.detach()
        step = contrastive_step(
            images.detach(), features(seed=1), unseen, unseen, temperature=0.3, gamma=0.7, anchor_weight=pair
        )
        assert torch.equal(value.detach(), step.loss)
        assert torch.equal(images.grad, step.image_gradient)
        assert weights[0].grad is None
        plain(features(), features(seed=1), torch.arange(B))
        assert rows_of(loss) == rows_of(plain)


# ---------------------------------------------------------------------------------------------- types beside each other


@pytest.mark.parametrize("reference", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [torch.float32, torch.float16, torch.bfloat16])
def test_references_of_another_floating_type_are_promoted(own: Any, reference: Any) -> None:
    images, texts = (features(seed=seed).to(own).requires_grad_() for seed in (0, 1))
    references = tuple(features(seed=seed).to(reference) for seed in (2, 3))
    value = ContrastiveLoss(N, temperature=0.3)(images, texts, torch.arange(B), reference_features=references)
    value.backward()
    wide = [x.detach().double() for x in (images, texts, *references)]
    unseen = torch.full((B,), NEVER, dtype=torch.float64)
    exact = contrastive_step(*wide[:2], unseen, unseen, temperature=0.3, reference_features=(wide[2], wide[3]))
    assert abs(float(value.detach()) - float(exact.loss)) <= 1e-5
    assert images.grad.dtype == own
    assert float((images.grad.double() - exact.image_gradient).abs().max()) <= 2 * torch.finfo(own).eps


def test_the_core_accepts_parameters_under_no_grad() -> None:
    images, texts = features().requires_grad_(), features(seed=1).requires_grad_()
    unseen = torch.full((B,), NEVER)
    with torch.no_grad():
        step = contrastive_step(images, texts, unseen, unseen, temperature=torch.nn.Parameter(torch.tensor(0.3)))
    expected = contrastive_step(images.detach(), texts.detach(), unseen, unseen, temperature=torch.tensor(0.3))
    assert torch.equal(step.image_gradient, expected.image_gradient)
    assert not step.loss.requires_grad
    with pytest.raises(ValueError, match=r"^image_features must not require gradients"):
        contrastive_step(images, texts, unseen, unseen, temperature=0.3)


@pytest.mark.parametrize("option", ["temperature", "eps", "radius", "reference_weight"])
@pytest.mark.parametrize("value", [float("1e400"), 10**400, 1e39])
def test_a_number_too_large_for_its_type_is_a_value_error(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{option} must "):
        ContrastiveLoss(N, **{"temperature": 0.3, option: value})(
            features(), features(seed=1), torch.arange(B), reference_features=(features(seed=2), features(seed=3))
        )
