"""The bundled `demo` model: its small world, tokenizer, training and evaluation."""
