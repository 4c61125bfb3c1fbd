"""Shapes of models. Nothing here takes long to import."""

# Qwen2.5: layers, hidden, heads, key-value heads, intermediate, vocabulary, tied embeddings.
QWEN = {
    "0.5B": (24, 896, 14, 2, 4864, 151936, True),
    "1.5B": (28, 1536, 12, 2, 8960, 151936, True),
    "3B": (36, 2048, 16, 2, 11008, 151936, True),
    "7B": (28, 3584, 28, 4, 18944, 152064, False),
    "14B": (48, 5120, 40, 8, 13824, 152064, False),
    "32B": (64, 5120, 40, 8, 27648, 152064, False),  # a judge
    # For tests.
    "tiny": (4, 128, 4, 2, 384, 1024, True),
    "tiny-untied": (4, 128, 4, 2, 384, 1024, False),
}
