"""Several processes that train one model together: who they are, how they exchange values, and who writes.

Each process holds a part of every batch and makes the same update, so all processes always have the same parameters.
Only the first process writes files and prints. `protocol` is the interface that a backend implements, `one` is the
implementation for a single process, and `opening` joins the processes.
"""
