"""Programs that measure; see README.md. A package, so that another folder of this name does not stand in for it."""
