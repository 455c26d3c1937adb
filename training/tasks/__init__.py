"""Fine-tuning tasks: files to examples, examples to samples of token ids, their order and shares, answers to scores."""
