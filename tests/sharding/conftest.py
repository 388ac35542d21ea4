"""The tiny checkpoints of the model tests."""

from tests.models.conftest import saved  # noqa: F401  (a fixture)
