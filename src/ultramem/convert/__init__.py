"""Conversion of models to and from transformers and the published UltraMem code, and of that code's flags."""
