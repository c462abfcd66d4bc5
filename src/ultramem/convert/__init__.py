"""Models in other formats: those of transformers and of the published UltraMem code, and its training flags."""
