from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

class DType:
    @staticmethod
    def optimal_dtype(cardinality: int | None) -> type[np.number[Any]]: ...

class _IndexReader:
    dtype: type[np.number[Any]]
    sequence_pointers: NDArray[np.int64]

class _BinReader:
    def read(self, dtype: type[np.number[Any]], count: int, offset: int) -> NDArray[Any]: ...

class IndexedDataset(Dataset[NDArray[Any]]):
    index: _IndexReader
    bin_reader: _BinReader
    sequence_lengths: NDArray[np.int32]
    document_indices: NDArray[np.int64]
    def __init__(self, path_prefix: str, multimodal: bool = ..., mmap: bool = ...) -> None: ...
    def __len__(self) -> int: ...
    def __getitem__(self, idx: int) -> NDArray[Any]: ...

class IndexedDatasetBuilder:
    def __init__(self, bin_path: str, dtype: type[np.number[Any]] = ...) -> None: ...
    def add_document(self, tensor: NDArray[Any] | Tensor, lengths: list[int]) -> None: ...
    def finalize(self, idx_path: str) -> None: ...
