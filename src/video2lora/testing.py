"""Tiny random vision-language models and a tiny video, for tests and demos: made from a seed, never downloaded.

The models have the real classes, module names, special tokens and chat templates of their families; only sizes,
weights and vocabulary (single bytes) are small. What they say is noise, but noise that depends on every token and
every frame they are given.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import (
        Idefics3ForConditionalGeneration,
        Idefics3Processor,
        PreTrainedModel,
        PreTrainedTokenizerFast,
        ProcessorMixin,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        SmolVLMForConditionalGeneration,
        SmolVLMProcessor,
    )

__all__ = ["save_tiny_vlm", "tiny_clip", "tiny_idefics3", "tiny_qwen2_5_vl", "tiny_smolvlm"]

# One text decoder for all families: 4 layers, 64 wide, MLP 128, 4 heads of 16 with 2 key/value heads.
_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_IMAGE_SIZE, _PATCH_SIZE, _SCALE_FACTOR = 32, 8, 2  # pixels, pixels, patches a side merged into one token
_IMAGE_SEQ_LEN = (_IMAGE_SIZE // _PATCH_SIZE // _SCALE_FACTOR) ** 2  # 4 visual tokens a frame

_SIGLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": _IMAGE_SIZE,
    "patch_size": _PATCH_SIZE,
}

# SmolVLM2's template with the video branch that transformers adds (processing_smolvlm.DEFAULT_CHAT_TEMPLATE);
# Idefics3's is the same with another first token and no videos.
_IDEFICS_TEMPLATE = (
    "{bos}{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{video}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_SMOLVLM_TEMPLATE = _IDEFICS_TEMPLATE.replace("{bos}", "<|im_start|>").replace(
    "{video}", "{% elif line['type'] == 'video' %}{{ '<video>' }}"
)
_IDEFICS3_TEMPLATE = _IDEFICS_TEMPLATE.replace("{bos}", "<|begin_of_text|>").replace("{video}", "")
_QWEN_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_ROWS_AND_COLS = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]


def tiny_smolvlm(seed: int = 0, **overrides: Any) -> tuple[SmolVLMForConditionalGeneration, SmolVLMProcessor]:
    """Build a tiny random SmolVLM (the architecture of SmolVLM2) with its processor: 4 visual tokens a frame.

    Args:
        seed: Decides every weight; the global random state is neither read nor changed.
        **overrides: Fields of the text config, e.g. `num_hidden_layers=2` or `intermediate_size=96`.

    Returns:
        The model, float32 and in eval mode, and a `SmolVLMProcessor` that takes text, images and videos.

    Raises:
        ValueError: If an override is no field of the text config.
    """
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    tokenizer = _byte_tokenizer(
        # The order of SmolVLM2's own vocabulary: three control tokens, then text, then what images need.
        before=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        after=["<global-img>", *_ROWS_AND_COLS, "<fake_token_around_image>", "<image>", "<end_of_utterance>"],
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=_SMOLVLM_TEMPLATE,
        extra_special_tokens={
            "end_of_utterance_token": "<end_of_utterance>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "image_token": "<image>",
        },
    )
    config = SmolVLMConfig(
        text_config=_text_config("llama", tokenizer, overrides, rope_parameters=_rope(100_000.0)),
        vision_config=dict(_SIGLIP),
        image_token_id=tokenizer.get_vocab()["<image>"],
        scale_factor=_SCALE_FACTOR,
    )
    size, tile = {"longest_edge": 2 * _IMAGE_SIZE}, {"longest_edge": _IMAGE_SIZE}
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(size=size, max_image_size=tile),
        video_processor=SmolVLMVideoProcessor(
            size=size, max_image_size=tile, video_sampling={"fps": 1, "max_frames": 64, "video_size": tile}
        ),
        tokenizer=tokenizer,
        image_seq_len=_IMAGE_SEQ_LEN,
        chat_template=_SMOLVLM_TEMPLATE,
    )
    return _build(SmolVLMForConditionalGeneration, config, tokenizer, seed), processor


def tiny_idefics3(seed: int = 0, **overrides: Any) -> tuple[Idefics3ForConditionalGeneration, Idefics3Processor]:
    """Build a tiny random Idefics3 with its processor, which has no video input: give it frames as images.

    With `do_image_splitting=False` an image is 4 visual tokens; by default, as in Idefics3, it is cut into tiles.
    Arguments, return value and errors are those of `tiny_smolvlm`.
    """
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
    )

    tokenizer = _byte_tokenizer(
        before=[],
        after=["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<global-img>", *_ROWS_AND_COLS]
        + ["<fake_token_around_image>", "<image>", "<end_of_utterance>"],
        bos_token="<|begin_of_text|>",
        eos_token="<end_of_utterance>",
        pad_token="<|end_of_text|>",
        chat_template=_IDEFICS3_TEMPLATE,
    )
    config = Idefics3Config(
        text_config=_text_config("llama", tokenizer, overrides, rope_parameters=_rope(500_000.0)),
        vision_config=dict(_SIGLIP),
        image_token_id=tokenizer.get_vocab()["<image>"],
        scale_factor=_SCALE_FACTOR,
    )
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(
            size={"longest_edge": 2 * _IMAGE_SIZE}, max_image_size={"longest_edge": _IMAGE_SIZE}
        ),
        tokenizer=tokenizer,
        image_seq_len=_IMAGE_SEQ_LEN,
        chat_template=_IDEFICS3_TEMPLATE,
    )
    return _build(Idefics3ForConditionalGeneration, config, tokenizer, seed), processor


def tiny_qwen2_5_vl(seed: int = 0, **overrides: Any) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """Build a tiny random Qwen2.5-VL with its processor: one visual token per 16 x 16 pixels and two frames.

    Its vision blocks have `gate_proj`, `up_proj` and `down_proj` like its decoder layers, and one of the two attends
    in windows of 32 x 32 pixels. Frames keep their size, rounded to 16 pixels, between 1,024 and 3,072 pixels in all.
    Arguments, return value and errors are those of `tiny_smolvlm`; for a head size other than 16 override
    `rope_parameters` as well.
    """
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = _byte_tokenizer(
        before=[],
        after=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"]
        + ["<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"]
        + ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_QWEN_TEMPLATE,
    )
    # Sections count pairs of rotated channels for time, height and width: half the head size of 16 together.
    rope = _rope(1_000_000.0) | {"mrope_section": [2, 3, 3]}
    text_config = _text_config("qwen2_5_vl_text", tokenizer, overrides, rope_parameters=rope)
    config = Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": _PATCH_SIZE,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": _IMAGE_SIZE,
            "fullatt_block_indexes": [1],
            "out_hidden_size": text_config["hidden_size"],
        },
        image_token_id=tokenizer.get_vocab()["<|image_pad|>"],
        video_token_id=tokenizer.get_vocab()["<|video_pad|>"],
        vision_start_token_id=tokenizer.get_vocab()["<|vision_start|>"],
        vision_end_token_id=tokenizer.get_vocab()["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    patches: dict[str, Any] = {
        "size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 48},  # Qwen means pixels an image by these names
        "patch_size": _PATCH_SIZE,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**patches),
        video_processor=Qwen2VLVideoProcessor(**patches),
        tokenizer=tokenizer,
        chat_template=_QWEN_TEMPLATE,
    )
    return _build(Qwen2_5_VLForConditionalGeneration, config, tokenizer, seed), processor


_FAMILIES: dict[str, Callable[..., tuple[PreTrainedModel, ProcessorMixin]]] = {
    "smolvlm": tiny_smolvlm,
    "idefics3": tiny_idefics3,
    "qwen2_5_vl": tiny_qwen2_5_vl,
}


def save_tiny_vlm(family: str, directory: str | Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a tiny random model and its processor to a directory that the Auto classes load without a network.

    Args:
        family: `"smolvlm"`, `"idefics3"` or `"qwen2_5_vl"`.
        directory: A new or empty directory.
        seed: Decides every weight.
        **overrides: Fields of the text config.

    Returns:
        The directory.

    Raises:
        ValueError: If the family is unknown or an override is no field of the text config.
        FileExistsError: If the directory holds anything already.
    """
    if family not in _FAMILIES:
        raise ValueError(f"unknown family {family!r}: choose one of {', '.join(sorted(_FAMILIES))}")
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty: name a new or an empty directory")
    model, processor = _FAMILIES[family](seed, **overrides)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def tiny_clip(
    path: str | Path, *, seconds: float = 2, fps: int = 8, size: tuple[int, int] = (64, 48), seed: int = 0
) -> Path:
    """Write an H.264 mp4 of a coloured square that bounces over a dark background.

    Args:
        path: The file to write, ending in `.mp4`; it must not exist.
        seconds: Length in seconds, rounded to whole frames.
        fps: Frames a second, constant.
        size: Width and height in pixels, both even (chroma is stored at half size).
        seed: Decides the colours, the start and the direction.

    Returns:
        The path.

    Raises:
        FileExistsError: If the file exists.
        ValueError: If the size is odd or there would be no frame.
    """
    import av
    import numpy as np

    path, (width, height), num_frames = Path(path), size, round(seconds * fps)
    if path.exists():
        raise FileExistsError(f"{path} exists: name a new file")
    if width % 2 or height % 2:
        raise ValueError(f"size is {width} x {height} pixels, but H.264 in yuv420p needs an even width and height")
    if num_frames < 1:
        raise ValueError(f"{seconds} seconds at {fps} frames a second is no frame: ask for at least one")

    random = np.random.default_rng(seed)
    background, colour = random.integers(0, 64, 3), random.integers(96, 256, 3)
    side = max(1, min(width, height) // 3)
    room = np.array([width - side, height - side])
    position, step = random.uniform(0, 1, 2) * room, random.choice([-1, 1], 2) * room / max(4, num_frames / 2)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(num_frames):
            # Reflect at the borders: a triangle wave between 0 and the room there is.
            left, top = np.abs((position + index * step + room) % (2 * room) - room).astype(int)
            picture = np.broadcast_to(background.astype(np.uint8), (height, width, 3)).copy()
            picture[top : top + side, left : left + side] = colour
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def _byte_tokenizer(before: list[str], after: list[str], **settings: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer without merges: ids count `before`, then the 256 bytes, then `after`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*before, *alphabet, *after])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special: list[str | AddedToken] = [AddedToken(token, special=True, normalized=False) for token in before + after]
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=8192, clean_up_tokenization_spaces=False, **settings
    )


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def _text_config(
    model_type: str, tokenizer: PreTrainedTokenizerFast, overrides: dict[str, Any], **family: Any
) -> dict[str, Any]:
    """The text config as a dict: the shared sizes, what the family and its tokenizer say, then the overrides."""
    from transformers import AutoConfig

    fields = _TEXT | {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    known = AutoConfig.for_model(model_type).to_dict()
    if unknown := sorted(set(overrides) - set(known) - set(fields)):
        raise ValueError(f"{', '.join(unknown)}: no such field in the text config ({model_type})")
    return {"model_type": model_type} | fields | family | overrides


def _build(model_class: Any, config: Any, tokenizer: PreTrainedTokenizerFast, seed: int) -> Any:
    """Build the model, draw its weights anew and tell it how to stop."""
    import torch
    from transformers import GenerationConfig

    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global state
        model = model_class(config)
    _draw_weights(model, seed)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model.eval()


def _draw_weights(model: nn.Module, seed: int) -> None:
    """Draw every parameter so that activations stay O(1) through the depth and attention is far from uniform.

    The 0.02 of a fresh transformers model would make all logits nearly equal, whatever the input: errors would not
    show. Each parameter has a generator of its own, made from seed and name: the order of modules does not matter.
    """
    import hashlib

    import torch

    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            digest = hashlib.sha256(f"{seed}/{module_name}.{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if isinstance(module, torch.nn.Embedding):
                values = 0.6 * noise
            elif parameter.ndim > 1:
                # Attention scores multiply two projections: at 0.9 they would spread by 0.8 only, nearly uniform.
                gain = 1.5 if module_name.endswith(("q_proj", "k_proj", "qkv")) else 0.9
                values = noise * (gain / parameter[0].numel() ** 0.5)  # [out, in] or [out, in, *kernel]
            elif name == "bias":
                values = 0.1 * noise
            else:
                values = 1 + 0.1 * noise
            with torch.no_grad():
                parameter.copy_(values)
