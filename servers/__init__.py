"""Thin gRPC adaptors over `tte_jax` and the processes that run them."""
