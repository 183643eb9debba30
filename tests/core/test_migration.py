"""Inner estimates saved by other programs: replayed step by step against recordings of what those programs store."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drrho_core import InnerEstimator, contrastive_step, unimodal_contrastive_step
from drrho_core.migration import (
    log_inner_from_fastclip_loss,
    log_inner_from_libauc_v1,
    log_inner_from_libauc_v2,
    log_inner_from_sogclr_loss,
)

NEVER = -math.inf
NOTHING = -1e4  # an estimate of 0 that counts as a visit: LibAUC's first visits in a batch with known samples
STEPS = range(5)


def recording(name: str) -> Any:
    return np.load(Path(__file__).parents[1] / "data" / "peers" / f"{name}_f64.npz")


def before(table: np.ndarray, step: int, start: float) -> np.ndarray:
    """A table (64,) as it was before a step."""
    return table[step - 1, :, 0] if step else np.full(64, start)


# ---------------------------------------------------------------------------------------------------------------------
# Against recordings
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["libauc_v2_global_learnable", "libauc_v2_isogclr"])
def test_bimodal_state_of_libauc_continues_like_libauc(name: str) -> None:
    z = recording(name)
    for step in STEPS:
        index = z["index"][step]
        old, new = (
            [log_inner_from_libauc_v2(z[f"out_u{side}"][at], z[f"out_b{side}"][at]) for side in (1, 2)]
            if at >= 0
            else [np.full(64, NEVER)] * 2
            for at in (step - 1, step)
        )
        temperature = tuple(
            before(z[f"out_learnable_tau_{side}"], step, 0.1)[index] if "isogclr" in name else np.full(16, 0.1)
            for side in ("img", "txt")
        )
        gamma = tuple(np.full(16, 1.0 if np.all(side[index] == NEVER) else 0.7) for side in old)
        rows = [np.maximum(side[index], NOTHING) for side in old]
        got = contrastive_step(z["feat1"][step], z["feat2"][step], *rows, temperature=temperature, gamma=gamma)
        for ours, theirs, untouched in zip((got.log_inner_image, got.log_inner_text), new, old, strict=True):
            np.testing.assert_allclose(ours, theirs[index], rtol=0, atol=1e-13)
            assert np.array_equal(np.delete(theirs, index), np.delete(untouched, index))
    assert np.sum(new[0] == NEVER) == 64 - len(np.unique(z["index"]))


@pytest.mark.parametrize("name", ["libauc_v1_const_firstvisit", "libauc_v1_isogclr"])
def test_unimodal_state_of_libauc_continues_like_libauc(name: str) -> None:
    z = recording(name)
    for step in STEPS:
        index, views = z["index"][step], (z["feat1"][step], z["feat2"][step])
        table = before(z["out_u"], step, 0.0)
        tau = before(z["out_learnable_tau"], step, 0.1)[index] if "isogclr" in name else np.full(16, 0.1)
        options = {"temperature": tau, "positive_similarity": np.sum(views[0] * views[1], axis=1)}
        old, new = (log_inner_from_libauc_v1(u, **options) for u in (table[index], z["out_u"][step][index]))
        rows = np.maximum(old, NOTHING)
        got = unimodal_contrastive_step(
            *views, rows, rows, temperature=(tau, tau), gamma=0.7 if np.any(old != NEVER) else 1.0
        )
        both = np.logaddexp(got.log_inner_view1, got.log_inner_view2) - math.log(2)
        np.testing.assert_allclose(both, new, rtol=0, atol=1e-13)


def test_unimodal_gradient_is_half_of_that_of_libauc() -> None:
    # Its loss is the sum over both views of a mean over samples, ours the mean of both views. It normalises features.
    z = recording("libauc_v1_const_firstvisit")
    views, never = (z["feat1"][0], z["feat2"][0]), np.full(16, NEVER)
    step = unimodal_contrastive_step(*views, never, never, temperature=0.1)
    for features, ours, theirs in zip(
        views, (step.view1_gradient, step.view2_gradient), (z["out_g1"][0], z["out_g2"][0]), strict=True
    ):
        along_the_sphere = ours - np.sum(ours * features, axis=1, keepdims=True) * features
        np.testing.assert_allclose(2 * along_the_sphere, theirs, rtol=0, atol=1e-15)


def test_libaucs_bimodal_gradient_is_b_minus_1_times_ours() -> None:
    z, never = recording("libauc_v2_isogclr"), np.full(16, NEVER)
    step = contrastive_step(z["feat1"][0], z["feat2"][0], never, never, temperature=0.1)
    np.testing.assert_allclose(15 * step.image_gradient, z["out_g1"][0], rtol=0, atol=1e-13)
    np.testing.assert_allclose(15 * step.text_gradient, z["out_g2"][0], rtol=0, atol=1e-13)


def first_visits(z: Any) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Per step: its number, which places of the batch are first visits, and their samples."""
    seen, found = np.zeros(64, dtype=bool), []
    for step in STEPS:
        index = z["index"][step]
        new = ~seen[index]
        found.append((step, new, index[new]))
        seen[index] = True
    assert [len(samples) for _, _, samples in found] == [16, 8, 16, 5, 3]
    return found


def test_first_visits_of_fastclip_match_if_the_similarity_is_given() -> None:
    z, never = recording("official_fastclip_ref1_mt1_eps1e-14"), np.full(16, NEVER)
    for step, new, samples in first_visits(z):
        features = z["feat1"][step], z["feat2"][step]
        reference = z["ref1"][step], z["ref2"][step]
        ours = contrastive_step(*features, never, never, temperature=0.07, reference_features=reference)
        similarity = np.sum(features[0] * features[1], axis=1)[new]
        for table, log_inner in (("out_u_im", ours.log_inner_image), ("out_u_tt", ours.log_inner_text)):
            stored = z[table][step][samples]
            options = {"batch_size": 16, "eps": 1e-14}
            got = log_inner_from_fastclip_loss(stored, positive_similarity=similarity, **options)
            np.testing.assert_allclose(got, log_inner[new], rtol=0, atol=1e-13)
            # What SogCLRLoss would have stored is this, without the similarity.
            plain = log_inner_from_sogclr_loss(stored[:, 0] + similarity, **options)
            assert np.array_equal(got, plain)
    everything = np.zeros(64)
    estimates = log_inner_from_fastclip_loss(z["out_u_im"][-1], positive_similarity=everything, **options)
    assert np.sum(estimates == NEVER) == 64 - len(np.unique(z["index"]))


def test_first_visits_of_fastclip_with_temperatures_per_sample_match() -> None:
    z, never = recording("official_individual"), np.full(16, NEVER)
    for step, new, samples in first_visits(z):
        index = z["index"][step]
        temperature = tuple(before(z[f"out_tau_{side}"], step, 0.07)[index] for side in ("im", "tt"))
        ours = contrastive_step(z["feat1"][step], z["feat2"][step], never, never, temperature=temperature)
        for side, log_inner in (("im", ours.log_inner_image), ("tt", ours.log_inner_text)):
            got = log_inner_from_libauc_v2(z[f"out_u_{side}"][step], z[f"out_bound_{side}"][step])
            np.testing.assert_allclose(got[samples], log_inner[new], rtol=0, atol=1e-13)


# ---------------------------------------------------------------------------------------------------------------------
# By hand
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 1e-14, 0.3])
def test_eps_is_removed_from_a_moving_average(eps: float) -> None:
    # Both loss classes average what they store, in the linear domain: the average of eps is eps.
    rng = np.random.default_rng(0)
    similarity, gamma = rng.uniform(-1, 1, size=4), 0.4
    ours = theirs = None
    for batch in np.exp(rng.normal(size=(6, 4))):
        stored = eps + 7 / 8 * batch
        ours = batch if ours is None else (1 - gamma) * ours + gamma * batch
        theirs = stored if theirs is None else (1 - gamma) * theirs + gamma * stored
    plain = log_inner_from_sogclr_loss(np.log(theirs), batch_size=8, eps=eps)
    np.testing.assert_allclose(plain, np.log(ours), rtol=0, atol=1e-13)
    mixed = np.log(theirs) - similarity
    got = log_inner_from_fastclip_loss(mixed, batch_size=8, eps=eps, positive_similarity=similarity)
    np.testing.assert_allclose(got, np.log(ours), rtol=0, atol=1e-13)


def test_unvisited_samples_stay_unvisited(eager_space: Any) -> None:
    def run(function: Any, *arrays: Any, **options: Any) -> list[float]:
        given = [eager_space.asarray(np.array(x)) for x in arrays]
        if "positive_similarity" in options:
            options["positive_similarity"] = eager_space.asarray(np.array(options["positive_similarity"]))
        result = function(*given, **options)
        assert result.dtype == eager_space.dtype
        return eager_space.to_numpy(result).tolist()

    log_u = [1.0, 0.0, np.inf, -np.inf, np.nan]
    for eps in (0.0, 1.0):
        first, *others = run(log_inner_from_sogclr_loss, log_u, batch_size=2, eps=eps)
        assert first == pytest.approx(math.log(2 * (math.e - eps)), rel=eager_space.unit)
        assert others == [NEVER] * 4
        similarity = [0.5, np.nan, 7.0, np.inf, np.nan]  # only that of the first sample is read
        first, *others = run(log_inner_from_fastclip_loss, log_u, batch_size=2, eps=eps, positive_similarity=similarity)
        assert first == pytest.approx(math.log(2 * (math.exp(1.5) - eps)), rel=eager_space.unit)
        assert others == [NEVER] * 4
    assert run(log_inner_from_libauc_v2, [1.0, 0.0], [[2.0], [5.0]]) == [2.0, NEVER]
    assert run(log_inner_from_libauc_v1, [1.0, 0.0], temperature=0.5, positive_similarity=[0.5, np.nan]) == [-1, NEVER]


def test_an_estimate_far_below_eps_becomes_unvisited() -> None:
    for dtype in ("float64", "float32"):
        digits = 16 * np.finfo(dtype).eps * 14 * math.log(10)
        log_eps = math.log(1e-14)
        stored = np.array([log_eps, log_eps + 0.5 * digits, log_eps - 0.5 * digits, log_eps + 10 * digits], dtype=dtype)
        got = log_inner_from_sogclr_loss(stored, batch_size=2, eps=1e-14)
        assert got[:3].tolist() == [NEVER] * 3
        assert got[3] == pytest.approx(log_eps + math.log(2) + math.log(10 * digits), abs=0.1)


def test_large_estimates_keep_their_digits() -> None:
    got = log_inner_from_sogclr_loss(np.array([1e4, 710.0]), batch_size=2, eps=0.5)
    np.testing.assert_allclose(got, np.array([1e4, 710.0]) + math.log(2), rtol=1e-15)


def test_an_estimator_loads_converted_tables() -> None:
    z = recording("libauc_v2_global_learnable")
    estimator = InnerEstimator(64, like=z["out_u1"])
    images, texts = (log_inner_from_libauc_v2(z[f"out_u{side}"][-1], z[f"out_b{side}"][-1]) for side in (1, 2))
    estimator.load_state_dict({"log_inner_image": images, "log_inner_text": texts})
    assert np.array_equal(estimator.gather(np.array([5, 63]))[1], texts[[5, 63]])


def test_temperature_may_be_one_number_or_one_per_sample() -> None:
    u, similarity = np.array([1.0, 2.0, 0.0]), np.array([0.5, -0.25, 0.1])
    one = log_inner_from_libauc_v1(u, temperature=0.5, positive_similarity=similarity)
    np.testing.assert_allclose(one[:2], [-1.0, math.log(2.0) + 0.5], rtol=1e-15)
    for temperature in (np.asarray(0.5), np.full(3, 0.5), np.full((3, 1), 0.5)):
        again = log_inner_from_libauc_v1(u[:, None], temperature=temperature, positive_similarity=similarity[:, None])
        assert np.array_equal(one, again)


# ---------------------------------------------------------------------------------------------------------------------
# Refused
# ---------------------------------------------------------------------------------------------------------------------

U = np.array([1.0, 2.0])
FAST = {"batch_size": 4, "eps": 0.1, "positive_similarity": 0 * U}
V1 = {"temperature": 0.5, "positive_similarity": 0 * U}


@pytest.mark.parametrize(
    ("function", "arrays", "options", "error", "message"),
    [
        (log_inner_from_fastclip_loss, [U], {"batch_size": 4, "eps": 0.1}, ValueError,
         "positive_similarity must be given, because FastCLIPLoss subtracts each pair's similarity .*, got None"),
        (log_inner_from_libauc_v1, [U], {"temperature": 0.5}, ValueError,
         "positive_similarity must be given, because GCLoss_v1 does not subtract the pair's similarity .*, got None"),
        (log_inner_from_libauc_v2, [[1.0], U], {}, TypeError, "u must be an array, got list"),
        (log_inner_from_libauc_v2, [U, U[:1]], {}, ValueError, r"b must have one row per row of u \(2\), got"),
        (log_inner_from_libauc_v2, [U, U.astype("f4")], {}, TypeError, "b must have the dtype of u"),
        (log_inner_from_libauc_v2, [U.astype("f2"), U], {}, TypeError, "u must be float32 or wider, got float16"),
        (log_inner_from_libauc_v2, [np.ones((2, 2)), U], {}, ValueError,
         r"u must have shape \(num_samples,\) or \(num_samples, 1\), got \(2, 2\)"),
        (log_inner_from_libauc_v2, [np.asarray(1.0), U], {}, ValueError, r"u must have shape .*, got \(\)"),
        (log_inner_from_libauc_v2, [-U, U], {}, ValueError, r"u must be finite and >= 0, got -1\.0 at position 0"),
        (log_inner_from_libauc_v2, [U * np.nan, U], {}, ValueError, "u must be finite and >= 0, got nan"),
        (log_inner_from_libauc_v2, [U, U * np.inf], {}, ValueError, "b must be finite, got inf at position 0"),
        (log_inner_from_sogclr_loss, [U], {"batch_size": 1, "eps": 0.1}, ValueError, "batch_size must be at least 2"),
        (log_inner_from_sogclr_loss, [U], {"batch_size": 4.0, "eps": 0.1}, TypeError, "batch_size must be an integer"),
        (log_inner_from_sogclr_loss, [U], {"batch_size": 4, "eps": -0.1}, ValueError, r"eps must be >= 0, got -0\.1"),
        (log_inner_from_sogclr_loss, [U], {"batch_size": 4, "eps": 5.0}, ValueError,
         r"log_u must be at least log eps = 1\.60944, because eps was added to every stored estimate, got 1\.0 at pos"),
        (log_inner_from_fastclip_loss, [U], {**FAST, "eps": 5.0}, ValueError,
         r"log_u \+ positive_similarity must be at least log eps"),
        (log_inner_from_fastclip_loss, [U], {**FAST, "positive_similarity": U}, ValueError,
         r"positive_similarity must be in \[-1, 1\], got 2\.0 at position 1"),
        (log_inner_from_fastclip_loss, [U], {**FAST, "positive_similarity": 0.5}, TypeError,
         "positive_similarity must be an array, got float"),
        (log_inner_from_libauc_v1, [U], {**V1, "temperature": 0.0}, ValueError, r"temperature must be > 0, got 0\.0"),
        (log_inner_from_libauc_v1, [U], {**V1, "temperature": U - 1}, ValueError, "temperature must be > 0, got .* at"),
        (log_inner_from_libauc_v1, [U], {**V1, "temperature": np.ones(3)}, ValueError, "temperature must have one row"),
        (log_inner_from_libauc_v1, [U], {**V1, "temperature": "0.5"}, TypeError, "temperature must be a real number"),
        (log_inner_from_libauc_v1, [-U], V1, ValueError, "u must be finite and >= 0"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_converted_are_refused(
    function: Any, arrays: Any, options: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        function(*arrays, **options)


def test_another_device_and_autograd_are_refused() -> None:
    import array_api_strict as xp
    import torch

    with pytest.raises(ValueError, match="b must be on the device of u"):
        log_inner_from_libauc_v2(xp.ones(2), xp.ones(2, device=xp.Device("device1")))
    with pytest.raises(ValueError, match="log_u must not require gradients"):
        log_inner_from_sogclr_loss(torch.ones(2, requires_grad=True), batch_size=4, eps=0.1)
    with pytest.raises(TypeError, match=r"b must come from the library of u \(torch\)"):
        log_inner_from_libauc_v2(torch.ones(2), U)
