"""The cupy backend."""
