"""The edge: it keeps the text, the outer blocks and the head."""
