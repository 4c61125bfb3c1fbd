"""What lets the project run without a GPU, without vLLM and without a hub."""
