"""The two passes over all pairs of two views.

An anchor is one view of one sample; its negatives are both views of all other samples. So b samples have 2 b anchors,
and the similarities A of all anchors are a matrix of 2 b x 2 b entries. Three blocks of it are enough:

    A11, A22   both sides are the same view, so the matrix is symmetric
    A12        view 1 against view 2; the positives are on its diagonal

On several ranks `drrho_core.contrastive.sharded_views` adds the pairs of own samples and samples of other ranks.
"""

from __future__ import annotations

from typing import TypeAlias

from drrho_core._array_api import Array, Namespace, PerAnchor
from drrho_core.contrastive.options import StepOptions
from drrho_core.contrastive.passes import AnchorSums, log_sums_and_means, merge, pull_back, sum_negatives
from drrho_core.contrastive.ranks import Ranks
from drrho_core.contrastive.sizes import common_sizes
from drrho_core.contrastive.tiles import Tiles, split

Pair: TypeAlias = tuple[Array, Array]
"""One array per view."""

Sums: TypeAlias = tuple[AnchorSums, AnchorSums]
"""The sums of the anchors of each view."""


class ViewPasses:
    """Both passes on one rank that has the whole batch, and the part of both passes that needs own samples only.

    Parameters
    ----------
    views : pair of arrays, shape (b, d)
        The features of both views.
    references : pair of arrays, shape (b, r), or None
        The reference features of both views.
    options : StepOptions
        The checked options of the step.
    tile_size, memory_budget : int, optional
        As in `unimodal_contrastive_step`.
    xp : namespace
        The arrays' namespace.
    ranks : Ranks, optional
        The ranks that share the batch.
    """

    keeps_logits = True
    """If False, no logits stay in memory between the passes."""

    def __init__(
        self,
        views: Pair,
        references: Pair | None,
        options: StepOptions,
        tile_size: int | None,
        memory_budget: int | None,
        xp: Namespace,
        ranks: Ranks | None = None,
    ) -> None:
        self.xp, self.options, self._tile_size = xp, options, tile_size
        self._memory_budget = memory_budget if self.keeps_logits else 0
        self.views, self.references = views, references
        # All matrices are scaled alike, because sums of different matrices are merged.
        self._sizes = common_sizes(
            views, references, options.reference_weight, options.temperature, xp, ranks=ranks, same_sides=True
        )
        # The matrices with other ranks are 4 times as large as the three own ones.
        matrices = 3 if ranks is None else 4 * ranks.size - 1
        self.across, self.within = self._matrix(0, 1, matrices), [self._matrix(v, v, matrices) for v in (0, 1)]

    def sum_negatives(self) -> tuple[Pair, Pair, Sums]:
        """Pass 1: return log-sum-exp and weighted mean of D of the anchors of both views, and their sums for pass 2."""
        # The positive of an anchor is the other view of the same sample, an entry of A12. This also holds if the
        # negative is from the anchor's own view.
        across, rates = sum_negatives(self.across), self.across.scaling.rates
        within = [sum_negatives(tiles)[0] for tiles in self.within]
        sums = [merge(across[view], within[view], rates[view], xp=self.xp) for view in (0, 1)]
        whole = self.over_all_ranks((sums[0], sums[1]))
        return *log_sums_and_means(whole, rates, xp=self.xp), whole

    def pull_back(self, sums: Sums, weights: Pair) -> Pair:
        """Pass 2: return the weighted sums of features for both views, given the sum of each anchor's weights."""
        # V12 Z2 and V12^T Z1, then V11 Z1 and V22 Z2.
        pulls = pull_back(self.across, sums, weights)
        own = [pull_back(self.within[v], (sums[v], sums[v]), (weights[v], weights[v]))[0] for v in (0, 1)]
        return self.from_all_ranks(weights, (pulls[0] + own[0], pulls[1] + own[1]))

    def over_all_ranks(self, sums: Sums) -> Sums:
        """Return the sums over the negatives of all ranks, given those over own negatives."""
        return sums

    def from_all_ranks(self, _weights: Pair, pulls: Pair) -> Pair:
        """Return the pulls of the negatives of all ranks, given those of own negatives."""
        return pulls

    def _matrix(self, first: int, second: int, matrices: int) -> Tiles:
        """Return the similarities of the own samples in two views."""
        references, temperature = self.references, self.options.temperature
        if isinstance(temperature, tuple):
            temperature = temperature[first], temperature[second]
        return self.tiles(
            (self.views[first], self.views[second]),
            None if references is None else (references[first], references[second]),
            temperature,
            matrices,
            symmetric=first == second,
        )

    def tiles(
        self,
        features: Pair,
        references: Pair | None,
        temperature: PerAnchor,
        matrices: int,
        *,
        symmetric: bool = False,
        paired: bool = True,
    ) -> Tiles:
        """Return a matrix of similarities in tiles; so many `matrices` of this size share the memory budget."""
        return split(
            *features,
            temperature=temperature,
            reference_features=references,
            reference_weight=self.options.reference_weight,
            tile_size=self._tile_size,
            memory_budget=self._memory_budget,
            matrices=matrices,
            symmetric=symmetric,
            paired=paired,
            sizes=self._sizes,
            xp=self.xp,
        )
