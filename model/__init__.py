"""What is computed: the Transformer, its parts and their configuration."""
