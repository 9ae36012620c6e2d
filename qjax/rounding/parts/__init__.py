"""What rounding methods are made of."""
