"""The terminal chat, `edge-client chat`; `docs/terminal.md` describes it.

`chat` is the loop. It reads from a `Reader` and writes to a `Screen` (`screens`), of which there are two: a terminal's,
and a plain one for pipes. `connection` holds the edge, `answering` makes one answer, `conversation` is the text.
"""
