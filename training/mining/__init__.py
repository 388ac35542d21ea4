"""rHNM, the loop's pieces: embed → search → rerank → sealed rounds of negatives → examples."""
