"""`make gpu`: results, speed, tests and the demo on a GPU, in at most eight minutes.

`plan` has the measurements and their order, `processes` runs them, `worker` is the program of each process. `kit`,
`sweeps` and `checks` measure, with the arrays of `libraries`. Array libraries are imported in the processes only.
"""
