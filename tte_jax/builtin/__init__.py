"""What the repository brings along so that it works offline: models and the OpenMoji corpus."""
