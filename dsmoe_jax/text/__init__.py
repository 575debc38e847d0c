"""Tokenizers, special tokens, chat templates and tokenizer training."""
