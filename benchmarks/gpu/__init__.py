"""Everything that is to be known about a GPU, in one command of at most eight minutes: `make gpu`.

What it measures and in which order stands in `plan`; who runs it in `processes`; what it measures with in `worker` and
`libraries`. Nothing here imports an array library before a process of its own has begun.
"""
