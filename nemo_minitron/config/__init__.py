"""What a run asks for: frozen pydantic models, one place for each default. No torch."""
