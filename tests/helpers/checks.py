"""Rules and numbers that the tests of checks share."""

from __future__ import annotations

import array_api_strict

from drrho_core._validate import Rule

ABOVE_ONE = Rule("be > 1", low=1.0)
DEVICE1 = array_api_strict.Device("device1")
