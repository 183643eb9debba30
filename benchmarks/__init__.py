"""Programs that measure; see README.md. This file makes Python prefer this folder to other folders with its name."""
