"""Measure latents: pure functions and streaming metrics that need torch and torchmetrics alone."""
