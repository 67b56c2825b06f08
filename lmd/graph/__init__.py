"""The model's passes as exported graphs, which play; PyTorch is what one reads and trains."""

FORMAT, OPSET = "lmd-graphs-2", 18
MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"
CODEC = "codec.safetensors"  # a copy of the codec's own file, where it plays in PyTorch
PRECISIONS = ("float32", "bfloat16", "int8")  # in which a graph computes its products
