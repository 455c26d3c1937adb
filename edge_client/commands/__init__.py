"""The commands of `edge-client`, one module each, imported only when its command runs.

A command module has `add_arguments(parser)` and `run(arguments) -> int`, and imports nothing heavy at its top: `--help`
must come at once. `run` raises `FlLlamaError` for whatever a user can mend.
"""
