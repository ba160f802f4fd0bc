"""Read a module's distributions and batches, as they pass or by asking."""
