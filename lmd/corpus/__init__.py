"""The corpus: from public-domain scores to renditions whose truth is known."""
