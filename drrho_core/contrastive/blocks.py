"""A block of the similarities of ranks that share a batch, computed by tiles or by fused kernels.

Both classes offer the same four things to `drrho_core.contrastive.sharded_passes`: the rates of the anchors, the sums
over the negatives in the block, the weighted sums of the features, and the release of memory between the passes.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from drrho_core._array_api import Array, Namespace, Scalar, device_of
from drrho_core._routines import block_kernels, find_block_kernels
from drrho_core.contrastive.passes import AnchorSums, pull_back, sum_negatives
from drrho_core.contrastive.ranks import Ranks
from drrho_core.contrastive.tiles import Tiles, cast, work_dtype
from drrho_core.extend import Batch, BlockSweeps


def kernel_dtype(batch: Batch, xp: Namespace) -> Any:
    """Return the one dtype of features and reference features in which fused kernels get a batch."""
    references, dtype = batch.reference_features, batch.image_features.dtype
    # Kernels multiply half types, so features of one dtype are not cast.
    if references is None or references[0].dtype == dtype:
        return dtype
    return work_dtype(batch.image_features, references, xp)


def in_one_dtype(batch: Batch, xp: Namespace) -> Batch:
    """Return a batch whose features and reference features share one dtype, which fused kernels need."""
    dtype = kernel_dtype(batch, xp)
    images, texts = cast((batch.image_features, batch.text_features), dtype, xp)
    references = cast(batch.reference_features, dtype, xp)
    return batch._replace(image_features=images, text_features=texts, reference_features=references)


def choose_kernels(batch: Batch, ranks: Ranks | None, xp: Namespace) -> BlockSweeps | None:
    """Return the fused kernels for the blocks of a batch that ranks share; None for tiles, and without ranks.

    Call this function in the check that the ranks make together, because it raises an error if kernels are demanded
    and the kernels of this rank do not take the batch.
    """
    if ranks is None or block_kernels(xp) == "none":
        return None
    dtype, references = kernel_dtype(batch, xp), batch.reference_features
    if references is not None and (dtype != batch.image_features.dtype or dtype != references[0].dtype):
        # Kernels decide by shapes, dtypes and devices. So they get arrays that repeat one number, and no features are
        # cast here.
        def repeated(array: Array) -> Array:
            return xp.broadcast_to(xp.zeros((1, 1), dtype=dtype, device=device_of(array)), array.shape)

        batch = batch._replace(
            image_features=repeated(batch.image_features),
            text_features=repeated(batch.text_features),
            reference_features=(repeated(references[0]), repeated(references[1])),
        )
    return find_block_kernels(batch, xp)


class TileBlock:
    """A block that is computed in tiles."""

    def __init__(self, tiles: Tiles) -> None:
        self.tiles = tiles

    @property
    def rates(self) -> tuple[Scalar, Scalar]:
        """The rates 1 / t of the image anchors and of the text anchors."""
        return self.tiles.scaling.rates

    def sums(self) -> tuple[AnchorSums, AnchorSums]:
        """Return the sums over the negatives of the image anchors and of the text anchors in the block."""
        return sum_negatives(self.tiles)

    def pull(self, sums: tuple[AnchorSums, AnchorSums], weights: tuple[Array, Array]) -> tuple[Array, Array]:
        """Return the weighted sums of features, given sums over negatives and the sum of each anchor's weights.

        The sums may be those of several blocks; then the weights are shared by these blocks.
        """
        return pull_back(self.tiles, sums, weights)

    def release(self) -> None:
        """Free what the first pass needs and the second pass makes again."""
        self.tiles.release()


class KernelBlock:
    """A block that fused kernels compute.

    Parameters
    ----------
    kernels : BlockSweeps
        The kernels.
    batch : Batch
        The own images and the texts of a rank, b each, with the block's part of the mask, (b, b).
    paired : bool
        True if image i and text i belong to one pair, which is a positive and no negative.
    xp : namespace
        The arrays' namespace.
    """

    def __init__(self, kernels: BlockSweeps, batch: Batch, paired: bool, xp: Namespace) -> None:
        self.kernels, self.batch, self.paired, self.xp = kernels, batch, paired, xp

    @property
    def rates(self) -> tuple[Array, Array]:
        """The rates 1 / t of the image anchors and of the text anchors, (b,) each, in float32."""
        xp = self.xp
        # The inverse of a temperature below 3e-39 is infinite, and infinity times 0 would be nan.
        largest = float(xp.finfo(xp.float32).max)
        image, text = (
            xp.clip(1.0 / xp.astype(side, xp.float32), max=largest)
            for side in (self.batch.temperature_image, self.batch.temperature_text)
        )
        return image, text

    def sums(self) -> tuple[AnchorSums, AnchorSums]:
        """Return the sums over the negatives of the image anchors and of the text anchors in the block."""
        image, text = self.kernels.block_sums(self.batch, self.paired)
        return AnchorSums(*image), AnchorSums(*text)

    def pull(self, sums: tuple[AnchorSums, AnchorSums], weights: tuple[Array, Array]) -> tuple[Array, Array]:
        """Return the weighted sums of features, as `TileBlock.pull` does."""
        image, text = sums
        anchors = (image.peak, image.total), (text.peak, text.total)
        pulls = self.kernels.pull_block(self.batch, self.paired, anchors, weights)
        return pulls.image_pull, pulls.text_pull

    def release(self) -> None:
        """Free nothing, because kernels keep nothing between the passes."""


Block: TypeAlias = TileBlock | KernelBlock
"""A block of similarities."""
