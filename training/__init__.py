"""Split fine-tuning, and the training of the bundled demo model."""
