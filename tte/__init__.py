"""Messages and stubs of the tte-jax API, generated from `protos/`. See `tte.v1`."""
