"""The model families, as parameter-holding NNX modules with pure calls."""
