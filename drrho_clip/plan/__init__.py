"""The plan of a training run, from the settings and the sizes alone: steps, memory, and the traffic of many ranks.

`run` makes and prints the plan; `memory` and `traffic` count bytes, `ranks` has the times of several processes, and
`options` are those of the command line. The command reads `options` before it needs the rest, so this file imports
nothing.
"""
