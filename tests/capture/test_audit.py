"""The audit: what a capture gives, against a forward that was edited by hand, in every mode that people run models in.

Each cell of {eval, train} × {grad, no_grad, inference_mode} × {plain, checkpointed, compiled, autocast} is equal to the
reference, value and gradient, or a `CaptureError`. Never something else in silence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import capture_zoo as zoo
from hookdistill import Capture, CaptureError

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # dynamo looks at every tensor
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own imports on the way to the compiler
]

QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]], list[str]]] = {
    "bert": (
        lambda: zoo.bert(2, **QUIET),
        zoo.tokens,
        [
            "bert.embeddings",
            "bert.encoder.layer.0",
            "bert.encoder.layer.1:input",
            "bert.encoder.layer.1.attention",
            "bert.encoder.layer.0.intermediate",
            "bert.encoder.layer.1.output.dense",
            "bert.encoder.layer.0.attention.self.query:input",
            "bert.pooler",
            "classifier",
            ":logits",
        ],
    ),
    "llama": (
        zoo.llama,
        zoo.tokens,
        ["model.layers.0", "model.layers.2.mlp", "model.layers.1.self_attn", "model.layers.1.self_attn.k_proj", "model.norm"],
    ),
    "albert": (
        zoo.albert,
        zoo.tokens,
        [
            "encoder.albert_layer_groups.0.albert_layers.0@0",
            "encoder.albert_layer_groups.0.albert_layers.0.ffn:input@0",
            "embeddings",
        ],
    ),
    "vit": (zoo.vit, lambda: {"pixel_values": zoo.image()}, ["embeddings", "layers.0", "layers.-1:input", "layernorm"]),
    "t5": (
        zoo.t5,
        lambda: {**zoo.tokens(), "decoder_input_ids": zoo.tokens()["input_ids"]},
        ["encoder.block.0", "decoder.block.1", "decoder.block.1.layer.1.EncDecAttention", "encoder"],
    ),
    "resnet": (
        zoo.resnet,
        lambda: {"pixel_values": zoo.image(size=16)},
        [
            "embedder.embedder.normalization",
            "encoder.stages.0",
            "encoder.stages.1.layers.0.layer.0.convolution:input",
            "pooler",
        ],
    ),
    "in place": (zoo.Residual, lambda: {"x": zoo.image()}, ["conv", "bn", "relu", "mix:input", "pool"]),
    "encoder": (
        zoo.encoder,
        lambda: {"src": torch.linspace(-1, 1, 160).view(2, 5, 16)},
        ["layers.0", "layers.1.linear1:input"],
    ),
}
ADDRESSES = [(model, address) for model, (_, _, addresses) in MODELS.items() for address in addresses]

GRADS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@cache
def model_of(name: str) -> nn.Module:
    model = MODELS[name][0]()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute in ("dropout", "attention_dropout", "attention_dropout_prob"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return model


@contextmanager
def edited(model: nn.Module, addresses: list[str]) -> Iterator[dict[str, Tensor]]:
    """Rewritten ``forward`` methods that put differentiable copies of input and output aside, of their first call."""
    seen: dict[str, Tensor] = {}
    touched: dict[str, nn.Module] = {}
    for address in addresses:
        path = address.split("@")[0].split(":")[0].replace("-1", "1")
        touched[path] = model.get_submodule(path)

    def rewrite(path: str, module: nn.Module) -> None:
        forward = module.forward

        def recording(*args: Any, **kwargs: Any) -> Any:
            entered = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            entered = None if entered is None else entered.clone()
            output = forward(*args, **kwargs)
            if path not in seen:
                if entered is not None:
                    seen[f"{path}:input"] = entered
                first = zoo.first_tensor(output)
                seen[path] = first.clone()
                if path == "":
                    seen[":logits"] = output[0].clone()
            return output

        module.forward = recording  # type: ignore[method-assign]

    for path, module in touched.items():
        rewrite(path, module)
        module.register_forward_hook(lambda *_: None)  # as a capture does, it takes nn.TransformerEncoder off its fast path
    try:
        yield seen
    finally:
        for module in touched.values():
            del module.forward


def key_of(address: str) -> str:
    return address.split("@")[0].replace("-1", "1")


def runner(name: str, model: nn.Module, how: str) -> Callable[[], Any]:
    batch = MODELS[name][1]()
    if how == "autocast":

        def run() -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return model(**batch)

        return run
    if how == "checkpointed" and not getattr(model, "is_gradient_checkpointing", False):
        return lambda: checkpoint(lambda: model(**batch), use_reentrant=False)
    return lambda: model(**batch)


def audit(name: str, model: nn.Module, called: nn.Module, how: str, train: bool, grad: str) -> list[str]:
    """The cells that are neither equal nor an error; the errors count as equal."""
    addresses = MODELS[name][2]
    model.train(train)
    reference = copy.deepcopy(model)  # with statistics of its own
    with GRADS[grad]():
        with edited(reference, addresses) as want:
            runner(name, reference, "autocast" if how == "autocast" else "plain")()
        with Capture(called, addresses) as captured:
            runner(name, called, how)()
    wrong = []
    for address in addresses:
        expected = want[key_of(address)]
        path, _, rest = address.partition(":")
        path, _, call = path.partition("@")
        key = (rest.partition("@")[0] or "output") + (f"@{call or rest.partition('@')[2]}" if "@" in address else "")
        try:
            got = captured[path][key]
        except CaptureError as error:
            errors.append(f"{name} {address} {how} {grad} {train}: {error}")
            continue
        exactly = how != "compiled"
        if got.is_nested:
            got = got.to_padded_tensor(0.0)
        same = torch.equal(got, expected) if exactly else torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
        same = same and got.dtype is expected.dtype and got.requires_grad == expected.requires_grad
        if same and got.requires_grad:
            ours, theirs = zoo.gradients(got, model), zoo.gradients(expected, reference)
            same = zoo.same_gradients(ours, theirs, exactly=exactly)
        if not same:
            wrong.append(f"{address} {how} {grad} {'train' if train else 'eval'}")
    return wrong


errors: list[str] = []


def test_the_audit_has_thirty_addresses():
    assert len(ADDRESSES) >= 30


@pytest.mark.parametrize("how", ["plain", "checkpointed", "autocast"])
@pytest.mark.parametrize("name", MODELS)
def test_audit(name, how):
    model = model_of(name)
    checkpoints = how == "checkpointed" and hasattr(model, "gradient_checkpointing_enable")
    if checkpoints and not model.supports_gradient_checkpointing:
        checkpoints = False  # the whole of it in one checkpoint then
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    errors.clear()
    try:
        wrong = [w for train in (False, True) for grad in GRADS for w in audit(name, model, model, how, train, grad)]
    finally:
        if checkpoints:
            model.gradient_checkpointing_disable()
    assert wrong == []
    assert errors == []  # none of these cells is one of those that may refuse


@pytest.mark.parametrize("name", MODELS)
def test_audit_compiled(name):
    model = model_of(name)
    compiled = torch.compile(model, backend="aot_eager")
    errors.clear()
    wrong = []
    for train in (False, True):
        for grad in GRADS:
            torch._dynamo.reset()  # a capture that is opened after a compiled run is refused, see test_compile.py
            wrong += audit(name, model, compiled, "compiled", train, grad)
    assert wrong == []
    assert errors == []
