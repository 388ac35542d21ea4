"""A package, so that no dependency's own top-level `tests` (some wheels bring one) hides it."""
