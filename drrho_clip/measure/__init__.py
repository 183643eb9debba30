"""Measures of a model on held-out pairs, one file each; `drrho_clip.evaluate` calls them and gives their names."""
