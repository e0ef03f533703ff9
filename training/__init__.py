"""A training run: what it starts from, what it reads, and all that happens between its steps."""
