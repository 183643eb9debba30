"""The claims of the Model Steering paper (arXiv 2505.06699), measured again in small, with intervals and verdicts.

``engine.py`` asks the claims for experiments and runs those that have no row yet. An *experiment* is one training or
one measurement with one seed, and a *row* is the result of an experiment; the rows of a claim stand in CLAIM.jsonl.
Verdicts, pages and pictures are computed from the rows alone.
"""
