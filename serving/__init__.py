"""The server: it hosts the middle blocks and answers steps."""
