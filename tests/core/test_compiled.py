"""Under jax.jit and torch.compile: traced scalars, constants from outside, no transfers, no warnings, pytrees."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import array_api_compat.torch as torch_namespace
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from drrho_core import ContrastiveStep, InnerEstimator, LossGradients, contrastive_step, info_nce, scent_gamma
from helpers import problems

jax.config.update("jax_enable_x64", True)
SHAPE = {"b": 6, "d": 3, "r": 5, "mask": "empty", "eps": 1e-4, "radius": 0.7}


def tensors(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: tensors(value) for name, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(map(tensors, tree))
    return torch.asarray(tree) if isinstance(tree, np.ndarray) else tree


def numpy_step(p: Any) -> ContrastiveStep:
    return contrastive_step(*p.arrays, **p.options)


def as_numpy(step: ContrastiveStep) -> ContrastiveStep:
    return ContrastiveStep(*(tuple(map(np.asarray, x)) if isinstance(x, tuple) else np.asarray(x) for x in step))


# ---------------------------------------------------------------------------------------------------------------------
# JAX
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_anchor", [False, True], ids=["scalars", "pairs"])
def test_everything_may_be_traced_and_nothing_moves(per_anchor: bool) -> None:
    p = problems.draw(41, per_anchor_temperature=per_anchor, gamma="pair" if per_anchor else "number", **SHAPE)
    arguments = jax.device_put(jax.tree.map(jnp.asarray, (p.arrays, p.options)))
    traces = []

    @jax.jit
    def step(arrays: Any, options: Any) -> ContrastiveStep:
        traces.append(1)
        return contrastive_step(*arrays, **options, xp=jnp)

    step(*arguments)
    with jax.transfer_guard("disallow"):
        got = step(*arguments)
    assert len(traces) == 1
    problems.check_step(as_numpy(got), numpy_step(p), p, 1e-12)


def test_what_a_jitted_function_closes_over_is_a_constant() -> None:
    p = problems.draw(42, per_anchor_temperature=True, gamma="pair", **SHAPE)
    arrays, options = jax.tree.map(jnp.asarray, (p.arrays, p.options))
    got = jax.jit(lambda image: contrastive_step(image, *arrays[1:], **options))(arrays[0])
    problems.check_step(as_numpy(got), numpy_step(p), p, 1e-12)
    estimator = InnerEstimator(9, like=arrays[0])
    index = jnp.asarray([4, 2])
    new = jax.jit(lambda rows: estimator.scatter(index, rows, rows).gather(index)[0])(jnp.asarray([0.5, 1.5]))
    assert new.tolist() == [0.5, 1.5]


def test_values_are_not_looked_at_under_tracing() -> None:
    p = problems.draw(43, **SHAPE)
    arrays, options = jax.tree.map(jnp.asarray, (p.arrays, p.options))
    with pytest.raises(ValueError, match="image_features must be finite, got nan"):
        contrastive_step(arrays[0] * jnp.nan, *arrays[1:], **options)
    step = jax.jit(lambda arrays, options: contrastive_step(*arrays, **options))
    # Where nobody looks at the input, everything that depends on it says so.
    broken = step(
        (arrays[0].at[0, 0].set(jnp.nan), *arrays[1:]), {**options, "pair_mask": jnp.ones((6, 6), dtype=bool)}
    )
    assert np.isnan(broken.loss)
    assert np.isnan(broken.surrogate)
    assert np.isnan(broken.log_inner_image).tolist() == [True] + 5 * [False]
    assert np.all(np.isnan(broken.log_inner_text))
    assert np.all(np.isnan(broken.text_gradient))
    with pytest.raises(ValueError, match="temperature must be > 0, got -1"):
        contrastive_step(*arrays, **{**options, "temperature": jnp.asarray(-1.0)})
    step(arrays, {**options, "temperature": jnp.asarray(-1.0)})
    # Shapes and dtypes are known to a tracer.
    with pytest.raises(ValueError, match=r"log_inner_image must have shape \(batch_size,\) = \(6,\), got \(5,\)"):
        step((*arrays[:2], arrays[2][:5], arrays[3]), options)
    with pytest.raises(TypeError, match="log_inner_text must be float32 or wider, got float16"):
        step((*arrays[:3], arrays[3].astype("float16")), options)
    estimator = InnerEstimator(9, like=arrays[0])
    jax.jit(lambda index: estimator.gather(index)[0])(jnp.asarray([4, 4]))


def test_a_batch_of_problems_may_be_mapped() -> None:
    draws = [problems.draw(seed, b=4, r=None) for seed in (1, 2)]
    stacked = [jnp.stack([jnp.asarray(p.arrays[i]) for p in draws]) for i in range(4)]
    step = jax.vmap(lambda *arrays: contrastive_step(*arrays, temperature=0.3, gamma=0.5).image_gradient)
    got = jax.jit(step)(*stacked)
    for mapped, p in zip(got, draws, strict=True):
        alone = contrastive_step(*p.arrays, temperature=0.3, gamma=0.5).image_gradient
        np.testing.assert_allclose(mapped, alone, atol=1e-13)


def test_results_are_pytrees() -> None:
    p = problems.draw(44, per_anchor_temperature=True, gamma="pair", **SHAPE)
    arrays, options = jax.tree.map(jnp.asarray, (p.arrays, p.options))
    step = contrastive_step(*arrays, **options)
    doubled = jax.tree.map(lambda x: 2 * x, step)
    assert type(doubled) is ContrastiveStep
    assert len(jax.tree.leaves(step)) == 8
    assert float(doubled.temperature_gradient[1][0]) == 2 * float(step.temperature_gradient[1][0])
    loss = info_nce(*arrays[:2], temperature=0.3)
    assert type(jax.tree.map(lambda x: x, loss)) is LossGradients
    assert len(torch.utils._pytree.tree_leaves(contrastive_step(*tensors(p.arrays), **tensors(p.options)))) == 8


def test_the_other_functions_can_be_jitted() -> None:
    p = problems.draw(45, b=6, d=3)
    arrays = [jnp.asarray(x) for x in p.arrays]
    got = jax.jit(lambda e1, e2, t: info_nce(e1, e2, temperature=t))(*arrays[:2], jnp.asarray(0.3))
    for one, other in zip(got, info_nce(*p.arrays[:2], temperature=0.3), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)
    gamma = jax.jit(lambda x, a: scent_gamma(x, log_alpha=a))(arrays[2], jnp.asarray(1.5))
    np.testing.assert_allclose(gamma, scent_gamma(p.arrays[2], log_alpha=1.5), rtol=1e-13)


WITHOUT_64_BITS = """
import warnings
warnings.simplefilter("error")
import jax, jax.numpy as jnp, numpy as np
from drrho_core import InnerEstimator, contrastive_step, info_nce, scent_gamma
assert not jax.config.jax_enable_x64
rng = np.random.default_rng(0)
unit = lambda x: jnp.asarray((x / np.linalg.norm(x, axis=1, keepdims=True)).astype("float32"))
image, text = unit(rng.normal(size=(5, 3))), unit(rng.normal(size=(5, 3)))
estimator = InnerEstimator(9, like=image)
take = lambda state, gamma: contrastive_step(image, text, *state, temperature=0.07, gamma=gamma, eps=1e-4)
for dtype, run in ((jnp.int32, jax.jit(take)), (jnp.uint8, take)):
    index = jnp.asarray([3, 1, 4, 0, 5], dtype=dtype)
    state = estimator.gather(index)
    gamma = scent_gamma(state[0], log_alpha=1.0), scent_gamma(state[1], log_alpha=1.0)
    step = run(state, gamma)
    wide = lambda arrays: tuple(np.asarray(x).astype("float64") for x in arrays)
    exact = contrastive_step(*wide((image, text, *state)), temperature=0.07, eps=1e-4, gamma=wide(gamma))
    assert step.image_gradient.dtype == step.log_inner_image.dtype == step.loss.dtype == jnp.float32
    assert abs(step.loss - exact.loss) < 1e-5
    assert np.max(np.abs(np.asarray(step.image_gradient) - exact.image_gradient)) < 1e-5
    estimator = estimator.scatter(index, step.log_inner_image, step.log_inner_text)
assert info_nce(image, text, temperature=0.07).loss.dtype == jnp.float32
print("fine")
"""


def test_without_jaxs_64_bits_nothing_warns() -> None:
    # Most users never switch them on; the rest of the tests needs them, so this runs in a process of its own.
    done = subprocess.run([sys.executable, "-c", WITHOUT_64_BITS], capture_output=True, text=True, check=False)
    assert done.stdout == "fine\n", done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function: Any) -> Any:
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("form", ["numbers and tiles", "arrays"])
def test_a_step_compiles_as_one_graph(form: str) -> None:
    names = ("temperature", "gamma", "reference_weight", "radius", "eps")
    p = problems.draw(51, **SHAPE, as_arrays=names if form == "arrays" else ())
    arrays, options = tensors(p.arrays), tensors(p.options)
    for name in p.as_arrays:
        options[name] = torch.asarray(getattr(p, name), dtype=torch.float64)
    static = {} if form == "arrays" else {"tile_size": 4}
    step = compiled(lambda arrays, options: contrastive_step(*arrays, **options, **static, xp=torch_namespace))
    problems.check_step(as_numpy(step(arrays, options)), numpy_step(p), p, 1e-12)


@pytest.mark.usefixtures("_fresh_compiler")
def test_half_features_and_pairs_compile() -> None:
    p = problems.draw(52, per_anchor_temperature=True, gamma="pair", **SHAPE)
    arrays, options = tensors(p.arrays), tensors(p.options)
    options["reference_features"] = tuple(x.to(torch.bfloat16) for x in options["reference_features"])
    arrays = (*(x.to(torch.bfloat16) for x in arrays[:2]), *(x.to(torch.float32) for x in arrays[2:]))
    step = compiled(lambda arrays, options: contrastive_step(*arrays, **options, xp=torch_namespace))
    for one, other in zip(step(arrays, options), contrastive_step(*arrays, **options), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("_fresh_compiler")
def test_the_other_functions_compile() -> None:
    p = problems.draw(53, b=6, d=3)
    arrays = tensors(p.arrays)
    loss = compiled(lambda e1, e2: info_nce(e1, e2, temperature=0.3, xp=torch_namespace))(*arrays[:2])
    for one, other in zip(loss, info_nce(*arrays[:2], temperature=0.3), strict=True):
        torch.testing.assert_close(one, other)
    gamma = compiled(lambda x: scent_gamma(x, log_alpha=1.5, xp=torch_namespace))(arrays[2])
    torch.testing.assert_close(gamma, scent_gamma(arrays[2], log_alpha=1.5))
