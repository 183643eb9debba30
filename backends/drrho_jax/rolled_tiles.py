"""Passes over the tiles of a batch with JAX's own loops, for code that is being traced.

Z is the b x b matrix of similarities, E1 E2^T - lambda R1 R2^T, with the features E1 and E2 of images and texts, the
reference features R1 and R2 and the reference weight lambda. A block is a range of anchors (images or texts); a tile is
the part of Z that belongs to a block of images and a block of texts. If images are compared with images, or texts with
texts, Z is symmetric, and only the tiles on and above its diagonal are visited. The compiler unrolls a Python loop over
tiles: 1,024 tiles would take minutes to compile, and all tiles would be in memory at once. In this file all blocks have
the same size, the last block is padded, and a stack (an array with one axis more) holds all blocks. One loop visits the
tiles on the diagonal of Z, a second loop all other tiles.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from drrho_core.checks import Array
from drrho_core.contrastive.tiles import Merge, Tile, Tiles, Values, Visit, Weigh, add
from drrho_jax.loops import fori_loop, put, traces


def choose() -> type[RolledTiles] | None:
    """Return `RolledTiles` if code is being traced; None otherwise, because a Python loop is faster then."""
    return RolledTiles if traces() else None


class RolledTiles(Tiles):
    """`Tiles` whose blocks are stacks (num_blocks, side, ...) and whose loops are JAX's."""

    can_share = False
    _current: Tile
    all_z: Array | None = None
    """All tiles, (num_blocks, num_blocks, side, side), once pass 1 has computed and kept them for pass 2; else None."""

    @property
    def padding(self) -> int:
        """Return the number of anchors that the last block lacks."""
        return self.num_blocks * self.side - self.batch_size

    def cut(self, *arrays: Array, fill: float = 0.0) -> list[Array]:
        """Return the blocks of each array as a stack; the entries that the last block lacks are `fill`."""
        # The last block is filled up, because a traced index can choose only among blocks of the same size.
        stacks = []
        for x in arrays:
            missing = jnp.full((self.padding, *x.shape[1:]), fill, dtype=x.dtype)
            filled = jnp.concat([x, missing], axis=0) if self.padding else x
            stacks.append(jnp.reshape(filled, (self.num_blocks, self.side, *x.shape[1:])))
        return stacks

    def cut_mask(self, mask: Array) -> Array:
        """Return the mask as a table of tiles, (num_blocks, num_blocks, side, side)."""
        columns = jnp.pad(self.cut(mask)[0], ((0, 0), (0, 0), (0, self.padding)))
        return jnp.permute_dims(
            jnp.reshape(columns, (self.num_blocks, self.side, self.num_blocks, self.side)), (0, 2, 1, 3)
        )

    def sweep(self, visit: Visit, merge: Merge) -> tuple[Values, Values]:
        """Visit every tile; return the merged results of all rows, and those of all columns, without the padding."""
        rows, columns = self._stacks(visit, merge)
        joined = tuple(map(self._join, rows))
        return joined, joined if self.symmetric else tuple(map(self._join, columns))

    def pull(self, weigh: Weigh, *, to_columns: bool = True) -> tuple[Array, Any, Values, Values]:
        """Return ``V E2`` and ``V^T E1`` for weights V, and the sums of further results for rows and for columns."""
        # In compiled code the product of a transposed tile takes 1.5 times as long, so the features are transposed once
        # instead: V^T E1 = (E1^T V)^T. If the matrix is symmetric, both products are added to the same rows, so neither
        # result may be transposed.
        transposed_images = None if self.symmetric else jnp.permute_dims(self.images, (0, 2, 1))

        def visit(i: Any, j: Any, diagonal: bool) -> tuple[Values, Values]:
            v, rows, columns = weigh(i, j, diagonal)
            to_rows = (self.matmul(v, self.texts[j]), *rows)
            if not to_columns or (self.symmetric and diagonal):
                return to_rows, ()
            text = (
                self.matmul(v.T, self.images[i]) if transposed_images is None else self.matmul(transposed_images[i], v)
            )
            return to_rows, (text, *columns)

        rows, columns = self._stacks(visit, add)
        image, *row_sums = map(self._join, rows)
        if self.symmetric:
            return image, image, tuple(row_sums), tuple(row_sums)
        if not to_columns:
            return image, None, tuple(row_sums), ()
        text = self._join(jnp.permute_dims(columns[0], (0, 2, 1)))
        return image, text, tuple(row_sums), tuple(map(self._join, columns[1:]))

    def tile(self, i: Any, j: Any, diagonal: bool) -> Tile:
        """Return a tile of Z, with the mask of the entries that count."""
        # After the visit the loop stores this tile in the table of all tiles.
        self._current = super().tile(i, j, diagonal)
        return self._current

    def z(self, i: Any, j: Any) -> Array:
        """Return the entries of a tile, from the table of kept tiles or computed anew."""
        return self.matmul(self.left(i), self.right[j].T) if self.all_z is None else self.all_z[i, j]

    def left(self, i: Any) -> Array:
        """Return the rows of ``[E1, -lambda R1]`` of a block, computed anew: a traced loop cannot keep them."""
        return self.make_left(i)

    def keep(self, tile: Tile) -> None:
        """Do nothing: the loop passes the table of all tiles from step to step, see `_stacks`."""

    def positives(self) -> Array:
        """Return the diagonal of Z (b,), from the products of its tiles."""

        def body(i: Any, stack: Array) -> Array:
            return put(stack, i, jnp.linalg.diagonal(self.z(i, i)))

        start = jnp.zeros((self.num_blocks, self.side), dtype=self.dtype)
        return self._join(fori_loop(0, self.num_blocks, body, start))

    def counts(self, i: Any, j: Any, diagonal: bool) -> Array | None:
        """Return the mask of the entries of a tile that pair an anchor with a negative; None if all entries do."""
        counts = None if self.mask is None else self.mask[i, j]
        index = jnp.arange(self.side)
        # An entry counts if its row and its column are real anchors and, on the diagonal, different ones.
        conditions = []
        if diagonal:
            conditions.append(index[:, None] != index[None, :])
        # The rows and columns that pad the last block belong to no anchor.
        if self.padding:
            real = [block * self.side + index < self.batch_size for block in (i, j)]
            conditions.append(real[0][:, None] & real[1][None, :])
        for condition in conditions:
            counts = condition if counts is None else counts & condition
        return counts

    def only_negatives(self, x: Array, tile: Tile) -> Array:
        """Return the numbers of all pairs, with -inf for each pair that does not count."""
        return x if tile.counts is None else jnp.where(tile.counts, x, -jnp.inf)

    def _join(self, stack: Array | None) -> Array | None:
        """Return the array that `cut` has cut into this stack, without the padding."""
        if stack is None:
            return None
        return jnp.reshape(stack, (self.num_blocks * self.side, *stack.shape[2:]))[: self.batch_size, ...]

    def _stacks(self, visit: Visit, merge: Merge) -> tuple[Values, Values]:
        """Return the merged results of all blocks of rows and of all blocks of columns as stacks; None stays None."""
        number, symmetric = self.num_blocks, self.symmetric
        # If the tiles are kept, pass 1 fills a table of all tiles in the loop, and pass 2 reads it.
        keeps = self.keeps and self.all_z is None

        def visited(i: Any, j: Any, diagonal: bool, table: Any) -> tuple[Values, Values, Any]:
            rows, columns = visit(i, j, diagonal)
            return rows, columns, put(table, (i, j), self._current.z) if keeps else None

        def replaced(stacks: Values, block: Any, values: Values) -> Values:
            pairs = zip(stacks, values, strict=True)
            return tuple(None if stack is None else put(stack, block, value) for stack, value in pairs)

        def merged(side: int, block: Any, stacks: Values, new: Values) -> Values:
            old = tuple(None if stack is None else stack[block] for stack in stacks)
            return replaced(stacks, block, merge(side, block, old, new))

        def on_diagonal(i: Any, carry: Any) -> Any:
            to_rows, to_columns, table = carry
            rows, columns, table = visited(i, i, self.paired, table)
            return replaced(to_rows, i, rows), () if symmetric else replaced(to_columns, i, columns), table

        def off_diagonal(k: Any, carry: Any) -> Any:
            to_rows, to_columns, table = carry
            i, j = places[k, 0], places[k, 1]
            rows, columns, table = visited(i, j, False, table)
            to_rows = merged(0, i, to_rows, rows)
            # In a symmetric matrix the rows and the columns are the same anchors.
            if symmetric:
                return merged(1, j, to_rows, columns), (), table
            return to_rows, merged(1, j, to_columns, columns), table

        # A loop of JAX needs arrays for its results before the first step; tracing one visit gives their shapes.
        rows, columns = jax.eval_shape(lambda i: tuple(map(tuple, visit(i, i, self.paired))), jnp.zeros((), jnp.int32))
        shapes = (rows, () if symmetric else columns)
        stacks = jax.tree.map(lambda x: jnp.zeros((number, *x.shape), dtype=x.dtype), shapes)
        table = jnp.zeros((number, number, self.side, self.side), dtype=self.dtype) if keeps else None
        # The first loop sets the results of each block from the tile on the diagonal; the second loop merges the
        # results of all other tiles into them.
        carry = fori_loop(0, number, on_diagonal, (*stacks, table))
        blocks = range(number)
        places = jnp.asarray(
            [(i, j) for i in blocks for j in blocks if (i < j if symmetric else i != j)], dtype=jnp.int32
        )
        to_rows, to_columns, table = fori_loop(0, len(places), off_diagonal, carry)
        if keeps:
            self.all_z = table
        return to_rows, to_columns
