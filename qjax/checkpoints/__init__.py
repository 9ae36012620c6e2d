"""Checkpoint folders: reading and writing."""
