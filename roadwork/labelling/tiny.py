"""Tiny randomly initialised networks of the REAL classes, with real processors: no file of a hub is needed.

They have the layers, names and file format of the published models, so that everything but the weights is exercised.
What they draw is noise, and everything that uses them says "randomly initialised".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Model = TypeVar("Model", bound=torch.nn.Module)

ORIGIN = "random-tiny (randomly initialised)"
SAM3_SIZE = 112
SAM_SIZE = 128
TEXT_LENGTH = 48
WIDE = 0.3
"""Spread of SAM 3's random weights: with the usual 0.02 all scores agree to four digits and no threshold bites."""
_BERT_FIRST_WORD = 1030
_BERT_FIXED = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
"""Grounding DINO looks for these ids of bert-base-uncased by number."""


def byte_vocabulary() -> dict[str, int]:
    """CLIP's vocabulary without merges: the 256 byte symbols, the same as word ends, and the two specials."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    words = [*symbols, *(f"{s}</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    return {word: index for index, word in enumerate(words)}


def clip_tokenizer() -> Any:
    """transformers' CLIP tokenizer on that vocabulary."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=byte_vocabulary(), merges=[], model_max_length=TEXT_LENGTH)


def bert_tokenizer(words: list[str]) -> Any:
    """transformers' BERT tokenizer that knows `words`, with the special ids of bert-base-uncased."""
    from transformers import BertTokenizer

    ids = {i: f"[unused{i}]" for i in range(_BERT_FIRST_WORD)} | _BERT_FIXED
    ids |= {_BERT_FIRST_WORD + i: word for i, word in enumerate(words)}
    return BertTokenizer(vocab={word: i for i, word in ids.items()}, model_max_length=TEXT_LENGTH)


def sam3(seed: int = 0) -> tuple[Any, Any]:
    """(Sam3Model, Sam3Processor): 112 px input, 16 queries, 0.3 M parameters."""
    from transformers import Sam3Config, Sam3ImageProcessor, Sam3Model, Sam3Processor

    grid = SAM3_SIZE // 14
    block = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    layers = {**block, "num_layers": 1}
    config = Sam3Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam3_vit_model",
                **block,
                "num_hidden_layers": 2,
                "image_size": SAM3_SIZE,
                "pretrain_image_size": SAM3_SIZE,
                "window_size": 4,
                "global_attn_indexes": [1],
            },
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[grid * 4] * 2, [grid * 2] * 2, [grid] * 2],
        },
        text_config={
            "model_type": "clip_text_model",
            **_clip_text(),
            "max_position_embeddings": 32,
        },
        geometry_encoder_config=layers,
        detr_encoder_config=layers,
        detr_decoder_config={**layers, "num_queries": 16},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2},
        initializer_range=WIDE,
    )
    model = _seeded(lambda: Sam3Model(config), seed)
    size = {"height": SAM3_SIZE, "width": SAM3_SIZE}
    images = Sam3ImageProcessor(size=size, mask_size={"height": grid * 4, "width": grid * 4})
    return model, Sam3Processor(images, clip_tokenizer())


def grounding_dino(words: list[str], seed: int = 0) -> tuple[Any, Any]:
    """(GroundingDinoForObjectDetection, GroundingDinoProcessor) that knows `words`; 16 queries."""
    from transformers import (
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
    )

    tokenizer = bert_tokenizer(words)
    config = GroundingDinoConfig(
        backbone_config={
            "model_type": "swin",
            "image_size": 96,
            "embed_dim": 16,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 2, 4],
            "window_size": 4,
            "out_indices": [2, 3, 4],
        },
        text_config={
            "model_type": "bert",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": TEXT_LENGTH,
        },
        num_queries=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        d_model=32,
        max_text_len=TEXT_LENGTH,
    )
    model = _seeded(lambda: GroundingDinoForObjectDetection(config), seed)
    images = GroundingDinoImageProcessor(size={"shortest_edge": 96, "longest_edge": 160})
    return model, GroundingDinoProcessor(images, tokenizer)


def owlv2(seed: int = 0) -> tuple[Any, Any]:
    """(Owlv2ForObjectDetection, Owlv2Processor): 64 px input, 16 boxes."""
    from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    block = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 1}
    config = Owlv2Config(
        vision_config={**block, "image_size": 64, "patch_size": 16},
        text_config={**_clip_text(), "num_hidden_layers": 1, "max_position_embeddings": TEXT_LENGTH},
        projection_dim=32,
    )
    model = _seeded(lambda: Owlv2ForObjectDetection(config), seed)
    images = Owlv2ImageProcessor(size={"height": 64, "width": 64})
    return model, Owlv2Processor(images, clip_tokenizer())


def sam1(seed: int = 0) -> torch.nn.Module:
    """segment_anything's Sam: 128 px input, two blocks."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    grid = SAM_SIZE // 16

    def build() -> torch.nn.Module:
        sam: torch.nn.Module = Sam(
            image_encoder=ImageEncoderViT(
                img_size=SAM_SIZE, patch_size=16, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, out_chans=32,
                window_size=4, global_attn_indexes=(1,), use_rel_pos=True,
            ),
            prompt_encoder=PromptEncoder(
                embed_dim=32, image_embedding_size=(grid, grid), input_image_size=(SAM_SIZE, SAM_SIZE), mask_in_chans=8
            ),
            mask_decoder=MaskDecoder(
                transformer_dim=32,
                transformer=TwoWayTransformer(depth=2, embedding_dim=32, num_heads=2, mlp_dim=64),
                iou_head_depth=2,
                iou_head_hidden_dim=32,
            ),
        )  # fmt: skip
        return sam

    return _seeded(build, seed)


def _clip_text() -> dict[str, Any]:
    size = len(byte_vocabulary())
    return {
        "vocab_size": size, "hidden_size": 32, "intermediate_size": 64, "projection_dim": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1,
    }  # fmt: skip


def _seeded(build: Callable[[], Model], seed: int) -> Model:
    """Weights that depend on the seed alone; the caller's generator is left as it was. Always on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()
