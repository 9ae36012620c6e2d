"""Any JAX function: its trace shows which parameters its contractions consume, whatever framework wrote them."""
