"""Recipes, and the typed Run that they return."""
