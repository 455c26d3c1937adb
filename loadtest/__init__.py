"""Workloads, and a report of what the server carries."""
