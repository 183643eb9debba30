"""The command ``drrho verify``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drrho_clip.commands.common import device_option, write_json
from drrho_clip.errors import BadInput
from drrho_clip.options import PATH, TEXT, setting
from drrho_clip.terminal.printing import say
from drrho_core.backend import backend_names, get_backend


@dataclass(frozen=True)
class Verify:
    """Compare drrho_core with the oracle, a slow NumPy implementation, on every array library that is installed.

    All cases run in float64 and in float32. For each library the command prints a table: the number of compared fields
    that passed, the largest error (relative, and in ulps, which are units in the last place), and every failure. The
    exit code is 1 if a case fails or cannot run.

    For example:
      drrho verify
      drrho verify --backend numpy
      drrho verify --device cuda:0 --json errors.json
    """

    backend: tuple[str, ...] = setting(
        (), rule=TEXT, several="append", shown="all that are installed", help="Array library; may be repeated."
    )
    device: str | None = device_option()
    json: Path | None = setting(None, rule=PATH, help="A file to which the command also writes all cases and errors.")

    def run(self) -> int:
        """Check every library; return 1 if a library fails."""
        import drrho_reference

        import drrho_core
        from drrho_clip.files.outputs import check_file

        check_file(self.json, "json")
        reports, passed = {}, True
        for name, (xp, device, device_name) in self._libraries().items():
            report = drrho_reference.conformance.check(drrho_core, xp=xp, device=device)
            reports[name] = {"device": device_name, **report.to_json()}
            # A library that cannot run all cases, for example because it has no float64, has neither failed nor passed.
            complete = report.complete
            verdict = "passed" if complete else "FAILED" if report.verdict == "failed" else "INCOMPLETE"
            say(f"{name} on {device_name}: {verdict}", *report.table().splitlines(), "")
            passed = passed and complete
        write_json(self.json, reports)
        return 0 if passed else 1

    def _libraries(self) -> dict[str, tuple[Any, Any, str]]:
        """Return namespace, device and name of the device of the libraries to check."""
        import array_api_compat
        import numpy as np

        libraries = {}
        for name in self.backend or backend_names():
            try:
                # Some libraries have float64 only if the process enables float64 before it makes the first array.
                backend = get_backend(name, device=self.device, dtype="float64")
            except (ValueError, ImportError) as error:
                # A library that the user named must work; any other library that does not work is left out.
                if name in self.backend:
                    raise BadInput(str(error)) from error
                continue
            array = backend.asarray(np.zeros(1))
            libraries[name] = array_api_compat.array_namespace(array), array_api_compat.device(array), backend.device
        if not libraries:
            raise BadInput(f"device must be one that an installed library has, got {self.device!r}")
        return libraries
