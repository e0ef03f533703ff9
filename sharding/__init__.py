"""Where arrays live and where devices talk."""
