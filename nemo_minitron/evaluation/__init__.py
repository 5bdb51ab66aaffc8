"""What a model is worth: perplexity and text, at any parallel layout."""
