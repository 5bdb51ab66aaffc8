from collections.abc import Callable

from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

class BlendedMegatronDatasetBuilder:
    def __init__(
        self, cls: type[GPTDataset], sizes: list[int], is_built_on_rank: Callable[[], bool], config: GPTDatasetConfig
    ) -> None: ...
    def build(self) -> list[GPTDataset]: ...
