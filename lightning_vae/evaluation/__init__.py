"""Evaluation of a trained model: the work of `test` and `predict`."""
