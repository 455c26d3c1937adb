"""Rotary positions, and K and V into their pages, in one pass."""
