"""What a model is made of: axes, sizes and the table of its weights. Standard library only."""
