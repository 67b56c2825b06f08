"""Stage 1: base and outpainting fine-tune, from losses to the command line."""
