"""What `test` and `predict` do with a trained model."""
