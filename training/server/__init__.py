"""The server's side of split fine-tuning: an extension of `split-server`."""
