"""Attention over pages and mask descriptors: planner, kernel, launch and reference."""
