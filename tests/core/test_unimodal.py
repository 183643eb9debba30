"""The unimodal step against 60 digits on every array library, and facts that hold for it.

The tests see it another way than the core: as 2b anchors and one (2b, 2b) matrix, view 1 first, view 2 after it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from drrho_reference import unimodal_contrastive_step as oracle_step
from hypothesis import given, settings
from hypothesis import strategies as st

from drrho_core import UnimodalStep, unimodal_contrastive_step
from helpers import problems
from helpers.unimodal import FULL, check, exact, run

SCALARS = ("temperature", "gamma", "reference_weight", "radius", "eps")
# XLA compiles per shape and per structure of the arguments, so JAX gets few of them.
FIXED = [
    {"b": 2, "d": 1, "r": None, "per_anchor_temperature": False, "gamma": "number", "as_arrays": ()},
    {"b": 4, "d": 3, "r": 5, "per_anchor_temperature": True, "gamma": "pair", "as_arrays": ("eps",)},
]


@given(data=st.data())
@settings(max_examples=12)
def test_the_step_is_exact(space: Any, data: Any) -> None:
    if space.name == "jax":
        structure = FIXED[space.dtype_name == "float32"]
    else:
        structure = {
            "b": data.draw(st.integers(2, 4)),
            "d": data.draw(st.integers(1, 4)),
            "r": data.draw(st.sampled_from([None, 1, 5])),
            "per_anchor_temperature": data.draw(st.booleans()),
            "gamma": data.draw(st.sampled_from(["number", "pair", "one"])),
            "as_arrays": data.draw(st.sampled_from([(), SCALARS, ("temperature", "eps")])),
        }
    coldest, log_inner = data.draw(st.sampled_from([(0.1, 1.0), (1e-2, 3.0), (1e-4, 1e2), (1e-3, 1e4)]))
    p = problems.draw(
        data.draw(st.integers(0, 2**32 - 1)),
        features=data.draw(st.sampled_from(["random", "aligned", "opposite", "identical", "ties"])),
        temperature=(coldest, 10 * coldest),
        log_inner=log_inner,
        reference_weight=data.draw(st.sampled_from([0.0, 0.5, 1.5])),
        eps=data.draw(st.sampled_from([0.0, 1e-4, 0.5])),
        radius=data.draw(st.sampled_from([0.0, 0.7])),
        **structure,
    )
    rounded = p.rounded(space)
    check(run(p, space), exact(rounded), rounded, space.unit)


@given(seed=st.integers(0, 2**32 - 1), b=st.integers(2, 6), r=st.sampled_from([None, 1, 5]))
@settings(max_examples=15)
def test_the_step_is_the_oracles(seed: int, b: int, r: int | None) -> None:
    p = problems.draw(seed, b=b, r=r, **FULL)
    expected = oracle_step(*p.arrays, **p.options)
    expected = UnimodalStep(*(getattr(expected, name) for name in UnimodalStep._fields))
    check(unimodal_contrastive_step(*p.arrays, **p.options), expected, p, 1e-12)


def test_views_may_change_roles() -> None:
    p = problems.draw(21, b=5, **FULL)
    step = unimodal_contrastive_step(*p.arrays, **p.options)
    swapped = {name: value[::-1] if isinstance(value, tuple) else value for name, value in p.options.items()}
    back = unimodal_contrastive_step(*p.arrays[1::-1], *p.arrays[:1:-1], **swapped)
    order = (0, 1, 3, 2, 4, 6, 5)
    back = UnimodalStep(*(back[field] for field in order))._replace(
        temperature_gradient=back.temperature_gradient[::-1]
    )
    check(back, step, p, 1e-14)


def test_samples_may_come_in_any_order() -> None:
    p = problems.draw(22, b=5, **FULL)
    order = np.array([3, 0, 4, 1, 2])
    step = unimodal_contrastive_step(*p.arrays, **p.options)
    shuffled = p.mapped(lambda x: x[order], float)
    other = unimodal_contrastive_step(*shuffled.arrays, **shuffled.options)
    expected = UnimodalStep(step.loss, step.surrogate, *(
        tuple(side[order] for side in value) if isinstance(value, tuple) else value[order] for value in step[2:]
    ))  # fmt: skip
    check(other, expected, shuffled, 1e-14)


def test_a_reference_is_subtracted() -> None:
    p = problems.draw(23, b=5, reference_weight=0.0, temperature=(0.5, 0.6))
    step = unimodal_contrastive_step(*p.arrays, **p.options)
    plain = {name: value for name, value in p.options.items() if name != "reference_features"}
    check(unimodal_contrastive_step(*p.arrays, **plain), step, p, 1e-14)
    q = replace(p, reference_features=(p.image_features, p.text_features), reference_weight=0.75)
    halved = replace(p, temperature=4 * p.temperature)  # A - 3/4 A = A / 4
    a, b = (unimodal_contrastive_step(*x.arrays, **x.options) for x in (q, replace(halved, reference_features=None)))
    np.testing.assert_allclose(a.log_inner_view1, b.log_inner_view1, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(a.view2_gradient, b.view2_gradient, rtol=0, atol=1e-13)


def test_no_input_is_written_to(eager_space: Any) -> None:
    p = problems.draw(24, b=4, as_arrays=("eps",), **FULL)
    arrays, options = p.given(eager_space)
    everything = [*arrays]
    for value in options.values():
        everything += value if isinstance(value, tuple) else [value] if hasattr(value, "dtype") else []
    before = [np.array(eager_space.to_numpy(array), copy=True) for array in everything]
    unimodal_contrastive_step(*arrays, **options)
    for array, old in zip(everything, before, strict=True):
        assert np.array_equal(eager_space.to_numpy(array), old)


def test_repeated_visits_lead_to_the_objective() -> None:
    p = problems.draw(25, b=4, r=None, log_inner=3.0)
    first, second = p.arrays[2:]
    for _ in range(200):
        step = unimodal_contrastive_step(*p.arrays[:2], first, second, temperature=0.5, gamma=0.2)
        first, second = step.log_inner_view1, step.log_inner_view2
    without = unimodal_contrastive_step(*p.arrays[:2], first, second, temperature=0.5)
    check(step, without, replace(p, temperature=0.5), 1e-14)
