"""Mutants of the core: a list of mistakes of the formula, and the thousands of mutants that mutmut makes."""
