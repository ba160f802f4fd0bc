"""Train, evaluate and compare many runs."""
