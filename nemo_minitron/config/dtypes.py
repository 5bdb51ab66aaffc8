"""The words for a dtype that recipes, options and NeMo configurations take, all of them everywhere."""

DTYPE_WORDS = {
    "float32": ("float32", "fp32", "32", "32-true", "float", "torch.float32"),
    "bfloat16": ("bfloat16", "bf16", "bf16-true", "bf16-mixed", "torch.bfloat16"),
    "float16": ("float16", "fp16", "16", "16-true", "half", "torch.float16"),
}
"""torch's name of a dtype, and what else it is called."""


def dtype_name(word: object) -> str | None:
    """Torch's name of the dtype that a word, or NeMo's number 32, stands for; None if it stands for none."""
    text = str(word).lower()
    return next((name for name, words in DTYPE_WORDS.items() if text in words), None)
