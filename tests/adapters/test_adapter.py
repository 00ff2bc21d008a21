"""VideoAdapter in memory: from weights, on a base, composed, truncated."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from video2lora.adapters import (
    AdapterError,
    AdapterKeyError,
    AdapterProvenance,
    BaseMismatchError,
    CompositionError,
    NonFiniteAdapterError,
    Segment,
    VideoAdapter,
    compose_adapters,
    extract_text_model,
    rank_space,
)
from video2lora.modeling.lora import stack_lora
from video2lora.modeling.targets import base_fingerprint, resolve_targets
from video2lora.testing import tiny_idefics3, tiny_qwen2_5_vl, tiny_smolvlm

LAYERS = range(4)


def total_change(adapter: VideoAdapter) -> torch.Tensor:
    """The whole change, computed from full products in float64, `[layers, d_out, d_in]` of the one module."""
    name = adapter.targets.module_names[0]
    a, b = adapter.weights.lora_A[name][0].double(), adapter.weights.lora_B[name][0].double()
    return b.mT @ a


def test_the_multiplier_is_folded_in_float32(vlm, random_weights):
    targets = resolve_targets(vlm, ["down_proj"])
    raw = random_weights(targets, 0).to(dtype=torch.bfloat16)
    adapter = VideoAdapter.from_weights(raw, vlm=vlm)
    expected = 5.0 * raw.lora_B["down_proj"][0, 2].float().T @ raw.lora_A["down_proj"][0, 2].float()
    torch.testing.assert_close(adapter.delta_weight("down_proj", 2), expected)
    assert adapter.weights.scaling == 1.0
    assert adapter.delta_weight("down_proj", 2).shape == (64, 128)
    assert (adapter.rank, adapter.generated_rank, adapter.static_rank) == (6, 3, 3)
    assert adapter.num_parameters == 4 * 6 * (64 + 128) and adapter.nbytes == 4 * adapter.num_parameters


def test_weights_are_copied_unless_told_otherwise(vlm, random_weights):
    raw = random_weights(resolve_targets(vlm, ["down_proj"]), 0)
    own = VideoAdapter.from_weights(raw, vlm=vlm)
    taken = VideoAdapter.from_weights(raw, vlm=vlm, copy=False)
    before = own.delta_weight("down_proj", 2)
    assert taken.content_hash == own.content_hash and before.any()
    assert taken.weights.lora_A["down_proj"].data_ptr() == raw.lora_A["down_proj"].data_ptr()
    raw.lora_A["down_proj"].zero_()
    raw.lora_B["down_proj"].zero_()
    assert torch.equal(own.delta_weight("down_proj", 2), before)


def test_zero_rows_of_a_mixed_batch_are_cut(vlm, random_weights):
    targets = resolve_targets(vlm, ["down_proj"])
    short, long = random_weights(targets, 0, rank=2), random_weights(targets, 1, rank=7)
    batch = stack_lora([short, long])
    assert batch.lora_A["down_proj"].shape[2] == 10
    adapter = VideoAdapter.from_weights(batch[0], vlm=vlm)
    assert adapter.rank == 5
    assert adapter.content_hash == VideoAdapter.from_weights(short, vlm=vlm).content_hash


def test_weights_that_do_not_fit_are_refused(vlm, random_weights):
    targets = resolve_targets(vlm, ["down_proj"])
    weights = random_weights(targets, 0)
    with pytest.raises(AdapterError, match="batch of 2"):
        VideoAdapter.from_weights(stack_lora([weights, weights]), vlm=vlm)
    with pytest.raises(AdapterKeyError, match=r"pass targets="):
        VideoAdapter.from_weights(random_weights(resolve_targets(vlm, ["down_proj"], [1]), 0), vlm=vlm)
    with pytest.raises(AdapterKeyError, match="up_proj"):
        VideoAdapter.from_weights(weights, vlm=vlm, targets=resolve_targets(vlm, ["up_proj"]))
    weights.lora_A["down_proj"][0, 2, 0, 0] = float("nan")
    with pytest.raises(NonFiniteAdapterError, match=r"layers\.2\.mlp\.down_proj\.lora_A"):
        VideoAdapter.from_weights(weights, vlm=vlm)


def test_segments_share_the_generated_ranks(vlm, random_weights):
    weights = random_weights(resolve_targets(vlm, ["down_proj"]), 0, rank=6)
    two = AdapterProvenance(segments=(Segment("a.mp4"), Segment("b.mp4")))
    adapter = VideoAdapter.from_weights(weights, vlm=vlm, provenance=two)
    assert [segment.ranks for segment in adapter.segments] == [(0, 3), (3, 6)]
    uneven = AdapterProvenance(segments=(Segment(ranks=(0, 2)), Segment(ranks=(2, 6))))
    assert VideoAdapter.from_weights(weights, vlm=vlm, provenance=uneven).segments == uneven.segments
    for segments in [(Segment(),) * 4, (Segment(ranks=(0, 2)), Segment(ranks=(3, 6)))]:
        with pytest.raises(AdapterError, match="ranks"):
            VideoAdapter.from_weights(weights, vlm=vlm, provenance=AdapterProvenance(segments=segments))


@pytest.mark.parametrize(
    ("source", "kept"),
    [
        ("/home/me/clip.mp4", "clip.mp4"),
        ("C:\\videos\\clip.mp4", "clip.mp4"),
        ("https://host/dir/clip.mp4?token=secret", "clip.mp4"),
        ("clip.mp4", "clip.mp4"),
    ],
)
def test_a_source_is_named_without_its_place(source, kept):
    assert Segment(source).source == kept


# --- on a base


def test_attach_gives_the_merged_logits(vlm, adapter, merged, logits):
    base = copy.deepcopy(vlm)
    model = adapter.attach(base)
    assert type(model) is PeftModel and model.active_adapter == "default"
    torch.testing.assert_close(logits(model), logits(merged(vlm, adapter)), rtol=0, atol=1e-5)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(vlm))


def test_merged_for_a_while(vlm, adapter, merged, logits):
    base = copy.deepcopy(vlm)
    with adapter.merged(base):
        torch.testing.assert_close(logits(base), logits(merged(vlm, adapter)), rtol=0, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), vlm.parameters(), strict=True))
    model = adapter.attach(base)
    for carrying in (model, model.get_base_model()):
        with pytest.raises(AdapterError, match="pass the plain base"), adapter.merged(carrying):
            raise AssertionError("entered")


def test_several_adapters_on_one_base(vlm, make_adapter, merged, logits):
    first, second, third = make_adapter(1), make_adapter(2, rank=5), make_adapter(3)
    model = first.attach(copy.deepcopy(vlm), "first")
    assert second.attach(model) is model
    assert model.active_adapter == f"video-{second.content_hash[:12]}"
    third.attach(model, "third")
    for name, adapter in {"first": first, model.active_adapter: third, "third": third}.items():
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), logits(merged(vlm, adapter)), rtol=0, atol=1e-5)
    with pytest.raises(AdapterError, match="'third' is attached already"):
        make_adapter(4).attach(model, "third")
    with pytest.raises(AdapterError, match="pass the PeftModel"):
        make_adapter(4).attach(model.get_base_model())
    with pytest.raises(AdapterError, match="plain base"):
        VideoAdapter.from_weights(first.weights, vlm=model)


def test_the_vision_tower_of_qwen_is_left_alone(qwen, make_adapter, merged, logits):
    adapter = make_adapter(base=qwen)
    assert adapter.base.short_names == ("text",)
    model = adapter.attach(copy.deepcopy(qwen))
    assert not any("lora_" in name for name, _ in model.named_parameters() if "visual" in name)
    torch.testing.assert_close(logits(model), logits(merged(qwen, adapter)), rtol=0, atol=1e-5)


def test_a_bfloat16_base_gets_float32_adapters(vlm, make_adapter):
    first, second = make_adapter(1), make_adapter(2)
    model = second.attach(first.attach(copy.deepcopy(vlm).bfloat16()), "second")
    down_proj = model.get_base_model().get_decoder().layers[1].mlp.down_proj
    for name, adapter in {"default": first, "second": second}.items():
        assert torch.equal(down_proj.lora_A[name].weight, adapter.weights.lora_A["down_proj"][0, 1])
        assert torch.equal(down_proj.lora_B[name].weight, adapter.weights.lora_B["down_proj"][0, 1].T)


def test_a_base_that_is_not_named_is_called_as_the_model_calls_itself(vlm, random_weights):
    weights = random_weights(resolve_targets(vlm, ["down_proj"]), 0)
    base = copy.deepcopy(vlm)
    base.config._name_or_path = "user/base"
    for known, expected in [
        (AdapterProvenance(), ("user/base", None)),
        (AdapterProvenance(base_revision="b" * 40), ("user/base", "b" * 40)),
        (AdapterProvenance(base_model="user/other", base_revision="b" * 40), ("user/other", "b" * 40)),
    ]:
        provenance = VideoAdapter.from_weights(weights, vlm=base, provenance=known).provenance
        assert (provenance.base_model, provenance.base_revision) == expected


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda: tiny_smolvlm(num_hidden_layers=5)[0], "expected 4 decoder layers, found 5"),
        (lambda: tiny_smolvlm(intermediate_size=96)[0], r"\(96, 64\), expected \(128, 64\)"),
        (lambda: tiny_qwen2_5_vl()[0], r"no module model\.text_model\.layers\.0\.mlp\.down_proj"),
    ],
)
def test_a_wrong_base_is_refused_and_left_as_it_was(adapter, other, reason):
    base = other()
    names = [name for name, _ in base.named_parameters()]
    with pytest.raises(BaseMismatchError, match=reason) as refused:
        adapter.attach(base)
    assert "tiny-smolvlm (SmolVLM" in str(refused.value) and type(base).__name__ in str(refused.value)
    assert [name for name, _ in base.named_parameters()] == names


def test_a_base_without_a_name_is_known_by_its_weights(vlm, random_weights, tmp_path):
    unnamed, targets = copy.deepcopy(vlm), resolve_targets(vlm, ["down_proj"])
    unnamed.config._name_or_path = unnamed.name_or_path = ""
    made = VideoAdapter.from_weights(random_weights(targets, 0), vlm=unnamed)
    named = VideoAdapter.from_weights(random_weights(targets, 0), vlm=vlm)
    assert made.provenance.base_sha256 is not None and named.provenance.base_sha256 is None
    made.save_pretrained(tmp_path / "adapter")
    loaded = VideoAdapter.from_pretrained(tmp_path / "adapter")
    assert loaded.provenance.base_sha256 == made.provenance.base_sha256
    named.save_pretrained(tmp_path / "named")
    told = {name: (tmp_path / name / "README.md").read_text(encoding="utf-8") for name in ("adapter", "named")}
    take_it_out = 'from_pretrained(CHECKPOINT).vlm.save_pretrained("path/to/base")'
    assert take_it_out in told["adapter"] and "CHECKPOINT" not in told["named"]
    half, meta = copy.deepcopy(vlm).to(torch.float16), copy.deepcopy(vlm).to("meta")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for base in (copy.deepcopy(vlm), copy.deepcopy(unnamed).to(torch.bfloat16), half):  # half rounds otherwise
            loaded.attach(base)
        assert base_fingerprint(meta, targets) is None
        packed = copy.deepcopy(vlm)  # some quantised layers have no weight of that name
        packed.set_submodule(targets.all_paths()[0], torch.nn.Identity())
        assert base_fingerprint(packed, targets) is None
    other = copy.deepcopy(unnamed)
    other.get_submodule(targets.all_paths()[-1]).weight.data[0, 0] += 1
    of_other = VideoAdapter.from_weights(random_weights(targets, 1), vlm=other)
    with pytest.warns(UserWarning, match="whose weights are others"):
        loaded.attach(other)
    with pytest.raises(CompositionError, match="bases with other weights"):
        compose_adapters([made, of_other])
    both = compose_adapters([made, loaded])
    assert both.provenance.base_sha256 == made.provenance.base_sha256


def test_another_base_of_the_same_sizes_warns(vlm, adapter):
    other = copy.deepcopy(vlm)
    other.config._name_or_path = "somebody/else"
    with pytest.warns(UserWarning, match="not for somebody/else"):
        adapter.attach(other)
    with pytest.warns(UserWarning, match="not for .*Idefics3"):
        adapter.attach(tiny_idefics3()[0])
    moved = copy.deepcopy(vlm)
    moved.config._name_or_path = "/elsewhere/tiny-smolvlm"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapter.attach(moved)


@pytest.mark.parametrize("tiny", [tiny_smolvlm, tiny_idefics3])
def test_the_extracted_text_model_has_the_same_logits(tiny, logits):
    vlm, _ = tiny()
    text_model = extract_text_model(vlm)
    assert "Vision" not in type(text_model).__name__ and text_model.config.model_type == "llama"
    torch.testing.assert_close(logits(text_model), logits(vlm), rtol=0, atol=1e-6)
    text_model.get_decoder().layers[0].mlp.down_proj.weight.data.zero_()
    assert vlm.get_decoder().layers[0].mlp.down_proj.weight.abs().max() > 0  # memory of its own


def test_a_text_tower_that_is_no_causal_lm_is_refused(qwen):
    with pytest.raises(AdapterError, match="text tower of Qwen2_5_VLForConditionalGeneration.*qwen2_5_vl_text"):
        extract_text_model(qwen)


# --- composition


def of_hypernetwork(adapter: VideoAdapter, letter: str) -> VideoAdapter:
    """The adapter, of a hypernetwork whose weights have the hash of this letter."""
    return replace(adapter, provenance=replace(adapter.provenance, hypernetwork_sha256=letter * 64))


def test_composition_is_the_sum_with_the_static_part_once(make_adapter):
    parts = [make_adapter(seed) for seed in (1, 2, 3)]
    composed = compose_adapters(parts)
    assert (composed.rank, composed.static_rank) == (4 * 3, 3)
    only_static = {n: t[:, :, 3:] for n, t in parts[0].weights.lora_A.items()}
    for layer in LAYERS:
        static = parts[0].weights.lora_B["down_proj"][0, layer, 3:].T @ only_static["down_proj"][0, layer]
        expected = sum(part.delta_weight("down_proj", layer) - static for part in parts) + static
        torch.testing.assert_close(composed.delta_weight("down_proj", layer), expected, rtol=1e-5, atol=1e-6)
    assert [segment.source for segment in composed.segments] == ["clip-1.mp4", "clip-2.mp4", "clip-3.mp4"]
    assert [segment.ranks for segment in composed.segments] == [(0, 3), (3, 6), (6, 9)]
    assert [segment.start for segment in composed.segments] == [10.0, 20.0, 30.0]


def test_weights_scale_the_generated_parts_only(make_adapter):
    first, second = make_adapter(1), make_adapter(2)
    composed = compose_adapters([first, second], weights=[0.5, -2.0])
    nothing = compose_adapters([first], weights=[0.0])  # the static part alone
    static = total_change(nothing)
    expected = 0.5 * (total_change(first) - static) - 2 * (total_change(second) - static) + static
    torch.testing.assert_close(total_change(composed), expected, rtol=1e-6, atol=1e-8)
    assert [segment.weight for segment in composed.segments] == [0.5, -2.0]


def test_a_composition_can_be_composed_again(make_adapter):
    parts = [make_adapter(seed) for seed in (1, 2, 3)]
    again = compose_adapters([compose_adapters(parts[:2]), parts[2]])
    assert again.content_hash == compose_adapters(parts).content_hash
    assert again.segments == compose_adapters(parts).segments
    assert compose_adapters(parts[:1]).content_hash == parts[0].content_hash


def test_adapters_that_do_not_belong_together_are_refused(vlm, qwen, make_adapter):
    first = make_adapter(1)
    other_hypernetwork = make_adapter(2, static_seed=99)
    elsewhere = make_adapter(2)
    elsewhere = replace(elsewhere, provenance=replace(elsewhere.provenance, base_model="somebody/else"))
    pinned = [replace(first, provenance=replace(first.provenance, base_revision=r * 40)) for r in "ab"]
    cases = [
        ([], None, "at least one"),
        ([first], [1.0, 2.0], "2 weights for 1"),
        ([first], [float("nan")], "finite"),
        ([first, make_adapter(2, base=qwen)], None, "different modules or bases"),
        ([first, make_adapter(2, layers=[0, 1])], None, "different modules or bases"),
        ([first, elsewhere], None, "different bases: .* somebody/else"),
        (pinned, None, "different revisions"),
        ([first, other_hypernetwork], None, "different static parts"),
        ([first, make_adapter(2, static_rank=0)], None, "different static parts"),
        ([first, make_adapter(2).truncate(3)[0]], None, "adapter 1 was truncated"),
        ([make_adapter(2).truncate(3)[0], make_adapter(3).truncate(3)[0]], None, "adapter 0 was truncated"),
    ]
    for adapters, weights, reason in cases:
        with pytest.raises(CompositionError, match=reason):
            compose_adapters(adapters, weights=weights)


@pytest.fixture
def in_dtype(make_adapter, tmp_path):
    """Makes adapters of hypernetwork "a", read back from a file of a dtype."""

    def make(seed: int, dtype: torch.dtype, letter: str = "a") -> VideoAdapter:
        adapter = of_hypernetwork(make_adapter(seed), letter)
        return VideoAdapter.from_pretrained(
            adapter.save_pretrained(tmp_path / f"{seed}-{dtype}-{letter}", dtype=dtype)
        )

    return make


def static_part(adapter: VideoAdapter) -> list[torch.Tensor]:
    weights = adapter.weights
    return [t[:, :, -3:] for tensors in (weights.lora_A, weights.lora_B) for t in tensors.values()]


@pytest.mark.parametrize("dtypes", [[torch.bfloat16], [torch.float16], [torch.bfloat16, torch.float16]])
def test_of_one_hypernetwork_the_most_precise_static_part_is_taken(make_adapter, in_dtype, dtypes):
    exact = of_hypernetwork(make_adapter(1), "a")
    rounded = [in_dtype(seed, dtype) for seed, dtype in enumerate(dtypes, 2)]
    for adapters in ([exact, *rounded], [*rounded, exact]):
        composed = compose_adapters(adapters)
        assert all(map(torch.equal, static_part(composed), static_part(exact)))
        for number, adapter in enumerate(adapters):  # what was generated stays as it was
            own = composed.weights.lora_B["down_proj"][:, :, 3 * number : 3 * (number + 1)]
            assert torch.equal(own, adapter.weights.lora_B["down_proj"][:, :, :3])


def test_of_files_of_one_dtype_their_static_part_is_taken(in_dtype):
    rounded = [in_dtype(seed, torch.bfloat16, letter) for seed, letter in ((1, "a"), (2, "a"), (3, "b"))]
    assert all(map(torch.equal, static_part(compose_adapters(rounded)), static_part(rounded[0])))


def test_the_refusal_of_static_parts_says_what_the_hashes_tell(make_adapter, in_dtype):
    unknown, exact = make_adapter(1), of_hypernetwork(make_adapter(1), "a")
    rounded, other = in_dtype(2, torch.bfloat16), make_adapter(3, static_seed=99)
    different = "from different hypernetworks .*sha256 aaaaaaaaaaaa and sha256 bbbbbbbbbbbb"
    cases = [
        ([unknown, rounded], "or were saved in different dtypes, and at least one does not say"),
        ([exact, in_dtype(2, torch.bfloat16, "b")], different),
        ([exact, of_hypernetwork(other, "b")], different),
        ([exact, of_hypernetwork(other, "a")], "both come from one hypernetwork .*aaa.*neither part is a rounding"),
        ([in_dtype(2, torch.float16), rounded], "neither part is a rounding .* Compose float32 adapters"),
    ]
    for adapters, reason in cases:
        with pytest.raises(CompositionError, match=f"adapters 0 and 1 have different static parts.*{reason}"):
            compose_adapters(adapters)


def test_names_are_no_adapters(make_adapter):
    for names in (["clip-lora"], "clip-lora", Path("clip-lora"), [make_adapter(1), "clip-lora"]):
        with pytest.raises(TypeError, match="expected adapters, got a name, 'clip-lora': load it with VideoAdapter"):
            compose_adapters(names)
    with pytest.raises(TypeError, match="expected adapters .*got NoneType"):
        compose_adapters([make_adapter(1), None])


def test_one_adapter_and_iterators_compose(make_adapter):
    parts = [make_adapter(1), make_adapter(2)]
    assert compose_adapters(parts[0]).content_hash == parts[0].content_hash
    assert compose_adapters(iter(parts)).content_hash == compose_adapters(parts).content_hash


def test_truncated_adapters_without_a_static_part_compose(make_adapter):
    parts = [make_adapter(seed, rank=6, static_rank=0).truncate(2)[0] for seed in (1, 2)]
    composed = compose_adapters(parts)
    assert composed.rank == 4 and composed.segments[0].ranks is None
    torch.testing.assert_close(total_change(composed), sum(total_change(part) for part in parts))


# --- truncation


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_the_truncation_error_is_that_of_the_full_products(make_adapter, rank):
    adapter = compose_adapters([make_adapter(seed, modules=("down_proj",)) for seed in (1, 2)])
    truncated, error = adapter.truncate(rank)
    full, low = total_change(adapter), total_change(truncated)
    assert error == pytest.approx(((full - low).norm() / full.norm()).item(), rel=1e-5)
    singular = torch.linalg.svdvals(full)  # nothing of this rank is closer
    best = singular[:, rank:].square().sum().sqrt() / singular.square().sum().sqrt()
    assert error == pytest.approx(best.item(), rel=1e-9)
    assert (truncated.rank, truncated.static_rank) == (rank, 0)


def test_truncation_is_exact_where_nothing_is_lost(make_adapter):
    adapter = make_adapter(1)
    assert adapter.truncate(6) == (adapter, 0.0)
    doubled = compose_adapters([adapter, adapter])  # 9 ranks that span 6
    truncated, error = doubled.truncate(6)
    assert error < 1e-7
    torch.testing.assert_close(total_change(truncated), total_change(doubled), rtol=1e-5, atol=1e-6)
    wide = make_adapter(1, rank=70, static_rank=10)  # more ranks than the module has rows
    truncated, error = wide.truncate(75)
    assert error < 1e-7
    torch.testing.assert_close(total_change(truncated), total_change(wide), rtol=1e-5, atol=1e-5)


def test_more_ranks_than_rows_are_cut_as_well_as_possible(make_adapter):
    wide = make_adapter(1, modules=("down_proj",), rank=70, static_rank=10)
    truncated, error = wide.truncate(9)
    singular = torch.linalg.svdvals(total_change(wide))
    best = singular[:, 9:].square().sum().sqrt() / singular.square().sum().sqrt()
    assert error == pytest.approx(best.item(), rel=1e-9)
    lost = (total_change(wide) - total_change(truncated)).norm() / total_change(wide).norm()
    assert lost.item() == pytest.approx(error, rel=1e-5)


def test_a_batch_of_adapters_is_not_truncated(vlm, random_weights):
    one = random_weights(resolve_targets(vlm, ["down_proj"]), 0)
    with pytest.raises(AdapterError, match="weights of one adapter, got a batch of 2"):
        rank_space.truncate(stack_lora([one, one]), 2)


def test_an_adapter_that_changes_nothing_truncates_to_nothing(vlm, random_weights):
    weights = random_weights(resolve_targets(vlm, ["down_proj"]), 0)
    weights.lora_B["down_proj"].zero_()
    truncated, error = VideoAdapter.from_weights(weights, vlm=vlm).truncate(2)
    assert error == 0.0 and total_change(truncated).abs().max() == 0


def test_truncation_says_what_it_did(adapter):
    truncated, error = adapter.truncate(4)
    (record,) = truncated.provenance.truncations
    assert (record.from_rank, record.to_rank, record.relative_error) == (6, 4, error)
    assert record.static_part_folded and truncated.segments[0].ranks is None
    assert adapter.truncate(torch.tensor(4))[0].content_hash == truncated.content_hash
    for rank in (0, -1, 4.0, True, "4"):
        with pytest.raises(AdapterError, match=f"whole number from 1, got {rank!r}"):
            adapter.truncate(rank)
    for rank in (6, 32):  # adapters of several ranks are brought to one rank at most
        assert adapter.truncate(rank) == (adapter, 0.0)
    with pytest.raises(AdapterError, match="does not change 'up_proj' of layer 0"):
        adapter.delta_weight("up_proj", 0)
