"""The two passes over all pairs of two views, if several ranks share the batch.

Each of W ranks holds b samples, so 2 b anchors. `drrho_core.contrastive.view_passes` computes the pairs of own samples.
The rows of the other ranks are the columns of W - 1 further matrices of similarities, 2 b x 2 b each. These matrices
have no positives. A rank computes all negatives of its own anchors, and no gradient is summed over ranks:

    reduce     The features of all ranks are gathered.
    ring       The features travel from rank to rank, once in each pass. No rank holds the features of all ranks.

An anchor pulls its negatives, too, which may be rows of another rank. The rank of the anchor knows which part of the
anchor's sum came from which rank. So it sends each rank the weight of this rank's part, one number per anchor. The
receiving rank has computed the exponentials of this part itself, as the columns of its own matrix, and divides each
exponential by their sum. So the weights of an anchor add up to the right number, however they are rounded.
"""

from __future__ import annotations

from typing import Any

from drrho_core._array_api import Array, Namespace, Scalar
from drrho_core.contrastive.options import StepOptions
from drrho_core.contrastive.passes import AnchorSums, merge, part_of_sum, pull_back, sum_negatives
from drrho_core.contrastive.ranks import Arrays, Ranks
from drrho_core.contrastive.sharded_passes import by_rank, merged, received_sums
from drrho_core.contrastive.tiles import Tiles
from drrho_core.contrastive.view_passes import Pair, Sums, ViewPasses


def find_view_passes(
    views: Pair,
    references: Pair | None,
    options: StepOptions,
    tile_size: int | None,
    memory_budget: int | None,
    xp: Namespace,
    ranks: Ranks | None,
    form: str,
) -> ViewPasses:
    """Return the passes of a batch, on one rank or over ranks."""
    if ranks is None:
        return ViewPasses(views, references, options, tile_size, memory_budget, xp)
    kind = ReducedViews if form == "reduce" else RingViews
    return kind(views, references, options, tile_size, memory_budget, xp, ranks)


class ReducedViews(ViewPasses):
    """Both passes in the form reduce; for the parameters see `ViewPasses`."""

    def __init__(
        self,
        views: Pair,
        references: Pair | None,
        options: StepOptions,
        tile_size: int | None,
        memory_budget: int | None,
        xp: Namespace,
        ranks: Ranks,
    ) -> None:
        super().__init__(views, references, options, tile_size, memory_budget, xp, ranks)
        self.ranks = ranks
        # The rows that other ranks need: features and reference features in their own dtypes, and temperatures if each
        # anchor has its own. First come all rows of view 1, then all rows of view 2.
        pairs = (views, references, options.temperature)
        self.rows: Arrays = tuple(xp.concat(list(pair), axis=0) for pair in pairs if isinstance(pair, tuple))
        self.per_anchor = isinstance(options.temperature, tuple)
        rates = self.across.scaling.rates
        self.rate: Scalar = xp.concat(list(rates)) if self.per_anchor else rates[0]

    def over_all_ranks(self, sums: Sums) -> Sums:
        """Return the sums over the negatives of all ranks, given those over own negatives."""
        xp = self.xp
        own = _both(sums, xp)
        # An anchor has both views of all other samples of the batch as negatives.
        number = 2.0 * self.options.batch_size - 2.0
        whole = self.visit_all(own._replace(count=None))
        self.whole = whole._replace(positive=own.positive, count=xp.full_like(own.total, number))
        return _halves(self.whole)

    def from_all_ranks(self, weights: Pair, pulls: Pair) -> Pair:
        """Return the pulls of the negatives of all ranks, given those of own negatives."""
        xp, weight = self.xp, self.xp.concat(list(weights))
        # Rank r gets entry r of the message; entry r of the answer belongs to the anchors of rank r. The entry of the
        # own rank is not used.
        shares = [weight * part_of_sum(part, self.whole, self.rate, xp=xp) for part in self.parts()]
        (received,) = self.ranks.all_to_all((by_rank([xp.zeros_like(weight), *shares], self.ranks, xp),))
        pull = self.pull_all(weight, received, xp.concat(list(pulls), axis=0))
        half = weight.shape[0] // 2
        return pull[:half, :], pull[half:, :]

    def visit_all(self, own: AnchorSums) -> AnchorSums:
        """Pass 1: return the sums of the own anchors over the negatives of all ranks."""
        gathered = self.ranks.all_gather(self.rows)
        self._tables: list[Tiles] = []
        self._to_rows: list[AnchorSums] = []
        self._to_columns: list[AnchorSums] = []
        for k in range(1, self.ranks.size):
            table = self.table(tuple(x[self.owner(k), ...] for x in gathered))
            rows, columns = sum_negatives(table)
            table.release()
            self._tables.append(table)
            self._to_rows.append(rows._replace(count=None))
            self._to_columns.append(columns)
        return merged([own, *self._to_rows], self.rate, self.xp)

    def parts(self) -> list[AnchorSums]:
        """Return the sums of the own anchors over the rows of each other rank, starting with rank + 1."""
        return self._to_rows

    def pull_all(self, weight: Array, received: Array, pull: Array) -> Array:
        """Pass 2: add to `pull` the pairs with other ranks, given the weights of the own and of the other anchors."""
        for k, columns in enumerate(self._to_columns, start=1):
            # A table leaves the list, so that the memory of its tiles is free as soon as it was read.
            pull += self.pull_of(self._tables.pop(0), columns, weight, received[self.owner(k), ...])
        return pull

    def owner(self, k: Any) -> Any:
        """Return the rank that is k ranks after the own rank."""
        return (self.ranks.rank + k) % self.ranks.size

    def table(self, others: Arrays) -> Tiles:
        """Return the similarities of all own rows with all rows of another rank."""
        return self.tiles(
            (self.rows[0], others[0]),
            None if self.references is None else (self.rows[1], others[1]),
            (self.rows[-1], others[-1]) if self.per_anchor else self.options.temperature,
            self.ranks.size,
            paired=False,
        )

    def pull_of(self, table: Tiles, columns: AnchorSums, weight: Array, theirs: Array) -> Array:
        """Return the pull of one other rank's rows at the own rows."""
        return pull_back(table, (self.whole, columns), (weight, theirs), to_columns=False)[0]


class RingViews(ReducedViews):
    """Both passes in the form ring."""

    keeps_logits = False

    def visit_all(self, own: AnchorSums) -> AnchorSums:
        """Pass 1: return the sums of the own anchors over the negatives of all ranks."""
        xp, others = self.xp, self.ranks.size - 1
        hops = xp.arange(1, others + 1, device=self.across.device)

        # The carry holds three sums of the own anchors, four arrays for the second pass, and the rows that travel.
        def visit(k: Any, carry: Arrays) -> Arrays:
            travelling = self.ranks.shift(carry[7:])
            rows, columns = sum_negatives(self.table(travelling))
            rows = rows._replace(count=None)
            # The sums of each matrix are kept for the second pass. `k` may be traced, so `where` stores them.
            new = (rows.peak, rows.total, columns.peak, columns.total)
            kept = (xp.where(hops[:, None] == k, x[None, :], old) for x, old in zip(new, carry[3:7], strict=True))
            whole = merge(received_sums(carry[:3]), rows, self.rate, xp=xp)
            return (*whole[:3], *kept, *travelling)

        empty = xp.stack([xp.zeros_like(own.total)] * others) if others else own.total[None, :]
        carry = self.ranks.repeat(others, visit, (*own[:3], *[empty] * 4, *self.rows))
        self._kept = carry[3:7]
        return received_sums(carry[:3])

    def parts(self) -> list[AnchorSums]:
        """Return the sums of the own anchors over the rows of each other rank, starting with rank + 1."""
        peak, total, _, _ = self._kept
        return [_peak_and_total(peak[k, ...], total[k, ...]) for k in range(self.ranks.size - 1)]

    def pull_all(self, weight: Array, received: Array, pull: Array) -> Array:
        """Pass 2: add to `pull` the pairs with other ranks, given the weights of the own and of the other anchors."""
        _, _, peak, total = self._kept

        def visit(k: Any, carry: Arrays) -> Arrays:
            travelling = self.ranks.shift(carry[1:])
            columns = _peak_and_total(peak[k - 1, ...], total[k - 1, ...])
            more = self.pull_of(self.table(travelling), columns, weight, received[self.owner(k), ...])
            return (carry[0] + more, *travelling)

        return self.ranks.repeat(self.ranks.size - 1, visit, (pull, *self.rows))[0]


def _both(sums: Sums, xp: Namespace) -> AnchorSums:
    """Return the sums of the anchors of both views, first those of view 1."""
    return AnchorSums(*(xp.concat([first, second]) for first, second in zip(*sums, strict=True)))


def _halves(sums: AnchorSums) -> Sums:
    """Return the sums of the anchors of view 1 and of view 2."""
    half = sums.total.shape[0] // 2
    fields = [x for x in sums if x is not None]
    return AnchorSums(*(x[:half] for x in fields)), AnchorSums(*(x[half:] for x in fields))


def _peak_and_total(peak: Array, total: Array) -> AnchorSums:
    """Return the sums of anchors without the fields that the second pass does not need."""
    return AnchorSums(peak, total, total, None, None)
