"""Tokenizer files: Meta's and Mistral's tokenizer.model, and Hugging Face's tokenizer.json."""
