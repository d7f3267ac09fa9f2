"""The built-in model *micro*: an ordinary `StableDiffusion3Pipeline`, 64 x 64 px, about 5 million parameters.

Every part is the class that SD3.5 uses, only small: an 8x KL auto-encoder with 8 latent channels, two CLIP text
encoders over a word-level vocabulary, and a six-block MMDiT on 8 x 8 latents. Stock diffusers refuses an SD3 folder
without a T5 encoder, so there is one that reads nothing: it has no layers and its tokenizer knows one token, so that
all 256 tokens it returns are the same. The recipes `pretrain-micro-vae` and `pretrain-micro` train the rest.
"""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from trimtab.worlds import blocks

NUM_TOKENS = 12  # the longest prompt, "a photo of a red ring left of a blue star", has ten words, a start and an end
TEXT_WIDTH = 64
TRAINED = ("transformer", "text_encoder", "text_encoder_2")  # after the auto-encoder, and together
SHIFT = 1.0


def build(seed: int) -> StableDiffusion3Pipeline:
    """The whole pipeline with random weights, the same for the same seed; float32, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _tokenizer()
        pipe = StableDiffusion3Pipeline(
            transformer=_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            vae=_vae(),
            text_encoder=_text_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=_text_encoder(tokenizer),
            tokenizer_2=tokenizer,
            text_encoder_3=T5EncoderModel(
                T5Config(vocab_size=1, d_model=2 * TEXT_WIDTH, num_layers=0, pad_token_id=0, eos_token_id=0)
            ),
            tokenizer_3=_blind_tokenizer(),
        )
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()  # there is no dropout in training either
    return pipe


def vocabulary() -> list[str]:
    """All words of the blocks world, sorted."""
    phrases = [blocks.phrase(content) for tag in blocks.TAGS for content in blocks.contents(tag)]
    return sorted({word for text in (*phrases, *blocks.OPENINGS) for word in text.split()})


def _tokenizer() -> PreTrainedTokenizerFast:
    special = ["<start>", "<end>", "<unk>"]  # the end must not be number 2, which transformers reads as "old CLIP"
    index = {word: i for i, word in enumerate([*special, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(index, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(token, index[token]) for token in special[:2]]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=NUM_TOKENS,
        unk_token="<unk>",
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<end>",
    )


def _blind_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<pad>", pad_token="<pad>")


def _text_encoder(tokenizer: PreTrainedTokenizerFast) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=NUM_TOKENS,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def _transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def _vae() -> AutoencoderKL:
    """Scale and shift are set once it is trained, so that latents have mean 0 and standard deviation 1."""
    return AutoencoderKL(
        sample_size=64,
        latent_channels=8,
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
