"""Refining: what improves a rounded weight, or a whole rounded block."""
