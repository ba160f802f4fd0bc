"""Save whole checkpoints and resume from them exactly."""
