"""Data sets that install from package registries, with their hold-outs."""
