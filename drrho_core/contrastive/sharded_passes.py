"""The two passes over all pairs of a batch that several ranks share.

Each of W ranks holds b pairs. Z, the matrix of the excess similarities of all images and all texts, is cut into W x W
blocks of size b x b. A rank computes the W blocks of its own images. Blocks are numbered relative to the own rank:
block k holds the own images and the texts of rank (rank + k) % W. So the positives are the diagonal of block 0 on each
rank.

    reduce   All texts are gathered. The sums over text anchors are sent to the rank that holds the texts, which merges
             them. The gradients of texts are summed over ranks and scattered.
    ring     The texts travel from rank to rank, together with the sums, later the gradients, that the ranks visited so
             far have accumulated for them. No rank holds all texts.

A text anchor has negatives on all ranks. For the second pass a rank needs the weights that the anchors of other ranks
give to its own images. In the form reduce the rank of an anchor knows which part of the anchor's sum came from which
rank, so it splits the anchor's weight accordingly and sends each rank the weight of this rank's part: one number per
anchor. `drrho_core.contrastive.passes` computes each block; a block is a matrix whose columns have other owners.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from drrho_core._array_api import Array, Namespace, PerAnchor, Scalar
from drrho_core._routines import find_kernels
from drrho_core.contrastive.blocks import Block, KernelBlock, TileBlock, kernel_dtype
from drrho_core.contrastive.passes import AnchorSums, PlainSweeps, log_sums_and_means, merge, part_of_sum
from drrho_core.contrastive.ranks import Arrays, Ranks
from drrho_core.contrastive.sizes import common_sizes
from drrho_core.contrastive.tiles import Tiles, cast, split, work_dtype
from drrho_core.extend import Batch, BlockSweeps, FirstSweep, SecondSweep, Sweeps


def find_sweeps(
    batch: Batch,
    temperature: PerAnchor,
    tile_size: int | None,
    memory_budget: int | None,
    xp: Namespace,
    ranks: Ranks | None = None,
    form: str = "reduce",
    block_kernels: BlockSweeps | None = None,
) -> Sweeps:
    """Return the passes for a batch: over ranks, or fused kernels if `fused_kernels` allows them, or `PlainSweeps`.

    `block_kernels` are those that `choose_kernels` returned for the batch.
    """
    if ranks is not None:
        keep = form == "reduce"
        blocks = Blocks(batch, temperature, tile_size, memory_budget, ranks, keep, xp, kernels=block_kernels)
        return over_ranks(blocks, form)
    kernels = find_kernels(batch, xp)
    return PlainSweeps(temperature, tile_size, memory_budget, xp) if kernels is None else kernels


def over_ranks(blocks: Blocks, form: str) -> ReducedSweeps | RingSweeps:
    """Return the passes over the blocks in one of the two forms."""
    return ReducedSweeps(blocks) if form == "reduce" else RingSweeps(blocks)


class Blocks:
    """The blocks of Z that one rank computes.

    Parameters
    ----------
    batch : Batch
        The own pairs; the mask has the own rows, (b, W b).
    temperature : float, array of shape () or pair of arrays of shape (b,)
        The temperature of the own anchors.
    tile_size, memory_budget : int, optional
        As in `contrastive_step`. The budget is shared by all blocks.
    ranks : Ranks
        The ranks that share the batch.
    keep : bool
        If True, the logits may stay in memory between the passes.
    xp : namespace
        The arrays' namespace.
    models : int
        Number of models whose logits share the budget.
    share : bool
        As in `drrho_core.contrastive.tiles.split`.
    kernels : BlockSweeps, optional
        Fused kernels that compute the blocks. None: tiles.
    """

    def __init__(
        self,
        batch: Batch,
        temperature: PerAnchor,
        tile_size: int | None,
        memory_budget: int | None,
        ranks: Ranks,
        keep: bool,
        xp: Namespace,
        *,
        models: int = 1,
        share: bool = True,
        kernels: BlockSweeps | None = None,
    ) -> None:
        self.kernels, self.ranks, self.xp, self._temperature = kernels, ranks, xp, temperature
        self._tile_size, self._budget = tile_size, memory_budget if keep else 0
        self._models, self._share = models, share
        self.num_local = int(batch.image_features.shape[0])
        references = batch.reference_features
        # The texts that travel: features and reference features in their own dtypes, and temperatures if each anchor
        # has its own. A text is cast to the dtype of the products after it has arrived.
        self.per_anchor = isinstance(temperature, tuple)
        self.texts: Arrays = (batch.text_features,)
        if references is not None:
            self.texts += (references[1],)
        if isinstance(temperature, tuple):
            self.texts += (temperature[1],)
        # The own images are cast once for all blocks.
        with_kernels = kernels is not None
        self._dtype = kernel_dtype(batch, xp) if with_kernels else work_dtype(batch.image_features, references, xp)
        if references is not None:
            references = cast(references[0], self._dtype, xp), references[1]
        self.batch = batch = batch._replace(
            image_features=cast(batch.image_features, self._dtype, xp), reference_features=references
        )
        # All ranks have to scale Z by the same factors, which depend on the largest features of all ranks. Kernels do
        # not scale Z.
        self._sizes = None
        if kernels is None:
            self._sizes = common_sizes(
                (batch.image_features, batch.text_features),
                references,
                batch.reference_weight,
                temperature,
                xp,
                ranks=ranks,
            )
        self.mask = None
        if batch.pair_mask is not None:
            self.mask = xp.reshape(batch.pair_mask, (self.num_local, ranks.size, self.num_local))

    def block(self, k: Any, texts: Arrays, paired: bool) -> Block:
        """Return block k, given the texts of rank (rank + k) % W, for kernels if there are any, else in tiles."""
        if self.kernels is None:
            return TileBlock(self.tiles(k, texts, paired))
        batch, text_temperature = self.batch, self.batch.temperature_text
        if self.per_anchor:
            texts, text_temperature = texts[:-1], texts[-1]
        texts = cast(texts, self._dtype, self.xp)
        references, mask = self._references(texts), self._mask_of(k)
        of_pairs = (batch.image_features, texts[0], references, batch.reference_weight)
        return KernelBlock(
            self.kernels, Batch(*of_pairs, batch.temperature_image, text_temperature, mask), paired, self.xp
        )

    def tiles(self, k: Any, texts: Arrays, paired: bool) -> Tiles:
        """Return block k in tiles, given the texts of rank (rank + k) % W."""
        batch, temperature = self.batch, self._temperature
        if isinstance(temperature, tuple):
            temperature = (temperature[0], texts[-1])
        return split(
            batch.image_features,
            texts[0],
            temperature=temperature,
            reference_features=self._references(texts),
            reference_weight=batch.reference_weight,
            pair_mask=self._mask_of(k),
            tile_size=self._tile_size,
            memory_budget=self._budget,
            matrices=self._models * self.ranks.size,
            share=self._share,
            paired=paired,
            sizes=self._sizes,
            xp=self.xp,
        )

    def _references(self, texts: Arrays) -> tuple[Array, Array] | None:
        """Return the reference features of a block: those of the own images and of the texts that arrived."""
        references = self.batch.reference_features
        return None if references is None else (references[0], texts[1])

    def _mask_of(self, k: Any) -> Array | None:
        """Return the mask of block k, (b, b)."""
        return None if self.mask is None else self.mask[:, self.owner(k), :]

    def owner(self, k: Any) -> Any:
        """Return the rank that holds the texts of block k."""
        return (self.ranks.rank + k) % self.ranks.size

    def counted(self, sums: AnchorSums) -> AnchorSums:
        """Return the sums of anchors of the whole batch with the number of negatives; a mask was counted already."""
        if self.mask is not None:
            return sums
        number = self.ranks.size * self.num_local - 1
        return sums._replace(count=self.xp.full_like(sums.total, float(number)))


class _SweepsOverRanks:
    """The part that both forms share; see `drrho_core.extend.Sweeps`."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks

    def declines(self, _batch: Batch, _mode: str, /) -> str | None:
        """Return None: no batch is declined."""
        return None


class ReducedSweeps(_SweepsOverRanks):
    """Both passes in the form reduce."""

    def sum_negatives(self, _batch: Batch, /) -> FirstSweep:
        """Pass 1: return the log-sum-exp over each own anchor's negatives on all ranks."""
        blocks, ranks, xp = self._blocks, self._blocks.ranks, self._blocks.xp
        gathered = ranks.all_gather(blocks.texts)
        tables, to_images, to_texts = [], [], []
        for k in range(ranks.size):
            owner = blocks.owner(k)
            table = blocks.block(k, tuple(x[owner, ...] for x in gathered), k == 0)
            rows, columns = table.sums()
            table.release()
            tables.append(table)
            to_images.append(rows)
            to_texts.append(columns)
        # Each text anchor's sums go to the rank that holds the text, which merges the parts of all ranks.
        names = AnchorSums._fields[: 4 if blocks.mask is not None else 3]
        sent = tuple(by_rank([getattr(part, name) for part in to_texts], ranks, xp) for name in names)
        received = ranks.all_to_all(sent)
        rates = tables[0].rates
        parts = [received_sums(tuple(x[rank, ...] for x in received)) for rank in range(ranks.size)]
        image = blocks.counted(merged(to_images, rates[0], xp))
        text = blocks.counted(merged(parts, rates[1], xp)._replace(positive=to_texts[0].positive))
        log_sums, means = log_sums_and_means((image, text), rates, xp=xp)
        return FirstSweep(*log_sums, *means, image.count, text.count, saved=(tables, image, to_texts, [text, *parts]))

    def anchor_sums(self, first: FirstSweep) -> tuple[AnchorSums, AnchorSums]:
        """Return the sums of the own image anchors and of the own text anchors over the negatives of all ranks."""
        return first.saved[1], first.saved[3][0]

    def table(self, first: FirstSweep, k: Any, _texts: Arrays, _paired: bool) -> Tiles:
        """Return the tiles of block k, which pass 1 has made."""
        made: TileBlock = first.saved[0][k]
        return made.tiles

    def pull_back(self, _batch: Batch, first: FirstSweep, weight_image: Array, weight_text: Array, /) -> SecondSweep:
        """Pass 2: return the weighted sums of features for the own images and texts."""
        blocks, ranks, xp = self._blocks, self._blocks.ranks, self._blocks.xp
        tables, image, to_texts, (text, *parts) = first.saved
        rate = tables[0].rates[1]
        shares = [weight_text * part_of_sum(part, text, rate, xp=xp) for part in parts]
        (weights,) = ranks.all_to_all((xp.stack(shares),))
        image_pull, text_pulls = None, []
        for k, columns in enumerate(to_texts):
            pulls = tables[k].pull((image, columns), (weight_image, weights[blocks.owner(k), ...]))
            tables[k] = None  # the memory of the tiles is free from here on
            if image_pull is None:
                image_pull = pulls[0]
            else:
                image_pull += pulls[0]
            text_pulls.append(pulls[1])
        (text_pull,) = ranks.reduce_scatter((by_rank(text_pulls, ranks, xp),))
        return SecondSweep(image_pull, text_pull)


class RingSweeps(_SweepsOverRanks):
    """Both passes in the form ring."""

    def sum_negatives(self, _batch: Batch, /) -> FirstSweep:
        """Pass 1: return the log-sum-exp over each own anchor's negatives on all ranks."""
        blocks, ranks, xp = self._blocks, self._blocks.ranks, self._blocks.xp
        own = blocks.block(0, blocks.texts, True)
        rates = own.rates
        image, text = own.sums()
        width, num_sums = len(blocks.texts), 4 if blocks.mask is not None else 3
        positive = text.positive

        def visit(k: Any, carry: Arrays) -> Arrays:
            # The arrays after the own images' sums travel: after k hops they are those of the texts of block k.
            travelling = ranks.shift(carry[num_sums:])
            texts, accumulated = travelling[:width], received_sums(travelling[width:])
            table = blocks.block(k, texts, False)
            rows, columns = table.sums()
            mine = merge(received_sums(carry[:num_sums]), rows, rates[0], xp=xp)
            accumulated = merge(accumulated, columns, table.rates[1], xp=xp)
            return (*mine[:num_sums], *texts, *accumulated[:num_sums])

        carry = ranks.repeat(ranks.size - 1, visit, (*image[:num_sums], *blocks.texts, *text[:num_sums]))
        at_home = carry[num_sums + width :]
        if ranks.size > 1:
            at_home = ranks.shift(at_home)
        image = blocks.counted(received_sums(carry[:num_sums])._replace(positive=positive))
        text = blocks.counted(received_sums(at_home)._replace(positive=positive))
        log_sums, means = log_sums_and_means((image, text), rates, xp=xp)
        return FirstSweep(*log_sums, *means, image.count, text.count, saved=(image, text))

    def anchor_sums(self, first: FirstSweep) -> tuple[AnchorSums, AnchorSums]:
        """Return the sums of the own image anchors and of the own text anchors over the negatives of all ranks."""
        image, text = first.saved
        return image, text

    def table(self, _first: FirstSweep, k: Any, texts: Arrays, paired: bool) -> Tiles:
        """Return the tiles of block k, made of the texts that have arrived."""
        return self._blocks.tiles(k, texts, paired)

    def pull_back(self, _batch: Batch, first: FirstSweep, weight_image: Array, weight_text: Array, /) -> SecondSweep:
        """Pass 2: return the weighted sums of features for the own images and texts."""
        blocks, ranks = self._blocks, self._blocks.ranks
        image, text = first.saved
        # The logits of block 0 are computed again, so that no block stays in memory between the passes.
        pulls = blocks.block(0, blocks.texts, True).pull((image, text), (weight_image, weight_text))
        width = len(blocks.texts)

        def visit(k: Any, carry: Arrays) -> Arrays:
            travelling = ranks.shift(carry[1:])
            texts, (peak, total, weight, accumulated) = travelling[:width], travelling[width:]
            # The second pass needs neither means nor numbers of negatives.
            theirs = AnchorSums(peak, total, total, None, None)
            to_images, to_texts = blocks.block(k, texts, False).pull((image, theirs), (weight_image, weight))
            to_images += carry[0]
            to_texts += accumulated
            return (to_images, *texts, peak, total, weight, to_texts)

        start = (pulls[0], *blocks.texts, text.peak, text.total, weight_text, pulls[1])
        carry = ranks.repeat(ranks.size - 1, visit, start)
        at_home = carry[-1:] if ranks.size == 1 else ranks.shift(carry[-1:])
        return SecondSweep(carry[0], at_home[0])


def pull_over_ranks(
    ranks: Ranks, texts: Arrays, form: str, pull: Callable[[Any, Arrays, bool], tuple[Arrays, Arrays]], xp: Namespace
) -> tuple[Arrays, Arrays]:
    """Return the sums over all blocks of the results for the own images and of the results for the own texts.

    ``pull(k, texts, paired)`` returns the results of block k: those for the own images, and those for the texts of the
    block's owner, which are summed over ranks. `texts` are the arrays of the own texts that the owners of other images
    need.
    """

    def add(old: Arrays, new: Arrays) -> Arrays:
        return tuple(a + b for a, b in zip(old, new, strict=True))

    if form == "reduce":
        gathered = ranks.all_gather(texts)
        own, first = pull(0, texts, True)
        of_blocks = [first]
        for k in range(1, ranks.size):
            owner = (ranks.rank + k) % ranks.size
            more, theirs = pull(k, tuple(x[owner, ...] for x in gathered), False)
            own = add(own, more)
            of_blocks.append(theirs)
        message = tuple(by_rank(list(parts), ranks, xp) for parts in zip(*of_blocks, strict=True))
        return own, ranks.reduce_scatter(message)

    own, accumulated = pull(0, texts, True)
    num_own, width = len(own), len(texts)

    def visit(k: Any, carry: Arrays) -> Arrays:
        travelling = ranks.shift(carry[num_own:])
        more, theirs = pull(k, travelling[:width], False)
        return (*add(carry[:num_own], more), *travelling[:width], *add(travelling[width:], theirs))

    carry = ranks.repeat(ranks.size - 1, visit, (*own, *texts, *accumulated))
    at_home = carry[num_own + width :]
    return carry[:num_own], at_home if ranks.size == 1 else ranks.shift(at_home)


def merged(parts: list[AnchorSums], rate: Scalar, xp: Namespace) -> AnchorSums:
    """Merge the sums that the same anchors have in several blocks."""
    whole = parts[0]
    for part in parts[1:]:
        whole = merge(whole, part, rate, xp=xp)
    return whole


def received_sums(arrays: Arrays) -> AnchorSums:
    """Return the sums of anchors that another rank has sent: peak, total and mean, and the count if there is a mask."""
    return AnchorSums(arrays[0], arrays[1], arrays[2], arrays[3] if len(arrays) == 4 else None, None)


def by_rank(of_blocks: list[Array], ranks: Ranks, xp: Namespace) -> Array:
    """Stack one array per block, so that entry r belongs to the block with the texts of rank r."""
    if isinstance(ranks.rank, int):
        # Only a traced rank needs a roll, which copies all blocks once more.
        return xp.stack([of_blocks[(rank - ranks.rank) % ranks.size] for rank in range(ranks.size)])
    return xp.roll(xp.stack(of_blocks), ranks.rank, axis=0)
