"""The rows of a batch in the state, read before a step and written after it: from the whole state, or from its parts.

The state has two numbers for each of the n samples. W devices that share a batch hold it in one of two ways. Either
every device has the whole state, and writes the new rows of all devices. Or the state is *split*: device r has the rows
r n / W to (r + 1) n / W - 1, so the row of a sample is fetched from the device that has it, and sent back there.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax.numpy as jnp

from drrho_jax.ranks import AxisRanks

Sides: TypeAlias = tuple[Any, Any]
"""An array for the image anchors and one for the text anchors."""


class WholeState:
    """The rows of a batch in a state of which every device has all rows.

    Parameters
    ----------
    state : pair of arrays (n,)
        The state.
    sample_index : array of integers (b,)
        The rows of the own pairs.
    ranks : AxisRanks, optional
        The devices that share the batch; None: nobody shares it.
    """

    def __init__(self, state: Sides, sample_index: Any, ranks: AxisRanks | None) -> None:
        self._state, self._ranks = state, ranks
        self._rows = _without_negative(sample_index, state[0].shape[0])

    def read(self) -> Sides:
        """Return the rows; a row that is out of range is nan, which makes the loss nan."""
        return _read(self._state, self._rows, jnp.nan)

    def written(self, image: Any, text: Any) -> Sides:
        """Return the state with the new rows of all devices."""
        rows, ranks = self._rows, self._ranks
        if ranks is not None:
            rows, image, text = (jnp.reshape(x, (-1,)) for x in ranks.everywhere((rows, image, text)))
        return _written(self._state, rows, (image, text))


class SplitState:
    """The rows of a batch in a state whose rows are divided among the devices.

    Parameters
    ----------
    part : pair of arrays (n / W,)
        The own rows of the state.
    sample_index : array of integers (b,)
        The rows of the own pairs in the state of all devices.
    ranks : AxisRanks
        The devices.
    """

    def __init__(self, part: Sides, sample_index: Any, ranks: AxisRanks) -> None:
        self._part, self._ranks = part, ranks
        length = part[0].shape[0]
        self._outside = (sample_index < 0) | (sample_index >= ranks.size * length)
        # Every device learns the rows of all devices, (W, b), and finds its own among them.
        (everyone,) = ranks.all_gather((sample_index,))
        self._places = _without_negative(everyone - ranks.rank * length, length)

    def read(self) -> Sides:
        """Return the rows; a row that is out of range is nan, which makes the loss nan."""
        # The device that has a row answers with it, all others answer -inf, and the largest answer counts.
        answers = self._ranks.all_to_all(_read(self._part, self._places, -jnp.inf))
        image, text = (jnp.where(self._outside, jnp.nan, jnp.max(x, axis=0)) for x in answers)
        return image, text

    def written(self, image: Any, text: Any) -> Sides:
        """Return the own part with those new rows of all devices that belong to it."""
        everyone = self._ranks.all_gather((image, text))
        return _written(self._part, self._places, (everyone[0], everyone[1]))


def _without_negative(rows: Any, length: int) -> Any:
    """Return rows with `length`, which is out of range, in place of negative rows, which JAX counts from the end."""
    rows = rows.astype(jnp.promote_types(rows.dtype, jnp.int32))
    return jnp.where(rows < 0, length, rows)


def _read(state: Sides, rows: Any, absent: float) -> Sides:
    image, text = (side.at[rows].get(mode="fill", fill_value=absent) for side in state)
    return image, text


def _written(state: Sides, rows: Any, new: Sides) -> Sides:
    # With a donated state the compiler writes the rows in place; "drop" skips rows that are out of range.
    image, text = (side.at[rows].set(values, mode="drop") for side, values in zip(state, new, strict=True))
    return image, text
