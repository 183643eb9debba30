"""The commands of ``drrho``, one file each; `drrho_clip.cli` has the table of all commands.

Each command is a dataclass: the docstring is the text of the help, the fields are the options, and `run` does the work
and returns the exit code. The commands import heavy libraries only when they run, so that ``drrho --help`` is quick.
"""
