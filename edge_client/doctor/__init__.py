"""What `edge-client doctor` looks at, from the name of the server to the memory of this machine.

finding     one line of the report
judgements  what measured facts mean, in plain words: pure functions
probes      how the facts are got: sockets, files, the clock; tests put others in their place
examine     walks from one to the next as far as it can
report      the lines as text or JSON
"""
