"""Constants that the settings share with the encoders and the images."""

# The command line needs these constants for the help, so this file imports nothing.
from __future__ import annotations

LARGEST_DEPTH = 1000
"""The largest number of blocks or of hidden layers; more would take longer to build than to train."""

LARGEST_MODEL = 2**31
"""The largest number of parameters: NumPy draws them in float64, which takes 16 GiB for so many."""

RESIZE_MODES = ("crop", "fit")
"""The ways to make an image square: its central square, or the whole image between grey borders."""

FULL = "float32"
"""The value of the setting `precision` with which the encoders compute in the dtype of the run."""

ORDERS = ("full", "blocks")
"""The orders of the samples in an epoch: all samples mixed, or blocks of samples mixed within a window."""

AUGMENTATIONS = ("crop", "crop-flip")
"""The values of the setting `augment`: a random part of the image, or this part, mirrored half of the time."""
