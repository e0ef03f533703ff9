"""Compressors: trained models in fewer bytes."""
