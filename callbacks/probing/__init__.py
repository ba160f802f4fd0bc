"""Evaluate a module's loss on copies of it."""
