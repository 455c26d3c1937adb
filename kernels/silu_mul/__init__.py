"""The SwiGLU product in one pass."""
