"""Text that is there without a download: the source of Python's standard library."""

import sysconfig
from pathlib import Path

import numpy as np

VOCAB_SIZE = 128  # ASCII


def load_text() -> tuple[np.ndarray, np.ndarray]:
    """The top-level modules of the standard library as ASCII codes.

    Returns:
      Training and held-out characters, uint8. Every tenth file is held out: a split within files
      would leak, as code repeats itself.
    """
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(library.glob("*.py"))
    train, held_out = [], []
    for i, file in enumerate(files):
        text = np.frombuffer(file.read_bytes(), np.uint8)
        (held_out if i % 10 == 0 else train).append(text[text < VOCAB_SIZE])
    return np.concatenate(train), np.concatenate(held_out)


def sample_batch(
    rng: np.random.Generator, text: np.ndarray, batch: int, seq_len: int
) -> np.ndarray:
    """Random windows `[batch, seq_len + 1]`: inputs and, one to the right, targets."""
    starts = rng.integers(len(text) - seq_len, size=(batch, 1))
    return text[starts + np.arange(seq_len + 1)].astype(np.int32)
