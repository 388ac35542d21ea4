"""The papers' experiments in small, with the built-in models."""
