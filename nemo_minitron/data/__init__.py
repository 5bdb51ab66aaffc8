"""Where texts come from and how they become documents: packages, file formats, splits, tokenizers. No Megatron."""
