"""The only places that know a module framework."""
