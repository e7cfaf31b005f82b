"""The embedded default: task, tokenizer, small pretrained model."""
