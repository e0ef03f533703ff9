"""What a run tells people: metrics files, TensorBoard, the progress bar, the report."""
