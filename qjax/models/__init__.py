"""Decoder-only language models in Flax Linen."""
