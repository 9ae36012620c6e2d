"""Measurements of a model: corpora, perplexity and what is compared with it."""
