"""What a step must do, held against what it did."""
