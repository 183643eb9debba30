"""Code that test files share: array libraries, problems, comparisons (``from helpers.problems import draw``)."""
