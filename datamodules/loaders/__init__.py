"""Cut tensors and files into batches, in an order that a resumed run takes up again."""
