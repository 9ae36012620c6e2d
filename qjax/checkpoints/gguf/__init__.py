"""GGUF files, as llama.cpp writes them: container, types of blocks, names, configuration and tokenizers."""
