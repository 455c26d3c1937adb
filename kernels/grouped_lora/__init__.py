"""LoRA adapters of many sessions in one batch."""
