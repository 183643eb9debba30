"""The work, the memory and the messages of one of several ranks, measured; and the plan of a run beside them.

`measure` and `process` measure, `counted_ranks` has the ranks for both, and `page` makes the tables.
"""
