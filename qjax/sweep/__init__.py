"""Sweeps: cells, resumable runs, rows."""
