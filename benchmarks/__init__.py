"""Measurements. They print and record figures and assert nothing; `results/` keeps their JSON."""
