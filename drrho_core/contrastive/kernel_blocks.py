"""A block of the similarities of ranks that share a batch, computed by tiles or by fused kernels.

Each function here takes a block of either kind, so `drrho_core.contrastive.sharded_passes` need not know which kind it
has. From a block this module gets the rates of the anchors, the sums over the negatives in the block, and the weighted
sums of the features.
"""

from __future__ import annotations

from drrho_core._array_api import Array, Namespace, Scalar
from drrho_core.contrastive.passes import AnchorSums, pull_back, sum_negatives
from drrho_core.contrastive.tiles import Tiles
from drrho_core.extend import Batch, BlockSweeps


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


Block = Tiles | KernelBlock
"""A block of similarities."""


def rates_of(block: Block) -> tuple[Scalar, Scalar]:
    """Return the rates of the image anchors and of the text anchors of a block."""
    return block.rates if isinstance(block, KernelBlock) else block.scaling.rates


def sums_of(block: Block) -> tuple[AnchorSums, AnchorSums]:
    """Return the sums over the negatives of the image anchors and of the text anchors in a block."""
    if not isinstance(block, KernelBlock):
        return sum_negatives(block)
    image, text = block.kernels.block_sums(block.batch, block.paired)
    return AnchorSums(*image), AnchorSums(*text)


def pull_of(block: Block, sums: tuple[AnchorSums, AnchorSums], weights: tuple[Array, Array]) -> tuple[Array, Array]:
    """Return the weighted sums of features of a block, given sums over negatives and the sum of each anchor's weights.

    The sums may be those of several blocks; then the weights are shared by these blocks.
    """
    if not isinstance(block, KernelBlock):
        return pull_back(block, sums, weights)
    image, text = sums
    anchors = (image.peak, image.total), (text.peak, text.total)
    pulls = block.kernels.pull_block(block.batch, block.paired, anchors, weights)
    return pulls.image_pull, pulls.text_pull


def release(block: Block) -> None:
    """Free what the first pass needs and the second pass makes again."""
    if not isinstance(block, KernelBlock):
        block.release()
