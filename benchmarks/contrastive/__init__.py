"""``drrho bench``: the contrastive step against other programs for the same loss, as ratios within one process."""
