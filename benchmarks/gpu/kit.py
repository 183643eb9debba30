"""Check results on a device: run the conformance kit, and compare half types with NumPy in float64.

The kit compares our functions with the oracle (drrho_reference, the slow NumPy implementation). Half types are bfloat16
and float16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks.gpu.libraries import TEMPERATURE, Absent, open_library
from benchmarks.gpu.plan import HALF, Case
from benchmarks.gpu.processes import FAILED, Report, Row, rounded

AGREEMENT = {True: ((64, 32, True), (48, 32, False)), False: ((2048, 768, True), (1500, 768, False))}
"""For each value of `dry_run` the batches that are compared with NumPy in float64.

A batch has a size b, features of width d, and perhaps a reference model.
"""


class Kit:
    """Run the conformance kit on a device, and compare half types with NumPy in float64."""

    def __init__(self, first: Case, report: Report, dry_run: bool) -> None:
        self.library = open_library(first["library"], dry_run=dry_run)
        self.report, self.dry_run = report, dry_run
        if self.library.name == "jax":
            import jax

            # The kit also checks float64, which is off by default in JAX.
            jax.config.update("jax_enable_x64", True)  # type: ignore[no-untyped-call]

    def __call__(self, case: Case) -> Row:
        facts = self.library.facts()
        if case["engine"] == "fused" and (reason := self.library.no_kernels()) is not None:
            raise Absent(reason)
        if case["check"] == "half types":
            return facts | self.half_types(case["engine"])
        return facts | self.conformance(case["engine"], every="all" in case["check"])

    def conformance(self, engine: str, *, every: bool) -> Row:
        """Run the kit function by function, so that earlier functions keep their results if the time runs out."""
        import drrho_reference.conformance as kit

        import drrho_core

        own = {name: getattr(drrho_core, name) for name in drrho_core.__all__}
        functions = list(dict.fromkeys(problem.function for problem in kit.ordered_problems()))
        names = [name for name in functions if (name == "contrastive_step") != every and name in own]
        # A dry run checks this program, not the library, which the tests check. So it takes functions with few cases.
        if self.dry_run:
            names = ["info_nce", "weighted_sum"] if every else ["pair_loss"]
        # The kit also needs the names that it does not check, such as the ambiguity sets.
        others = {name: value for name, value in own.items() if name not in functions}
        # The kernels have no float64.
        dtypes = ["float32"] if engine == "fused" or self.dry_run else ["float64", "float32"]
        result: Row = {"functions": 0, "of": len(names), "passed": 0, "fields": 0, "worst_share_of_bound": 0.0}
        if self.dry_run:
            result["check"] = ", ".join(names)
        wrong: list[str] = []
        for name in names:
            with self.kernels(engine):
                checked = kit.check(
                    others | {name: own[name]}, xp=self.library.xp, device=self.library.kit_device, dtypes=dtypes
                )
            fields = [field for case in checked.cases for field in case.fields]
            result["functions"] += 1
            result["fields"] += len(fields)
            result["passed"] += sum(field.verdict == "passed" for field in fields)
            shares = [field.relative / field.bound for field in fields if field.relative is not None]
            result["worst_share_of_bound"] = rounded(max([result["worst_share_of_bound"] or 0.0, *shares]))
            wrong += [
                f"{name}, {case.name}, {case.dtype}: {field.name} {field.verdict} {field.note}".strip()
                for case in checked.cases
                for field in case.fields
                if field.verdict != "passed"
            ]
            if wrong:
                result["wrong"] = wrong[:20]
            self.report("progress", result)
        if result["passed"] != result["fields"]:
            return result | {"status": FAILED, "reason": f"{len(wrong)} fields have not passed, the first: {wrong[0]}"}
        return result

    @contextmanager
    def kernels(self, engine: str) -> Iterator[None]:
        from drrho_core import fused_kernels

        with fused_kernels("always" if engine == "fused" else "never"):
            yield

    def half_types(self, engine: str) -> Row:
        """Compare a step on half types with a step in NumPy's float64 on the same numbers, and with a second run."""
        from drrho_core import contrastive_step

        name = HALF[self.library.name]
        unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[name]
        # V is the matrix of weights. Rounding V adds an error of 1 unit (2 in an interpreter, which truncates).
        # Rounding the gradient adds 2 units, because an entry may be twice the size by which errors are divided. Tensor
        # cores add with a few bits less than float32, so on a GPU the bound of sums is wider.
        logarithm = 5e-6 if self.dry_run else 2e-5
        bounds = {"gradient": 4 * unit, "state": logarithm, "loss": logarithm}
        worst, reasons = dict.fromkeys(bounds, 0.0), []
        for b, d, has_reference in AGREEMENT[self.dry_run]:
            rng = np.random.default_rng(b)
            drawn = [rng.standard_normal((b, d)) for _ in range(4)]
            given = [self.library.given(x / np.linalg.norm(x, axis=1, keepdims=True), name) for x in drawn]
            exact = [self.library.numpy(x) for x in given]
            unseen = np.full(b, -np.inf)
            state = self.library.given(unseen, "float32")

            def step(arrays: list[Any], state: Any, has_reference: bool = has_reference) -> Any:
                reference = (arrays[2], arrays[3]) if has_reference else None
                return contrastive_step(
                    arrays[0], arrays[1], state, state, temperature=TEMPERATURE, reference_features=reference
                )

            expected = step(exact, unseen)
            with self.kernels(engine):
                first, second = step(given, state), step(given, state)
            largest = largest_sum_of_weights(exact if has_reference else exact[:2])
            for field, kind in FIELDS.items():
                got, right = self.library.numpy(getattr(first, field)), np.asarray(getattr(expected, field))
                size = np.maximum(1.0, np.abs(right))
                if kind == "gradient":
                    size = largest / (2 * b) * max(float(np.max(np.abs(x))) for x in exact[:2])
                worst[kind] = max(worst[kind], float(np.max(np.abs(got - right) / size)))  # max may drop a nan
                if not np.all(np.isfinite(got)):
                    reasons.append(f"{field} is not finite")
                if not np.array_equal(got, self.library.numpy(getattr(second, field)), equal_nan=True):
                    reasons.append(f"{field} differs from call to call")
        reasons += [
            f"{kind} is off by {worst[kind]:.1e}, allowed {bound:.1e}"
            for kind, bound in bounds.items()
            if not worst[kind] <= bound
        ]
        row: Row = {f"{kind}_error": rounded(value) for kind, value in worst.items()}
        return row | ({"status": FAILED, "reason": "; ".join(reasons)} if reasons else {})


FIELDS = {"image_gradient": "gradient", "text_gradient": "gradient", "log_inner_image": "state",
          "log_inner_text": "state", "loss": "loss"}  # fmt: skip


def largest_sum_of_weights(features: Sequence[np.ndarray]) -> float:
    """Return the largest sum over a row or a column of the weights V for gamma = 1, so without stored estimates.

    This sum times the largest feature entry, divided by 2b, is the size of the entries of the feature gradients.
    """
    z = features[0] @ features[1].T
    if len(features) > 2:
        z = z - features[2] @ features[3].T
    positive = np.diagonal(z).copy()
    np.fill_diagonal(z, -np.inf)
    # V is the sum of the weights of both directions: a softmax over each row plus a softmax over each column of z.
    v = np.zeros_like(z)
    for axis, positives in ((1, positive[:, None]), (0, positive[None, :])):
        exponents = (z - positives) / TEMPERATURE
        weights = np.exp(exponents - np.max(exponents, axis=axis, keepdims=True))
        v += weights / np.sum(weights, axis=axis, keepdims=True)
    return float(max(np.max(np.sum(v, axis=axis)) for axis in (0, 1)))
