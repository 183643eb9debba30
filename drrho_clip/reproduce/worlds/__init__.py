"""The worlds: data sets with their noise, their division by seed, and their reference models."""

from drrho_clip.reproduce.worlds.scenes import SCENES
from drrho_clip.reproduce.worlds.world import World

__all__ = ["SCENES", "WORLDS", "World"]

WORLDS: dict[str, World] = {world.name: world for world in SCENES}
"""All worlds by name."""
