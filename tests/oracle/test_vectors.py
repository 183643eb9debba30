"""The test vectors: what is written is what the kit asks and answers, and the index is as its schema says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from drrho_reference import vectors
from drrho_reference.cases.calls import STORIES
from drrho_reference.questions import answered, ordered_problems
from safetensors.numpy import load

import drrho_core


@pytest.fixture(scope="module")
def written() -> dict[str, bytes]:
    return vectors.files(library_version="1.2.3")


@pytest.fixture(scope="module")
def index(written: dict[str, bytes]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(written[vectors.INDEX])
    return found


@pytest.fixture(scope="module")
def tensors(written: dict[str, bytes]) -> dict[str, dict[str, np.ndarray]]:
    return {name: load(content) for name, content in written.items() if name.endswith(".safetensors")}


# ---------------------------------------------------------------------------------------------------------------------
# A JSON Schema validator for the words that the schema uses; any other word is an error
# ---------------------------------------------------------------------------------------------------------------------


def faults(value: Any, schema: dict[str, Any], root: dict[str, Any], at: str = "$") -> list[str]:
    found = []
    for word, rule in schema.items():
        if word == "$ref":
            found += faults(value, root["$defs"][rule.removeprefix("#/$defs/")], root, at)
        elif word == "oneOf":
            matching = [one for one in rule if not faults(value, one, root, at)]
            found += [] if len(matching) == 1 else [f"{at}: {len(matching)} of {len(rule)} match"]
        elif word == "type":
            kinds = [rule] if isinstance(rule, str) else rule
            found += [] if any(is_a(value, kind) for kind in kinds) else [f"{at}: not {kinds}"]
        elif word == "const":
            found += [] if value == rule else [f"{at}: not {rule}"]
        elif word == "enum":
            found += [] if value in rule else [f"{at}: not in {rule}"]
        elif word == "pattern":
            found += [] if re.search(rule, value) else [f"{at}: not like {rule}"]
        elif word in ("minLength", "minItems"):
            found += [] if len(value) >= rule else [f"{at}: too short"]
        elif word in ("minimum", "exclusiveMinimum"):
            found += [] if value > rule or (word == "minimum" and value == rule) else [f"{at}: too small"]
        elif word == "required":
            found += [f"{at}: no {name}" for name in rule if name not in value]
        elif word == "items":
            found += [fault for i, one in enumerate(value) for fault in faults(one, rule, root, f"{at}[{i}]")]
        elif word == "properties" and isinstance(value, dict):
            for name in rule.keys() & value.keys():
                found += faults(value[name], rule[name], root, f"{at}.{name}")
        elif word == "additionalProperties" and isinstance(value, dict):
            for name in value.keys() - schema.get("properties", {}).keys():
                found += [f"{at}: what is {name}"] if rule is False else faults(value[name], rule, root, f"{at}.{name}")
        else:
            assert word in ("$schema", "$defs", "title", "properties", "additionalProperties"), word
    return found


def is_a(value: Any, kind: str) -> bool:
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
    return isinstance(value, kinds[kind]) and (kind == "boolean" or not isinstance(value, bool))


def test_the_index_is_as_its_schema_says(written: dict[str, bytes], index: dict[str, Any]) -> None:
    schema = json.loads(written[vectors.SCHEMA])
    assert schema == vectors.schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert faults(index, schema, schema) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda index: index.pop("rules"), "$: no rules"),
        (lambda index: index.update(format_version="2.0"), "$.format_version: not like"),
        (lambda index: index["cases"][0].update(more=1), "$.cases[0]: what is more"),
        (lambda index: index["cases"][1]["fields"][0].update(bound=0), "$.cases[1].fields[0].bound: too small"),
        (lambda index: index["cases"][0]["arguments"][0].pop("tensor"), "$.cases[0].arguments[0]: 0 of 5 match"),
        (lambda index: index["cases"][0]["options"].update(axis="last"), "$.cases[0].options.axis: 0 of 5 match"),
        (lambda index: index["cases"][0]["fields"].clear(), "$.cases[0].fields: too short"),
    ],
)
def test_the_schema_refuses_what_is_not_an_index(written: dict[str, bytes], change: Any, fault: str) -> None:
    schema, index = json.loads(written[vectors.SCHEMA]), json.loads(written[vectors.INDEX])
    change(index)
    assert any(one.startswith(fault) for one in faults(index, schema, schema)), faults(index, schema, schema)


# ---------------------------------------------------------------------------------------------------------------------
# The content
# ---------------------------------------------------------------------------------------------------------------------


DIGEST = """
import hashlib
from drrho_reference import vectors
content = vectors.files(library_version="1.2.3", dtypes=["float32"])
print(hashlib.sha256(repr(content).encode()).hexdigest())
"""


def test_the_same_command_gives_the_same_bytes(written: dict[str, bytes]) -> None:
    answered.cache_clear()
    assert vectors.files(library_version="1.2.3") == written
    runs = [
        subprocess.run(
            [sys.executable, "-c", DIGEST], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]


def test_inputs_have_the_dtype_and_answers_are_in_float64(
    index: dict[str, Any], tensors: dict[str, dict[str, np.ndarray]]
) -> None:
    seen: dict[tuple[str, str], set[str]] = {}
    for found in tensors.values():
        for name, tensor in found.items():
            _, dtype, part = name.split("/")[:3]
            seen.setdefault((part, dtype), set()).add(tensor.dtype.name)
    for dtype in ("float64", "float32"):
        assert seen["expected", dtype] == {"float64", "int64", "bool"}
        assert seen["scale", dtype] == {"float64"}
        assert seen["argument", dtype] == {dtype, "int64"}
        assert seen["option", dtype] == {dtype, "bool"}
    (tiles,) = (case for case in index["cases"] if case["id"] == "contrastive_step/tiles/float32")
    assert tiles["how"] == {"tile_size": 2}


def test_the_index_names_every_tensor_once(index: dict[str, Any], tensors: dict[str, dict[str, np.ndarray]]) -> None:
    assert index["library_version"] == "1.2.3"
    assert len({case["id"] for case in index["cases"]}) == len(index["cases"])
    named: dict[str, list[str]] = {}

    def walk(value: Any, file: str) -> None:
        if isinstance(value, dict):
            if "tensor" in value:
                named.setdefault(file, []).append(value["tensor"])
            for one in value.values():
                walk(one, file)
        elif isinstance(value, list):
            for one in value:
                walk(one, file)

    for case in index["cases"]:
        walk(case, case["file"])
    for function, entry in index["functions"].items():
        assert sorted(named[entry["file"]]) == sorted(tensors[entry["file"]])
        assert entry == {"file": f"{function}.safetensors", "tensors": len(tensors[entry["file"]])}


def test_one_dtype_alone(index: dict[str, Any]) -> None:
    part = json.loads(vectors.files(library_version="1.2.3", dtypes=["float32"])[vectors.INDEX])
    assert part["dtypes"] == ["float32"]
    assert part["cases"] == [case for case in index["cases"] if case["dtype"] == "float32"]
    with pytest.raises(ValueError, match="dtypes must hold 'float64' and 'float32' only, got 'int8'"):
        vectors.files(library_version="1.2.3", dtypes=["int8"])


def test_special_values_survive(tensors: dict[str, dict[str, np.ndarray]]) -> None:
    masked = tensors["worst_case.safetensors"]["KLBall_mask/float32/argument/losses"]
    where = tensors["worst_case.safetensors"]["KLBall_mask/float32/option/where"]
    assert (masked.dtype, where.dtype) == (np.float32, np.bool_)
    np.testing.assert_array_equal(np.isnan(masked), ~where)
    ties = tensors["worst_case.safetensors"]["CVaR/float64/argument/losses"][3]
    assert sorted(ties.tolist()) == [0.0, 0.5, 0.5, 1.0, 1.0, 1.0]
    assert np.all(tensors["contrastive_step.safetensors"]["plain/float64/argument/log_inner_text"] == -np.inf)
    assert np.all(np.isinf(tensors["worst_case.safetensors"]["KLBall_radius_0/float64/expected/dual[1]"]))
    assert tensors["select_jest.safetensors"]["top_k/float32/expected/index"].dtype == np.int64


# ---------------------------------------------------------------------------------------------------------------------
# A reader: from the files alone to a verdict on the core
# ---------------------------------------------------------------------------------------------------------------------


def value_of(described: dict[str, Any], tensors: dict[str, np.ndarray]) -> Any:
    if "tensor" in described:
        return tensors[described["tensor"]]
    if "items" in described:
        return tuple(value_of(one, tensors) for one in described["items"])
    if "fields" in described:
        fields = {name: value_of(one, tensors) for name, one in described["fields"].items()}
        if "log_inner_image" in fields:
            return drrho_core.ContrastiveStep(**fields)
        return (drrho_core.LossGradients if "temperature_gradient" in fields else drrho_core.FeatureGradients)(**fields)
    if "ambiguity_set" in described:
        return getattr(drrho_core, described["ambiguity_set"])(**described["parameters"])
    return described["value"]


def largest_error(got: Any, expected: Any, scale: Any) -> float:
    if isinstance(expected, tuple):
        return max(largest_error(*three) for three in zip(got, expected, scale, strict=True))
    assert np.shape(got) == np.shape(expected)
    with np.errstate(all="ignore"):
        errors = np.abs(np.asarray(got, dtype=np.float64) - expected.astype(np.float64)) / scale
    errors = np.where(np.asarray(got) == expected, 0.0, errors)
    return float(np.max(np.where(np.isnan(errors), np.inf, errors)))


def weighted_by_hand(*arguments: Any, **options: Any) -> Any:
    """The gradient that a wrapper gives: the upstream gradient times the core's weights."""
    *losses, upstream = arguments
    weights = drrho_core.drrho_risk(*losses, **options).weights
    return np.expand_dims(upstream, options.get("axis", -1)) * weights


@pytest.mark.parametrize("function", dict.fromkeys(problem.function for problem in ordered_problems()))
def test_the_core_agrees_with_the_files(
    function: str, index: dict[str, Any], tensors: dict[str, dict[str, np.ndarray]]
) -> None:
    looked_at = 0
    for case in (case for case in index["cases"] if case["function"] == function):
        here = tensors[case["file"]]
        arguments = [value_of(one, here) for one in case["arguments"]]
        options = {name: value_of(one, here) for name, one in case["options"].items()} | case["how"]
        ours = weighted_by_hand if function == "drrho_risk_vjp" else getattr(drrho_core, function)
        answer = STORIES[function](ours, *arguments) if function in STORIES else ours(*arguments, **options)
        for field in case["fields"]:
            if field["rule"] == "error":
                expected, scale = (value_of(field[name], here) for name in ("expected", "scale"))
                got = answer.get(field["field"]) if isinstance(answer, dict) else answer
                if hasattr(answer, "_fields"):
                    got = getattr(answer, field["field"])
                assert largest_error(got, expected, scale) <= field["bound"], (case["id"], field["field"])
                looked_at += 1
    assert looked_at > 0
