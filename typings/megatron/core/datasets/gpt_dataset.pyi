from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

class GPTDatasetConfig:
    path_to_cache: str | None
    def __init__(self, **settings: Any) -> None: ...

class GPTDataset(Dataset[dict[str, Tensor]]):
    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        dataset_path: str | None,
        indexed_indices: NDArray[np.int32],
        num_samples: int | None,
        index_split: Split,
        config: GPTDatasetConfig,
    ) -> None: ...
    def __len__(self) -> int: ...
    def __getitem__(self, idx: int | None) -> dict[str, Tensor]: ...
