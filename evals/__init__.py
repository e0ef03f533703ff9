"""Evaluation: what a model scores on text, on choices, on answers and on programs."""
