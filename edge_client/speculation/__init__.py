"""Guessing tokens ahead, so that one round trip to the server checks several of them (`docs/speculation.md`)."""
