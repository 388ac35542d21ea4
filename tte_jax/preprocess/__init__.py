"""Host-side preparation: media to patches, text to token ids, plans and positions. No JAX here."""
