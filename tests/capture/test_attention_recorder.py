"""Maps recorded from running attention, against maps that torch and transformers hand out themselves or that are written
out by hand here."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from hookdistill.attention import AttentionCall, AttentionRecorder, attention_probabilities, attention_scores
from hookdistill.errors import CaptureError

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # transformers, of its own future
    pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning"),  # nn.TransformerEncoder makes one itself
    pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),  # meant, it is fast to test
]


@dataclass
class Seen:
    call: AttentionCall
    probabilities: Tensor
    scores: Tensor


@contextmanager
def watching(module: nn.Module) -> Iterator[list[Seen]]:
    """Hooks as a capture places them; what they saw of the module's last run."""
    recorder, seen = AttentionRecorder(), []

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen[:] = [Seen(call, attention_probabilities(call), attention_scores(call)) for call in recorder.stop()]

    handles = [
        module.register_forward_pre_hook(lambda module, args: recorder.start()),
        module.register_forward_hook(after, always_call=True),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        assert not _get_current_function_mode_stack()


def watch(module: nn.Module, *args: Any, at: nn.Module | None = None, **kwargs: Any) -> list[Seen]:
    with watching(module if at is None else at) as seen:
        module(*args, **kwargs)
    return seen


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Tensor) -> Tensor:
        return self.inner(*args)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def slope(maps: Tensor) -> Tensor:
    """A scalar whose gradient tells every element of a map from every other."""
    weights = torch.linspace(-1, 1, maps.numel(), dtype=maps.dtype).view(maps.shape)
    return (maps.square() * weights).sum()


def gradients(maps: list[Tensor], parameters: list[nn.Parameter]) -> list[Tensor]:
    total = torch.stack([slope(each) for each in maps]).sum()
    found = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    assert max(gradient.abs().max() for gradient in found) > 0
    return list(found)


# --- Hugging Face ------------------------------------------------------------------------------------------------------

IDS = torch.arange(3 * 7).view(3, 7) * 5 % 83 + 7
RIGHT = (torch.arange(7) < torch.tensor([[7], [4], [1]])).long()
LEFT = RIGHT.flip(-1)
SIZES = {"vocab_size": 99, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 6}
SEQ2SEQ = {
    "vocab_size": 99,
    "d_model": 24,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
}
T5 = {"vocab_size": 99, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}
DEBERTA = {**SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4}
WHISPER = {**SEQ2SEQ, "num_mel_bins": 4, "max_source_positions": 8, "pad_token_id": 0, "decoder_start_token_id": 1}
VIT = {key: SIZES[key] for key in SIZES if key != "vocab_size"} | {"image_size": 8, "patch_size": 4}


@dataclass(frozen=True)
class Family:
    name: str
    options: dict[str, Any]
    attention: str  # the watched module's path
    maps: str = "attentions"  # where transformers keeps its map of it, the last one
    implementations: tuple[str, ...] = ("sdpa", "eager")

    def build(self) -> transformers.PreTrainedModel:
        torch.manual_seed(0)
        config = getattr(transformers, f"{self.name}Config")(**self.options)
        return getattr(transformers, f"{self.name}Model")(config).eval()

    def inputs(self, mask: Tensor | None) -> dict[str, Any]:
        if self.name == "ViT":
            return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).sin().view(2, 3, 8, 8)}
        inputs: dict[str, Any] = {"input_ids": IDS, "attention_mask": mask}
        if self.name == "Whisper":
            inputs = {"input_features": torch.linspace(-9, 9, 3 * 4 * 16).sin().view(3, 4, 16)}
        if self.maps != "attentions":
            inputs |= {"decoder_input_ids": IDS[:, :5], "decoder_attention_mask": RIGHT[:, :5]}
        return inputs


FAMILIES = [
    Family("Bert", SIZES, "encoder.layer.1.attention.self"),
    Family("Albert", {**SIZES, "embedding_size": 8, "num_hidden_groups": 2}, "encoder.albert_layer_groups.1"),
    Family("GPT2", {"vocab_size": 99, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32}, "h.1.attn"),
    Family("ViT", VIT, "layers.1.attention"),
    Family("Llama", GROUPED, "layers.1.self_attn"),  # grouped heads, rotary
    Family("Mistral", {**GROUPED, "sliding_window": 3}, "layers.1"),
    Family("Gemma2", {**GROUPED, "attn_logit_softcapping": 2.0}, "layers.1.self_attn", implementations=("eager",)),
    Family("GptOss", {**GROUPED, "num_local_experts": 4}, "layers.1.self_attn", implementations=("eager",)),  # sinks
    Family("T5", T5, "decoder.block.1.layer.0", "decoder_attentions"),  # position bias
    Family("T5", T5, "decoder.block.1.layer.1.EncDecAttention", "cross_attentions"),
    Family("Bart", SEQ2SEQ, "decoder.layers.1.encoder_attn", "cross_attentions"),
    Family("Whisper", WHISPER, "decoder.layers.1.self_attn", "decoder_attentions"),
    # attention functions of their own: three products, alibi, merged heads, einsum
    Family("DebertaV2", DEBERTA, "encoder.layer.1.attention", implementations=("eager",)),
    Family("Bloom", {"vocab_size": 99, "hidden_size": 24, "n_layer": 2, "n_head": 4}, "h.1", implementations=("eager",)),
    Family("Mvp", SEQ2SEQ, "decoder.layers.1.encoder_attn", "cross_attentions", implementations=("eager",)),
    Family("XLNet", {"vocab_size": 99, "d_model": 24, "n_layer": 2, "n_head": 4}, "layer.1", implementations=("eager",)),
]


@pytest.mark.parametrize("padding", [None, RIGHT, LEFT], ids=["full", "right", "left"])
@pytest.mark.parametrize(
    ("family", "implementation"),
    [pytest.param(f, i, id=f"{f.name}-{f.attention}-{i}") for f in FAMILIES for i in f.implementations],
)
def test_maps_and_gradients_are_those_of_eager(family: Family, implementation: str, padding: Tensor | None) -> None:
    model, inputs = family.build(), family.inputs(padding)
    attention = model.get_submodule(family.attention)
    parameters = list(attention.parameters())
    if implementation == "sdpa":
        model.set_attn_implementation("sdpa")
        assert model(**inputs, output_attentions=True).get(family.maps) in (None, ())  # what this library is for
    (seen,) = watch(model, **inputs, at=attention)
    model.set_attn_implementation("eager")
    maps = model(**inputs, output_attentions=True)[family.maps]
    if not maps:
        pytest.skip(f"this version of transformers gives no {family.maps} of {family.name}")
    expected = maps[-1]

    lost = seen.probabilities.sum(-1, keepdim=True) == 0
    close(seen.probabilities, expected.masked_fill(lost, 0.0))
    close(seen.probabilities.sum(-1, keepdim=True) + lost, torch.ones_like(lost, dtype=torch.float), 1.0)
    found = gradients([seen.probabilities], parameters)
    for mine, eager in zip(found, gradients([expected.masked_fill(lost, 0.0)], parameters), strict=True):
        close(mine, eager, 1e-6 * max(1.0, eager.abs().max().item()))


def test_a_query_that_sees_only_padding_has_a_row_of_zeros_and_no_gradient() -> None:
    model = transformers.LlamaModel(transformers.LlamaConfig(**GROUPED)).eval()
    attention = model.layers[0].self_attn
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        (seen,) = watch(model, IDS, attention_mask=LEFT, at=attention)
        sees_nothing = LEFT[:, None, :] == 0
        torch.testing.assert_close(seen.probabilities.sum(-1) == 0, sees_nothing.expand(3, 4, 7))
        (gradient,) = torch.autograd.grad(slope(seen.probabilities), seen.call.query)
        assert gradient.isfinite().all() and not gradient[sees_nothing.expand(3, 4, 7)].any()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_query_key_and_value_are_per_head_after_rotary_embedding_and_not_repeated(implementation: str) -> None:
    model = transformers.LlamaModel(transformers.LlamaConfig(**GROUPED)).eval()
    model.set_attn_implementation(implementation)
    attention = model.layers[1].self_attn
    given: dict[str, Any] = {}
    with attention.register_forward_pre_hook(lambda module, args, kwargs: given.update(kwargs), with_kwargs=True):
        (seen,) = watch(model, IDS, at=attention)

    def heads(projection: nn.Module) -> Tensor:
        return projection(given["hidden_states"]).view(3, 7, -1, 6).transpose(1, 2)

    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query, key = apply_rotary_pos_emb(heads(attention.q_proj), heads(attention.k_proj), *given["position_embeddings"])
    close(seen.call.query, query)
    close(seen.call.key, key)
    close(seen.call.value, heads(attention.v_proj))
    for tensor in (seen.call.query, seen.call.key, seen.call.value):
        assert tensor.requires_grad and tensor.shape[1] in (4, 2)


@pytest.mark.parametrize("mask", [None, LEFT], ids=["full", "left"])
def test_generation_steps_of_grouped_heads(mask: Tensor | None) -> None:
    """transformers packs the heads of a single query before it calls the kernel."""
    steps: dict[str, list[Seen]] = {}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)).eval()
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        steps[implementation] = []
        cache = transformers.DynamicCache(config=model.config)
        for end in (6, 7):
            with torch.no_grad():
                start = cache.get_seq_length()
                known = None if mask is None else mask[:, :end]
                ids = IDS[:, start:end]
                steps[implementation] += watch(
                    model, ids, attention_mask=known, past_key_values=cache, at=model.model.layers[1].self_attn
                )
    for fast, eager in zip(steps["sdpa"], steps["eager"], strict=True):
        assert fast.probabilities.shape == eager.probabilities.shape
        sees_something = fast.probabilities.sum(-1, keepdim=True) > 0  # of what sees nothing, each makes something else
        close(fast.probabilities, eager.probabilities)
        close(fast.call.query * sees_something, eager.call.query * sees_something)
    assert steps["sdpa"][1].call.query.shape == (3, 4, 1, 6)
    assert steps["sdpa"][1].call.key.shape == (3, 2, 7, 6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_probabilities_are_those_before_dropout(implementation: str) -> None:
    model = transformers.BertModel(transformers.BertConfig(**SIZES, attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0))
    attention = model.encoder.layer[0].attention.self
    model.set_attn_implementation("eager")
    expected = model.eval()(IDS, output_attentions=True).attentions[0]
    model.set_attn_implementation(implementation)
    close(watch(model.train(), IDS, at=attention)[0].probabilities, expected)


# --- F.scaled_dot_product_attention ------------------------------------------------------------------------------------


class Functional(nn.Module):
    """A user's own module around one call."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, **self.options)


def tensors(*, heads: int = 4, groups: int = 4, queries: int = 5, keys: int = 7, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    shapes = (2, heads, queries, 6), (2, groups, keys, 6), (2, groups, keys, 3)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def by_hand(query: Tensor, key: Tensor, allowed: Tensor, *, scale: float = 6**-0.5, bias: Tensor | float = 0.0) -> Tensor:
    """Softmax over the allowed keys alone, row by row; a row without any stays zero."""
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scale + bias
    rows = torch.zeros_like(scores)
    for index in torch.ones(scores.shape[:3]).nonzero().tolist():
        keys = allowed.expand(scores.shape)[tuple(index)]
        if keys.any():
            where = tuple(torch.tensor(position) for position in index)
            rows = rows.index_put((*where, keys.nonzero().squeeze(1)), scores[tuple(index)][keys].softmax(0))
    return rows


PADDED = torch.ones(2, 1, 1, 7, dtype=torch.bool).index_fill(3, torch.tensor([5, 6]), False)
RAGGED = (torch.arange(7) < torch.tensor([7, 3, 0, 1, 5])[:, None]).expand(2, 1, 5, 7)  # the third query has no key
CAUSAL = torch.ones(5, 7, dtype=torch.bool).tril()
EVERY = torch.ones(5, 7, dtype=torch.bool)
SOFT = torch.linspace(-2, 2, 35).view(1, 1, 5, 7)


@pytest.mark.parametrize(
    ("options", "allowed", "expected"),
    [
        pytest.param({}, EVERY, {}, id="plain"),
        pytest.param({"scale": 0.3}, EVERY, {"scale": 0.3}, id="scale"),
        pytest.param({"is_causal": True}, CAUSAL, {}, id="causal"),
        pytest.param({"dropout_p": 0.5}, EVERY, {}, id="dropout"),
        pytest.param({"attn_mask": PADDED}, PADDED, {}, id="boolean"),
        pytest.param({"attn_mask": RAGGED}, RAGGED, {}, id="boolean-empty-row"),
        pytest.param({"attn_mask": SOFT}, EVERY, {"bias": SOFT}, id="additive"),
        *(
            pytest.param({"attn_mask": torch.zeros(2, 1, 5, 7).masked_fill(~RAGGED, low)}, RAGGED, {}, id=f"additive{low}")
            for low in (-math.inf, torch.finfo(torch.float32).min, -1e9)
        ),
    ],
)
def test_functional_attention(options: dict[str, Any], allowed: Tensor, expected: dict[str, Any]) -> None:
    query, key, value = tensors()
    (seen,) = watch(Functional(**options), query, key, value)
    assert seen.call.query is query and seen.call.key is key and seen.call.value is value
    by_now = by_hand(query, key, allowed, **expected)
    close(seen.probabilities, by_now)
    for mine, theirs in zip(*(torch.autograd.grad(slope(p), (query, key)) for p in (seen.probabilities, by_now)), strict=True):
        close(mine, theirs)
    assert not seen.probabilities[~allowed.expand(2, 4, 5, 7)].any()


def test_scores_hold_scale_and_mask() -> None:
    query, key, value = tensors()
    (seen,) = watch(Functional(attn_mask=PADDED, scale=0.3), query, key, value)
    close(seen.scores, (query @ key.mT * 0.3).masked_fill(~PADDED, -math.inf))
    (seen,) = watch(Functional(attn_mask=SOFT), query, key, value)
    close(seen.scores, query @ key.mT / math.sqrt(6) + SOFT)


def test_a_causal_bias_object_as_mask() -> None:
    from torch.nn.attention.bias import causal_lower_right

    query, key, value = tensors()
    (seen,) = watch(Functional(attn_mask=causal_lower_right(5, 7)), query, key, value)
    close(seen.probabilities, by_hand(query, key, torch.ones(5, 7, dtype=torch.bool).tril(2)))


@pytest.mark.parametrize("spelling", ["enable_gqa", "repeat_interleave", "expand"])
def test_grouped_heads(spelling: str) -> None:
    class Grouped(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if spelling == "enable_gqa":
                return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
            return F.scaled_dot_product_attention(query, self.repeat(key), self.repeat(value))

        def repeat(self, heads: Tensor) -> Tensor:
            if spelling == "repeat_interleave":
                return heads.repeat_interleave(2, dim=1)
            batch, groups, length, width = heads.shape
            return heads[:, :, None].expand(batch, groups, 2, length, width).reshape(batch, 2 * groups, length, width)

    query, key, value = tensors(groups=2)
    (seen,) = watch(Grouped(), query, key, value)
    torch.testing.assert_close([seen.call.key, seen.call.value], [key, value], atol=0, rtol=0)
    close(seen.probabilities, by_hand(query, key.repeat_interleave(2, 1), EVERY))


def test_keys_repeated_otherwise_are_left_alone() -> None:
    class Tiled(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            tiled = [heads[:, None].expand(2, 2, 2, 7, -1).reshape(2, 4, 7, -1) for heads in (key, value)]
            return F.scaled_dot_product_attention(query, *tiled)

    query, key, value = tensors(groups=2)
    (seen,) = watch(Tiled(), query, key, value)
    close(seen.call.key, key.repeat(1, 2, 1, 1))


def test_attention_without_heads_has_one() -> None:
    query, key, value = (tensor[:, 0] for tensor in tensors())
    mask = RAGGED[:, 0]
    (seen,) = watch(Functional(attn_mask=mask), query, key, value)
    assert seen.call.query.shape == (2, 1, 5, 6)
    close(seen.probabilities, by_hand(query[:, None], key[:, None], RAGGED))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_maps_have_the_dtype_of_the_query(dtype: torch.dtype) -> None:
    query, key, value = tensors(dtype=dtype)
    (seen,) = watch(Functional(attn_mask=RAGGED), query, key, value)
    assert seen.probabilities.dtype == dtype
    exact = by_hand(query.double(), key.double(), RAGGED)
    close(seen.probabilities.double(), exact, 1e-12 if dtype == torch.float64 else 1e-2)


def test_flex_attention_with_mask_and_score_function() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    slopes = torch.tensor([0.5, 2.0, 1.0, 3.0])

    class Flex(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return flex_attention(
                query,
                key,
                value,
                score_mod=lambda score, b, h, q, k: score + slopes[h] * (k - q),
                block_mask=create_block_mask(lambda b, h, q, k: q >= k, None, None, 5, 7, device="cpu"),
                enable_gqa=True,
            )

    query, key, value = (tensor.detach() for tensor in tensors(groups=2))
    (seen,) = watch(Flex(), query, key, value[..., :2])
    distance = torch.arange(7) - torch.arange(5)[:, None]
    bias = slopes[:, None, None] * distance
    close(seen.probabilities, by_hand(query, key.repeat_interleave(2, 1), CAUSAL, bias=bias))
    assert seen.call.key.shape == (2, 2, 7, 6)


# Stays as long as the process: torch 2.11 compiles nothing any more when operators that it has seen are gone.
FLASH = torch.library.Library("flash_attn_stand_in", "DEF")
FLASH.define("_flash_attn_forward(Tensor q) -> Tensor")
FLASH.impl("_flash_attn_forward", lambda q: q.clone(), "CPU")


def test_a_flash_attention_kernel_is_refused_with_the_way_out() -> None:
    class Flash(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.flash_attn_stand_in._flash_attn_forward(x)

    with pytest.raises(CaptureError, match=r"Flash .*_flash_attn_forward.*set_attn_implementation\('sdpa'\)"):
        watch(Flash(), torch.zeros(1))
    assert not _get_current_function_mode_stack()


# --- torch's own modules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"kdim": 5, "vdim": 8},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"batch_first": False},
    ],
    ids=str,
)
def test_multi_head_attention(options: dict[str, Any], training: bool, need_weights: bool) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(15, 5, **{"batch_first": True, **options}).train(training)
    query, key, value = torch.randn(3, 4, 15), torch.randn(3, 7, module.kdim), torch.randn(3, 7, module.vdim)
    if not module.batch_first:
        query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
    parameters = [parameter for name, parameter in module.named_parameters() if "out_proj" not in name]
    padding = {"key_padding_mask": RIGHT == 0}
    expected = module(query, key, value, **padding, average_attn_weights=False)[1]
    module.dropout = 0.5
    (seen,) = watch(module, query, key, value, **padding, need_weights=need_weights)
    close(seen.probabilities, expected)
    assert seen.call.query.shape == (3, 5, 4, 3) and seen.call.value.shape == seen.call.key.shape
    for mine, theirs in zip(*(gradients([maps], parameters) for maps in (seen.probabilities, expected)), strict=True):
        close(mine, theirs)
    (other,) = watch(module, query, key, value, **padding, need_weights=not need_weights)
    close(seen.call.query, other.call.query)
    close(seen.scores.nan_to_num(neginf=0), other.scores.nan_to_num(neginf=0))


def test_multi_head_attention_with_an_empty_row_stays_finite() -> None:
    module, x = nn.MultiheadAttention(12, 2, batch_first=True), torch.randn(2, 5, 12)
    nothing = torch.tensor([[False] * 5, [True] * 5])
    for need_weights in (False, True):
        (seen,) = watch(module, x, x, x, key_padding_mask=nothing, need_weights=need_weights)
        assert not seen.probabilities[1].any()
        (gradient,) = torch.autograd.grad(slope(seen.probabilities), module.in_proj_weight)
        assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("at", ["", "self_attn"])
def test_transformer_encoder_layer_in_eval_leaves_its_fused_forward_and_keeps_its_values(at: str) -> None:
    layer, x = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True).eval(), torch.randn(2, 5, 12)
    with torch.no_grad():
        fused = layer(x)
        with watching(layer.get_submodule(at)) as seen:
            close(layer(x), fused)
        expected = layer.self_attn(x, x, x, average_attn_weights=False)[1]
    assert seen[0].call.module is layer.self_attn
    close(seen[0].probabilities, expected)


def test_the_nested_tensor_of_a_transformer_encoder_is_refused_with_the_way_out() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 16, batch_first=True), 2).eval()
    x, padding = torch.randn(3, 7, 12), RIGHT == 0
    with torch.no_grad():
        for at in (encoder.layers[0], encoder.layers[1].self_attn):
            with pytest.raises(CaptureError, match="enable_nested_tensor=False"):
                watch(encoder, x, src_key_padding_mask=padding, at=at)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            (seen,) = watch(encoder, x, src_key_padding_mask=padding, at=encoder.layers[0])
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        first = encoder.layers[0].self_attn
        close(seen.probabilities, first(x, x, x, key_padding_mask=padding, average_attn_weights=False)[1])


# --- attention written out in Python -----------------------------------------------------------------------------------


class Written(nn.Module):
    """One layer of attention in one of the spellings people use; every value is that of the first."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spelling = spelling
        self.project = nn.Linear(12, 36)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.project(x).view(*x.shape[:2], 3, 4, 3).permute(2, 0, 3, 1, 4)
        return getattr(self, self.spelling)(query, key, value, mask).transpose(1, 2).flatten(2)

    def nano(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        scores = (query @ key.transpose(-2, -1)) * (1.0 / math.sqrt(key.size(-1)))
        scores = scores.masked_fill(~mask, -math.inf)
        return F.dropout(F.softmax(scores, dim=-1), 0.5) @ value

    def in_place(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        scores = torch.matmul(query, key.mT)
        scores /= math.sqrt(3)
        scores += torch.zeros_like(scores).masked_fill_(~mask, torch.finfo(scores.dtype).min)
        return torch.matmul(scores.float().softmax(-1).type_as(scores), value)

    def merged(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        batch, heads, length, width = query.shape
        query, key, value = (tensor.reshape(batch * heads, length, width) for tensor in (query, key, value))
        scores = torch.bmm(query, key.transpose(1, 2)) / math.sqrt(width)
        scores = (scores.view(batch, heads, length, length) + torch.where(mask, 0.0, -1e9)).view_as(scores)
        return torch.bmm(nn.Softmax(dim=2)(scores), value).view(batch, heads, length, width)

    def added(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        batch, heads, length, width = query.shape
        bias = torch.where(mask, 0.0, -math.inf).expand(batch, heads, length, length).flatten(0, 1)
        query, key, value = (tensor.flatten(0, 1) for tensor in (query, key, value))
        weights = torch.baddbmm(bias, query, key.mT, alpha=1 / math.sqrt(width)).softmax(dim=-1)
        return (weights @ value).view(batch, heads, length, width)

    def summed(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        scores = torch.einsum("b q h d, b k h d -> b h q k", query, key) * 3**-0.5
        weights = torch.softmax(scores.masked_fill(~mask, -math.inf), -1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, value).transpose(1, 2)

    def sunk(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        scores = (query @ key.mT / math.sqrt(3)).masked_fill(~mask, -math.inf)
        weights = torch.cat([scores, torch.zeros_like(scores[..., :1])], dim=-1).softmax(-1)[..., :-1]
        return weights @ value


MASK = (torch.arange(5) < torch.tensor([5, 2, 0, 4, 1])[:, None]).expand(2, 1, 5, 5)


@pytest.mark.parametrize("spelling", ["nano", "in_place", "merged", "added", "summed"])
def test_attention_written_out_in_python(spelling: str) -> None:
    module, x = Written(spelling), torch.randn(2, 5, 12)
    query, key, value = module.project(x).view(2, 5, 3, 4, 3).permute(2, 0, 3, 1, 4)
    expected = by_hand(query, key, MASK, scale=3**-0.5)
    (seen,) = watch(module, x, MASK)
    close(seen.probabilities, expected)
    for mine, theirs in zip((seen.call.query, seen.call.key, seen.call.value), (query, key, value), strict=True):
        close(mine, theirs)
    visible = MASK.expand(2, 4, 5, 5)
    close(seen.scores[visible], (query @ key.mT / math.sqrt(3))[visible])
    (mine,), (theirs,) = (gradients([maps], [module.project.weight]) for maps in (seen.probabilities, expected))
    close(mine, theirs)


def test_attention_sinks_take_their_share_and_are_no_keys() -> None:
    module, x = Written("sunk"), torch.randn(2, 5, 12)
    (seen,) = watch(module, x, MASK)
    weights = seen.scores.exp()
    close(seen.probabilities, weights / (1 + weights.sum(-1, keepdim=True)))
    assert seen.scores.shape == (2, 4, 5, 5)


# --- the recorder itself -----------------------------------------------------------------------------------------------


def test_nested_recorders_see_the_same_calls() -> None:
    outer, x = Around(nn.MultiheadAttention(12, 2, batch_first=True)), torch.randn(2, 5, 12)
    with watching(outer) as far, watching(outer.inner) as near:
        outer(x, x, x)
    assert len(far) == len(near) == 1
    close(far[0].probabilities, near[0].probabilities)
    close(far[0].call.query, near[0].call.query)


def test_several_calls_come_in_order_and_name_their_modules() -> None:
    model = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    calls = [seen.call for seen in watch(model, IDS, at=model.encoder)]
    assert [call.module for call in calls] == [layer.attention.self for layer in model.encoder.layer]


def test_a_module_without_attention_gives_no_calls() -> None:
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT).softmax(-1) * x.sum()  # a softmax of a product that weighs nothing

    assert watch(nn.Sequential(nn.Linear(4, 4), Gate()), torch.randn(2, 3, 4)) == []
    assert AttentionRecorder().stop() == []


def test_an_exception_leaves_nothing_behind() -> None:
    class Failing(Functional):
        def forward(self, *args: Tensor) -> Tensor:
            super().forward(*args)
            raise ValueError("after the attention")

    module = Failing()
    with watching(module) as seen, pytest.raises(ValueError, match="after the attention"):
        module(*tensors())
    assert len(seen) == 1 and not _get_current_function_mode_stack()


def test_stop_takes_its_own_mode_from_under_others() -> None:
    class Other(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    first, second, other = AttentionRecorder(), AttentionRecorder(), Other()
    first.start()
    with other:
        second.start()
        assert first.stop() == []
        F.scaled_dot_product_attention(*tensors())
        assert len(second.stop()) == 1
        assert _get_current_function_mode_stack() == [other]
    assert not _get_current_function_mode_stack()


def test_threads_do_not_see_one_another() -> None:
    recorder = AttentionRecorder()
    recorder.start()
    thread = threading.Thread(target=lambda: F.scaled_dot_product_attention(*tensors()))
    thread.start()
    thread.join()
    assert recorder.stop() == []


def test_nothing_is_kept_after_stop() -> None:
    module, recorder = Functional(), AttentionRecorder()
    query, key, value = (tensor.detach() for tensor in tensors())
    recorder.start()
    module(query, key, value)
    recorder.stop()
    alive = weakref.ref(query)
    del query
    assert alive() is None


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_checkpointed_segment_does_not_notice(need_weights: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner = nn.MultiheadAttention(12, 2, batch_first=True)
            self.last = nn.Linear(12, 12)

        def segment(self, x: Tensor) -> Tensor:
            return self.last(self.inner(x, x, x, need_weights=need_weights)[0]).relu()

    block, x = Block(), torch.randn(2, 5, 12)
    results = []
    for run in (block.segment, lambda x: checkpoint(block.segment, x, use_reentrant=False)):
        with watching(block.inner) as seen:
            output = run(x)
        loss = output.sum() + slope(seen[0].probabilities) + slope(seen[0].scores)  # recomputed without hooks
        results.append(torch.autograd.grad(loss, list(block.parameters())))
    torch.testing.assert_close(results[0], results[1])


# --- torch.compile -----------------------------------------------------------------------------------------------------


@dataclass
class Slot:
    probabilities: Tensor | None = None
    key: Tensor | None = None


@contextmanager
def slotted(module: nn.Module) -> Iterator[Slot]:
    """Hooks whose bodies dynamo can trace."""
    recorder, slot = AttentionRecorder(), Slot()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        (call,) = recorder.stop()
        slot.probabilities, slot.key = attention_probabilities(call), call.key

    handles = [
        module.register_forward_pre_hook(lambda module, args: recorder.start()),
        module.register_forward_hook(after, always_call=True),
    ]
    try:
        yield slot
    finally:
        for handle in handles:
            handle.remove()
        torch.compiler.reset()
        assert not _get_current_function_mode_stack()


def compiled_cases() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, nn.Module, tuple[Tensor, ...]]]]]:
    def llama(implementation: str) -> tuple[nn.Module, nn.Module, tuple[Tensor, ...]]:
        config = transformers.LlamaConfig(**GROUPED, use_cache=False)
        model = transformers.LlamaModel(config).eval()
        model.set_attn_implementation(implementation)
        return model, model.layers[1].self_attn, (IDS, LEFT)

    def layer() -> tuple[nn.Module, nn.Module, tuple[Tensor, ...]]:
        module = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True)
        return module, module.self_attn, (torch.randn(2, 5, 12),)

    def written() -> tuple[nn.Module, nn.Module, tuple[Tensor, ...]]:
        module = Written("summed")
        return Around(module), module, (torch.randn(2, 5, 12), MASK)

    yield "llama-sdpa", lambda: llama("sdpa")
    yield "llama-eager", lambda: llama("eager")
    yield "encoder-layer", layer
    yield "written", written


@pytest.mark.filterwarnings("ignore")  # of the compiler's own making, and different ones in each version
@pytest.mark.parametrize("build", [pytest.param(build, id=name) for name, build in compiled_cases()])
def test_compiled_in_one_graph(build: Callable[[], tuple[nn.Module, nn.Module, tuple[Tensor, ...]]]) -> None:
    model, attention, inputs = build()
    parameters = list(attention.parameters())
    graphs = 0

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    with slotted(attention) as slot:
        model(*inputs)
        expected, key = slot.probabilities, slot.key
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for _ in range(3):
            slot.probabilities = slot.key = None
            compiled(*inputs)
    assert graphs == 1
    close(slot.probabilities, expected)
    close(slot.key, key)
    for mine, theirs in zip(*(gradients([maps], parameters) for maps in (slot.probabilities, expected)), strict=True):
        close(mine, theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_with_graph_breaks_and_real_backends(backend: str) -> None:
    class Broken(Functional):
        def forward(self, x: Tensor) -> Tensor:
            query, key, value = x.view(2, 5, 3, 2, 2).permute(2, 0, 3, 1, 4)
            torch._dynamo.graph_break()
            return super().forward(query, key, value)

    model = nn.Sequential(nn.Linear(12, 12), Broken(is_causal=True), nn.Tanh())
    x = torch.randn(2, 5, 12)
    with slotted(model[1]) as slot:
        model(x)
        expected = slot.probabilities
        slot.probabilities = None
        torch.compile(model, backend=backend)(x)
    close(slot.probabilities, expected)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_module_inside_the_watched_one() -> None:
    inputs = tensors()
    around = Around(torch.compile(Functional(attn_mask=PADDED), backend="aot_eager"))
    around(*inputs)  # compiled before anybody watches
    for _ in range(2):
        (seen,) = watch(around, *inputs)
        close(seen.probabilities, by_hand(*inputs[:2], PADDED))
    torch.compiler.reset()
