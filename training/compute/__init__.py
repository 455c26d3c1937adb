"""The maths of split fine-tuning: passes that can be paused, grouped LoRA, loss, optimizer, aggregation."""
