"""Roundings: how codes are chosen for a format. One method, one file."""
