"""What both stages share: cache format, model code, tokenizer and evaluation."""
