"""drrho_torch under torch.func and torch.compile: the same numbers, the same state, or one clear sentence."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from drrho_torch import ContrastiveLoss, drrho_risk  # noqa: E402
from torch.func import functional_call, grad, jacrev, vjp, vmap  # noqa: E402

from drrho_core import (  # noqa: E402
    CappedKLPenalty,
    ChiSquareBall,
    ChiSquarePenalty,
    CressieReadBall,
    CVaR,
    KLBall,
    KLPenalty,
)

B, D, N = 5, 4, 11
INDEX = [7, 0, 10, 4, 2]
SETS = [CVaR(0.35), KLPenalty(0.7), KLBall(0.2), ChiSquarePenalty(0.8), ChiSquareBall(0.3), CressieReadBall(3.0, 0.2)]
SETS += [CappedKLPenalty(0.6, 0.4)]


def features(*shape: int, seed: int = 0) -> Any:
    rows = np.random.default_rng(seed).standard_normal((*shape, D))
    return torch.tensor(rows / np.linalg.norm(rows, axis=-1, keepdims=True))


def module(**options: Any) -> ContrastiveLoss:
    """A loss in float64 whose state remembers all samples but three."""
    loss = ContrastiveLoss(N, **{"temperature": 0.3, "gamma": 0.7, "radius": 0.2, **options}).double()
    states = np.random.default_rng(5).normal(-1.0, 1.5, (2, N))
    states[:, [0, 2, 5]] = -np.inf
    loss.log_inner_image.copy_(torch.tensor(states[0]))
    loss.log_inner_text.copy_(torch.tensor(states[1]))
    return loss


def state(loss: ContrastiveLoss) -> Any:
    return torch.stack([loss.log_inner_image, loss.log_inner_text])


# ------------------------------------------------------------------------------------------------------- torch.func


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "grad of functional_call"])
def test_a_transformed_loss_gives_the_gradient_and_the_state_of_an_eager_call(transform: str) -> None:
    images, texts, index = features(B), features(B, seed=1), torch.tensor(INDEX)
    eager = module(temperature=torch.nn.Parameter(torch.tensor(0.3)))
    leaves = [x.clone().requires_grad_() for x in (images, texts)]
    value = eager(*leaves, index)
    value.backward()
    expected = [leaves[0].grad, leaves[1].grad, eager.temperature.grad]

    loss = module(temperature=torch.nn.Parameter(torch.tensor(0.3)))
    parameters = {name: value.detach() for name, value in loss.named_parameters()}
    buffers = dict(loss.named_buffers())

    def function(images: Any, texts: Any, parameters: Any) -> Any:
        return functional_call(loss, (parameters, buffers), (images, texts, index))

    if transform == "grad":
        got = [*grad(lambda x, y: loss(x, y, index), argnums=(0, 1))(images, texts), None]
    elif transform == "vjp":
        output, pull_back = vjp(function, images, texts, parameters)
        assert torch.equal(output, value.detach())
        of = pull_back(3 * torch.ones_like(output))
        got = [gradient / 3 for gradient in (of[0], of[1], of[2]["temperature"])]
    elif transform == "jacrev":
        got = [*jacrev(function, argnums=(0, 1))(images, texts, parameters), None]
    else:
        of = grad(function, argnums=(0, 1, 2))(images, texts, parameters)
        got = [of[0], of[1], of[2]["temperature"]]
    for one, other in zip(got, expected, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-14, atol=0)
    assert torch.equal(state(loss), state(eager))
    assert not torch.equal(state(loss), state(module()))


def test_a_learned_temperature_per_anchor_goes_through_grad() -> None:
    images, texts, index = features(B), features(B, seed=1), torch.tensor(INDEX)
    pair = torch.tensor(np.random.default_rng(1).uniform(0.2, 0.8, (2, B)))
    leaf = pair.clone().requires_grad_()
    module()(images, texts, index, temperature=(leaf[0], leaf[1])).backward()
    got = grad(lambda t: module()(images, texts, index, temperature=(t[0], t[1])))(pair)
    torch.testing.assert_close(got, leaf.grad, rtol=1e-14, atol=0)


def test_a_second_derivative_is_refused_under_torch_func() -> None:
    images, texts, index = features(B), features(B, seed=1), torch.tensor(INDEX)
    once = grad(lambda x: module()(x, texts, index))
    with pytest.raises(RuntimeError, match=r"^the contrastive loss and .* must be differentiated once only"):
        grad(lambda x: once(x).square().sum())(images)
    risk = grad(lambda x: drrho_risk(x, torch.zeros(4), KLPenalty(0.5)))
    with pytest.raises(RuntimeError, match=r"^the contrastive loss and .* must be differentiated once only"):
        grad(lambda x: risk(x).square().sum())(torch.arange(4.0))


def test_vmap_in_eval_gives_each_batch_its_own_loss() -> None:
    images, texts = features(3, B), features(3, B, seed=1)
    index = torch.arange(B)
    loss = module().eval()
    before = state(loss).clone()
    got = vmap(lambda x, y: loss(x, y, index))(images, texts)
    expected = torch.stack([loss(x, y, index) for x, y in zip(images, texts, strict=True)])
    assert torch.equal(got, expected)
    per_batch = vmap(grad(lambda x, y: loss(x, y, index)))(images, texts)
    leaf = images.clone().requires_grad_()
    sum(loss(x, y, index) for x, y in zip(leaf, texts, strict=True)).backward()
    torch.testing.assert_close(per_batch, leaf.grad, rtol=1e-14, atol=0)
    whole = grad(lambda x: vmap(lambda a, b: loss(a, b, index))(x, texts).sum())(images)
    torch.testing.assert_close(whole, leaf.grad, rtol=1e-14, atol=0)
    assert torch.equal(state(loss), before)


def test_vmap_with_mapped_buffers_updates_one_state_per_batch() -> None:
    images, texts, index = features(3, B), features(3, B, seed=1), torch.tensor(INDEX)
    loss = module()
    tables = {name: torch.stack([buffer] * 3) for name, buffer in loss.named_buffers()}

    def function(buffers: Any, x: Any, y: Any) -> Any:
        return functional_call(loss, buffers, (x, y, index))

    got = vmap(function)(tables, images, texts)
    for row in range(3):
        one = module()
        assert torch.equal(got[row], one(images[row], texts[row], index))
        assert torch.equal(torch.stack([tables["log_inner_image"][row], tables["log_inner_text"][row]]), state(one))
    assert torch.equal(state(loss), state(module()))


def test_vmap_in_training_says_what_it_needs_and_changes_nothing() -> None:
    images, texts, index = features(3, B), features(3, B, seed=1), torch.tensor(INDEX)
    loss = module()
    with pytest.raises(RuntimeError, match=r"^ContrastiveLoss must be in eval\(\) or have mapped buffers under"):
        vmap(lambda x, y: loss(x, y, index))(images, texts)
    assert torch.equal(state(loss), state(module()))


@pytest.mark.parametrize("ambiguity_set", SETS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("axis", [0, -1])
def test_the_risk_goes_through_grad_vjp_jacrev_and_vmap(ambiguity_set: Any, axis: int) -> None:
    generator = np.random.default_rng(0)
    loss, reference = (torch.tensor(generator.normal(1.0, 2.0, (2, 3, 7))) for _ in range(2))

    def risk(x: Any, r: Any) -> Any:
        return drrho_risk(x, r, ambiguity_set, reference_weight=0.8, axis=axis)

    leaf = loss[0].clone().requires_grad_()
    value = risk(leaf, reference[0])
    weights = torch.arange(1.0, 1.0 + value.numel(), dtype=torch.float64)
    (value @ weights).backward()
    torch.testing.assert_close(grad(lambda x: risk(x, reference[0]) @ weights)(loss[0]), leaf.grad, rtol=1e-14, atol=0)
    output, pull_back = vjp(lambda x: risk(x, reference[0]), loss[0])
    assert torch.equal(output, value.detach())
    torch.testing.assert_close(pull_back(weights)[0], leaf.grad, rtol=1e-14, atol=0)
    jacobian = jacrev(lambda x: risk(x, reference[0]))(loss[0])
    torch.testing.assert_close(torch.einsum("i,ijk->jk", weights, jacobian), leaf.grad, rtol=1e-14, atol=1e-17)
    # The batch axis of the losses is the last one here, and the references are shared or not.
    moved = vmap(risk, in_dims=(-1, 0))(loss.movedim(0, -1), reference)
    torch.testing.assert_close(moved, torch.stack([risk(*pair) for pair in zip(loss, reference, strict=True)]))
    shared = vmap(risk, in_dims=(0, None))(loss, reference[1])
    torch.testing.assert_close(shared, torch.stack([risk(x, reference[1]) for x in loss]))
    each = vmap(grad(lambda x, r: risk(x, r) @ weights))(loss, reference)
    torch.testing.assert_close(each[0], leaf.grad)


def test_the_risk_maps_its_mask_and_its_weight() -> None:
    generator = np.random.default_rng(0)
    loss, reference = (torch.tensor(generator.normal(1.0, 2.0, (4, 3, 7))) for _ in range(2))
    where = torch.tensor(generator.random((4, 7)) < 0.6)
    where[:, 0] = True
    weight = torch.tensor([0.0, 0.5, 1.0, 1.5], dtype=torch.float64)

    def risk(x: Any, r: Any, mask: Any, w: Any) -> Any:
        return drrho_risk(x, r, CVaR(0.4), where=mask, reference_weight=w)

    expected = torch.stack([risk(*row) for row in zip(loss, reference, where, weight, strict=True)])
    torch.testing.assert_close(vmap(risk)(loss, reference, where, weight), expected)
    one = torch.stack([risk(*row, 0.5) for row in zip(loss, reference, where, strict=True)])
    torch.testing.assert_close(vmap(lambda *row: risk(*row, 0.5))(loss, reference, where), one)


# ----------------------------------------------------------------------------------------------------- torch.compile


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiles(test: Any) -> Any:
    """Let two warnings of the compiler about itself and about array_api_compat's cached question about types pass."""
    for message in ("<class 'torch.autograd.function.Function'> should not", "Dynamo detected a call to a `functools"):
        test = pytest.mark.filterwarnings(f"ignore:{message}")(test)
    return pytest.mark.slow(pytest.mark.usefixtures("fresh_compiler")(test))


@compiles
@pytest.mark.parametrize("asks", [True, False], ids=["gradient", "no gradient"])
def test_a_loss_compiled_with_dynamic_shapes_is_the_eager_one(asks: bool) -> None:
    results = []
    for compiled in (False, True):
        loss = module(eps=0.1, reference_weight=0.7)
        call = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager") if compiled else loss
        for b in (5, 6, 8):
            images, texts = features(b, seed=b).requires_grad_(asks), features(b, seed=b + 1)
            value = call(images, texts, torch.arange(b), reference_features=(texts, images.detach()))
            if asks:
                value.backward()
            results.append([value, images.grad if asks else value, state(loss).clone()])
    for eager, other in zip(results[:3], results[3:], strict=True):
        for one, two in zip(eager, other, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-13, atol=1e-15)


@compiles
@pytest.mark.parametrize("asks", [True, False], ids=["gradient", "no gradient"])
@pytest.mark.parametrize("ambiguity_set", SETS, ids=lambda s: type(s).__name__)
def test_a_risk_compiled_with_dynamic_shapes_is_the_eager_one(ambiguity_set: Any, asks: bool) -> None:
    call = torch.compile(
        lambda x, r: drrho_risk(x, r, ambiguity_set), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for n in (5, 6, 8):
        values = torch.tensor(np.random.default_rng(n).normal(size=(2, n)))
        eager, other = (values[0].clone().requires_grad_(asks) for _ in range(2))
        expected, got = drrho_risk(eager, values[1], ambiguity_set), call(other, values[1])
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)
        if asks:
            expected.backward()
            got.backward()
            torch.testing.assert_close(other.grad, eager.grad, rtol=1e-13, atol=1e-15)


@compiles
@pytest.mark.parametrize("bad", [[7, 0, 11, 4, 2], [7, 0, -1, 4, 2], [7, 0, 10, 4, 2**40]], ids=["n", "-1", "huge"])
def test_a_compiled_call_with_an_index_out_of_range_is_nan_and_changes_no_state(bad: list[int]) -> None:
    loss = module()
    call = torch.compile(loss, fullgraph=True, backend="aot_eager")
    images = features(B).requires_grad_()
    before = state(loss).clone()
    value = call(images, features(B, seed=1), torch.tensor(bad))
    value.backward()
    assert math.isnan(value.detach())
    assert torch.isnan(images.grad).all()
    assert torch.equal(state(loss), before)
    again = features(B).requires_grad_()
    good = call(again, features(B, seed=1), torch.tensor(INDEX))
    assert torch.equal(good, module()(again, features(B, seed=1), torch.tensor(INDEX)))
    assert not torch.equal(state(loss), before)


# ------------------------------------------------------------------------------------- temperature, copies and pickles


def test_a_computed_temperature_is_refused_when_the_module_is_built() -> None:
    logit_scale = torch.nn.Parameter(torch.tensor(2.6593))
    message = r"^temperature must be a number, a Parameter or a tensor without history, got one that was computed; pass"
    with pytest.raises(ValueError, match=message):
        ContrastiveLoss(N, temperature=(-logit_scale).exp())
    loss = ContrastiveLoss(N, temperature=(-logit_scale).exp().detach())
    loss(features(B), features(B, seed=1), torch.tensor(INDEX), temperature=(-logit_scale).exp()).backward()
    assert logit_scale.grad is not None


def inference_tensor() -> Any:
    with torch.inference_mode():
        return torch.tensor(0.3)


TEMPERATURES: dict[str, Callable[[], Any]] = {
    "number": lambda: 0.3,
    "NumPy number": lambda: np.float32(0.3),
    "Parameter": lambda: torch.nn.Parameter(torch.tensor(0.3)),
    "tensor": lambda: torch.tensor(0.3),
    "tensor that asks for a gradient": lambda: torch.tensor(0.3, requires_grad=True),
    "detached": lambda: torch.nn.Parameter(torch.tensor(0.3)).detach(),
    "inference tensor": inference_tensor,
}


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("kind", list(TEMPERATURES))
def test_every_accepted_temperature_can_be_copied_and_trained(kind: str, how: str) -> None:
    loss = ContrastiveLoss(N, temperature=TEMPERATURES[kind](), gamma=0.7)
    arguments = features(B).float(), features(B, seed=1).float(), torch.tensor(INDEX)
    leaf = arguments[0].clone().requires_grad_()
    loss(leaf, *arguments[1:]).backward()
    if how == "deepcopy":
        other = copy.deepcopy(loss)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(loss))
    else:
        file = io.BytesIO()
        torch.save(loss, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(state(other), state(loss))
    again = features(B, seed=2).float()
    results = []
    for one in (loss, other):
        leaf = again.clone().requires_grad_()
        value = one(leaf, *arguments[1:])
        value.backward()
        results.append((value.detach(), leaf.grad, state(one)))
    for mine, copied in zip(*results, strict=True):
        assert torch.equal(mine, copied)
    for module, source in ((loss, other), (other, loss)):
        module.load_state_dict(source.state_dict())
    if isinstance(other.temperature, torch.nn.Parameter):
        torch.optim.SGD(other.parameters(), lr=0.01).step()


def test_a_module_built_in_inference_mode_trains_outside() -> None:
    with torch.inference_mode():
        loss = ContrastiveLoss(N, temperature=torch.tensor(0.3), gamma=0.7)
    images = features(B).float().requires_grad_()
    loss(images, features(B, seed=1).float(), torch.tensor(INDEX)).backward()
    loss.gamma = 0.5
    assert images.grad is not None
    with torch.inference_mode():
        loss.grow(N + 1)
    loss(images, features(B, seed=2).float(), torch.tensor([N, *INDEX[1:]])).backward()
    assert math.isfinite(loss.log_inner_text[N])
    assert torch.isfinite(state(loss)[:, INDEX]).all()
