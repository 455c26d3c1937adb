"""One Transport protocol; WebSocket, HTTP and in-process versions.

base        Channel and Transport, ChannelClosed, the bounded pipe that channels are made of
address     what a user types after --server, and the URLs made from it
failures    what can go wrong with a link, as our exceptions
trust       whose certificates are good
liveness    when a silent link is dead; backlog, what has not left yet
websocket   one connection, frames both ways: the normal case
http        the same frames by POST, where WebSocket is blocked
inprocess   two channels back to back: tests, and both parties in one process
"""
