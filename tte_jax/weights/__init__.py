"""Hugging Face safetensors ↔ JAX: one table for both directions."""
