"""Read the test vectors without our packages. The standard library of any language is enough.

``drrho vectors --out vectors`` writes inputs and right answers. This program reads these files, computes two functions
in plain Python with lists and loops, and compares the results by the rules that the index file, vectors.json, states.
(A .safetensors file consists of eight bytes with the length of the header, a JSON header and the numbers.)

    worst_case with a KL penalty     risk = t log mean exp(x / t), weights = softmax(x / t), one slice at a time
    contrastive_step                 the new log estimates of every anchor, and the loss

A program in C, Rust or Julia does the same: read the header, find the tensors that the index names, call your own
function, and compare. All computations are in the log domain, so they also work for cases with extreme numbers
(temperature 1e-4, log estimates of +-1e4).

Run ``drrho vectors --out vectors``, then ``python -I examples/read_vectors.py vectors``, which takes about a
second. The exit code is 1 if an answer differs.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

INF = float("inf")
FORMATS = {"F64": ("d", 8), "F32": ("f", 4), "I64": ("q", 8), "BOOL": ("?", 1)}

Tensors = dict[str, Any]
Rows = list[list[Any]]
Answer = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> Tensors:
    """Return all tensors of a .safetensors file as nested lists; a tensor without axes is a number."""
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        letter, size = FORMATS[entry["dtype"]]
        begin, end = entry["data_offsets"]
        flat = struct.unpack_from(f"<{(end - begin) // size}{letter}", content, 8 + length + begin)
        tensors[name] = nested(list(flat), entry["shape"])
    return tensors


def nested(flat: list[Any], shape: list[int]) -> Any:
    """Fold a flat list into nested lists, row by row."""
    if not shape:
        return flat[0]
    if len(shape) == 1:
        return flat
    size = len(flat) // shape[0]
    return [nested(flat[row * size : (row + 1) * size], shape[1:]) for row in range(shape[0])]


def value_of(described: dict[str, Any], tensors: Tensors) -> Any:
    """Return the value that an entry of the index describes: a tensor, number, pair, ambiguity set, or named fields."""
    if "tensor" in described:
        return tensors[described["tensor"]]
    if "items" in described:
        return tuple(value_of(item, tensors) for item in described["items"])
    if "ambiguity_set" in described:
        return {"name": described["ambiguity_set"], **described["parameters"]}
    if "fields" in described:
        return {name: value_of(field, tensors) for name, field in described["fields"].items()}
    return described["value"]


# ---------------------------------------------------------------------------------------------------------------------
# The rule "error": the largest |got - expected| / scale over all entries
# ---------------------------------------------------------------------------------------------------------------------


def largest_error(got: Any, expected: Any, scale: Any) -> float:
    """Return the largest error. Equal entries have the error 0, also -inf and -inf; a nan has the error infinity."""
    if isinstance(expected, (list, tuple)):
        if not isinstance(got, (list, tuple)) or len(got) != len(expected):
            return INF
        # A scale broadcasts as in NumPy: from the last axis; an axis of length one is repeated.
        scales = scale if depth(scale) == depth(expected) else [scale] * len(expected)
        scales = scales * len(expected) if len(scales) == 1 else scales
        return max(largest_error(*three) for three in zip(got, expected, scales, strict=True))
    scale = scale[0] if isinstance(scale, list) else scale
    if got == expected:
        return 0.0
    error = abs(got - expected) / scale
    return INF if math.isnan(error) else error


def depth(value: Any) -> int:
    """Return the number of axes of nested lists."""
    return 1 + depth(value[0]) if isinstance(value, (list, tuple)) else 0


# ---------------------------------------------------------------------------------------------------------------------
# The two functions, in plain Python
# ---------------------------------------------------------------------------------------------------------------------


def log_mean_exp(values: list[float]) -> float:
    """Return log(mean(exp(values))) of one slice; log1p and expm1 keep small results exact."""
    largest = max(values)
    excess = math.fsum(math.expm1(value - largest) for value in values) / len(values)
    return largest + (math.log1p(excess) if excess > -0.5 else math.log(1.0 + excess))


def kl_penalty(losses: Rows, ambiguity_set: dict[str, Any], axis: int = -1, where: Rows | None = None) -> Answer:
    """Return risk and weights of two-dimensional losses under a KL penalty."""
    temperature = ambiguity_set["temperature"]
    if axis == 0:
        losses = transposed(losses)
        where = transposed(where) if where is not None else None
    risks, rows = [], []
    for position, row in enumerate(losses):
        counted = where[position] if where is not None else [True] * len(row)
        x = [value for value, counts in zip(row, counted, strict=True) if counts]
        largest = max(x)
        shifted = log_mean_exp([(value - largest) / temperature for value in x])
        risks.append(largest + temperature * shifted)
        rows.append(
            [
                math.exp((value - largest) / temperature - shifted) / len(x) if counts else 0.0
                for value, counts in zip(row, counted, strict=True)
            ]
        )
    return {"risk": risks, "weights": transposed(rows) if axis == 0 else rows}


def transposed(rows: Rows) -> Rows:
    """Swap the two axes."""
    return [list(column) for column in zip(*rows, strict=True)]


def log_add(first: float, second: float) -> float:
    """Return log(e^first + e^second)."""
    small, large = sorted((first, second))
    return large if small == -INF else large + math.log1p(math.exp(small - large))


def contrastive_step(
    image: Rows,
    text: Rows,
    log_image: list[float],
    log_text: list[float],
    *,
    temperature: float | tuple[list[float], list[float]],
    gamma: float | tuple[list[float], list[float]] = 1.0,
    reference_features: tuple[Rows, Rows] | None = None,
    reference_weight: float = 1.0,
    radius: float = 0.0,
    eps: float = 0.0,
    pair_mask: Rows | None = None,
    anchor_weight: list[float] | tuple[list[float], list[float]] | None = None,
) -> Answer:
    """Return the loss and the new log estimates, computed with math.fsum and log_mean_exp."""
    b = len(image)
    Z = similarities(image, text)
    if reference_features is not None:
        R = similarities(*reference_features)
        Z = [[z - reference_weight * r for z, r in zip(*rows, strict=True)] for rows in zip(Z, R, strict=True)]
    sides = []
    for side, states in enumerate((log_image, log_text)):
        t, g = (value[side] if isinstance(value, tuple) else [value] * b for value in (temperature, gamma))
        weights = anchor_weight[side] if isinstance(anchor_weight, tuple) else anchor_weight or [1.0] * b
        anchors = []
        for i in range(b):
            others = [j for j in range(b) if j != i and allowed(pair_mask, *((i, j) if side == 0 else (j, i)))]
            D = [((Z[i][j] if side == 0 else Z[j][i]) - Z[i][i]) / t[i] for j in others]
            loss, state = anchor(D, states[i], t[i], g[i], radius, eps)
            anchors.append((weights[i] * loss, state))  # the weight of an anchor does not change its state
        sides.append(anchors)
    return {
        "loss": math.fsum(loss for anchors in sides for loss, _ in anchors) / (2 * b),
        "log_inner_image": [state for _, state in sides[0]],
        "log_inner_text": [state for _, state in sides[1]],
    }


def allowed(pair_mask: Rows | None, image: int, text: int) -> bool:
    """Return whether a pair is a negative according to the mask."""
    return pair_mask is None or bool(pair_mask[image][text])


def anchor(D: list[float], log_u: float, t: float, gamma: float, radius: float, eps: float) -> tuple[float, float]:
    """Return an anchor's loss and its new log estimate."""
    if not D:
        return 0.0, log_u
    log_g = log_mean_exp(D)
    keeps = log_u != -INF and gamma < 1.0
    log_new = log_add(math.log1p(-gamma) + log_u, math.log(gamma) + log_g) if keeps else log_g
    level = log_new if eps == 0.0 else log_add(math.log(eps), log_new)
    return t * (level + radius), log_new


def similarities(rows: Rows, columns: Rows) -> Rows:
    """Return the inner products of all rows with all columns."""
    return [[math.fsum(a * c for a, c in zip(row, column, strict=True)) for column in columns] for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def main(folder: Path) -> int:
    """Compare, print a table and return the number of fields that are wrong."""
    index = json.loads((folder / "vectors.json").read_text(encoding="utf-8"))
    if index["format"] != "drrho-vectors" or index["format_version"].split(".")[0] != "1":
        raise SystemExit(f"format_version must be 1.x, got {index['format']} {index['format_version']}")
    print(f"{index['library']} {index['library_version']}, format {index['format_version']}")
    print(f"{'function':<17} {'case':<30} {'dtype':<8} {'field':<16} {'error':>8} {'bound':>8}")
    looked_at = wrong = 0
    files: dict[str, Tensors] = {}
    for case in index["cases"]:
        if case["function"] not in ("worst_case", "contrastive_step"):
            continue
        if case["file"] not in files:
            files[case["file"]] = read_tensors(folder / case["file"])
        tensors = files[case["file"]]
        arguments = [value_of(argument, tensors) for argument in case["arguments"]]
        options = {name: value_of(option, tensors) for name, option in case["options"].items()}
        if case["function"] == "contrastive_step":
            answer = contrastive_step(*arguments, **options)
        elif arguments[1]["name"] == "KLPenalty":
            answer = kl_penalty(*arguments, **options)
        else:
            continue
        for field in case["fields"]:
            if field["field"] in answer:
                expected, scale = (value_of(field[name], tensors) for name in ("expected", "scale"))
                error = largest_error(answer[field["field"]], expected, scale)
                verdict = "" if error <= field["bound"] else "  WRONG"
                looked_at, wrong = looked_at + 1, wrong + bool(verdict)
                print(
                    f"{case['function']:<17} {case['name']:<30} {case['dtype']:<8} {field['field']:<16} "
                    f"{error:>8.1e} {field['bound']:>8.0e}{verdict}"
                )
    print(f"{looked_at - wrong} of {looked_at} fields are right")
    return wrong if looked_at else 1


if __name__ == "__main__":
    sys.exit(1 if main(Path(sys.argv[1] if len(sys.argv) > 1 else "vectors")) else 0)
