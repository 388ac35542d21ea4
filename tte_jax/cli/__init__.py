"""`tte`, the command line."""
