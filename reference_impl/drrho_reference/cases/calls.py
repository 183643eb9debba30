"""The calls of each function that is tested by several calls, and the fields of an answer that are compared."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import drrho_reference.sets as sets
from drrho_reference.cases.problem import Problem, SetOf


def oracle_set(ambiguity_set: SetOf) -> Any:
    """Return the ambiguity set as an object of the oracle's class."""
    return ambiguity_set.build(sets)


def to_numpy(value: Any) -> Any:
    """Copy an array of any library to NumPy in float64; a pair of arrays becomes a pair of NumPy arrays."""
    if isinstance(value, (tuple, list)):
        return tuple(map(to_numpy, value))
    for method in ("detach", "cpu", "get"):  # torch, torch on a device, CuPy
        if hasattr(value, method):
            value = getattr(value, method)()
    return np.asarray(value).astype(np.float64)


def use_estimator(
    estimator_class: Any,
    num_samples: int,
    index: Any,
    log_inner_image: Any,
    log_inner_text: Any,
    num_samples_grown: int,
    later_index: Any,
    later_image: Any,
    later_text: Any,
    /,
) -> dict[str, Any]:
    """Use an estimator as a training run does: gather, scatter, grow, save and load."""

    def method(owner: Any, name: str) -> Any:
        if not hasattr(owner, name):
            raise NotImplementedError(f"no method {name}")
        return getattr(owner, name)

    # Before the first scatter all rows are -inf; afterwards the rows hold the new estimates.
    estimator = estimator_class(num_samples, like=log_inner_image)
    fresh = method(estimator, "gather")(index)
    estimator = method(estimator, "scatter")(index, log_inner_image, log_inner_text)
    visited = method(estimator, "gather")(index)
    # A data set that grows keeps the old rows; the state is loaded into a new estimator.
    estimator = method(estimator, "grow")(num_samples_grown)
    estimator = estimator.scatter(later_index, later_image, later_text)
    state = method(estimator, "state_dict")()
    copied = estimator_class(num_samples_grown, like=log_inner_image)
    method(copied, "load_state_dict")(state)
    return {
        "fresh": tuple(fresh),
        "visited": tuple(visited),
        "state": (state["log_inner_image"], state["log_inner_text"]),
        "copied": tuple(copied.gather(later_index)),
    }


def add_terms(weighted_sum: Any, *terms: Any) -> dict[str, Any]:
    """Call a weighted sum, and name every parameter gradient after the position of the term."""
    answer = weighted_sum(*terms)
    fields = {
        name: answer[name] if isinstance(answer, Mapping) else getattr(answer, name, None)
        for name in ("loss", "image_gradient", "text_gradient", "parameter_gradients")
    }
    for position, gradients in enumerate(fields.pop("parameter_gradients") or ()):
        for name, value in gradients.items():
            fields[f"parameter_gradients[{position}].{name}"] = value
    return {name: value for name, value in fields.items() if value is not None}


# Functions of the API that need several calls, or whose fields get other names. The value makes the calls and returns
# the fields.
STORIES: dict[str, Callable[..., Any]] = {"InnerEstimator": use_estimator, "weighted_sum": add_terms}
# The compared fields of each function that also has fields that are not compared: the bootstrap's intervals are random.
COMPARED = {"fit_scaling_law": ("prefactor", "exponent", "floor", "residual", "fitted")}


def names_of_arguments(problem: Problem, oracle: Callable[..., Any], count: int) -> list[str]:
    """Return the names of the positional arguments."""
    function = STORIES.get(problem.function, oracle)
    parameters = [*inspect.signature(function).parameters.values()][1 if problem.function in STORIES else 0 :]
    if parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return [f"{parameters[0].name}[{position}]" for position in range(count)]
    return [parameter.name for parameter in parameters[:count]]
