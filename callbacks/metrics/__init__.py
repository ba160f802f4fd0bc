"""Measure latents: pure functions and streaming metrics that need only torch and torchmetrics."""
