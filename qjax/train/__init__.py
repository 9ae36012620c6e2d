"""Training with optax: the bundled model, and later quantization-aware training."""
