"""`make gpu`: check results, measure speed, and run the tests and the demo on a GPU, in at most eight minutes.

`plan` lists the measurements in their order, `processes` runs them, and `worker` is the program of each process. `kit`,
`sweeps` and `checks` measure; `libraries` makes the arrays for them. Only the measuring processes import array
libraries.
"""
