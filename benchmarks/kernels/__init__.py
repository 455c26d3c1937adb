"""One file per kernel: `measure(device, quick)` gives rows of figures."""
