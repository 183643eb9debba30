"""Problems and measures that several test files share; import them as ``from helpers.ambiguity import solve``."""
