"""The model: the transformer, its attention masks, its key-value cache and its text encoders."""
