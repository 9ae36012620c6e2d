"""The driver: recipes applied to models, part by part."""
