"""Ranks exchange as many bytes as the formulas say, in the types of the features, and all raise the same errors."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from typing import Any

import array_api_compat.torch as torch_namespace
import numpy as np
import pytest
import torch

import drrho_core as core
from benchmarks.many_devices.counted_ranks import StandIn
from drrho_core import InnerEstimator, ThreadRanks, contrastive_step, fused_kernels, sharded_contrastive_step
from helpers import problems
from helpers.features import unit_rows
from helpers.ranks import Counting, joined, on_ranks, own_rows

FORMS = ("reduce", "ring")


def received(p: problems.Problem, num_ranks: int, form: str, dtype: str, reference_dtype: str) -> int:
    """Return the bytes that one rank receives in a step, without the messages whose size does not depend on b."""
    totals = []
    for b in (num_ranks * 3, num_ranks * 5):
        notes: list[tuple[str, int]] = []

        def step(*arrays: Any, ranks: Any, notes: list[tuple[str, int]] = notes, **options: Any) -> Any:
            return sharded_contrastive_step(*arrays, ranks=Counting(ranks, notes), form=form, **options)

        arrays = [x[:b] for x in p.arrays]
        options = p.options
        for name, value in options.items():
            if isinstance(value, tuple):
                options[name] = tuple(x[:b] for x in value)
        if p.pair_mask is not None:
            options["pair_mask"] = p.pair_mask[:b, :b]
        cast = [x.astype(dtype) for x in arrays[:2]]
        if "reference_features" in options:
            options["reference_features"] = tuple(x.astype(reference_dtype) for x in options["reference_features"])
        on_ranks(step, num_ranks, (*cast, *(x.astype("float32") for x in arrays[2:])), options)
        totals.append(sum(number for _, number in notes) / num_ranks)
    # The digest of the arguments has a fixed size, and so have the sums over all ranks.
    return round((totals[1] - totals[0]) / 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "kind", ["plain", "reference", "temperatures", "mask", "half", "half features", "half references"]
)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_rank_receives_the_bytes_of_the_formula(num_ranks: int, kind: str, form: str) -> None:
    d, r = 16, 0 if kind in ("plain", "mask") else 6
    per_anchor = kind == "temperatures"
    p = problems.draw(
        3, b=20, d=d, r=r or None, mask="random" if kind == "mask" else None, per_anchor_temperature=per_anchor
    )
    if per_anchor:
        p = p.mapped(lambda x: x.astype("float32"), float)
    # Features and reference features travel in their own dtypes.
    item, half = 4, {True: 2, False: 4}
    of_features, of_references = kind in ("half", "half features"), kind in ("half", "half references")
    texts = half[of_features] * d + half[of_references] * r
    extra = per_anchor + (kind == "mask")
    if form == "reduce":
        # The gradients of features are sums and so float32.
        per_pair = (num_ranks - 1) * (texts + item * (d + 4 + extra))
    else:
        texts += item * per_anchor
        hops = num_ranks - 1
        masked = item * (kind == "mask")
        per_pair = hops * (2 * texts + item * (d + 6) + masked) + item * (d + 3) + masked
    dtypes = ("float16" if is_half else "float32" for is_half in (of_features, of_references))
    assert received(p, num_ranks, form, *dtypes) == per_pair


NUMBERS: dict[str, tuple[int, int, int]] = {
    # Of a loss with features of width 16 and reference features of width 6: numbers per own pair and other rank in the
    # forms reduce and ring, and in the form ring those of the last hop, per own pair.
    "info_nce": (2 * 16 + 4, 3 * 16 + 6, 16 + 3),
    "sigmoid_loss": (2 * 16, 2 * 16, 16),
    "distillation_loss": (2 * 16 + 6 + 12, 3 * 16 + 2 * 6 + 12, 16 + 8),
    "pair_loss": (16 + 3, 16 + 3, 3),
    "two views": (2 * 16 + 2 * 6 + 2, 4 * 16 + 4 * 6 + 2, 0),
    "two views, temperatures": (2 * 16 + 2 * 6 + 4, 4 * 16 + 4 * 6 + 6, 0),
}


def shared_call(kind: str, ranks: Any, b: int, form: str, *, own: slice = slice(None)) -> Any:
    """Call a function in float32 with the own pairs of b pairs, or with some of them."""
    p = problems.draw(8, b=b, d=16, r=6)
    features, states, references, taus = (
        tuple(x.astype("float32")[own] for x in own_rows(arrays, ranks.rank, ranks.size))
        for arrays in (p.arrays[:2], p.arrays[2:], p.reference_features, tuple(np.full((2, b), 0.5)))
    )
    how: dict[str, Any] = {"ranks": ranks, "form": form}
    if kind.startswith("two views"):
        temperature: Any = taus if kind.endswith("temperatures") else 0.5
        return core.unimodal_contrastive_step(
            *features, *states, temperature=temperature, reference_features=references, **how
        )
    if kind == "sigmoid_loss":
        return core.sigmoid_loss(*features, scale=2.0, bias=-1.0, **how)
    if kind == "distillation_loss":
        return core.distillation_loss(*features, *references, temperature=0.5, reference_temperature=0.5, **how)
    return getattr(core, kind)(*features, temperature=0.5, **how)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_rank_receives_the_numbers_of_the_page_about_ranks(num_ranks: int, kind: str, form: str) -> None:
    totals = []
    for local in (3, 5):
        notes: list[tuple[str, int]] = []

        def call(ranks: Any, local: int = local, notes: list[tuple[str, int]] = notes) -> None:
            shared_call(kind, Counting(ranks, notes), num_ranks * local, form)

        ThreadRanks.run(num_ranks, call)
        totals.append(sum(number for _, number in notes) / num_ranks)
    reduce, ring, last_hop = NUMBERS[kind]
    others = num_ranks - 1
    # Messages whose size does not depend on b cancel in the difference.
    assert (totals[1] - totals[0]) / 2 == 4 * (others * reduce if form == "reduce" else others * ring + last_hop)


def test_ring_needs_less_memory_than_reduce() -> None:
    num_ranks, local, d = 4, 64, 2048
    rng = np.random.default_rng(0)
    features = [unit_rows(rng, num_ranks * local, d).astype("float32") for _ in range(2)]
    states = [np.full(num_ranks * local, -np.inf, dtype="float32")] * 2
    peaks = {}
    for form in FORMS:
        tracemalloc.start()
        try:
            on_ranks(sharded_contrastive_step, num_ranks, (*features, *states), {"temperature": 0.1}, form=form)
            peaks[form] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    # In the form reduce all threads together hold W copies of all texts; this alone is W^2 b d numbers.
    all_texts = num_ranks**2 * local * d * 4
    assert peaks["reduce"] > all_texts
    assert peaks["ring"] < 0.7 * peaks["reduce"], peaks


def test_reduce_holds_the_texts_of_all_ranks_twice_at_most() -> None:
    num_ranks, local, d, r = 16, 16, 256, 256
    rng = np.random.default_rng(0)
    features = [unit_rows(rng, local, width).astype("float32") for width in (d, d, r, r)]
    states = [np.full(local, -np.inf, dtype="float32")] * 2

    def step() -> None:
        options = {"temperature": 0.1, "reference_features": tuple(features[2:])}
        sharded_contrastive_step(*features[:2], *states, ranks=StandIn(num_ranks, np), **options)

    step()
    tracemalloc.start()
    try:
        step()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The logits of the own images, (b, W b), are smaller than the texts.
    logits, texts = 4 * num_ranks * local**2, 4 * num_ranks * local * (d + r)
    assert peak < 2 * texts + logits, peak / texts


@pytest.mark.parametrize("reference", ["the same", "float32", "float64"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_half_types_are_no_farther_from_float64_than_on_one_rank(dtype: str, reference: str, form: str) -> None:
    kind = getattr(torch, dtype)
    p = problems.draw(5, b=12, d=8, gamma="pair")
    of_reference = kind if reference == "the same" else getattr(torch, reference)
    references = tuple(torch.from_numpy(x).to(of_reference) for x in p.reference_features or ())
    features = tuple(torch.from_numpy(x).to(kind) for x in p.arrays[:2])
    states = tuple(torch.from_numpy(x).float() for x in p.arrays[2:])
    gammas = tuple(torch.from_numpy(x).float() for x in p.gamma)
    options = {"temperature": p.temperature, "gamma": gammas, "reference_features": references}

    def errors(step: Any) -> list[float]:
        return [float((x.double() - y).abs().max()) for x, y in zip(step[:4], exact[:4], strict=True)]

    wide = {"gamma": tuple(x.double() for x in gammas), "reference_features": tuple(x.double() for x in references)}
    exact = contrastive_step(*(x.double() for x in (*features, *states)), temperature=p.temperature, **wide)
    whole = contrastive_step(*features, *states, **options)
    shared = joined(on_ranks(sharded_contrastive_step, 3, (*features, *states), options, form=form), torch_namespace)
    unit = 2.0**-22
    for name, mine, alone in zip(whole._fields, errors(shared), errors(whole), strict=False):
        assert mine <= 1.01 * alone + 4 * unit, (name, mine, alone)
    assert shared.image_gradient.dtype == kind


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


def messages(num_ranks: int, change: Callable[[int, dict[str, Any]], None]) -> list[str]:
    """Return the error of each rank of a step whose arguments `change` has made wrong on some ranks."""
    p = problems.draw(9, b=4 * num_ranks, gamma="pair", mask="random")

    def work(ranks: Any) -> str:
        names = ("image_features", "text_features", "log_inner_image", "log_inner_text")
        everything = dict(zip(names, p.arrays, strict=True)) | p.options
        mine = {name: own_rows(value, ranks.rank, num_ranks) for name, value in everything.items()}
        mine["sample_index"] = np.arange(4) + 4 * ranks.rank
        change(ranks.rank, mine)
        state = InnerEstimator(4 * num_ranks, like=np.zeros(1))
        try:
            arrays = [mine.pop(name) for name in names]
            step = sharded_contrastive_step(*arrays, ranks=ranks, **mine)
            state.scatter(np.arange(4), step.log_inner_image, step.log_inner_text)
        except (TypeError, ValueError) as error:
            assert np.all(np.isinf(state.log_inner_image))
            return f"{type(error).__name__}: {error}"
        return "no error"

    return ThreadRanks.run(num_ranks, work)


def shorter(rank: int, a: dict[str, Any]) -> None:
    if rank == 2:
        for name in ("image_features", "text_features", "log_inner_image", "log_inner_text", "sample_index"):
            a[name] = a[name][:3]
        a["reference_features"], a["gamma"] = own_rows((a["reference_features"], a["gamma"]), 0, 1)
        a["reference_features"] = tuple(x[:3] for x in a["reference_features"])
        a["gamma"] = tuple(x[:3] for x in a["gamma"])
        a["pair_mask"] = None


def on_rank_1(**changed: Any) -> Callable[[int, dict[str, Any]], None]:
    def change(rank: int, a: dict[str, Any]) -> None:
        if rank == 1:
            a.update({name: make(a.get(name)) for name, make in changed.items()})

    return change


BAD: dict[str, tuple[Callable[[int, dict[str, Any]], None], str]] = {
    "sizes": (shorter, r"batch_size must be the same on all ranks, got 4 on ranks 0, 1 and 3 on rank 2"),
    "temperatures": (
        on_rank_1(temperature=lambda _: 0.25),
        r"temperature must be the same on all ranks, got [\d.]+ on ranks 0, 2 and 0\.25 on rank 1",
    ),
    "kinds of option": (
        on_rank_1(reference_features=lambda _: None),
        r"reference_features must be the same on all ranks, got shape \(4, 3\) .* and None on rank 1",
    ),
    "forms": (on_rank_1(form=lambda _: "ring"), r"form must be the same on all ranks, got .* and 'ring' on rank 1"),
    "dtype of the features": (
        on_rank_1(image_features=lambda x: x.astype("float32"), text_features=lambda x: x.astype("float32")),
        r"image_features must be the same on all ranks, got shape \(4, 4\) and dtype float64 on ranks 0, 2 and .*32 on",
    ),
    "a wrong argument of one rank": (
        on_rank_1(gamma=lambda _: 1.5),
        r"rank 1 refuses its arguments: gamma must be in \(0, 1\], got 1\.5",
    ),
    "a mask of own columns": (
        on_rank_1(pair_mask=lambda x: x[:, :4]),
        r"rank 1 refuses its arguments: pair_mask must have shape \(batch_size, number of ranks \* batch_size\)",
    ),
    "an id on two ranks": (
        on_rank_1(sample_index=lambda _: np.asarray([4, 5, 3, 7])),
        r"sample_index must not repeat an index within a batch, got 3 on rank 0 and on rank 1",
    ),
    "an id twice on one rank": (
        on_rank_1(sample_index=lambda _: np.asarray([4, 5, 5, 7])),
        r"sample_index must not repeat an index within a batch, got 5 twice on rank 1",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_all_ranks_raise_the_same_error_before_any_state_changes(kind: str) -> None:
    change, message = BAD[kind]
    every = messages(3, change)
    assert len(set(every)) == 1
    assert re.search(message, every[0]), every[0]


@pytest.mark.parametrize("kind", NUMBERS)
def test_a_rank_without_pairs_is_named_on_all_ranks(kind: str) -> None:
    def call(ranks: Any) -> str:
        with pytest.raises(ValueError) as caught:
            shared_call(kind, ranks, 6, "reduce", own=slice(0 if ranks.rank == 1 else None))
        return str(caught.value)

    (message,) = set(ThreadRanks.run(3, call))
    name = "view1_features" if kind.startswith("two views") else "image_features"
    assert message == f"rank 1 refuses its arguments: {name} must hold at least 1 pair on each rank, got 0"


def test_a_form_that_does_not_exist_is_refused_on_all_ranks() -> None:
    def everywhere(_: int, a: dict[str, Any]) -> None:
        a["form"] = "tree"

    assert set(messages(2, everywhere)) == {"ValueError: form must be 'reduce' or 'ring', got 'tree'"}


def test_a_mask_of_all_columns_and_different_ids_are_accepted() -> None:
    assert messages(3, lambda _rank, _arguments: None) == ["no error"] * 3


def test_fused_kernels_are_not_promised_to_ranks() -> None:
    p = problems.draw(1, b=4)
    with fused_kernels("always"), pytest.raises(RuntimeError, match="several ranks share the batch, got 'always'"):
        on_ranks(sharded_contrastive_step, 2, p.arrays, p.options)


# ---------------------------------------------------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------------------------------------------------


def test_a_rank_that_raises_stops_the_others_and_is_named() -> None:
    reached = []

    def work(ranks: Any) -> None:
        ranks.all_sum((np.ones(2),))
        if ranks.rank == 1:
            raise MemoryError("no room")
        ranks.all_sum((np.ones(2),))
        reached.append(ranks.rank)

    with pytest.raises(RuntimeError, match=r"^rank 1 raised MemoryError: no room$") as caught:
        ThreadRanks.run(3, work)
    assert isinstance(caught.value.__cause__, MemoryError)
    assert reached == []


def test_ranks_that_call_different_operations_or_return_early_are_named() -> None:
    def different(ranks: Any) -> None:
        (ranks.all_sum if ranks.rank else ranks.shift)((np.ones(2),))

    def early(ranks: Any) -> None:
        if ranks.rank:
            ranks.all_sum((np.ones(2),))

    with pytest.raises(RuntimeError, match=r"rank \d calls (all_sum|shift), but rank \d calls (all_sum|shift)"):
        ThreadRanks.run(2, different)
    with pytest.raises(RuntimeError, match="rank 1 calls all_sum, but rank 0 has already returned"):
        ThreadRanks.run(2, early)


def test_each_operation_of_threads_moves_the_right_rows() -> None:
    def work(ranks: Any) -> list[Any]:
        table = 10.0 * ranks.rank + np.arange(3.0)
        carry = ranks.repeat(2, lambda k, arrays: (ranks.shift(arrays)[0] + 100 * k,), (table,))
        results = [ranks.all_gather((table,)), ranks.all_sum((table,)), ranks.all_to_all((table,)), carry]
        table += 1000  # a message that was sent does not change any more
        return [*(x[0].tolist() for x in results), float(ranks.reduce_scatter((table,))[0])]

    rank_0, _, rank_2 = ThreadRanks.run(3, work)
    assert rank_0[0] == rank_2[0] == [[0, 1, 2], [10, 11, 12], [20, 21, 22]]
    assert rank_0[1] == rank_2[1] == [30, 33, 36]
    assert (rank_0[2], rank_2[2]) == ([0, 10, 20], [2, 12, 22])
    assert (rank_0[3], rank_2[3]) == ([320, 321, 322], [310, 311, 312])
    assert (rank_0[4], rank_2[4]) == (3030.0, 3036.0)
