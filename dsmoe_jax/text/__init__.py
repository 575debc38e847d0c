"""Text: tokenizers, their special tokens and chat templates, and training a vocabulary."""
