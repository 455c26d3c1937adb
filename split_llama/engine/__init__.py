"""KV pages, batch plans, the executor and the attention backend: A, B and C all run on it."""
