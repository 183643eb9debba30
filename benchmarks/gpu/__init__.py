"""`make gpu`: results, speed, tests and the demo on a GPU, in at most eight minutes.

`plan` lists the measurements in their order, `processes` runs them, and `worker` is the program of each process. `kit`,
`sweeps` and `checks` measure, with the arrays of `libraries`. Only the measuring processes import array libraries.
"""
