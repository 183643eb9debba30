"""Files of every kind: written whole or not at all, tried before the work, and read with distrust."""
