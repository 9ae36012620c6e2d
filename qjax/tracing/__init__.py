"""Any JAX function: its trace shows which parameters its contractions consume; no module framework is known here."""
