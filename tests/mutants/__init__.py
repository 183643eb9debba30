"""Mutants of the core: mistakes of the formula written by hand, and mutmut's mutants by the thousand."""
