"""Streaming: from clean context to the next block, and the state between blocks."""
