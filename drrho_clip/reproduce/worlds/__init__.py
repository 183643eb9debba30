"""The worlds: data sets with their noise, their division by seed, and their reference models."""

from drrho_clip.reproduce.worlds.fashion import FASHION
from drrho_clip.reproduce.worlds.heads import FURTHER_TESTS, HEAD_WORLDS
from drrho_clip.reproduce.worlds.scenes import SCENES
from drrho_clip.reproduce.worlds.tables import TABLE_WORLDS
from drrho_clip.reproduce.worlds.words import (
    POOL_OF_HEADS,
    POOL_OF_PICTURES,
    RIGHT_VALIDATION,
    RIGHT_VALIDATION_OF_HEADS,
    RULE_OF_REFERENCES,
)
from drrho_clip.reproduce.worlds.world import HEADS, PICTURES, TABLES, World, scaled_worlds

__all__ = [
    "FASHION",
    "FURTHER_TESTS",
    "HEADS",
    "HEAD_WORLDS",
    "PICTURES",
    "POOL_OF_HEADS",
    "POOL_OF_PICTURES",
    "RIGHT_VALIDATION",
    "RIGHT_VALIDATION_OF_HEADS",
    "RULE_OF_REFERENCES",
    "SCENES",
    "TABLES",
    "TABLE_WORLDS",
    "WORLDS",
    "World",
    "scaled_worlds",
]

WORLDS: dict[str, World] = {world.name: world for world in (*SCENES, FASHION, *HEAD_WORLDS, *TABLE_WORLDS)}
"""All worlds by name."""
