"""Gradients in float32 at any temperature: no noisier than a framework's own autograd.

`helpers.dense_objectives` writes every objective a second time, for torch and for JAX. In float64 their autograd gives
the truth; in float32 it is the noise that a user of that framework would have without this library.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from drrho_core import contrastive_step, distillation_loss, info_nce, sigmoid_loss, unimodal_contrastive_step
from helpers.dense_objectives import (
    INVERSE,
    KINDS,
    LIBRARIES,
    SEEDS,
    UNSEEN,
    B,
    compare,
    contrastive,
    cross_entropy,
    distilled,
    draw,
    our_gradients,
    sigmoid,
    two_views,
    unmoved,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_step_is_no_noisier_than_autograd(library: str, kind: str) -> None:
    weight = 300.0 if kind == "heavy reference" else 1.0
    for inverse in INVERSE[library]:
        draws: list[Any] = []
        t = np.full(B, 1.0 / inverse, dtype=np.float32)
        for seed in range(SEEDS[library]):
            *arrays, one, other = draw(kind, seed)
            references = None if seed % 2 and kind != "heavy reference" else (one, other)
            options: dict[str, Any] = {"temperature": float(t[0])}
            if references is not None:
                options |= {"reference_features": references, "reference_weight": weight}
            ours = our_gradients(library, contrastive_step, UNSEEN, UNSEEN, **options)
            draws.append((contrastive, unmoved((t, t), references=references, weight=weight), tuple(arrays), ours))
        compare(library, draws)


@pytest.mark.parametrize("library", LIBRARIES)
def test_temperatures_per_anchor_are_no_noisier_than_autograd(library: str) -> None:
    spread = np.random.default_rng(3).uniform(0.5, 2.0, size=(2, B))
    for inverse in INVERSE[library]:
        t, draws = tuple((side / inverse).astype(np.float32) for side in spread), []
        for seed in range(SEEDS[library]):
            *arrays, one, other = draw("unit", seed)
            ours = our_gradients(
                library, contrastive_step, UNSEEN, UNSEEN, temperature=t, reference_features=(one, other)
            )
            draws.append((contrastive, unmoved(t, references=(one, other), weight=1.0), tuple(arrays), ours))
        compare(library, draws)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_step_with_memory_is_no_noisier_than_autograd(library: str) -> None:
    for inverse in [1.0, 10.0, 100.0]:
        draws: list[Any] = []
        t = np.full(B, 1.0 / inverse, dtype=np.float32)
        for seed in range(SEEDS[library]):
            arrays, rng = draw("unit", seed)[:2], np.random.default_rng(50 + seed)
            Z = arrays[0].astype(np.float64) @ arrays[1].astype(np.float64).T
            log_g = [np.log(np.mean(np.exp((m - np.diag(m)[:, None]) * inverse), axis=1)) for m in (Z, Z.T)]
            states = tuple((side + rng.normal(size=B)).astype(np.float32) for side in log_g)

            dense = {"t": (t, t), "references": None, "weight": 1.0, "gamma": 0.4, "states": states}
            ours = our_gradients(library, contrastive_step, *states, temperature=float(t[0]), gamma=0.4)
            draws.append((contrastive, dense, arrays, ours))
        compare(library, draws)


def distil(images: Any, texts: Any, one: Any, other: Any, **options: Any) -> Any:
    return distillation_loss(images, texts, one, other, **options)


@pytest.mark.parametrize("kind", ["unit", "aligned", "clusters", "long"])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("loss", ["info_nce", "distillation_loss", "sigmoid_loss", "unimodal_contrastive_step"])
def test_other_losses_are_no_noisier_than_autograd(library: str, loss: str, kind: str) -> None:
    for inverse in INVERSE[library]:
        draws: list[Any] = []
        t = float(np.float32(1.0 / inverse))
        for seed in range(SEEDS[library]):
            *arrays, one, other = draw(kind, seed)
            forms: dict[str, tuple[Any, Any, tuple[Any, ...], dict[str, Any], dict[str, Any]]] = {
                "info_nce": (cross_entropy, info_nce, (), {"temperature": t}, {"t": t}),
                "sigmoid_loss": (sigmoid, sigmoid_loss, (), {"scale": inverse, "bias": -3.0}, {"scale": inverse}),
                "unimodal_contrastive_step": (
                    two_views, unimodal_contrastive_step, (UNSEEN, UNSEEN), {"temperature": t}, {"t": t}
                ),
                "distillation_loss": (
                    distilled, distil, (one, other),
                    {"temperature": t, "reference_temperature": t}, {"t": t, "references": (one, other)},
                ),
            }  # fmt: skip
            dense, function, more, options, inner = forms[loss]

            draws.append((dense, inner, tuple(arrays), our_gradients(library, function, *more, **options)))
        compare(library, draws)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("per_anchor", [False, True])
def test_the_weights_of_an_anchor_sum_to_at_most_one_over_gamma(dtype: str, per_anchor: bool) -> None:
    """With all other anchors' weights at 0, the texts' gradients are w_ij image_i / 2b: their sum shows sum_j w_ij."""
    images, texts, *_ = (x.astype(dtype) for x in draw("unit", 7))
    rng, bound = np.random.default_rng(8), 1e-5 if dtype == "float32" else 1e-10
    for inverse in INVERSE["numpy"]:
        for gamma in (1.0, 0.3):
            states = np.where(rng.uniform(size=B) < 0.5, -np.inf, inverse * rng.normal(size=B)).astype(dtype)
            t: Any = np.full(B, 1.0 / inverse, dtype=dtype)
            for i in range(4):
                chosen = np.zeros(B, dtype=dtype)
                chosen[i] = 1.0
                step = contrastive_step(
                    images, texts, states, states,
                    temperature=(t, t) if per_anchor else float(t[0]),
                    gamma=gamma, anchor_weight=(chosen, np.zeros_like(chosen)),
                )  # fmt: skip
                others = np.delete(step.text_gradient.astype(np.float64), i, axis=0).sum(axis=0)
                image = images[i].astype(np.float64)
                total = 2 * B * float(others @ image) / float(image @ image)
                assert 0.0 <= total <= (1.0 + bound) / gamma
                if states[i] == -np.inf or gamma == 1.0:
                    assert total == pytest.approx(1.0, rel=bound)
