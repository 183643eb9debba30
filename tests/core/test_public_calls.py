"""What holds for every public function: which arrays it refuses, where autograd is off, which dtypes it makes.

`CALLS` names every array that every function of `drrho_core` can be given, optional ones and scalars among them.
"""

from __future__ import annotations

import inspect
import random
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import array_api_compat.numpy as numpy_namespace
import array_api_compat.torch as torch_namespace
import array_api_strict
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import torch
from jax.experimental import sparse as jax_sparse
from torch.utils._python_dispatch import TorchDispatchMode

import drrho_core as core

RNG = np.random.default_rng(0)
EYE = np.eye(4)
X, Y = RNG.normal(size=(4, 3)), RNG.normal(size=(4, 3))
LOSS, REFERENCE = RNG.normal(size=6), RNG.normal(size=6)
COUNTS = np.asarray([True, True, False, True, True, True])
NEVER = np.full(4, -np.inf)
SCALAR = np.asarray(0.5)
PAIRS = ~np.eye(4, dtype=bool)
UNIT_ROWS = X / np.linalg.norm(X, axis=1, keepdims=True)
RISK = {"loss": LOSS, "reference_loss": REFERENCE, "reference_weight": SCALAR, "where": COUNTS}
FEATURES = {"image_features": X, "text_features": Y}
STATE = {"log_inner_image": NEVER, "log_inner_text": NEVER}
OPTIONS = {"gamma": SCALAR, "reference_weight": SCALAR, "radius": SCALAR, "eps": SCALAR, "pair_mask": PAIRS}
WEIGHT = {"anchor_weight": np.asarray([0.5, 0.0, 2.0, 1.0])}
REFERENCES = {"reference_features[0]": Y, "reference_features[1]": X}
TABLE = np.asarray([0.5, 2.0, 3.0])
INDEX = np.asarray([2, 0, 3])
(ONE_RANK,) = core.ThreadRanks.run(1, lambda ranks: ranks)
ROWS = np.asarray([0.1, 0.2, 0.3])


def step(function: Callable[..., Any], per_anchor: bool) -> Callable[[dict[str, Any]], Any]:
    def call(a: dict[str, Any]) -> Any:
        options = {name: a[name] for name in OPTIONS | WEIGHT if name in a}
        options["temperature"] = (a["temperature[0]"], a["temperature[1]"]) if per_anchor else a["temperature"]
        if per_anchor:
            options["gamma"] = (a["gamma[0]"], a["gamma[1]"])
            options["anchor_weight"] = (a["anchor_weight[0]"], a["anchor_weight[1]"])
        options["reference_features"] = (a["reference_features[0]"], a["reference_features[1]"])
        return function(*list(a.values())[:4], **options)

    return call


def two_terms(a: dict[str, Any]) -> Any:
    gradients = core.FeatureGradients(*(a[f"terms[0][1].{name}"] for name in core.FeatureGradients._fields))
    return core.weighted_sum((a["terms[0][0]"], gradients), (0.5, gradients))


def estimator(a: dict[str, Any]) -> Any:
    made = core.InnerEstimator(4, like=a["like"])
    made = made.scatter(a["sample_index"], a["log_inner_image"], a["log_inner_text"])
    return *made.gather(a["sample_index"]), *made.grow(6).state_dict().values()


def learned(a: dict[str, Any]) -> Any:
    made = core.PerSampleTemperature(4, 0.5, like=a["like"])
    made = made.update(a["sample_index"], (a["gradient[0]"], a["gradient[1]"]), learning_rate=a["learning_rate"])
    return *made.gather(a["sample_index"]), *made.grow(6).state_dict().values()


def global_temperature(a: dict[str, Any]) -> Any:
    made = core.GlobalTemperature(0.5, like=a["like"], slow_below=0.9)
    made = made.update(a["gradient"], learning_rate=a["learning_rate"])
    made.load_state_dict(made.state_dict())
    return made.state


def without(arrays: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: array for name, array in arrays.items() if name not in names}


CALLS: dict[str, tuple[Callable[[dict[str, Any]], Any], dict[str, np.ndarray]]] = {
    "excess_loss": (lambda a: core.excess_loss(a["loss"], a["reference_loss"], reference_weight=a["reference_weight"]),
                    without(RISK, "where")),
    "drrho_risk": (lambda a: core.drrho_risk(a["loss"], a["reference_loss"], core.CVaR(0.5), where=a["where"],
                                             reference_weight=a["reference_weight"]), RISK),
    **{
        f"worst_case {kind}": (lambda a, kind=kind: core.worst_case(a["losses"], kind, where=a["where"]),
                               {"losses": LOSS, "where": COUNTS})
        for kind in (core.CVaR(0.5), core.KLPenalty(0.5), core.KLBall(0.2), core.ChiSquarePenalty(0.5),
                     core.ChiSquareBall(0.2), core.CressieReadBall(3.0, 0.2), core.CappedKLPenalty(0.5, 0.5))
    },
    "moving_average_kl": (
        lambda a: core.moving_average_kl(a["loss"], a["reference_loss"], a["log_inner"], temperature=a["temperature"],
                                         gamma=a["gamma"], reference_weight=a["reference_weight"], where=a["where"]),
        RISK | {"log_inner": SCALAR, "temperature": SCALAR, "gamma": SCALAR}),
    "contrastive_step": (step(core.contrastive_step, False),
                         FEATURES | STATE | REFERENCES | OPTIONS | WEIGHT | {"temperature": SCALAR}),
    "contrastive_step per anchor": (
        step(core.contrastive_step, True),
        FEATURES | STATE | REFERENCES | without(OPTIONS, "gamma")
        | {f"{name}[{side}]": np.full(4, 0.5 + side / 4) for name in ("temperature", "gamma", "anchor_weight")
           for side in (0, 1)}),
    "sharded_contrastive_step": (
        lambda a: step(partial(core.sharded_contrastive_step, ranks=ONE_RANK), False)(a),
        FEATURES | STATE | REFERENCES | OPTIONS | WEIGHT | {"temperature": SCALAR}),
    "unimodal_contrastive_step": (
        step(core.unimodal_contrastive_step, False),
        {"view1_features": X, "view2_features": Y, "log_inner_view1": NEVER, "log_inner_view2": NEVER}
        | REFERENCES | without(OPTIONS, "pair_mask") | WEIGHT | {"temperature": SCALAR}),
    "info_nce": (lambda a: core.info_nce(*list(a.values())[:2], temperature=a["temperature"],
                                         anchor_weight=a["anchor_weight"], pair_mask=a["pair_mask"]),
                 FEATURES | WEIGHT | {"temperature": SCALAR, "pair_mask": PAIRS}),
    "pair_loss": (
        lambda a: core.pair_loss(*list(a.values())[:2], temperature=a["temperature"], pair_mask=a["pair_mask"]),
        FEATURES | {"temperature": SCALAR, "pair_mask": PAIRS}),
    "reference_anchor_weight": (
        lambda a: core.reference_anchor_weight(a["pair_loss"], temperature=a["temperature"], threshold=a["threshold"]),
        {"pair_loss": LOSS, "temperature": SCALAR, "threshold": SCALAR}),
    "posterior_anchor_weight": (
        lambda a: core.posterior_anchor_weight(a["pair_loss"], a["swapped_pair_loss"]),
        {"pair_loss": LOSS, "swapped_pair_loss": np.asarray([0.5, 1.0, 2.0])}),
    "sigmoid_loss": (
        lambda a: core.sigmoid_loss(*list(a.values())[:2], scale=a["scale"], bias=a["bias"], pair_mask=a["pair_mask"]),
        FEATURES | {"scale": SCALAR, "bias": SCALAR, "pair_mask": PAIRS}),
    "distillation_loss": (
        lambda a: core.distillation_loss(*list(a.values())[:4], temperature=a["temperature"],
                                         reference_temperature=a["reference_temperature"]),
        FEATURES | {"reference_image": Y, "reference_text": X, "temperature": SCALAR, "reference_temperature": SCALAR}),
    "hinge_margin_loss": (
        lambda a: core.hinge_margin_loss(*list(a.values())[:2], margin=a["margin"], pair_mask=a["pair_mask"]),
        FEATURES | {"margin": SCALAR, "pair_mask": PAIRS}),
    "weighted_sum": (two_terms, {"terms[0][0]": SCALAR, "terms[0][1].loss": SCALAR,
                                 "terms[0][1].image_gradient": X, "terms[0][1].text_gradient": Y}),
    "select_top_excess": (
        lambda a: core.select_top_excess(a["loss"], a["reference_loss"], k=2, reference_weight=a["reference_weight"]),
        without(RISK, "where")),
    "select_jest": (
        lambda a: core.select_jest(a["learner_logits"], a["reference_logits"], k=3, num_chunks=2, gumbel=a["gumbel"]),
        {"learner_logits": X @ Y.T, "reference_logits": Y @ X.T, "gumbel": RNG.gumbel(size=(2, 4))}),
    "select_jest drawn": (
        lambda a: core.select_jest(a["learner_logits"], a["reference_logits"], k=3, num_chunks=2),
        {"learner_logits": X @ Y.T, "reference_logits": Y @ X.T}),
    "excess_variance": (
        lambda a: core.excess_variance(a["loss"], a["reference_loss"], reference_weight=a["reference_weight"],
                                       where=a["where"]), RISK),
    "effective_sample_size": (lambda a: core.effective_sample_size(a["weights"]), {"weights": np.full(4, 0.25)}),
    "generalization_bound": (
        lambda a: core.generalization_bound(a["risk"], a["variance"], radius=a["radius"], c1=a["c1"], c2=a["c2"],
                                            num_samples=9),
        {"risk": LOSS, "variance": LOSS**2, "radius": SCALAR, "c1": SCALAR, "c2": SCALAR}),
    "log_mean_exp_bias": (lambda a: core.log_mean_exp_bias(a["losses"], batch_size=2, temperature=a["temperature"]),
                          {"losses": LOSS, "temperature": SCALAR}),
    "fit_scaling_law": (
        lambda a: core.fit_scaling_law(a["compute"], a["error"], where=a["where"], with_floor=True, num_resamples=5),
        {"compute": np.asarray([1.0, 2, 3, 4, 8, 9]), "error": np.asarray([0.9, 0.8, 0.7, 0.6, 0.5, 0.4]),
         "where": COUNTS}),
    "scent_gamma": (lambda a: core.scent_gamma(a["log_inner"], log_alpha=a["log_alpha"], gamma_floor=a["gamma_floor"]),
                    {"log_inner": NEVER, "log_alpha": SCALAR, "gamma_floor": SCALAR}),
    "InnerEstimator": (estimator, {"like": X, "sample_index": INDEX, "log_inner_image": ROWS, "log_inner_text": ROWS}),
    "PerSampleTemperature": (learned, {"like": X, "sample_index": INDEX, "gradient[0]": ROWS, "gradient[1]": ROWS,
                                       "learning_rate": SCALAR}),
    "GlobalTemperature": (global_temperature, {"like": X, "gradient": SCALAR, "learning_rate": SCALAR}),
    "update_global_temperature": (
        lambda a: core.update_global_temperature(
            core.GlobalTemperatureState(a["temperature"], a["first_moment"], a["second_moment"], a["step"]),
            a["gradient"], learning_rate=a["learning_rate"]),
        {"temperature": SCALAR, "first_moment": SCALAR, "second_moment": SCALAR, "step": np.asarray(3),
         "gradient": SCALAR, "learning_rate": SCALAR}),
    "update_temperature_rows": (
        lambda a: core.update_temperature_rows(core.TemperatureRows(a["temperature"], a["momentum"]), a["slope"],
                                               learning_rate=a["learning_rate"]),
        {"temperature": TABLE / 9, "momentum": TABLE, "slope": TABLE, "learning_rate": SCALAR}),
    "log_inner_from_libauc_v2": (lambda a: core.log_inner_from_libauc_v2(a["u"], a["b"]), {"u": TABLE, "b": TABLE}),
    "log_inner_from_libauc_v1": (
        lambda a: core.log_inner_from_libauc_v1(a["u"], temperature=a["temperature"],
                                                positive_similarity=a["positive_similarity"]),
        {"u": TABLE, "temperature": SCALAR, "positive_similarity": ROWS}),
    "log_inner_from_sogclr_loss": (lambda a: core.log_inner_from_sogclr_loss(a["log_u"], batch_size=4, eps=a["eps"]),
                                   {"log_u": TABLE, "eps": SCALAR}),
    "log_inner_from_fastclip_loss": (
        lambda a: core.log_inner_from_fastclip_loss(a["log_u"], batch_size=4, eps=0.1,
                                                    positive_similarity=a["positive_similarity"]),
        {"log_u": TABLE, "positive_similarity": ROWS}),
}  # fmt: skip

NO_ARRAYS = {"cosine_gamma", "recommended_gamma_min", "fused_kernels", "save_shards", "load_shards"}


def test_every_public_function_is_called() -> None:
    functions = {name for name in core.__all__ if inspect.isfunction(getattr(core, name))}
    assert functions - NO_ARRAYS <= {name.split()[0] for name in CALLS}


def leaves(result: Any) -> Iterator[Any]:
    if isinstance(result, dict):
        result = tuple(result.values())
    if isinstance(result, (tuple, list)):
        for member in result:
            yield from leaves(member)
    else:
        yield result


def given(arrays: dict[str, np.ndarray], xp: Any, dtype: str = "float32", device: Any = None) -> dict[str, Any]:
    def convert(array: np.ndarray) -> Any:
        name = dtype if array.dtype.kind == "f" else "int32" if array.dtype.kind == "i" else "bool"
        if xp is torch_namespace:
            return (
                torch.from_numpy(array.astype(name))
                if array.ndim
                else torch.tensor(array.astype(name).item(), dtype=getattr(torch, name))
            )
        return xp.asarray(array.astype(name), dtype=getattr(xp, name), device=device)

    return {name: convert(np.asarray(array)) for name, array in arrays.items()}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Arrays that are not plain
# ---------------------------------------------------------------------------------------------------------------------


def torch_sparse(array: np.ndarray) -> Any:
    return torch.asarray(array).to_sparse()


def bcoo(array: np.ndarray) -> Any:
    """Build it by hand: `fromdense` compiles, each shape anew."""
    places = np.argwhere(np.ones(array.shape, dtype=bool)).reshape(array.size, array.ndim)
    return jax_sparse.BCOO((jnp.asarray(array.reshape(-1)), jnp.asarray(places.astype("int32"))), shape=array.shape)


NOT_PLAIN: dict[str, tuple[Any, Callable[[np.ndarray], Any], str]] = {
    "masked array": (numpy_namespace, lambda x: np.ma.masked_array(x, mask=False),
                     r"numpy\.ma\.MaskedArray: pass its data, with where=~mask if the function has `where`, else "),
    "matrix": (numpy_namespace, np.matrix, r"numpy\.matrix: pass it as an array \(asarray\)"),
    "object array": (numpy_namespace, lambda x: x.astype(object), "dtype object: pass numbers of a floating"),
    "scipy array": (numpy_namespace, lambda x: scipy.sparse.csr_array(np.atleast_2d(x)),
                    r"scipy\.sparse.*\.csr_array: pass it as a dense array"),
    "scipy matrix": (numpy_namespace, lambda x: scipy.sparse.coo_matrix(np.atleast_2d(x)),
                     r"scipy\.sparse.*\.coo_matrix: pass it as a dense array"),
    "torch sparse": (torch_namespace, torch_sparse, r"a tensor of layout torch\.sparse_coo: pass it as a dense array"),
    "jax sparse": (jnp, bcoo, r"jax\.experimental\.sparse\.bcoo\.BCOO: pass it as a dense array"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:the matrix subclass is not the recommended way:PendingDeprecationWarning")
@pytest.mark.parametrize("kind", NOT_PLAIN)
@pytest.mark.parametrize("name", CALLS)
def test_arrays_that_are_not_plain_are_refused_by_type(name: str, kind: str) -> None:
    xp, make, message = NOT_PLAIN[kind]
    function, arrays = CALLS[name]
    if xp is numpy_namespace:
        function(given(arrays, xp, "float64"))  # as they are they are right
    for argument, array in arrays.items():
        here = given(arrays, xp, "float64" if xp is numpy_namespace else "float32")
        array = array.astype(
            {"f": "float64" if xp is numpy_namespace else "float32", "i": "int32"}.get(array.dtype.kind, bool)
        )
        here[argument] = make(array)
        with pytest.raises(TypeError, match=rf"^(state\.)?{re.escape(argument)} must be a plain array, got {message}"):
            function(here)


def test_a_nested_tensor_is_refused_by_type() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"losses must be a plain array, got a .*: pass it as a dense array"):
        core.worst_case(nested, core.CVaR(0.5))


def test_memory_maps_are_plain_arrays(tmp_path: Any) -> None:
    losses = np.memmap(tmp_path / "losses", dtype="float64", mode="w+", shape=(3,))
    assert float(core.worst_case(losses, core.CVaR(0.5)).risk) == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Autograd
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", CALLS)
def test_where_autograd_is_off_tensors_may_ask_for_gradients(name: str, mode: Any) -> None:
    function, arrays = CALLS[name]
    tensors = given(arrays, torch_namespace)
    random.seed(0)
    expected = list(leaves(function(tensors)))
    asking = {
        name: tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in given(arrays, torch_namespace).items()
    }
    with pytest.raises(ValueError, match="must not require gradients, because results are constants for autograd"):
        function(asking)
    with mode():
        random.seed(0)
        results = list(leaves(function(asking)))
    for result, right in zip(results, expected, strict=True):
        assert not result.requires_grad
        assert torch.equal(torch.nan_to_num(result), torch.nan_to_num(right))


# ---------------------------------------------------------------------------------------------------------------------
# Devices without float64, and versions of the standard
# ---------------------------------------------------------------------------------------------------------------------


class NoFloat64(TorchDispatchMode):
    """A device that cannot make a float64 array."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64:
                raise AssertionError(f"{func} made a float64 tensor")
        return result


@pytest.mark.parametrize("name", CALLS)
def test_no_float64_array_is_made_of_float32_input_in_torch(name: str) -> None:
    function, arrays = CALLS[name]
    tensors = given(arrays, torch_namespace)
    with NoFloat64():
        results = list(leaves(function(tensors)))
    assert all(result.dtype != torch.float64 for result in results)


@pytest.mark.parametrize("name", CALLS)
def test_a_device_without_float64_is_enough(name: str) -> None:
    """array-api-strict has such a device; it raises where an array is made of a dtype that it does not have."""
    function, arrays = CALLS[name]
    device = array_api_strict.Device("no_float64")
    result = function(given(arrays, array_api_strict, device=device))
    assert all(leaf.device == device for leaf in leaves(result))


@pytest.mark.parametrize("version", ["2024.12", "2025.12"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:The 202. version of the array API:UserWarning")
def test_supported_versions_of_the_standard_are_enough(name: str, version: str) -> None:
    function, arrays = CALLS[name]
    with array_api_strict.ArrayAPIStrictFlags(api_version=version, enabled_extensions=("linalg",)):
        for dtype in ("float32", "float64"):
            results = list(leaves(function(given(arrays, array_api_strict, dtype))))
            assert results


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:The 202. version of the array API:UserWarning")
def test_an_older_version_of_the_standard_is_refused(name: str) -> None:
    function, arrays = CALLS[name]
    message = (
        r"must be an array of a library that follows the array API standard's version 2024\.12 or a newer one, "
        r"got array_api_strict, which reports version 2023\.12$"
    )
    with array_api_strict.ArrayAPIStrictFlags(api_version="2023.12"), pytest.raises(TypeError, match=message):
        function(given(arrays, array_api_strict))
