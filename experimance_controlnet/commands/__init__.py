"""The commands of ``controlnet-worker`` beside the server. They print; nothing else here does."""
