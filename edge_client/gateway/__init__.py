"""The edge's own API for the tools people already have: OpenAI's routes, a chat page and its WebSocket.

`docs/gateway.md` describes it. Only this package may import FastAPI; everything else at the edge works without it.
"""
