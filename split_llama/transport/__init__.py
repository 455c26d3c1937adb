"""One Transport protocol; WebSocket, HTTP and in-process versions."""
