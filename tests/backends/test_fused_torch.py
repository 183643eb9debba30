"""The Triton kernels: on a GPU, or interpreted on the CPU (TRITON_INTERPRET=1); compiled for Hopper with neither."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import array_api_compat.torch
import drrho_torch  # noqa: F401  (registers the kernels)
import numpy as np
import pytest
import torch
from drrho_reference import conformance

from drrho_core import fused_kernels
from drrho_core._routines import find_kernels
from drrho_core.extend import Batch
from helpers import fused_sweeps

HAS_TRITON = find_spec("triton") is not None
triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(
    not HAS_TRITON or not (GPU or INTERPRETED),
    reason="Triton is not installed, or has no GPU and no TRITON_INTERPRET=1",
)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PULL_UNITS = {"float32": None, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""V is rounded before it is multiplied: to float16's 11 bits, to bfloat16's 8."""


@pytest.fixture(params=["descriptors", "pointers"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, with tiles so small that a small batch has many where they are interpreted, and small panels."""
    from drrho_torch import fused, fused_plans

    def changed(plan: Any) -> Any:
        plan = plan._replace(descriptors=request.param == "descriptors")
        if not fused.interpreted():  # several panels of real tiles
            return plan._replace(panel=256, rows=512, columns=256)
        wide, tall = fused.Blocks(16, 32, 16, 1, 1), fused.Blocks(32, 16, 16, 1, 1)
        return plan._replace(sums=tall, weights=wide, masked=wide, panel=32, rows=48, columns=32)

    plans = {major: {dtype: changed(plan) for dtype, plan in table.items()} for major, table in fused.PLANS.items()}
    monkeypatch.setattr(fused_plans, "PLANS", plans)
    with np.errstate(all="ignore"):  # a GPU does not warn of an infinity that a mask removes
        yield fused


def rounding(name: str) -> Any:
    return lambda x: torch.tensor(x).to(DTYPES[name]).double().numpy()


def to_numpy(x: Any) -> np.ndarray:
    return x.detach().double().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def anchors(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float32, device=DEVICE)


def given(problem: Any, name: str) -> Batch:
    return problem.given(
        lambda x: torch.tensor(x, device=DEVICE).to(DTYPES[name]), anchors, lambda x: torch.tensor(x, device=DEVICE)
    )


def both_sweeps(kernels: Any, problem: Any, name: str) -> tuple[Any, Any]:
    batch = given(problem, name)
    sweeps = kernels.TritonSweeps()
    assert sweeps.declines(batch, "always") is None
    first = sweeps.sum_negatives(batch)
    second = sweeps.pull_back(batch, first, anchors(problem.weight_image), anchors(problem.weight_text))
    return first._make([*map(to_numpy, first[:6]), None]), second._make(map(to_numpy, second))


SHAPES = [
    {"b": 2, "d": 1},
    {"b": 16, "d": 16, "r": 16},
    {"b": 33, "d": 20, "r": 7},
    {"b": 65, "d": 7, "r": 40, "mask": True},
    {"b": 40, "d": 33, "mask": True},
    {"b": 49, "d": 9, "r": 0, "one_temperature": True},
]
if GPU and not INTERPRETED:
    SHAPES += [{"b": 700, "d": 200, "r": 130}, {"b": 1030, "d": 128, "r": 64, "mask": True}]


@runs
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_sweeps_are_the_formula(kernels: Any, shape: dict[str, Any], name: str) -> None:
    problem = fused_sweeps.draw(**shape, rounded=rounding(name))
    fused_sweeps.check(*both_sweeps(kernels, problem, name), problem, unit=5e-6, pull_unit=PULL_UNITS[name])


@runs
@pytest.mark.parametrize("one_temperature", [True, False])
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("temperature", [1e-2, 1e-4, 1e-6, 1e-10])
def test_large_logits_lose_no_digits(kernels: Any, temperature: float, name: str, one_temperature: bool) -> None:
    problem = fused_sweeps.draw_exact(
        b=49, d=5, r=3, mask=True, temperature=temperature, one_temperature=one_temperature
    )
    fused_sweeps.check(*both_sweeps(kernels, problem, name), problem, unit=5e-6, pull_unit=PULL_UNITS[name])


@runs
@pytest.mark.parametrize("temperature", [0.05, 1e-4, 1e-10])
def test_the_weights_of_an_anchor_add_up(kernels: Any, temperature: float) -> None:
    """Whatever the products round: with a column of ones the pull is the sum of the weights."""
    problem = fused_sweeps.draw(b=65, d=24, r=9, coldest=temperature)
    for side in (problem.image_features, problem.text_features, *problem.reference_features):
        side *= np.sqrt(temperature)  # logits of size 1 / temperature that differ by about 1
    for side in (problem.image_features, problem.text_features):
        side[:, 0] = 1.0
    nothing = np.zeros_like(problem.weight_image)
    for own, pull in (("weight_image", "image_pull"), ("weight_text", "text_pull")):
        other = "weight_text" if own == "weight_image" else "weight_image"
        alone = type(problem)(**{**vars(problem), other: nothing})
        _, second = both_sweeps(kernels, alone, "float32")
        np.testing.assert_allclose(getattr(second, pull)[:, 0], getattr(problem, own), rtol=2e-6, atol=1e-9)


@runs
def test_one_exponential_serves_both_directions_only_where_it_may(
    kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = []
    share = kernels._Run._share

    def spy(*arguments: Any) -> Any:
        factors, shared = share(*arguments)
        flags.append(bool(shared[0]))
        return factors, shared

    monkeypatch.setattr(kernels._Run, "_share", spy)
    for options in (
        {"coldest": 0.1, "one_temperature": True},
        {"coldest": 0.1, "one_temperature": False},
        {"coldest": 0.001, "one_temperature": True},
    ):
        problem = fused_sweeps.draw(b=40, d=4, rounded=rounding("bfloat16"), **options)
        _, second = both_sweeps(kernels, problem, "bfloat16")
        assert np.all(np.isfinite(second.image_pull))
    assert flags == [True, False, False]


@triton
@pytest.mark.parametrize("columns", [4096, 5000, 16384, 32768, 65536])
def test_rectangles_cover_the_batch_once_in_nearly_equal_parts(columns: int) -> None:
    from drrho_torch import fused

    spans = fused.spans(columns, 5632, 128)
    assert [start for start, _ in spans] == list(np.cumsum([0] + [length for _, length in spans])[:-1])
    assert sum(length for _, length in spans) == columns
    assert all(length % 128 == 0 and length <= 5632 for _, length in spans[:-1])
    assert spans[0][1] - spans[-1][1] <= 128 * len(spans)


@triton
def test_both_sweeps_of_a_plan_see_the_same_logits() -> None:
    from drrho_torch import fused

    for table in fused.PLANS.values():
        for plan in table.values():
            assert plan.sums.depth == plan.weights.depth
            assert plan.panel % plan.sums.rows == 0
            assert plan.panel % plan.masked.rows == 0


@runs
def test_cold_temperatures_overflow_nothing(kernels: Any) -> None:
    problem = fused_sweeps.draw(b=20, d=8, r=8, coldest=0.001)
    fused_sweeps.check(*both_sweeps(kernels, problem, "float32"), problem, unit=100 * 5e-6)


@runs
def test_the_same_inputs_give_the_same_bits(kernels: Any) -> None:
    problem = fused_sweeps.draw(b=70, d=24, r=9, mask=True)
    torch.set_default_dtype(torch.float64)  # which is none of their business
    try:
        one, other = (both_sweeps(kernels, problem, "bfloat16") for _ in range(2))
    finally:
        torch.set_default_dtype(torch.float32)
    for left, right in zip(one, other, strict=True):
        for first, second in zip(left, right, strict=True):
            assert first is second or np.array_equal(first, second)


@runs
def test_the_kit_passes_a_step_that_is_made_of_them(kernels: Any) -> None:
    step = fused_sweeps.step(kernels.TritonSweeps(), to_numpy)
    report = conformance.check({"contrastive_step": step}, xp=torch, device=DEVICE, dtypes=["float32"])
    assert report.passed, report.table()


def test_importing_the_backend_registers_them() -> None:
    features, ones = torch.ones((2, 3), dtype=torch.float64), torch.ones(2)
    batch = Batch(features, features, None, 1.0, ones, ones, None)
    reason = (
        r"because the Triton kernels take float32 and half"
        if HAS_TRITON
        else r"because the kernels need Triton, see docs/fused\.md"
    )
    with fused_kernels("always"), pytest.raises(ValueError, match=reason):
        find_kernels(batch, array_api_compat.torch)


@runs
@pytest.mark.parametrize(
    ("change", "mode", "reason"),
    [
        ({}, "always", None),
        ({"dtype": torch.float64}, "always", r"take float32 and half types, not torch\.float64"),
        ({}, "auto", "multiply float32 no faster"),
        ({"dtype": torch.bfloat16}, "auto", "smaller than 2048"),
        ({"dtype": torch.bfloat16, "b": 2048}, "auto", None),
    ],
)
def test_what_they_decline(kernels: Any, change: dict[str, Any], mode: str, reason: str | None) -> None:
    options = {"dtype": torch.float32, "b": 2} | change
    features = torch.zeros((options["b"], 3), dtype=options["dtype"], device=DEVICE)
    ones = torch.ones(options["b"], device=DEVICE)
    said = kernels.TritonSweeps().declines(Batch(features, features, None, 1.0, ones, ones, None), mode)
    if reason is None:
        assert said is None
    else:
        assert said is not None
        assert re.search(reason, said)


COMPILE = """
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from drrho_torch import fused

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
INTEGERS = {"first_row", "first_column", "row_tiles", "column_tiles", "panel", "image_plane", "text_plane", "width",
            "b", "number", "stride", "plane", "first", "count"}


def build(kernel, dtype, plan, blocks, constants, target):
    def pair_of(name, rows, columns):
        return f"tensordesc<{name}[{rows}, {columns}]>" if plan.descriptors else "*" + name

    types = {"mask": "*u8", "v": pair_of(NAMES[plan.buffer], blocks.rows, blocks.columns)}
    for one, other in (("e1", "e2"), ("r1", "r2")):
        types[one] = pair_of(NAMES[dtype], blocks.rows, blocks.depth)
        types[other] = pair_of(NAMES[dtype], blocks.columns, blocks.depth)
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = types.get(name, "i32" if name in INTEGERS else "*fp32")
        if name in constants:
            signature[name] = "constexpr"
        elif not name.endswith("tiles") and not signature[name].startswith("tensordesc"):
            attributes[place,] = [["tt.divisibility", 16]]
    given = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = ASTSource(kernel, signature, given, attributes)
    built = compile(source, target=GPUTarget("cuda", target, 32), options=fused.launch_options(blocks))
    most = 227 if target == 90 else 99
    assert built.metadata.shared <= most * 1024, (kernel.__name__, dtype, built.metadata.shared)
    if target == 90 and plan.descriptors:
        assert "wgmma" in built.asm["ptx"], (kernel.__name__, dtype)
        assert "cp.async.bulk.tensor" in built.asm["ptx"], (kernel.__name__, dtype)


for target in (90, 80):
    for dtype, plan in fused.PLANS[target // 10].items():
        for mask, paired in ((False, True), (True, True), (False, False)):
            constants = dict(D=128, R=64, HAS_REFERENCE=not mask, HAS_MASK=mask, DESCRIPTORS=plan.descriptors)
            constants |= dict(PAIRED=paired)
            constants |= dict(GROUP=fused.GROUP, PRECISION="ieee", WIDEN=False, BUFFER=fused.TRITON_TYPES[plan.buffer])
            for kernel, blocks, shared in (
                (fused.sums_kernel, plan.sums, None),
                (fused.weights_kernel, plan.weights, True),
                (fused.weights_kernel, plan.weights, False),
            ):
                blocks = plan.masked if mask else blocks
                sizes = dict(ROWS=blocks.rows, COLUMNS=blocks.columns, DEPTH=blocks.depth, SHARED=shared)
                if mask:  # Triton makes a constant of an integer that is 1
                    sizes |= dict(row_tiles=1, column_tiles=1)
                build(kernel, dtype, plan, blocks, constants | sizes, target)
for ones in ({}, dict(number=1, count=1)):
    build(fused.merge_kernel, dtype, plan, plan.sums, ones | dict(PARTS=16, ANCHORS=64), 90)
"""


@triton
@pytest.mark.slow
def test_every_kernel_compiles_for_ampere_and_hopper_without_a_gpu(tmp_path: Any) -> None:
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


TUNER = Path(__file__).parents[2] / "tools" / "tune_fused.py"


def tune(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TUNER), *arguments], capture_output=True, text=True, check=False)


def test_the_tuner_explains_itself_without_a_gpu() -> None:
    done = tune("--help")
    assert done.returncode == 0, done.stderr
    assert "at most eight minutes" in done.stdout


@pytest.mark.skipif(GPU and HAS_TRITON, reason="here it would measure")
def test_the_tuner_says_why_it_measures_nothing(tmp_path: Path) -> None:
    done = tune("--out", str(tmp_path / "tune.json"))
    assert done.returncode == 1
    assert done.stderr.startswith("not measured: ")


@pytest.mark.slow
@pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="Triton is not installed, or no TRITON_INTERPRET=1")
def test_the_tuner_goes_through_all_its_parts_in_the_interpreter(tmp_path: Path) -> None:
    done = tune("--dry-run", "--out", str(tmp_path / "tune.json"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "tune.json").read_text())
    assert {row["part"] for row in rows} >= {"rate", "check", "logits", "pulls", "panels", "whole", "sweep", "best"}
    assert [row for row in rows if "failed" in row] == []
    assert all(row["good"] for row in rows if row["part"] == "check")
