"""Programs that measure; see README.md. This file makes Python prefer this folder to others of its name."""
