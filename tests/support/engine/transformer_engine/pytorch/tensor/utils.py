"""Functions for fp8 weights, which Megatron imports and never calls without them."""


def cast_master_weights_to_fp8(*args: object, **kwargs: object) -> None:
    """Not called."""
    raise RuntimeError("fp8 weights")


post_all_gather_processing = replace_raw_data = cast_master_weights_to_fp8
