"""Weighted sums of losses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import drrho_core as dc
from helpers.loss_family import FIELDS, B, draw, hinge, thin


def test_a_weighted_sum_of_everything(space: Any) -> None:
    thin(space)
    arrays = [space.asarray(x) for x in draw()]
    pair = tuple(space.asarray(np.linspace(0.3, 0.6, B) + shift) for shift in (0.0, 0.1))
    state, weight = space.asarray(np.full(B, -np.inf)), space.asarray(np.asarray(0.25, dtype=space.dtype_name))

    def everything(arrays: Any, pair: Any, state: Any, weight: Any) -> Any:
        images, texts = arrays[:2]
        step = dc.contrastive_step(images, texts, state, state, temperature=pair)
        sigmoid = dc.sigmoid_loss(images, texts, scale=5.0, bias=-1.0)
        clip = dc.info_nce(images, texts, temperature=0.4)
        hinge = dc.hinge_margin_loss(images, texts, margin=0.3)
        inner = dc.weighted_sum((0.5, sigmoid), (4.0, clip))
        return (step, sigmoid, clip, hinge), dc.weighted_sum((weight, step), [2.0, inner], (-1.0, hinge))

    terms, total = space.run(everything, arrays, pair, state, weight)
    step, sigmoid, clip, hinge = terms
    weights = (0.25, 1.0, 8.0, -1.0)
    for field in FIELDS:
        wanted = sum(w * space.to_numpy(getattr(term, field)) for w, term in zip(weights, terms, strict=True))
        got = space.to_numpy(getattr(total, field))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=4 * space.unit * np.max(np.abs(wanted)))
    assert total.image_gradient.dtype == arrays[0].dtype
    parameters = total.parameter_gradients
    assert [sorted(own) for own in parameters] == [
        ["temperature_gradient"], ["bias_gradient", "scale_gradient"], ["temperature_gradient"], [],
    ]  # fmt: skip
    for side in (0, 1):
        got = space.to_numpy(parameters[0]["temperature_gradient"][side])
        np.testing.assert_array_equal(got, 0.25 * space.to_numpy(step.temperature_gradient[side]))
    for own, name, factor, term in (
        (1, "scale_gradient", 1.0, sigmoid), (1, "bias_gradient", 1.0, sigmoid), (2, "temperature_gradient", 8.0, clip)
    ):  # fmt: skip
        assert float(parameters[own][name]) == pytest.approx(factor * float(getattr(term, name)), rel=1e-6)
    assert hinge._fields == FIELDS


def test_a_weighted_sum_of_half_types_is_summed_in_float32() -> None:
    import torch

    arrays = [torch.asarray(x).to(torch.float16) for x in draw()]
    term = dc.hinge_margin_loss(*arrays[:2], margin=1.0)
    total = dc.weighted_sum(*[(0.01, term)] * 100)
    assert total.loss.dtype == torch.float32
    assert total.image_gradient.dtype == torch.float16
    torch.testing.assert_close(total.image_gradient, term.image_gradient, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("terms", "error", "message"),
    [
        ((), ValueError, "weighted_sum must get at least one pair"),
        ((hinge(),), TypeError, r"terms\[0\] must be a pair \(weight, result\), got FeatureGradients"),
        (((1.0, hinge()), 3.0), TypeError, r"terms\[1\] must be a pair \(weight, result\), got 3\.0"),
        (((1.0, 2.0),), TypeError, r"terms\[0\]\[1\] must be a named tuple with loss, image_gradient and .*, got 2\.0"),
        (((math.nan, hinge()),), ValueError, r"terms\[0\]\[0\] must be finite, got nan"),
        ((("1", hinge()),), TypeError, r"terms\[0\]\[0\] must be a real number, got '1'"),
        (((1.0, hinge()), (1.0, hinge(b=5))), ValueError, r"1\]\.image_gradient must have shape .* = \(4, 3\)"),
        (((1.0, hinge()), (1.0, hinge(dtype=np.float32))), TypeError, r"1\]\.image_gradient must have the dtype"),
    ],
)  # fmt: skip
def test_bad_terms_get_one_clear_error(terms: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        dc.weighted_sum(*terms)
