"""How layers of Flax Linen are met in their calls."""
