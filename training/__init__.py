"""Trainers and their data."""
