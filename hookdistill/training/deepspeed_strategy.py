"""Steps by DeepSpeed's engine: ZeRO stages 0 to 2, weights in float32, clipping and optimizer steps its own."""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..distiller import Distiller
from ..errors import TrainerError, listing
from ..loading import rows_of
from ..sharding import is_sharded, kept
from .gradients import total_norm
from .strategies import Strategy, without_gradient

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .trainer import Trainer

_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")
_AUTO = (None, "auto")


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Whether accelerate is set to DeepSpeed."""
    return bool(accelerator.distributed_type.value == "DEEPSPEED")


def settle(settings: Trainer, accelerator: Accelerator) -> None:
    """Raise a `TrainerError` for what a training cannot have with DeepSpeed.

    The number of batches of a step is taken from DeepSpeed's config, where only that has one.
    """
    config = accelerator.deepspeed_plugin.deepspeed_config
    refused = {
        "ZeRO stage 3, which leaves a process a share of the weights only": _stage(config) > 2
        and "Choose stage 2, or fully_shard (FSDP2); in a loop of your own the engine takes a distiller at stage 3 too",
        "mixed_precision='fp16'": accelerator.mixed_precision == "fp16" and "Take 'bf16'",
        "on_nonfinite='skip'": settings.on_nonfinite == "skip" and "Take 'error'",
        "an optimizer of its config": "optimizer" in config and "Leave it out there, and pass optimizer= to the Trainer",
        "a scheduler of its config": "scheduler" in config and "Leave it out there, and pass scheduler= to the Trainer",
        "models that fully_shard has divided": is_sharded(settings.distiller) and "Take one of the two",
        "DeepSpeedCPUAdam in place of the optimizer": config.get("zero_force_ds_cpu_optimizer") is True
        and "Set zero_force_ds_cpu_optimizer to false there; DeepSpeedCPUAdam can be passed as optimizer=",
    }
    for what, way_out in refused.items():
        if way_out:
            raise TrainerError(f"accelerate is set to DeepSpeed, with which Trainer does not take {what}. {way_out}")
    _check_alike("clip_norm", settings.clip_norm, "gradient_clipping", config.get("gradient_clipping"))
    batches = config.get("gradient_accumulation_steps")
    if batches not in (*_AUTO, 1):  # accelerate writes 1 where a config says nothing
        _check_alike("accumulate", settings.accumulate, "gradient_accumulation_steps", batches)
        accelerator.gradient_accumulation_steps = batches


class DeepSpeedStrategy(Strategy):
    """An engine around the distiller for one training; afterwards parameters have memory of their own again.

    Mixed precision is autocast over float32 weights (DeepSpeed's ``torch_autocast``), as it is without DeepSpeed, and not a
    cast of the weights: the student that comes out is that of the optimizer.

    Args:
        clip: largest norm of the gradient, unless DeepSpeed's config has one.
    """

    def __init__(
        self, distiller: Distiller, optimizer: Optimizer, accelerator: Accelerator, first: Any, *, clip: float | None
    ) -> None:
        _check_dtypes(distiller)
        self.torch_optimizer, self.accelerator, self.distiller = optimizer, accelerator, distiller
        self._attributes = {parameter: set(vars(parameter)) for parameter in distiller.parameters()}
        self._hooks = {name: dict(getattr(distiller, name)) for name in _HOOKS}
        _warn_of_decay(distiller, optimizer, first)
        plugin = accelerator.deepspeed_plugin
        theirs = plugin.deepspeed_config
        self.stage = _stage(theirs)
        self.name = f"DeepSpeed, ZeRO stage {self.stage}"
        plugin.deepspeed_config = plugin.hf_ds_config.config = _filled(theirs, accelerator, clip, rows_of(first))
        try:
            self.model, self.optimizer = accelerator.prepare(distiller, optimizer)
            self.engine: Any = self.model
            self._check_engine()
        except (ValueError, TypeError, AssertionError, ImportError) as error:
            self.close()
            raise TrainerError(f"DeepSpeed refuses this training: {error}") from error
        finally:
            plugin.deepspeed_config = plugin.hf_ds_config.config = theirs

    def batch_of_step(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """For forward and backward of a batch: the engine exchanges at the last one of a step, and at each from stage 2 on."""
        self.engine.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, total: Tensor) -> None:
        """Add the gradient of a batch's total, whose shares are those of the whole step."""
        # The engine divides by the number of batches. Left to its scale_wrt_gas=False, it does so too where its own hook on the
        # total comes first, at stage 0 (DeepSpeed 0.19).
        self.engine.backward(total * self.accelerator.gradient_accumulation_steps)

    def after_backwards(self) -> None:
        """Nothing: the engine has exchanged gradients already."""

    def norm(self, *, clip: float | None) -> Tensor | None:
        """The norm of the gradient, at stage 0; the engine clips. From stage 1 on the gradient is divided already."""
        if self.stage:
            return None
        gradients = (parameter.grad for parameter in self.distiller.parameters())
        return total_norm(gradient for gradient in gradients if gradient is not None)

    def step(self) -> bool:
        """Let the engine clip and step; it does not where the gradient is not finite."""
        self.engine.step()
        return not getattr(self.engine.optimizer, "overflow", False)

    def norm_of_step(self) -> Tensor | None:
        """The norm of the gradient before it was clipped."""
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else torch.as_tensor(norm)

    def zero_grad(self) -> None:
        """Drop the gradients that a step has not dropped."""
        self.engine.zero_grad()

    def optimizer_state(self, *, keep: bool) -> dict[str, Any]:
        """The optimizer's state; from stage 1 on with a row for each process, as each steps a part of the weights."""
        state: dict[str, Any] = self.torch_optimizer.state_dict()
        return _each_tensor(state, lambda tensor: self._rows(tensor, keep)) if self.stage else state

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Go on from there, after the model's own state is loaded."""
        if not self.stage:
            self.torch_optimizer.load_state_dict(state)
            return
        self.torch_optimizer.load_state_dict(_each_tensor(state, lambda rows: rows[self.accelerator.process_index]))
        self.engine.optimizer.refresh_fp32_params()  # the engine steps a copy of the weights

    def close(self) -> None:
        """Take the engine off: hooks, what it has written on the parameters, and its one memory for all of them."""
        accelerator = self.accelerator
        if hasattr(self, "engine"):
            self.engine.destroy()
            accelerator._models = [each for each in accelerator._models if each is not self.engine]
            accelerator._optimizers = [each for each in accelerator._optimizers if each is not self.optimizer]
            accelerator.deepspeed_engine_wrapped = None
        for parameter, names in self._attributes.items():
            for name in vars(parameter).keys() - names:
                delattr(parameter, name)
            if self.stage and parameter.untyped_storage().nbytes() > parameter.numel() * parameter.element_size():
                parameter.data = parameter.data.clone()
        for name, hooks in self._hooks.items():
            there = getattr(self.distiller, name)
            for number in there.keys() - hooks.keys():
                del there[number]

    def _check_engine(self) -> None:
        if self.engine.basic_optimizer is not self.torch_optimizer:
            raise TypeError(
                f"it has put {type(self.engine.basic_optimizer).__name__} in place of "
                f"{type(self.torch_optimizer).__name__}, which the scheduler and the checkpoints know nothing of. Pass one "
                "that it takes as it is, by optimizer="
            )
        wants = self.accelerator.deepspeed_plugin.deepspeed_config.get("torch_autocast", {}).get("enabled", False)
        enabled = getattr(self.engine, "torch_autocast_enabled", None)
        if wants and not (enabled is not None and enabled()):
            raise ValueError("this release knows no torch_autocast. Update it, or take mixed_precision='no'")

    def _rows(self, tensor: Tensor, keep: bool) -> Tensor:
        """This process's tensor below those of the others, for the first process."""
        tensor = tensor.to(self.accelerator.device)
        rows = [torch.empty_like(tensor) for _ in range(self.accelerator.num_processes)] if keep else None
        torch.distributed.gather(tensor, rows, dst=0)
        return kept(torch.stack(rows) if rows is not None else tensor, keep)


def _stage(config: dict[str, Any]) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def _filled(theirs: dict[str, Any], accelerator: Accelerator, clip: float | None, rows: int) -> dict[str, Any]:
    """The config with what the training decides."""
    config = copy.deepcopy(theirs)
    config["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps
    if config.get("gradient_clipping") in _AUTO:
        config["gradient_clipping"] = clip or 0.0  # accelerate would take 1.0
    if config.get("train_micro_batch_size_per_gpu") in _AUTO:
        config["train_micro_batch_size_per_gpu"] = max(rows, 1)  # for what the engine prints only
    config["train_batch_size"] = "auto"
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    if config.get("bf16", {}).get("enabled") is True:
        config["bf16"] = {"enabled": False}
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return config


def _check_dtypes(distiller: Distiller) -> None:
    """The engine lays parameters of all dtypes into one memory of one dtype, and says nothing."""
    others = [name for name, each in distiller.named_parameters() if each.requires_grad and each.dtype != torch.float32]
    if others:
        raise TrainerError(
            f"with DeepSpeed the trained parameters are float32, and {listing(others, most=4)} are not; call student.float(), "
            "and take mixed_precision='bf16' for the speed"
        )


def _warn_of_decay(distiller: Distiller, optimizer: Optimizer, first: Any) -> None:
    """Without DeepSpeed a parameter without a gradient stays as it is; the engine gives it one of 0."""
    decayed = {each for group in optimizer.param_groups if group.get("weight_decay") for each in group["params"]}
    unreached = set(without_gradient(distiller, first)) if decayed else set()
    shrinking = [name for name, parameter in distiller.named_parameters() if name in unreached and parameter in decayed]
    if shrinking:
        warnings.warn(
            f"no match reaches {listing(shrinking, most=4)} at the first step. DeepSpeed gives such parameters a gradient of "
            "0, and weight_decay shrinks them. Freeze what is to stay as it is, with parameter.requires_grad_(False)",
            stacklevel=2,
        )


def _check_alike(name: str, given: Any, key: str, theirs: Any) -> None:
    if given is not None and theirs not in (*_AUTO, given):
        raise TrainerError(
            f"{name}={given!r} is given, but DeepSpeed's config has {key}: {theirs!r}; leave one of them out, or make both "
            "alike"
        )


def _each_tensor(state: dict[str, Any], change: Any) -> dict[str, Any]:
    """The optimizer's state with its tensors changed, but for numbers such as the count of steps."""
    changed = {
        number: {name: change(value) if isinstance(value, Tensor) and value.dim() else value for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": changed}
