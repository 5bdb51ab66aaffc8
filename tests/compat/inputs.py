"""The model and the texts that every environment of the matrix reads: `python -m tests.compat.inputs FOLDER`."""

import sys
from pathlib import Path

from tests.tiny import write_corpus, write_llama

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write_llama(folder / "hf", trained_steps=100)
    write_corpus(folder / "corpus")
