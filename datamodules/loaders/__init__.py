"""Loaders: cut tensors and files into batches, in an order that a resumed run continues."""
