"""``drrho bench`` compares the contrastive step with other implementations: ratios of times measured in one process."""
