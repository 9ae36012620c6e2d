"""Transforms: exact reparametrisations of the float weights that come before rounding. One method, one file."""
