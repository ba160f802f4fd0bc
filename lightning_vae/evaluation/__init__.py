"""Evaluation of a trained model: the work of `test` and `predict`."""

from .measure import evaluate as evaluate
