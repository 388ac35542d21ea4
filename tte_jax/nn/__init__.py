"""Building blocks of the models: pure functions on arrays, no parameters of their own."""
