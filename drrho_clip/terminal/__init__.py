"""The terminal: lines and tables, text made safe for a line, progress, and how a command ends."""
