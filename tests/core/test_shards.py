"""W ranks are one rank: the two-phase formula of the distributed form, block by block, against the step on everything.

No process is started. A rank is a slice of the batch, and what it may use of the others is what they send: in phase 1
features, reference features, the diagonal of Z and temperatures; in phase 2 the new estimates and the numbers of
negatives. It never sees more of Z than two blocks: own images with all texts, all images with own texts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from drrho_core import ContrastiveStep, contrastive_step
from drrho_core.numerics import log_add_constant, log_moving_average, log_sum_exp
from helpers import problems

B = 12
PROBLEMS = {
    "plain": {"r": None},
    "reference": {"r": 3, "reference_weight": 1.5, "gamma": "pair", "eps": 0.1},
    "everything": {
        "r": 5,
        "per_anchor_temperature": True,
        "gamma": "pair",
        "mask": "empty",
        "radius": 0.7,
        "eps": 0.01,
        "reference_weight": 0.5,
    },
    "cold": {"r": 3, "temperature": (1e-3, 2e-3), "per_anchor_temperature": True, "log_inner": 30.0, "mask": "random"},
}


class Batch(NamedTuple):
    """The arrays of a library; one entry per direction: image anchors, text anchors."""

    left: Any  # (b, d + r)
    right: Any
    features: tuple[Any, Any]  # (b, d)
    temperature: tuple[Any, Any]  # (b,)
    gamma: tuple[Any, Any]
    log_inner: tuple[Any, Any]
    mask: Any  # (b, b)


class Block(NamedTuple):
    """What a rank sees in one direction: D of its own anchors, D of the other direction's anchors, what counts."""

    own: Any  # (b / W, b), an anchor per row
    other: Any  # the same pairs, seen from the others' anchors
    counts: Any


def batch_of(p: Any, space: Any) -> Batch:
    images, texts = (space.asarray(x) for x in p.arrays[:2])
    left, right = images, texts
    if p.reference_features is not None:
        r1, r2 = (space.asarray(x) for x in p.reference_features)
        left = space.xp.concat([images, -float(space.rounded(p.reference_weight)) * r1], axis=1)
        right = space.xp.concat([texts, r2], axis=1)

    def per_anchor(value: Any) -> tuple[Any, Any]:
        sides = value if isinstance(value, tuple) else (value, value)
        return tuple(space.asarray(np.broadcast_to(side, (B,)).astype(float)) for side in sides)

    mask = np.ones((B, B), dtype=bool) if p.pair_mask is None else p.pair_mask
    return Batch(
        left,
        right,
        (images, texts),
        per_anchor(p.temperature),
        per_anchor(p.gamma),
        tuple(space.asarray(x) for x in p.arrays[2:]),
        space.asarray(mask & ~np.eye(B, dtype=bool)),
    )


def blocks_of(batch: Batch, positive: Any, rows: slice) -> tuple[Block, Block]:
    """The two blocks of a rank, each with its own anchors as rows."""
    t, t_text = batch.temperature
    z = batch.left[rows, :] @ batch.right.T  # own images, all texts
    image = Block(
        (z - positive[rows][:, None]) / t[rows][:, None],
        (z - positive[None, :]) / t_text[None, :],
        batch.mask[rows, :],
    )
    z = (batch.left @ batch.right[rows, :].T).T  # own texts, all images
    text = Block(
        (z - positive[rows][:, None]) / t_text[rows][:, None],
        (z - positive[None, :]) / t[None, :],
        batch.mask[:, rows].T,
    )
    return image, text


def sharded_step(batch: Batch, num_ranks: int, *, radius: float, eps: float, learned: bool, xp: Any) -> ContrastiveStep:
    """Two phases over all ranks, then what they send is put together."""
    share = B // num_ranks
    ranks = [slice(n * share, (n + 1) * share) for n in range(num_ranks)]

    # Phase 1: the diagonal, a part from each rank; then everyone updates the estimates of its own anchors.
    positive = xp.concat([xp.sum(batch.left[rows, :] * batch.right[rows, :], axis=1) for rows in ranks])
    log_inner, log_value, log_denominator = [], [], []
    for rows in ranks:
        updated = []
        for side, block in enumerate(blocks_of(batch, positive, rows)):
            number = xp.sum(xp.astype(block.counts, block.own.dtype), axis=1)
            alone, one = number == 0, xp.ones_like(number)
            own = log_sum_exp(block.own, axis=1, where=block.counts, xp=xp)
            log_number = xp.log(xp.where(alone, one, number))
            own = xp.where(alone, xp.zeros_like(own), own - log_number)
            old = batch.log_inner[side][rows]
            new = log_moving_average(old, own, batch.gamma[side][rows], xp=xp)
            value = xp.where(alone, xp.zeros_like(new), log_add_constant(new, eps, xp=xp))
            updated.append((xp.where(alone, old, new), value, value + log_number, ~alone))
        log_inner.append([one[0] for one in updated])
        log_value.append([(one[1], one[3]) for one in updated])
        log_denominator.append([one[2] for one in updated])

    # Phase 2: the new estimates are gathered; the same two blocks give each rank its gradients.
    gathered = [xp.concat([one[side] for one in log_denominator]) for side in (0, 1)]
    scale = 1 / (2 * B)
    losses, surrogates, gradients, slopes = [], [], [], []
    for rank, rows in enumerate(ranks):
        weights, sums = [], []
        for side, block in enumerate(blocks_of(batch, positive, rows)):
            w = xp.exp(xp.where(block.counts, block.own - gathered[side][rows][:, None], -xp.inf))
            theirs = xp.exp(xp.where(block.counts, block.other - gathered[1 - side][None, :], -xp.inf))
            weights.append(w + theirs)
            sums.append((xp.sum(w, axis=1), xp.sum(w * block.own, axis=1)))
        c = (sums[0][0] + sums[1][0])[:, None]
        gradients.append(
            [
                scale * (weights[side] @ batch.features[1 - side] - c * batch.features[1 - side][rows, :])
                for side in (0, 1)
            ]
        )
        loss, extra, slope = 0.0, 0.0, []
        for side in (0, 1):
            value, active = log_value[rank][side]
            value = xp.where(active, value + radius, xp.zeros_like(value))
            t = batch.temperature[side][rows]
            loss = loss + scale * xp.sum(t * value)
            extra = extra + scale * xp.sum(t * sums[side][0])
            slope.append(scale * (value - sums[side][1]))
        losses.append(loss)
        surrogates.append(loss + extra)
        slopes.append(slope)

    def joined(parts: list[Any], side: int) -> Any:
        return xp.concat([part[side] for part in parts])

    slope = tuple(joined(slopes, side) for side in (0, 1))
    return ContrastiveStep(
        sum(losses),
        sum(surrogates),
        *(joined(gradients, side) for side in (0, 1)),
        slope if learned else xp.sum(slope[0]) + xp.sum(slope[1]),
        *(joined(log_inner, side) for side in (0, 1)),
    )


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_ranks_together_are_the_whole(space: Any, num_ranks: int, name: str) -> None:
    if space.name == "jax" and (space.jit is None or (num_ranks, name) != (3, "everything")):
        pytest.skip("JAX is met jitted, once: XLA compiles for seconds")
    p = problems.draw(30 + num_ranks, b=B, d=4, **PROBLEMS[name])
    options = {
        "radius": float(space.rounded(p.radius)),
        "eps": float(space.rounded(p.eps)),
        "learned": isinstance(p.temperature, tuple),
        "xp": space.xp,
    }
    got = space.run(lambda *arrays: sharded_step(Batch(*arrays), num_ranks, **options), *batch_of(p, space))
    problems.check_step(problems.to_numpy(space, got), p.run(space), p.rounded(space), space.unit, far=name == "cold")


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_rank_alone_is_not_the_whole(num_ranks: int) -> None:
    # What would come out if nothing were gathered: estimates and gradients of the local batch.
    p = problems.draw(40, b=B, d=4, **PROBLEMS["reference"])
    whole = contrastive_step(*p.arrays, **p.options)
    share = B // num_ranks
    options = p.options
    for name in ("reference_features", "gamma"):
        options[name] = tuple(side[:share] for side in options[name])
    local = contrastive_step(*(array[:share] for array in p.arrays), **options)
    assert np.abs(local.image_gradient / num_ranks - whole.image_gradient[:share]).max() > 1e-3
    assert np.abs(local.log_inner_image - whole.log_inner_image[:share]).max() > 1e-3
