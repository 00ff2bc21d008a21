"""Adapters: where an adapter's tensors belong, and what they are called on disk. The only owner of key names.

A layout is a way to look at the base. In `"vlm"` the module paths are those of the vision-language model; in `"text"`
those of its text tower as a plain causal language model, for engines that serve only text. Keys follow PEFT: a module
at `path` has `base_model.model.<path>.lora_A.weight` [rank, d_in] and `.lora_B.weight` [d_out, rank].
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, get_args

import torch
import transformers
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..modeling.lora import LoraWeights
from ..modeling.targets import LoraTargets, decoder_layers
from .errors import AdapterError, BaseMismatchError

Layout = Literal["vlm", "text"]
LAYOUTS: tuple[str, ...] = get_args(Layout)

# Where a causal LM of transformers keeps its decoder: `LlamaForCausalLM.model.layers`.
_TEXT_DECODER_PATH = "model"
_KEY_PREFIX = "base_model.model."


@dataclass(frozen=True)
class BaseDescription:
    """What an adapter must know of its base when the base is not at hand.

    Attributes:
        model_class: class of the base, such as `SmolVLMForConditionalGeneration`.
        library: module that class is imported from.
        decoder_path: path of the text decoder inside the VLM, such as `model.text_model`.
        num_layers: its decoder layers.
        short_names: layouts in which the target modules' short names match exactly the adapted modules.
    """

    model_class: str
    library: str
    decoder_path: str
    num_layers: int
    short_names: tuple[str, ...]

    @classmethod
    def of(cls, vlm: nn.Module, targets: LoraTargets) -> BaseDescription:
        """Describe `vlm`, on which `targets` were resolved."""
        names = [name for name, _ in vlm.named_modules()]
        layers = decoder_layers(vlm)
        layers_path = next(name for name, module in vlm.named_modules() if module is layers)
        decoder_path = layers_path.rpartition(".")[0]
        wanted = set(targets.all_paths())
        in_decoder = [name for name in names if name.startswith(f"{decoder_path}.")]
        candidates: dict[str, list[str]] = {"vlm": names, "text": in_decoder}
        short = tuple(lay for lay in LAYOUTS if _matches(candidates[lay], targets.module_names) == wanted)
        library = type(vlm).__module__
        if getattr(transformers, type(vlm).__name__, None) is type(vlm):
            library = "transformers"  # the public place, which outlives a move of the file
        return cls(type(vlm).__name__, library, decoder_path, len(layers), short)


def _matches(names: Iterable[str], target_modules: Iterable[str]) -> set[str]:
    """The modules PEFT would wrap for a list of target modules."""
    endings = tuple(f".{target}" for target in target_modules)
    return {name for name in names if name in set(target_modules) or name.endswith(endings)}


def check_layout(layout: str) -> None:
    """Raise `AdapterError` if there is no such layout."""
    if layout not in LAYOUTS:
        raise AdapterError(f"layout must be one of {list(LAYOUTS)}, got {layout!r}.")


def module_paths(targets: LoraTargets, base: BaseDescription, layout: str) -> dict[str, tuple[str, ...]]:
    """Full path of every adapted module in `layout`, for each target module name in the order of the layers."""
    check_layout(layout)
    if layout == "vlm":
        return dict(targets.paths)
    start = len(base.decoder_path)
    return {name: tuple(_TEXT_DECODER_PATH + path[start:] for path in paths) for name, paths in targets.paths.items()}


def key_shapes(targets: LoraTargets, base: BaseDescription, layout: str, rank: int) -> dict[str, tuple[int, int]]:
    """Name and shape of every tensor of an adapter of this rank, as PEFT stores them."""
    shapes = {}
    for name, paths in module_paths(targets, base, layout).items():
        for path in paths:
            shapes[f"{_KEY_PREFIX}{path}.lora_A.weight"] = (rank, targets.in_features[name])
            shapes[f"{_KEY_PREFIX}{path}.lora_B.weight"] = (targets.out_features[name], rank)
    return shapes


def named_tensors(weights: LoraWeights, targets: LoraTargets, base: BaseDescription, layout: str) -> dict[str, Tensor]:
    """The tensors of a batch of one under their PEFT names, as views: a copy of an hour's adapter is a gigabyte."""
    views = {}
    for name, paths in module_paths(targets, base, layout).items():
        for position, path in enumerate(paths):
            views[f"{_KEY_PREFIX}{path}.lora_A.weight"] = weights.lora_A[name][0, position]
            views[f"{_KEY_PREFIX}{path}.lora_B.weight"] = weights.lora_B[name][0, position].T
    return views


def to_state_dict(weights: LoraWeights, targets: LoraTargets, base: BaseDescription, layout: str) -> dict[str, Tensor]:
    """The tensors of a batch of one under their PEFT names, each in memory of its own."""
    views = named_tensors(weights, targets, base, layout)
    return {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in views.items()}


def from_state_dict(
    state: dict[str, Tensor], targets: LoraTargets, base: BaseDescription, layout: str, rank: int, static_rank: int
) -> LoraWeights:
    """Inverse of `to_state_dict`, in float32; the keys must have been checked."""
    lora_A, lora_B = {}, {}
    for name, paths in module_paths(targets, base, layout).items():
        a = [state[f"{_KEY_PREFIX}{path}.lora_A.weight"].float() for path in paths]
        b = [state[f"{_KEY_PREFIX}{path}.lora_B.weight"].float().T for path in paths]
        lora_A[name], lora_B[name] = torch.stack(a)[None], torch.stack(b)[None]
    return LoraWeights(lora_A, lora_B, 1.0, (rank,), static_rank)


def peft_config(
    targets: LoraTargets,
    base: BaseDescription,
    layout: str,
    rank: int,
    base_model: str | None = None,
    base_revision: str | None = None,
) -> LoraConfig:
    """The plain `LoraConfig` of an adapter whose multiplier is already in `lora_B`.

    Rank and alpha are equal and there are no patterns, so that no engine can misread the scale.
    """
    paths = module_paths(targets, base, layout)
    full = sorted(path for group in paths.values() for path in group)
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        target_modules=list(targets.module_names) if layout in base.short_names else full,
        base_model_name_or_path=base_model,
        revision=base_revision,
        inference_mode=True,
        task_type="CAUSAL_LM" if layout == "text" else None,
        auto_mapping=(
            {"base_model_class": base.model_class, "parent_library": base.library} if layout == "vlm" else None
        ),
    )


def peft_config_dict(config: LoraConfig) -> dict[str, Any]:
    """`config` as the JSON values of `adapter_config.json`, with sorted target modules."""
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return {key: value.value if isinstance(value, Enum) else value for key, value in values.items()}


def check_base(vlm: nn.Module, targets: LoraTargets, base: BaseDescription, made_for: str, given: str) -> None:
    """Check that every adapted module exists on `vlm` with the right size.

    Raises:
        BaseMismatchError: it does not; the message names both bases and the module.
    """
    advice = f"This adapter was made for {made_for}; the model given is {given}. Load the base it was made for."
    try:
        layers = decoder_layers(vlm)
    except ValueError as error:
        raise BaseMismatchError(f"{error} {advice}") from error
    if len(layers) != base.num_layers:
        raise BaseMismatchError(f"expected {base.num_layers} decoder layers, found {len(layers)}. {advice}")
    modules = dict(vlm.named_modules())
    for name, paths in targets.paths.items():
        expected = (targets.in_features[name], targets.out_features[name])
        for path in paths:
            module = modules.get(path)
            if isinstance(module, BaseTunerLayer):
                module = module.get_base_layer()
            if module is None:
                raise BaseMismatchError(f"there is no module {path}. {advice}")
            # Attributes, not the weight's shape: a quantized weight is packed.
            found = (getattr(module, "in_features", None), getattr(module, "out_features", None))
            if found != expected:
                raise BaseMismatchError(f"{path} has (in, out) features {found}, expected {expected}. {advice}")


def extract_text_model(vlm: PreTrainedModel) -> PreTrainedModel:
    """Copy the text tower of `vlm` and its language-model head into a plain causal LM.

    Adapters in the `"text"` layout fit it. The copy has its own memory, the dtype, device and generation settings of
    `vlm`, and gives the same logits for text.

    Raises:
        AdapterError: the text tower is not one of transformers' causal language models (Qwen2.5-VL's is not).
    """
    config = copy.deepcopy(vlm.config.get_text_config(decoder=True))
    head, embeddings = vlm.get_output_embeddings(), vlm.get_input_embeddings()
    config.tie_word_embeddings = head is not None and head.weight is embeddings.weight
    problem = f"the text tower of {type(vlm).__name__} (model type {config.model_type!r}) is not a plain causal LM"
    try:
        with torch.device(vlm.device):
            text_model = AutoModelForCausalLM.from_config(config, dtype=vlm.dtype)
    except ValueError as error:
        raise AdapterError(f"{problem} that transformers can build: {error}") from error
    state = {f"{_TEXT_DECODER_PATH}.{name}": tensor for name, tensor in vlm.get_decoder().state_dict().items()}
    state |= {} if head is None else {f"lm_head.{name}": tensor for name, tensor in head.state_dict().items()}
    try:
        text_model.load_state_dict(state)
    except RuntimeError as error:
        raise AdapterError(f"{problem}: its weights do not fit {type(text_model).__name__}. {error}") from error
    if vlm.generation_config is not None:
        text_model.generation_config = copy.deepcopy(vlm.generation_config)
    return text_model.eval()
