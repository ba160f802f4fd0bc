"""Read a module's distributions and batches, by hooks or by calls."""
