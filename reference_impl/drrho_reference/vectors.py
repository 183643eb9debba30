"""Test vectors: the conformance kit's problems and the oracle's answers as files that any language can read.

:func:`files` returns the content of every file: an index ``vectors.json``, the JSON Schema ``vectors.schema.json`` of
the index, and one ``.safetensors`` file for each function. A safetensors file consists of a length, a JSON header and
the numbers, so the standard library is enough to write such a file. ``docs/verify.md`` describes the files.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from drrho_reference.cases.calls import names_of_arguments
from drrho_reference.cases.draws import SET_NAMES
from drrho_reference.cases.problem import Problem, SetOf
from drrho_reference.questions import answered, checked_dtypes, oracle_of, ordered_problems

__all__ = ["FORMAT_VERSION", "INDEX", "SCHEMA", "files", "schema"]

FORMAT_VERSION = "1.2"
INDEX, SCHEMA = "vectors.json", "vectors.schema.json"
RULES = {
    "error": (
        "max over entries of |got - expected| / scale must be at most bound. Entries that are equal have the error 0, "
        "also -inf and -inf; an error that is nan fails. scale broadcasts over expected."
    ),
    "certificate": (
        "got is a pair (nu, s). nu + s radius + s mean phi*((x - nu) / s), evaluated in float64, must lie within bound "
        "times scale of the expected risk; several pairs may pass. CVaR: nu + mean(max(x - nu, 0)) / alpha. At s = 0 "
        "and s = inf the value is nu. A penalty has no radius term. phi*(y) is e^y - 1 for KL and "
        "(max(1 + (k - 1) y, 0)^(k / (k - 1)) - 1) / k for Cressie-Read of order k; chi-square is order 2. For the "
        "capped KL penalty it is e^y - 1 if y <= -log(alpha), and (y + log(alpha) + 1) / alpha - 1 otherwise. "
        "x are the losses that count; for drrho_risk they are loss - reference_weight * reference_loss."
    ),
}
_TENSOR_TYPES = {"float64": "F64", "float32": "F32", "int64": "I64", "bool": "BOOL"}

Tensors = dict[str, npt.NDArray[Any]]


def files(*, library_version: str, dtypes: Iterable[str] = ("float64", "float32")) -> dict[str, bytes]:
    """Return the test vectors as a mapping from the name of every file to its content; the index comes last.

    Parameters
    ----------
    library_version : str
        The version of drrho-core that the index names.
    dtypes : iterable of str
        The dtypes of the inputs: ``"float64"``, ``"float32"``, or both of these. Answers are in float64.

    Returns
    -------
    dict of str to bytes
        The content of every file. Equal arguments give equal bytes.

    Raises
    ------
    ValueError
        If a dtype is neither ``"float64"`` nor ``"float32"``, or if there is no dtype.

    Notes
    -----
    Inputs are stored after rounding to their dtype, and the answers are the answers to the rounded inputs. Source: the
    oracle, and mpmath for problems in which an exponential leaves the range of float64.

    Examples
    --------
    >>> content = files(library_version="0.1.0", dtypes=["float64"])
    >>> list(content)[-1], "contrastive_step.safetensors" in content
    ('vectors.json', True)
    """
    names = checked_dtypes(dtypes)
    tensors: dict[str, Tensors] = {}
    entries = [
        _entry(problem, dtype, tensors.setdefault(problem.function, {}))
        for problem in ordered_problems()
        if not problem.story  # a problem that needs several calls cannot be stored as one question and one answer
        for dtype in names
    ]
    index = {
        "format": "drrho-vectors",
        "format_version": FORMAT_VERSION,
        "library": "drrho-core",
        "library_version": library_version,
        "dtypes": list(names),
        "rules": RULES,
        "functions": {
            function: {"file": f"{function}.safetensors", "tensors": len(arrays)}
            for function, arrays in tensors.items()
        },
        "cases": entries,
    }
    # The index comes last, so that it never names a file that is not written yet.
    content = {f"{function}.safetensors": safetensors(arrays) for function, arrays in tensors.items()}
    content[SCHEMA] = _json(schema())
    content[INDEX] = _json(index)
    return content


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def safetensors(tensors: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return a file in the format of safetensors: 8 bytes of length, a JSON header, then the numbers.

    Parameters
    ----------
    tensors : mapping of str to array
        Arrays of float64, float32, int64 or bool.

    Returns
    -------
    bytes
        The file's content, in little-endian order.

    Examples
    --------
    >>> content = safetensors({"x": np.array([1.0, 2.0])})
    >>> content[8:56].decode()
    '{"x":{"dtype":"F64","shape":[2],"data_offsets":['
    """
    # Tensors of wide dtypes come first, so that each tensor starts at a multiple of its item size.
    header: dict[str, Any] = {}
    body = bytearray()
    for name in sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key)):
        tensor = tensors[name]
        raw = np.ascontiguousarray(tensor).astype(tensor.dtype.newbyteorder("<")).tobytes()
        header[name] = {
            "dtype": _TENSOR_TYPES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [len(body), len(body) + len(raw)],
        }
        body += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    # The header is padded with spaces to a multiple of 8 bytes, as the format allows.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(body)


# ---------------------------------------------------------------------------------------------------------------------
# One case
# ---------------------------------------------------------------------------------------------------------------------


def _entry(problem: Problem, dtype: str, tensors: Tensors) -> dict[str, Any]:
    """Return the index's entry of a problem in one dtype; the arrays of the problem are added to ``tensors``."""
    question = answered(problem, dtype)
    arguments = question.arguments
    # Tensors are named case/dtype/role/field; these names are unique within the file of the function.
    prefix = f"{_slug(problem.name)}/{dtype}"
    store = _storer(tensors, dtype)
    positional = names_of_arguments(problem, oracle_of(problem), len(arguments.positional))
    fields = []
    for name, value in question.expected.items():
        fields.append(
            {
                "field": name,
                "expected": store(f"{prefix}/expected/{name}", value, exact=True),
                "scale": store(f"{prefix}/scale/{name}", question.scales[name], exact=True),
                "bound": question.bound_of(name),
                "rule": "certificate" if name == "dual" else "error",
            }
        )
    return {
        "id": f"{problem.function}/{prefix}",
        "function": problem.function,
        "name": problem.name,
        "description": problem.sentence,
        "dtype": dtype,
        "file": f"{problem.function}.safetensors",
        "rows": list(problem.rows),
        "arguments": [
            {"name": name, **store(f"{prefix}/argument/{name}", value)}
            for name, value in zip(positional, arguments.positional, strict=True)
        ],
        "options": {name: store(f"{prefix}/option/{name}", value) for name, value in arguments.options.items()},
        "how": dict(arguments.how),
        "fields": fields,
    }


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", name).strip("_")


def _storer(tensors: Tensors, dtype: str) -> Callable[..., dict[str, Any]]:
    """Return a function that describes a value as JSON; it adds arrays to ``tensors`` and describes them by name."""

    def store(name: str, value: Any, *, exact: bool = False) -> dict[str, Any]:
        if isinstance(value, SetOf):
            return {"ambiguity_set": value.name, "parameters": dict(value.parameters)}
        if hasattr(value, "_fields"):
            parts = {part: store(f"{name}.{part}", getattr(value, part), exact=exact) for part in value._fields}
            return {"fields": parts}
        if isinstance(value, tuple):
            return {"items": [store(f"{name}[{i}]", item, exact=exact) for i, item in enumerate(value)]}
        if isinstance(value, (bool, int)) or (isinstance(value, float) and not exact):
            return {"value": value}
        # Inputs are stored in the dtype of the problem, answers (`exact`) in float64, indices in int64.
        array = np.asarray(value)
        if array.dtype.kind in "iu":
            array = array.astype(np.int64)
        elif array.dtype.kind == "f":
            array = array.astype(np.float64 if exact else dtype)
        if name in tensors:
            raise ValueError(f"name must be unique, got {name!r} twice")
        tensors[name] = array
        return {"tensor": name}

    return store


# ---------------------------------------------------------------------------------------------------------------------
# The schema of the index
# ---------------------------------------------------------------------------------------------------------------------


def schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the index.

    Examples
    --------
    >>> schema()["$schema"]
    'https://json-schema.org/draft/2020-12/schema'
    """
    text, number = {"type": "string", "minLength": 1}, {"type": "number"}

    def record(**properties: Any) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }

    def mapping(values: dict[str, Any]) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": values}

    # A value is a tensor, a scalar, a tuple, a record with named fields, or an ambiguity set.
    value = {"$ref": "#/$defs/value"}
    kinds = {
        "tensor": record(tensor=text),
        "scalar": record(value={"type": ["number", "boolean"]}),
        "items": record(items={"type": "array", "items": value}),
        "fields": record(fields=mapping(value)),
        "ambiguity_set": record(ambiguity_set={"enum": list(SET_NAMES)}, parameters=mapping(number)),
    }
    field = record(
        field=text, expected=value, scale=value, bound={**number, "exclusiveMinimum": 0}, rule={"enum": list(RULES)}
    )
    named = [
        {**kind, "properties": {"name": text, **kind["properties"]}, "required": ["name", *kind["required"]]}
        for kind in kinds.values()
    ]
    # A case has a list of named arguments in order, a mapping of options, and a list of the fields of the answer.
    case = record(
        id=text,
        function=text,
        name=text,
        description=text,
        dtype={"enum": ["float64", "float32"]},
        file={"type": "string", "pattern": "^[A-Za-z_]+\\.safetensors$"},
        rows={"type": "array", "items": text},
        arguments={"type": "array", "items": {"oneOf": named}},
        options=mapping(value),
        how=mapping({"type": "integer"}),
        fields={"type": "array", "items": field, "minItems": 1},
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Index of the test vectors of drrho-core",
        **record(
            format={"const": "drrho-vectors"},
            format_version={"type": "string", "pattern": "^1\\.[0-9]+$"},
            library={"const": "drrho-core"},
            library_version=text,
            dtypes={"type": "array", "items": {"enum": ["float64", "float32"]}, "minItems": 1},
            rules=record(**dict.fromkeys(RULES, text)),
            functions=mapping(record(file=text, tensors={"type": "integer", "minimum": 1})),
            cases={"type": "array", "items": case, "minItems": 1},
        ),
        "$defs": {"value": {"oneOf": list(kinds.values())}},
    }
