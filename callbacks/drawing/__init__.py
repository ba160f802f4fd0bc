"""Drawing: turn tensors into pictures and hand them to the loggers."""
