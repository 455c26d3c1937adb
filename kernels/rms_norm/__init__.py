"""Residual sum and RMSNorm in one pass."""
