"""A client of a fine-tuning job: it has A, C, the head, its data and its adapters, and talks to the server about B."""
