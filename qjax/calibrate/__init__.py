"""Calibration: what goes into each linear layer, as statistics."""
