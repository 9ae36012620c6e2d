"""Training with optax: the bundled model, adapters on a frozen base, quantization-aware training."""
