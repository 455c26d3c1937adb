"""Scores of a model on a task: whole and split, with and without noise, as one table."""
