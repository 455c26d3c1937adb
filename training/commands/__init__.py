"""The commands of `split-train`, a module each; nothing heavy is imported before a command runs."""
