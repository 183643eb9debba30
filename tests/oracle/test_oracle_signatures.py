"""The oracle has the core's names and signatures, so that reading one is reading the other."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import drrho_reference
import pytest

import drrho_core

SHARED = sorted(
    name
    for name in set(drrho_core.__all__) & set(drrho_reference.__all__)
    if callable(getattr(drrho_core, name)) and name != "AmbiguitySet"  # a type alias in the oracle
)
# How something is computed, never what: the oracle knows one way.
HOW = {"xp", "tile_size", "memory_budget", "ranks", "form"}
# The oracle takes the step of all ranks in one call. Only the core compares the samples of different ranks.
OTHER = {
    "sharded_contrastive_step": {"num_shards", "sample_index"},
    "unimodal_contrastive_step": {"sample_index"},
}


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [
        (parameter.name, parameter.kind, parameter.default)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name not in HOW | OTHER.get(function.__name__, set())
    ]


@pytest.mark.parametrize("name", SHARED)
def test_parameters_are_equal(name: str) -> None:
    ours, theirs = getattr(drrho_reference, name), getattr(drrho_core, name)
    assert parameters(ours) == parameters(theirs)
    if inspect.isclass(ours):
        assert getattr(ours, "_fields", None) == getattr(theirs, "_fields", None)
        assert dataclasses.is_dataclass(ours) == dataclasses.is_dataclass(theirs)
        methods = {key for key, value in vars(theirs).items() if inspect.isfunction(value) and not key.startswith("_")}
        for method in methods if name == "InnerEstimator" else ():
            assert parameters(getattr(ours, method)) == parameters(getattr(theirs, method))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("HingeLoss", "FeatureGradients"), ("PairLoss", "LossGradients"), ("SigmoidLoss", "SigmoidLossGradients")],
)
def test_results_with_another_name_have_the_same_fields(ours: str, theirs: str) -> None:
    assert getattr(drrho_reference, ours)._fields == getattr(drrho_core, theirs)._fields
