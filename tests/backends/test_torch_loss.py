"""drrho_torch.ContrastiveLoss and drrho_torch.drrho_risk against autograd of the formulas, written out again here."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from drrho_torch import ContrastiveLoss, drrho_risk  # noqa: E402

from drrho_core import ChiSquareBall, CVaR, KLBall, KLPenalty, contrastive_step  # noqa: E402

B, D, R, N = 5, 4, 3, 11
INDEX = [7, 0, 10, 4, 2]
UNIT = {torch.float64: 1e-12, torch.float32: 5e-6}


def unit_rows(generator: np.random.Generator, *shape: int) -> np.ndarray:
    rows = generator.standard_normal(shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@dataclass
class Problem:
    """One asymmetric batch; two of its five samples were never visited."""

    images: Any
    texts: Any
    references: tuple[Any, Any]
    log_inner: tuple[Any, Any]  # (n,) each
    pair_mask: Any
    index: Any

    @classmethod
    def draw(cls, dtype: Any = torch.float64, seed: int = 0) -> Problem:
        generator = np.random.default_rng(seed)
        tensor = lambda values: torch.tensor(values, dtype=dtype)  # noqa: E731
        images, texts = unit_rows(generator, 2, B, D)
        references = unit_rows(generator, 2, B, R)
        states = generator.normal(-1.0, 1.5, (2, N))
        states[:, [0, 2, 5]] = -np.inf
        pair_mask = generator.random((B, B)) > 0.3
        pair_mask[3, :] = False  # an image without negatives
        return cls(
            tensor(images),
            tensor(texts),
            (tensor(references[0]), tensor(references[1])),
            (torch.tensor(states[0], dtype=dtype), torch.tensor(states[1], dtype=dtype)),
            torch.tensor(pair_mask),
            torch.tensor(INDEX),
        )

    def module(self, **options: Any) -> ContrastiveLoss:
        """The module, its state set to this problem's."""
        loss = ContrastiveLoss(N, **{"temperature": 0.3, "gamma": 0.7, **options})
        loss = loss.to(self.log_inner[0].dtype)
        loss.log_inner_image.copy_(self.log_inner[0])
        loss.log_inner_text.copy_(self.log_inner[1])
        return loss


@dataclass
class Written:
    """Section by section what the formulas say, in the linear domain: torch's autograd does the rest."""

    surrogate: Any
    log_inner: list[Any]
    value: float
    scale: float  # max |c_i| / 2b, the size of what a feature gradient sums up


def written_out(
    images: Any,
    texts: Any,
    temperature: Any,
    log_inner: tuple[Any, Any],
    *,
    gamma: float,
    eps: float = 0.0,
    radius: float = 0.0,
    references: tuple[Any, Any] | None = None,
    weight: float = 1.0,
    pair_mask: Any = None,
) -> Written:
    b = images.shape[0]
    z = images @ texts.T
    if references is not None:
        z = z - weight * references[0] @ references[1].T
    negatives = ~torch.eye(b, dtype=torch.bool)
    if pair_mask is not None:
        negatives = negatives & pair_mask
    loss = surrogate = torch.zeros((), dtype=images.dtype)
    new, positive_weight = [], torch.zeros(b, dtype=images.dtype)
    for logits, of_these, log_u in ((z, negatives, log_inner[0]), (z.T, negatives.T, log_inner[1])):
        count = of_these.sum(1)
        d = (logits - logits.diagonal()[:, None]) / temperature
        g = (d.exp() * of_these).sum(1) / count.clamp(min=1)
        active = count > 0
        old = log_u.exp()
        u = torch.where(old == 0, g, (1 - gamma) * old + gamma * g)
        new.append(torch.where(active, u.log(), log_u).detach())
        frozen = u.detach()
        temperature_alone = temperature.detach() if isinstance(temperature, torch.Tensor) else temperature
        value = torch.where(active, (eps + frozen).log() + radius, 0.0)
        fresh = torch.where(active, g / (eps + frozen), 0.0)
        loss = loss + (temperature * value).sum() / (2 * b)
        surrogate = surrogate + (temperature * value + temperature_alone * fresh).sum() / (2 * b)
        w = d.exp() * of_these / ((eps + frozen) * count.clamp(min=1))[:, None]
        positive_weight = positive_weight + torch.nan_to_num(w).sum(1).detach()
    return Written(surrogate, new, float(loss.detach()), float(positive_weight.abs().max()) / (2 * b))


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "memoryless": {"gamma": 1.0},
    "cold": {"temperature": 0.02},
    "eps": {"eps": 0.25},
    "radius": {"radius": 0.8},
    "reference": {"reference": True},
    "reference weight": {"reference": True, "reference_weight": 1.5},
    "pair mask": {"mask": True, "radius": 0.3},
    "everything": {"reference": True, "reference_weight": 0.4, "eps": 0.1, "radius": 0.2, "mask": True, "gamma": 0.2},
    "tiles": {"tile_size": 2, "reference": True},
    "no budget": {"memory_budget": 0},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", list(CASES))
def test_gradient_is_autograd_of_the_surrogate(case: str, dtype: Any) -> None:
    options = dict(CASES[case])
    problem = Problem.draw(dtype)
    references = problem.references if options.pop("reference", False) else None
    pair_mask = problem.pair_mask if options.pop("mask", False) else None
    temperature = torch.nn.Parameter(torch.tensor(options.pop("temperature", 0.3), dtype=dtype))
    module = problem.module(temperature=temperature, **options)
    images, texts = problem.images.clone().requires_grad_(), problem.texts.clone().requires_grad_()
    loss = module(images, texts, problem.index, reference_features=references, pair_mask=pair_mask)
    (3.0 * loss).backward()

    wide = [x.detach().double().requires_grad_() for x in (problem.images, problem.texts, temperature)]
    expected = written_out(
        *wide,
        tuple(state[problem.index].double() for state in problem.log_inner),
        gamma=options.get("gamma", 0.7),
        eps=options.get("eps", 0.0),
        radius=options.get("radius", 0.0),
        references=None if references is None else tuple(x.double() for x in references),
        weight=options.get("reference_weight", 1.0),
        pair_mask=pair_mask,
    )
    gradients = torch.autograd.grad(expected.surrogate, wide)
    tau = float(temperature.detach())
    unit = max(1.0, 0.1 / tau) * UNIT[dtype]
    assert loss.dtype == dtype
    assert loss.shape == ()
    assert abs(float(loss.detach()) - expected.value) <= unit * max(abs(expected.value), tau)
    for x, gradient in ((images, gradients[0]), (texts, gradients[1])):
        assert x.grad.dtype == dtype
        assert float((x.grad.double() - 3.0 * gradient).abs().max()) <= 3.0 * unit * expected.scale
    # The terms of its sum are of the size of |log u| + sum w |D|, where each D is at most 4 / temperature.
    size = 3.0 * max(1.0, abs(expected.value) / tau, 4 / tau * 2 * expected.scale)
    assert abs(float(temperature.grad) - 3.0 * float(gradients[2])) <= unit * size
    for name, rows, old in zip(("image", "text"), expected.log_inner, problem.log_inner, strict=True):
        state = getattr(module, f"log_inner_{name}")
        whole = old.double()
        whole[problem.index] = rows
        seen = whole > -math.inf
        assert torch.equal(state > -math.inf, seen)
        error = (state.double() - whole)[seen].abs() / whole[seen].abs().clamp(min=1.0)
        assert float(error.max()) <= unit


@pytest.mark.parametrize("visited", [False, True], ids=["first visit", "revisit"])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "reference, mask, eps, radius"])
def test_gradcheck_without_memory(visited: bool, extras: bool) -> None:
    problem = Problem.draw()
    module = problem.module(
        temperature=torch.tensor(0.3, dtype=torch.float64, requires_grad=True),
        gamma=1.0,
        **({"eps": 0.1, "radius": 0.3, "reference_weight": 0.7} if extras else {}),
    )
    index = problem.index if visited else torch.tensor([0, 2, 5])
    rows = slice(0, len(index))
    module.eval()  # gradcheck calls it often

    def function(images: Any, texts: Any, temperature: Any) -> Any:
        module.temperature = temperature
        return module(
            images,
            texts,
            index,
            reference_features=tuple(x[rows] for x in problem.references) if extras else None,
            pair_mask=problem.pair_mask[rows, rows] if extras else None,
        )

    inputs = [x[rows].clone().requires_grad_() for x in (problem.images, problem.texts)]
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (*inputs, temperature), eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "reference, mask, eps, radius"])
def test_gradcheck_of_a_temperature_per_anchor(extras: bool) -> None:
    problem = Problem.draw()
    options = {"eps": 0.1, "radius": 0.3, "reference_weight": 0.7} if extras else {}
    module = problem.module(temperature=0.9, gamma=1.0, **options).eval()

    def function(images: Any, texts: Any, image_table: Any, text_table: Any) -> Any:
        return module(
            images,
            texts,
            problem.index,
            reference_features=problem.references if extras else None,
            pair_mask=problem.pair_mask if extras else None,
            temperature=(image_table[problem.index], text_table[problem.index]),
        )

    tables = torch.tensor(np.random.default_rng(1).uniform(0.2, 0.8, (2, N)))
    inputs = [x.clone().requires_grad_() for x in (problem.images, problem.texts, *tables)]
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-8, rtol=1e-6)


def test_the_whole_data_set_without_memory_is_the_objective() -> None:
    problem = Problem.draw()
    weight, radius = 0.8, 0.4
    module = ContrastiveLoss(
        B, temperature=torch.nn.Parameter(torch.tensor(0.2).double()), gamma=1.0, radius=radius, reference_weight=weight
    ).double()
    leaves = [x.clone().requires_grad_() for x in (problem.images, problem.texts)]
    loss = module(*leaves, torch.arange(B), reference_features=problem.references)
    loss.backward()

    images, texts, t = (x.detach().clone().requires_grad_() for x in (*leaves, module.temperature))
    z = images @ texts.T - weight * problem.references[0] @ problem.references[1].T
    objective = torch.zeros((), dtype=torch.float64)
    for i in range(B):
        others = [j for j in range(B) if j != i]
        f = t * torch.log(sum(torch.exp((z[i, j] - z[i, i]) / t) for j in others) / (B - 1))
        g = t * torch.log(sum(torch.exp((z[j, i] - z[i, i]) / t) for j in others) / (B - 1))
        objective = objective + (f + g + radius * (t + t)) / (2 * B)
    expected = torch.autograd.grad(objective, (images, texts, t))
    assert abs(float((loss - objective).detach())) <= 1e-12 * max(abs(float(objective.detach())), 0.2)
    scale = 2 / (2 * B)  # the weights of an anchor sum to one
    for leaf, gradient in zip(leaves, expected[:2], strict=True):
        assert float((leaf.grad - gradient).abs().max()) <= 1e-12 * scale
    assert float(module.temperature.grad) == pytest.approx(float(expected[2]), rel=1e-12)


@pytest.mark.parametrize("tau", [0.5, 0.05])
def test_infonce_with_its_eps(tau: float) -> None:
    problem = Problem.draw()
    temperature = torch.nn.Parameter(torch.tensor(tau, dtype=torch.float64))
    module = problem.module(temperature=temperature, gamma=1.0, eps=1 / (B - 1))
    leaves = [x.clone().requires_grad_() for x in (problem.images, problem.texts)]
    loss = module(*leaves, problem.index)
    loss.backward()

    images, texts, t = (x.detach().clone().requires_grad_() for x in (*leaves, temperature))
    logits, labels = images @ texts.T / t, torch.arange(B)
    cross_entropy = torch.nn.functional.cross_entropy
    infonce = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    expected_loss = t * (infonce - math.log(B - 1))
    expected = torch.autograd.grad(expected_loss, (images, texts, t))
    unit = 1e-12 * max(1.0, 0.1 / tau)
    assert abs(float((loss - expected_loss).detach())) <= unit * max(abs(float(expected_loss.detach())), tau)
    for leaf, gradient in zip(leaves, expected[:2], strict=True):
        assert float((leaf.grad - gradient).abs().max()) <= unit * 2 / (2 * B)
    assert abs(float(temperature.grad - expected[2])) <= unit * 2 / tau


def test_the_incoming_gradient_multiplies() -> None:
    problem = Problem.draw()
    gradients = []
    for factor in (1.0, -2.5):
        images = problem.images.clone().requires_grad_()
        (factor * problem.module()(images, problem.texts, problem.index)).backward()
        gradients.append(images.grad)
    torch.testing.assert_close(gradients[1], -2.5 * gradients[0], rtol=1e-14, atol=0)


def test_one_tensor_in_both_roles() -> None:
    problem = Problem.draw()
    apart = [problem.images.clone().requires_grad_() for _ in range(2)]
    problem.module()(*apart, problem.index).backward()
    together = problem.images.clone().requires_grad_()
    problem.module()(together, together, problem.index).backward()
    torch.testing.assert_close(together.grad, apart[0].grad + apart[1].grad, rtol=1e-14, atol=1e-16)


def test_references_are_constants() -> None:
    problem = Problem.draw()
    references = tuple(x.clone().requires_grad_() for x in problem.references)
    images = problem.images.clone().requires_grad_()
    problem.module()(images, problem.texts, problem.index, reference_features=references).backward()
    assert images.grad is not None
    assert references[0].grad is None


# -------------------------------------------------------------------------------------------------------- temperature


def test_a_number_is_constant_and_in_no_state() -> None:
    module = ContrastiveLoss(N, temperature=0.1, gamma=1.0)
    assert list(module.parameters()) == []
    assert list(module.state_dict()) == ["log_inner_image", "log_inner_text"]


def test_a_parameter_is_registered_and_learned() -> None:
    temperature = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    problem = Problem.draw()
    module = problem.module(temperature=temperature)
    assert dict(module.named_parameters())["temperature"] is temperature
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(problem.images, problem.texts, problem.index).backward()
    optimizer.step()
    assert float(temperature.detach()) != 0.3
    assert float(module.state_dict()["temperature"]) == float(temperature.detach())


def test_a_tensor_is_a_buffer_and_gets_its_gradient() -> None:
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    problem = Problem.draw()
    module = problem.module(temperature=temperature)
    assert list(module.parameters()) == []
    assert "temperature" in module.state_dict()
    module(problem.images, problem.texts, problem.index).backward()
    assert temperature.grad is not None
    assert temperature.grad.dtype == torch.float64


def test_a_call_may_bring_its_own_temperature() -> None:
    """A number, a tensor or a pair, in place of the module's: the same loss as of a module that was built with it."""
    problem = Problem.draw()
    own = torch.nn.Parameter(torch.tensor(0.9, dtype=torch.float64))
    for given, same in ((0.3, 0.3), (torch.tensor(0.3), 0.3), ([torch.full((B,), 0.3)] * 2, 0.3), (None, 0.9)):
        results = []
        for module, options in (
            (problem.module(temperature=own, radius=0.5), {"temperature": given}),
            (problem.module(temperature=same, radius=0.5), {}),
        ):
            images = problem.images.clone().requires_grad_()
            loss = module(images, problem.texts, problem.index, **options)
            loss.backward()
            results.append([loss.detach(), images.grad, module.log_inner_image, module.log_inner_text])
        for one, other in zip(*results, strict=True):
            # The tensors are float32: 0.3 is another number there.
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        assert (own.grad is not None) == (given is None)  # the module's own was used where nothing was given


def test_temperatures_of_their_own_get_the_closed_form() -> None:
    """What arrives at the tables of all samples is `contrastive_step`'s gradient, in the batch's rows only."""
    problem = Problem.draw()
    tables = torch.tensor(np.random.default_rng(1).uniform(0.2, 0.8, (2, N)), requires_grad=True)
    module = problem.module(radius=0.4, temperature=0.9)
    rows = tables[:, problem.index]
    (3.0 * module(problem.images, problem.texts, problem.index, temperature=(rows[0], rows[1]))).backward()
    step = contrastive_step(
        problem.images,
        problem.texts,
        *(state[problem.index] for state in problem.log_inner),
        temperature=tuple(rows.detach()),
        gamma=0.7,
        radius=0.4,
    )
    expected = torch.zeros_like(tables)
    expected[:, problem.index] = 3.0 * torch.stack(list(step.temperature_gradient))
    torch.testing.assert_close(tables.grad, expected, rtol=1e-14, atol=0)
    assert torch.count_nonzero(expected) == 2 * B


def test_one_table_for_both_sides() -> None:
    problem = Problem.draw()
    module = problem.module(radius=0.4)
    table = torch.full((B,), 0.3, dtype=torch.float64, requires_grad=True)
    module(problem.images, problem.texts, problem.index, temperature=(table, table)).backward()
    sides = [torch.full((B,), 0.3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    problem.module(radius=0.4)(problem.images, problem.texts, problem.index, temperature=sides).backward()
    torch.testing.assert_close(table.grad, sides[0].grad + sides[1].grad, rtol=1e-14, atol=0)


# --------------------------------------------------------------------------------------------------------------- state


def bits(module: ContrastiveLoss) -> list[bytes]:
    return [side.numpy().tobytes() for side in (module.log_inner_image, module.log_inner_text)]


def trained(dtype: Any = torch.float32, **options: Any) -> tuple[Problem, ContrastiveLoss]:
    """A module whose state a half round trip would change."""
    problem = Problem.draw(dtype)
    module = problem.module(**options)
    module(problem.images, problem.texts, problem.index)
    assert not torch.equal(module.log_inner_image.half().to(dtype), module.log_inner_image)
    return problem, module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_survives_a_checkpoint_bit_by_bit(dtype: Any) -> None:
    problem, module = trained(dtype, temperature=torch.nn.Parameter(torch.tensor(0.3)))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = ContrastiveLoss(N, temperature=torch.nn.Parameter(torch.tensor(0.9)), gamma=0.7).to(dtype)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert bits(other) == bits(module)
    assert other.log_inner_image.dtype == dtype
    results = [m(problem.images, problem.texts, problem.index) for m in (module, other)]
    assert torch.equal(*results)
    assert bits(other) == bits(module)


def test_copies_are_independent() -> None:
    problem, module = trained()
    other = copy.deepcopy(module)
    before = bits(other)
    module(problem.images, problem.texts, problem.index)
    assert bits(other) == before != bits(module)


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.type(torch.float16),
        lambda m: torch.nn.Sequential(m).half()[0],
        lambda m: m.half().float(),
    ],
    ids=["half", "bfloat16", "to", "to device and dtype", "type", "parent", "there and back"],
)
def test_no_conversion_narrows_the_state(convert: Callable[[Any], Any]) -> None:
    problem, module = trained(temperature=torch.nn.Parameter(torch.tensor(0.3)))
    before = bits(module)
    module = convert(module)
    assert module.log_inner_image.dtype == torch.float32
    assert bits(module) == before
    assert module.temperature.dtype == torch.float32
    assert isinstance(module.temperature, torch.nn.Parameter)
    assert module(problem.images.half(), problem.texts.half(), problem.index).dtype == torch.float32
    assert module.log_inner_image.dtype == torch.float32


def test_double_widens_and_float_returns() -> None:
    _, module = trained()
    before = bits(module)
    assert module.double().log_inner_image.dtype == torch.float64
    assert module.half().log_inner_image.dtype == torch.float64
    assert module.float().log_inner_image.dtype == torch.float32
    assert bits(module) == before


def test_state_moves_with_the_module() -> None:
    _, module = trained()
    moved = module.to("meta", torch.float16)
    assert moved.log_inner_text.device.type == "meta"
    assert moved.log_inner_text.dtype == torch.float32


@pytest.mark.parametrize("how", ["no_grad", "inference_mode"])
def test_state_changes_in_training_only(how: str) -> None:
    problem, module = trained()
    before = bits(module)
    trains = copy.deepcopy(module)
    expected = trains(problem.images, problem.texts, problem.index)
    assert bits(trains) != before
    with getattr(torch, how)():
        value = module(problem.images, problem.texts, problem.index)
    assert torch.equal(value, expected)
    assert bits(module) == before


def test_two_steps_remember() -> None:
    # u = 0.7 g + 0.3 g' after g' on the first visit
    problem = Problem.draw()
    module = ContrastiveLoss(N, temperature=0.3, gamma=0.7).double()
    other = Problem.draw(seed=1)
    module(other.images, other.texts, problem.index)
    first = module.log_inner_image[problem.index].exp()
    module(problem.images, problem.texts, problem.index)
    fresh = ContrastiveLoss(N, temperature=0.3, gamma=1.0).double()
    fresh(problem.images, problem.texts, problem.index)
    expected = 0.3 * first + 0.7 * fresh.log_inner_image[problem.index].exp()
    torch.testing.assert_close(module.log_inner_image[problem.index].exp(), expected, rtol=1e-13, atol=0)
    untouched = [i for i in range(N) if i not in INDEX]
    assert torch.all(module.log_inner_image[untouched] == -math.inf)


def test_gamma_may_be_set_between_steps() -> None:
    problem = Problem.draw()
    module, other = problem.module(gamma=1.0), problem.module(gamma=0.25)
    module.gamma = 0.25
    assert module.gamma == 0.25
    results = [m(problem.images, problem.texts, problem.index) for m in (module, other)]
    assert torch.equal(*results)
    assert bits(module) == bits(other)
    for bad in (0.0, -0.5, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"^gamma must be "):
            module.gamma = bad
    with pytest.raises(TypeError, match=r"^gamma must be a real number, got 'half'$"):
        module.gamma = "half"
    assert module.gamma == 0.25


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_every_integer_type_is_an_index(dtype: Any) -> None:
    problem = Problem.draw()
    modules = [problem.module() for _ in range(2)]
    values = [
        module(problem.images, problem.texts, index)
        for module, index in zip(modules, (problem.index, problem.index.to(dtype)), strict=True)
    ]
    assert torch.equal(*values)
    assert bits(modules[0]) == bits(modules[1])


# ------------------------------------------------------------------------------------------------- half and autocast


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features(dtype: Any) -> None:
    problem = Problem.draw(torch.float32)
    half = [x.to(dtype).requires_grad_() for x in (problem.images, problem.texts)]
    wide = [x.detach().float().requires_grad_() for x in half]
    references = [x.to(dtype) for x in problem.references]
    modules = [problem.module() for _ in range(2)]
    loss = modules[0](*half, problem.index, reference_features=tuple(references))
    expected = modules[1](*wide, problem.index, reference_features=tuple(x.float() for x in references))
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    assert bits(modules[0]) == bits(modules[1])
    for x, y in zip(half, wide, strict=True):
        assert x.grad.dtype == dtype
        assert torch.equal(x.grad, y.grad.to(dtype))


def test_the_loss_scale_comes_before_rounding() -> None:
    # Well separated pairs: gradients of 1e-9 vanish in half, 65536 times as large they do not.
    images = torch.eye(4, dtype=torch.float16).requires_grad_()
    texts = torch.eye(4, dtype=torch.float16)
    module = ContrastiveLoss(4, temperature=0.1, gamma=1.0, eps=1e4)
    (2.0**16 * module(images, texts, torch.arange(4))).backward()
    wide = images.detach().float().requires_grad_()
    (2.0**16 * module(wide, texts.float(), torch.arange(4))).backward()
    assert 0 < float(wide.grad.abs().max()) / 2.0**16 < 2.0**-25  # half's smallest number, halved
    assert torch.equal(images.grad, wide.grad.half())
    assert float(images.grad.abs().max()) > 0


def test_autocast_does_not_reach_the_loss() -> None:
    problem = Problem.draw(torch.float32)
    modules = [problem.module() for _ in range(2)]
    gradients, values = [], []
    for module, enabled in zip(modules, (False, True), strict=True):
        images = problem.images.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = module(images, problem.texts, problem.index, reference_features=problem.references)
        loss.backward()
        gradients.append(images.grad)
        values.append(loss)
    assert values[1].dtype == torch.float32
    assert torch.equal(*values)
    assert torch.equal(*gradients)
    assert bits(modules[0]) == bits(modules[1])


def test_a_training_step_under_autocast() -> None:
    problem = Problem.draw(torch.float32)
    tower = torch.nn.Linear(D, D)
    module = problem.module()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = tower(problem.images), tower(problem.texts)
        assert features[0].dtype == torch.bfloat16
        loss = module(*features, problem.index)
    loss.backward()
    assert loss.dtype == module.log_inner_image.dtype == torch.float32
    assert float(tower.weight.grad.abs().max()) > 0


# ---------------------------------------------------------------------------------------------------------- compiled


def compiles(test: Any) -> Any:
    """Let two warnings of the compiler about itself and about array_api_compat's cached question about types pass."""
    for message in (
        "<class 'torch.autograd.function.Function'> should not",
        "Dynamo detected a call to a `functools",
        "ContrastiveLoss was called with the rows of the call before",  # each call changes the settings, not the rows
    ):
        test = pytest.mark.filterwarnings(f"ignore:{message}")(test)
    return pytest.mark.slow(test)


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@compiles
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "reference, mask, learned temperature"])
def test_compiled_is_eager(extras: bool, fresh_compiler: None) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    problem = Problem.draw()
    results, graphs = [], 0
    for compiled in (False, True):
        temperature = torch.nn.Parameter(torch.tensor(0.3)) if extras else 0.3
        module = problem.module(temperature=temperature, radius=0.5, eps=0.1)
        if extras:
            temperature.data = temperature.data.float()  # narrower than the features, as in practice
        call = torch.compile(module, fullgraph=True, backend=counter) if compiled else module
        images, texts = problem.images.clone().requires_grad_(), problem.texts.clone().requires_grad_()
        losses: list[Any] = []
        for gamma in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):  # compiled once for all of them
            module.gamma = gamma
            options = {"reference_features": problem.references, "pair_mask": problem.pair_mask} if extras else {}
            losses.append(call(images, texts, problem.index, **options))
            graphs = graphs or counter.frame_count
        sum(losses).backward()
        gradients = [images.grad, texts.grad, *([temperature.grad] if extras else [])]
        assert not extras or temperature.grad.dtype == torch.float32
        results.append([*gradients, *losses, module.log_inner_image, module.log_inner_text])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-13, atol=1e-15)
    assert counter.frame_count == graphs > 0


@compiles
def test_a_temperature_per_anchor_compiles(fresh_compiler: None) -> None:
    problem = Problem.draw()
    tables = torch.tensor(np.random.default_rng(1).uniform(0.2, 0.8, (2, N)))
    results = []
    for compiled in (False, True):
        module = problem.module(radius=0.5)

        def function(images: Any, *tables: Any, module: Any = module) -> Any:
            rows = tuple(table[problem.index] for table in tables)
            return module(images, problem.texts, problem.index, temperature=rows)

        call = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
        images = problem.images.clone().requires_grad_()
        image_table, text_table = (table.clone().requires_grad_() for table in tables)
        for both in ((image_table, text_table), (text_table, text_table)):  # one table for both sides, too
            loss = call(images, *both)
            loss.backward()
        results.append([loss, images.grad, image_table.grad, text_table.grad, module.log_inner_image])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-13, atol=1e-15)


@compiles
def test_one_tensor_in_both_roles_compiled(fresh_compiler: None) -> None:
    problem = Problem.draw()
    gradients = []
    for compiled in (False, True):
        module = problem.module()
        call = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
        features = problem.images.clone().requires_grad_()
        call(features, features, problem.index, reference_features=(features, features)).backward()
        gradients.append(features.grad)
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-15)


# ------------------------------------------------------------------------------------------------------------- errors


def valid() -> tuple[Problem, dict[str, Any]]:
    problem = Problem.draw(torch.float32)
    return problem, {
        "image_features": problem.images,
        "text_features": problem.texts,
        "sample_index": problem.index,
        "reference_features": problem.references,
        "pair_mask": problem.pair_mask,
    }


BAD_INPUT: dict[str, tuple[Callable[[Problem], dict[str, Any]], type[Exception], str]] = {
    "repeated index": (
        lambda p: {"sample_index": torch.tensor([7, 0, 10, 0, 2])},
        ValueError,
        "sample_index must not repeat an index within a batch, got 0 twice",
    ),
    "index too large": (
        lambda p: {"sample_index": torch.tensor([7, 0, 11, 4, 2])},
        ValueError,
        r"sample_index must hold row ids from 0 to 10 \(see docs/large-data\.md, .*\), got 11 at position 2",
    ),
    "negative index": (
        lambda p: {"sample_index": torch.tensor([7, -1, 10, 4, 2])},
        ValueError,
        r"sample_index must hold row ids from 0 to 10 \(see docs/large-data\.md, .*\), got -1 at position 1",
    ),
    "floating index": (
        lambda p: {"sample_index": p.index.float()},
        TypeError,
        "sample_index must have an integer dtype, got torch.float32",
    ),
    "list as index": (
        lambda p: {"sample_index": INDEX},
        TypeError,
        r"sample_index must be a torch tensor \(torch.as_tensor\), got list",
    ),
    "short index": (
        lambda p: {"sample_index": p.index[:4]},
        ValueError,
        r"sample_index must have shape \(batch_size,\) = \(5,\), got \(4,\)",
    ),
    "square index": (
        lambda p: {"sample_index": p.index[:, None]},
        ValueError,
        r"sample_index must have shape \(batch_size,\), one row id per sample of the batch, got \(5, 1\)",
    ),
    "index elsewhere": (
        lambda p: {"sample_index": p.index.to("meta")},
        ValueError,
        r"sample_index must be on the device of the state \(cpu\), got meta",
    ),
    "features elsewhere": (
        lambda p: {"text_features": p.texts.to("meta")},
        ValueError,
        r"text_features must be on the device of image_features \(cpu\), got meta",
    ),
    "numpy features": (
        lambda p: {"image_features": p.images.numpy()},
        TypeError,
        r"image_features must be a torch tensor \(torch.as_tensor\), got numpy.ndarray",
    ),
    "numpy index": (
        lambda p: {"sample_index": p.index.numpy()},
        TypeError,
        r"sample_index must be a torch tensor \(torch.as_tensor\), got numpy.ndarray",
    ),
    "index without axes": (
        lambda p: {"sample_index": p.index[0]},
        ValueError,
        r"sample_index must have shape \(batch_size,\), one row id per sample of the batch, got \(\)",
    ),
    "numpy temperature": (
        lambda p: {"temperature": np.asarray(0.5)},
        TypeError,
        r"temperature must be a number or a torch tensor \(torch.as_tensor\), got numpy.ndarray",
    ),
    "fewer texts": (
        lambda p: {"text_features": p.texts[:4]},
        ValueError,
        r"text_features must have shape \(batch_size, feature_dim\) = \(5, 4\), got \(4, 4\)",
    ),
    "shapes": (
        lambda p: {"text_features": p.texts[:, :3]},
        ValueError,
        r"text_features must have shape \(batch_size, feature_dim\) = \(5, 4\), got \(5, 3\)",
    ),
    "one axis": (
        lambda p: {"image_features": p.images[:, 0]},
        ValueError,
        r"image_features must have 2 axes \(batch_size, feature_dim\), got shape \(5,\)",
    ),
    "dtypes": (
        lambda p: {"image_features": p.images.half()},
        TypeError,
        r"text_features must have the dtype of image_features \(torch.float16\), got torch.float32",
    ),
    "reference dtype": (
        lambda p: {"reference_features": (p.references[0], p.references[1].double())},
        TypeError,
        r"reference_features\[1\] must have the dtype of ",
    ),
    "nan": (
        lambda p: {"image_features": torch.where(p.images == p.images[2, 1], math.nan, p.images)},
        ValueError,
        r"image_features must be finite, got nan at position \(2, 1\)",
    ),
    "one reference": (
        lambda p: {"reference_features": p.references[0]},
        TypeError,
        r"reference_features must be a pair \(image, text\) of arrays, got Tensor",
    ),
    "mask shape": (
        lambda p: {"pair_mask": p.pair_mask[:4]},
        ValueError,
        r"pair_mask must have shape \(batch_size, batch_size\) = \(5, 5\), got \(4, 5\)",
    ),
    "mask dtype": (lambda p: {"pair_mask": p.pair_mask.float()}, TypeError, "pair_mask must have dtype bool"),
    "temperature": (lambda p: {"temperature": -0.5}, ValueError, r"temperature must be > 0, got -0\.5"),
    "temperature of one side": (
        lambda p: {"temperature": (torch.ones(5), torch.ones(4))},
        ValueError,
        r"temperature\[1\] must have shape \(batch_size,\) = \(5,\), got \(4,\)",
    ),
    "temperatures of a side alone": (
        lambda p: {"temperature": torch.ones(5)},
        ValueError,
        "temperature must be a scalar or a pair of arrays, one value per anchor, got Tensor",
    ),
    "temperature of zero": (
        lambda p: {"temperature": (torch.ones(5), torch.tensor([1.0, 1, 0, 1, 1]))},
        ValueError,
        r"temperature\[1\] must be > 0, got 0\.0 at position 2",
    ),
    "a list of numbers": (
        lambda p: {"temperature": (0.1, torch.ones(5))},
        TypeError,
        r"temperature\[0\] must be an array of shape \(batch_size,\), got 0\.1",
    ),
    "one pair": (
        lambda p: {
            "image_features": p.images[:1],
            "text_features": p.texts[:1],
            "sample_index": p.index[:1],
            "reference_features": None,
            "pair_mask": None,
        },
        ValueError,
        "image_features must hold at least 2 pairs",
    ),
}


@pytest.mark.parametrize("case", list(BAD_INPUT))
def test_bad_input_is_one_clear_error_and_changes_nothing(case: str) -> None:
    change, error, message = BAD_INPUT[case]
    problem, arguments = valid()
    module = problem.module()
    before = bits(module)
    arguments.update(change(problem))
    with pytest.raises(error, match=f"^{message}"):
        module(**arguments)
    assert bits(module) == before
    module(**valid()[1])
    assert bits(module) != before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
        ({"num_samples": 3.0}, TypeError, r"num_samples must be an integer, got 3\.0"),
        ({"temperature": 0.0}, ValueError, r"temperature must be > 0, got 0\.0"),
        ({"temperature": math.inf}, ValueError, "temperature must be finite, got inf"),
        ({"temperature": "warm"}, TypeError, "temperature must be a real number, got 'warm'"),
        ({"temperature": torch.ones(3)}, ValueError, "temperature must be a scalar"),
        ({"temperature": torch.tensor(1)}, TypeError, "temperature must have a real floating dtype, got torch.int64"),
        ({"temperature": torch.tensor(-0.5)}, ValueError, r"temperature must be > 0, got -0\.5"),
        ({"temperature": torch.nn.Parameter(torch.tensor(-0.5))}, ValueError, r"temperature must be > 0, got -0\.5"),
        ({"gamma": 0.0}, ValueError, r"gamma must be in \(0, 1\], got 0\.0"),
        ({"gamma": 1.1}, ValueError, r"gamma must be in \(0, 1\], got 1\.1"),
        ({"eps": -1e-9}, ValueError, "eps must be >= 0, got -1e-09"),
        ({"reference_weight": -1.0}, ValueError, r"reference_weight must be >= 0, got -1\.0"),
        ({"radius": math.nan}, ValueError, "radius must be finite, got nan"),
        ({"tile_size": 0}, ValueError, "tile_size must be at least 1, got 0"),
        ({"memory_budget": 1.5}, TypeError, r"memory_budget must be an integer, got 1\.5"),
    ],
)
def test_bad_settings(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        ContrastiveLoss(**{"num_samples": N, "temperature": 0.1, "gamma": 1.0, **options})


def test_a_learned_temperature_that_turned_negative_is_caught() -> None:
    problem, arguments = valid()
    module = problem.module(temperature=torch.nn.Parameter(torch.tensor(0.1)))
    before = bits(module)
    with torch.no_grad():
        module.temperature.fill_(-0.1)
    with pytest.raises(ValueError, match=r"^temperature must be > 0, got -0\.1"):
        module(**arguments)
    assert bits(module) == before


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda side: side[:4], ValueError, r"log_inner_text must have shape \(num_samples,\) = \(11,\), got \(4,\)"),
        (lambda side: side.half(), TypeError, "log_inner_text must be float32 or wider, got torch.float16"),
        (lambda side: [1.0], TypeError, "log_inner_text must be an array, got list"),
    ],
    ids=["size", "half", "no tensor"],
)
def test_a_foreign_checkpoint_changes_nothing(change: Any, error: Any, message: str, assign: bool) -> None:
    problem, module = trained(temperature=torch.nn.Parameter(torch.tensor(0.3)))
    state = {name: value.clone() for name, value in problem.module().state_dict().items()}
    state["temperature"] = torch.tensor(0.9)
    state["log_inner_text"] = change(state["log_inner_text"])
    before = bits(module)
    with pytest.raises(error, match=f"^{message}$"):
        module.load_state_dict(state, assign=assign)
    assert bits(module) == before
    assert float(module.temperature.detach()) == np.float32(0.3)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, arguments = valid()
    module = problem.module()
    before = bits(module)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match=r"^world size must be 1, .* does not gather .* yet, got 2$"):
        module(**arguments)
    assert bits(module) == before
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    module(**arguments)


def test_a_second_derivative_is_refused() -> None:
    problem = Problem.draw()
    images = problem.images.clone().requires_grad_()
    loss = problem.module()(images, problem.texts, problem.index)
    (gradient,) = torch.autograd.grad(loss, images, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^the contrastive loss and .* must be differentiated once only"):
        (loss + gradient.square().sum()).backward()


def test_repr_shows_the_settings() -> None:
    module = ContrastiveLoss(N, temperature=0.1, gamma=0.9, radius=0.5)
    assert repr(module) == (
        "ContrastiveLoss(11, temperature=0.1, gamma=0.9, eps=0.0, reference_weight=1.0, radius=0.5)"
    )
    learned = ContrastiveLoss(N, temperature=torch.nn.Parameter(torch.tensor(0.1)), gamma=0.9)
    assert "temperature=<Parameter>" in repr(learned)


# --------------------------------------------------------------------------------------------------------------- risk


SETS = [CVaR(0.35), KLPenalty(0.7), KLBall(0.2), ChiSquareBall(0.3)]


@pytest.mark.parametrize("ambiguity_set", SETS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("axis", [0, -1])
def test_risk_gradcheck(ambiguity_set: Any, axis: int) -> None:
    generator = np.random.default_rng(0)
    loss = torch.tensor(generator.normal(1.0, 2.0, (3, 7)), requires_grad=True)
    reference_loss = torch.tensor(generator.normal(0.0, 1.0, (3, 7)))

    def function(x: Any) -> Any:
        return drrho_risk(x, reference_loss, ambiguity_set, reference_weight=0.8, axis=axis)

    assert function(loss).shape == ((7,) if axis == 0 else (3,))
    assert torch.autograd.gradcheck(function, loss, eps=1e-6, atol=1e-7, rtol=1e-6)


def test_risk_of_the_worst_half() -> None:
    # excess 0.1, 1.5, 0.5: the worst sample and half of the next, of the weight 1 / 1.5 each
    loss = torch.tensor([3.0, 2.0, 1.0], requires_grad=True)
    reference_loss = torch.tensor([2.9, 0.5, 0.5], requires_grad=True)
    risk = drrho_risk(loss, reference_loss, CVaR(0.5))
    assert float(risk.detach()) == pytest.approx((1.5 + 0.5 * 0.5) / 1.5, rel=1e-6)
    (2.0 * risk).backward()
    torch.testing.assert_close(loss.grad, torch.tensor([0.0, 4 / 3, 2 / 3]))
    assert reference_loss.grad is None


def test_risk_never_reads_what_does_not_count() -> None:
    loss = torch.tensor([[3.0, math.nan, 1.0], [1.0, 2.0, math.inf]], requires_grad=True)
    where = torch.tensor([[True, False, True], [True, True, False]])
    risk = drrho_risk(loss, torch.zeros(2, 3), CVaR(0.5), where=where)
    risk.sum().backward()
    assert risk.tolist() == [3.0, 2.0]
    assert loss.grad.tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


def test_risk_under_autocast_is_the_risk() -> None:
    generator = np.random.default_rng(1)
    loss = torch.tensor(generator.normal(size=9), dtype=torch.bfloat16)
    zeros = torch.zeros(9, dtype=torch.bfloat16)
    expected = drrho_risk(loss, zeros, ChiSquareBall(0.2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(drrho_risk(loss, zeros, ChiSquareBall(0.2)), expected)


def test_risk_errors() -> None:
    loss = torch.ones(3, requires_grad=True)
    with pytest.raises(TypeError, match=r"^loss must be a torch tensor \(torch.as_tensor\), got list$"):
        drrho_risk([1.0], torch.ones(1), CVaR(0.5))
    with pytest.raises(ValueError, match=r"^reference_loss must have "):
        drrho_risk(loss, torch.ones(4), CVaR(0.5))
    gradient = torch.autograd.grad(drrho_risk(loss, torch.zeros(3), KLPenalty(1.0)), loss, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"^the contrastive loss and .* must be differentiated once only"):
        (gradient.square().sum() + loss.sum()).backward()
