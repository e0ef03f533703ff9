"""Sentences that can be false. Folders mirror the packages."""
