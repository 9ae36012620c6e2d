"""Multiplication with quantized weights."""
