"""The shapes of the rendered scenes, as distances to their edges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["DISTANCES", "Float32"]

Float32: TypeAlias = npt.NDArray[np.float32]

# Every function returns the signed distance from (x, y), with y downwards, to the edge of a shape about as wide as the
# unit disc; the distance is negative inside. For a few shapes the distance is exact only near the edge. That is enough,
# because pixels further away are covered wholly or not at all.


def _circle(x: Float32, y: Float32) -> Float32:
    distance: Float32 = np.sqrt(x * x + y * y) - np.float32(0.95)
    return distance


def _square(x: Float32, y: Float32) -> Float32:
    distance: Float32 = np.maximum(np.abs(x), np.abs(y)) - np.float32(0.84)
    return distance


def _triangle(x: Float32, y: Float32) -> Float32:
    # Apex (0, -0.98), base from (-1, 0.8) to (1, 0.8).
    side: Float32 = (np.float32(1.78) * np.abs(x) - (y + np.float32(0.98))) * np.float32(1.0 / 2.0417)
    inside: Float32 = np.maximum(side, y - np.float32(0.8))
    return inside


def _diamond(x: Float32, y: Float32) -> Float32:
    # The diamond is taller than wide, so that a rotated square does not look like a diamond.
    across, up = np.float32(1.05 / 1.2732) * np.abs(x), np.float32(0.72 / 1.2732) * np.abs(y)
    distance: Float32 = across + up - np.float32(0.756 / 1.2732)
    return distance


def _cross(x: Float32, y: Float32) -> Float32:
    across, up, half_width = np.abs(x), np.abs(y), np.float32(0.3)
    upright = np.maximum(across - half_width, up - np.float32(1.0))
    lying = np.maximum(up - half_width, across - np.float32(1.0))
    return np.minimum(upright, lying)


def _ring(x: Float32, y: Float32) -> Float32:
    return np.abs(np.sqrt(x * x + y * y) - np.float32(0.74)) - np.float32(0.22)


# Outward normals of the five lines of a pentagram with one tip up: (sin, cos) of multiples of 72 degrees.
_STAR_NORMALS: Final = (
    (0.0, 1.0),
    (0.9510565, 0.3090170),
    (0.5877853, -0.8090170),
    (-0.5877853, -0.8090170),
    (-0.9510565, 0.3090170),
)


def _star(x: Float32, y: Float32) -> Float32:
    # A point inside a pentagram is outside at most one of the five lines, so the second largest
    # of the five distances is negative there.
    largest = np.full_like(x, -np.inf)
    second = np.full_like(x, -np.inf)
    for normal_x, normal_y in _STAR_NORMALS:
        distance = np.float32(normal_x) * x + np.float32(normal_y) * y
        second = np.maximum(second, np.minimum(largest, distance))
        largest = np.maximum(largest, distance)
    edge: Float32 = second - np.float32(0.33)
    return edge


def _heart(x: Float32, y: Float32) -> Float32:
    # Two discs of radius 0.5 around (+-0.48, -0.35), and a kite from the discs to the tip (0, 0.95), tangent to both.
    across = np.abs(x) - np.float32(0.48)
    down = y + np.float32(0.35)
    disc = np.sqrt(across * across + down * down) - np.float32(0.5)
    tangent = np.float32(0.75) * np.abs(x) + np.float32(0.6614) * y - np.float32(0.6284)
    spoke = np.float32(0.6614) * across - np.float32(0.75) * down
    joined: Float32 = np.minimum(disc, np.maximum(np.maximum(tangent, spoke), -down))
    return joined


DISTANCES: Final[dict[str, Callable[[Float32, Float32], Float32]]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "ring": _ring,
    "star": _star,
    "heart": _heart,
}
"""The distance function of every shape, by the shape's name in captions."""
