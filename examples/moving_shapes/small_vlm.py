"""Moving shapes, the model: a SmolVLM of seven million parameters with a tokenizer and a processor of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from video2lora.data.moving_shapes import caption_prompt
from video2lora.modeling.processor import INTERNALIZATION_PROMPT

PIXELS, PATCH, SCALE_FACTOR = 64, 8, 4  # pixels, pixels, patches a side merged into one token: 4 tokens a frame
VOCABULARY = 640
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
TILES = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% elif line['type'] == 'video' %}{{ '<video>' }}"
    "{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the benchmark's own language; anything else falls into bytes.

    The words that stand around every frame ("Frame from 00:07:") are three tokens, so that a frame costs 10.
    """
    from num2words import num2words
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    frame = [f"\nFrame from {minutes:02d}:{seconds:02d}:" for minutes in range(60) for seconds in range(60)]
    intro = [
        f"You are provided the following series of {num2words(n)} frames from a 0:{n // 60:02d}:{n % 60:02d} "
        "[H:MM:SS] video.\n"
        for n in range(1, 200)
    ]
    roles = ["User: ", "Assistant: ", "\n\n", INTERNALIZATION_PROMPT, caption_prompt("", "")] * 2000
    before = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    after = ["<global-img>", *TILES, "<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"\n(?=\nFrame)|\nFrame from |\d\d:| ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]|\n\n|\s"),
                behavior="isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(after),
        special_tokens=before,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *frame, *intro, *roles], trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in before + after])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=1_000_000,
        clean_up_tokenization_spaces=False,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens={
            "end_of_utterance_token": "<end_of_utterance>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "image_token": "<image>",
        },
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, longest_edge: int = PIXELS) -> SmolVLMProcessor:
    """The ordinary SmolVLM processor at this model's sizes.

    Args:
        longest_edge: pixels to which pictures given as images are brought before they are cut into tiles.
    """
    tile: Any = {"longest_edge": PIXELS}
    normalize: Any = {"image_mean": HALF["mean"], "image_std": HALF["std"]}
    return SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(size={"longest_edge": longest_edge}, max_image_size=tile, **normalize),
        video_processor=SmolVLMVideoProcessor(
            size=tile,
            max_image_size=tile,
            video_sampling={"fps": 1, "max_frames": 64, "video_size": tile},
            **normalize,
        ),
        tokenizer=tokenizer,
        image_seq_len=(PIXELS // PATCH // SCALE_FACTOR) ** 2,
        chat_template=CHAT_TEMPLATE,
    )


def build_vlm(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> SmolVLMForConditionalGeneration:
    """The untrained model: vision 192 wide and 4 layers deep, text 256 wide and 6 layers deep."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = SmolVLMConfig(
        text_config={
            "model_type": "llama", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "vocab_size": len(tokenizer),
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}, **ids,
        },
        vision_config={"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4,
                       "num_attention_heads": 6, "patch_size": PATCH, "image_size": PIXELS},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=SCALE_FACTOR,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = SmolVLMForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**ids)
    return model


def tiles(pixels: Tensor) -> Tensor:
    """Pictures `[n, 3, side, side]` as SmolVLM's processor cuts them: tiles row by row, then the whole, small."""
    side = pixels.shape[-1]
    if side < PIXELS:
        return interpolate(pixels, (PIXELS, PIXELS), mode="bicubic", antialias=True).clamp(-1, 1)
    if side == PIXELS:
        return pixels
    n = side // PIXELS
    cut = pixels.unflatten(2, (n, PIXELS)).unflatten(4, (n, PIXELS)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    whole = interpolate(pixels, (PIXELS, PIXELS), mode="bicubic", antialias=True).clamp(-1, 1)
    return torch.cat([cut, whole[:, None]], 1).flatten(0, 1)


class FusedNorm(nn.RMSNorm):
    """One kernel each way, in the input's own dtype: autocast would have it in float32, and four copies around it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


def fuse_norms(vlm: nn.Module) -> None:
    """Put torch's RMSNorm in the place of Llama's, which takes six kernels and more; they share the weights.

    For training on a frozen VLM, which is bound by launches. bfloat16 is rounded once instead of twice.
    """
    for module in list(vlm.modules()):
        for name, child in module.named_children():
            if isinstance(child, LlamaRMSNorm):
                fused = FusedNorm(child.weight.shape[0], child.variance_epsilon, device="meta")
                fused.weight = child.weight
                setattr(module, name, fused.train(child.training))


def compile_layers(model: Any, backend: str = "inductor") -> None:
    """Compile what a step of stage 2 spends its time in: the VLM's layers and the perceiver, for all shapes at once.

    The text layers are compiled up to their `down_proj`, which is where adapters are added: so one graph serves them
    all.
    """
    torch._dynamo.config.recompile_limit = 32  # with gradients or not, with a mask or not: more than the usual 8
    # else a row of 256 tokens is taken for the width of 256, and is compiled apart
    torch.fx.experimental._config.use_duck_shape = False
    to_down_proj = torch.compile(_to_down_proj, dynamic=True, backend=backend)
    for layer in model.vlm.model.text_model.layers:

        def forward(hidden_states: Tensor, layer: Any = layer, **kwargs: Any) -> Tensor:
            hidden_states, inner = to_down_proj(layer, hidden_states, kwargs)
            return hidden_states + layer.mlp.down_proj(inner)

        layer.forward = forward
    for layer in model.vlm.model.vision_model.encoder.layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)
    perceiver = model.hypernetwork.perceiver
    for name in ("project", "read"):
        setattr(perceiver, name, torch.compile(getattr(perceiver, name), dynamic=True, backend=backend))


def _to_down_proj(layer: Any, hidden_states: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A Llama layer's residual stream after its attention, and what enters the last matrix of its MLP."""
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
    hidden_states = hidden_states + attended
    x, mlp = layer.post_attention_layernorm(hidden_states), layer.mlp
    return hidden_states, mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
