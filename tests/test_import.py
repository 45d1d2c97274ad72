"""The front door: what the package exports, and what importing it does not do."""

import ast
import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import hookdistill

# Each issue adds its names here and nowhere else.
EXPORTED = {
    "AddressError",
    "BatchError",
    "Capture",
    "CaptureError",
    "CaptureSource",
    "CheckpointError",
    "DistillationLoss",
    "Distiller",
    "EMA",
    "Evaluation",
    "Evaluator",
    "ExampleMetric",
    "ExportError",
    "Fidelity",
    "GradNormBalance",
    "HeldOutLosses",
    "HookDistillError",
    "Keep",
    "Initialization",
    "LossError",
    "Losses",
    "MagnitudeBalance",
    "Match",
    "MatchError",
    "Plan",
    "StoreError",
    "Similarity",
    "StructureError",
    "RecipeError",
    "StudentMetric",
    "TeacherStore",
    "TrainResult",
    "Trainer",
    "TrainerError",
    "initialize_student",
    "layer_maps",
    "compat",
    "losses",
    "outline",
    "recipes",
    "register_loss",
    "similarity",
    "TrainerInterrupted",
    "evaluate",
    "load_student",
    "parameter_groups",
    "schedules",
}
HEAVY = ("transformers", "accelerate", "triton", "matplotlib", "typer", "rich", "tqdm", "pydantic", "safetensors", "sklearn")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_the_exported_names_are_these():
    public = {name for name in dir(hookdistill) if not name.startswith("_")} - {"TYPE_CHECKING", "Any"}
    modules = {name for name in public if isinstance(getattr(hookdistill, name), types.ModuleType)}
    assert public - modules | (modules & EXPORTED) == EXPORTED


def test_type_checkers_see_the_names_that_are_there():
    tree = ast.parse(Path(hookdistill.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert {name: home for name, home in seen.items() if home} == hookdistill._HOMES
    assert {name for name, home in seen.items() if home is None} == set(hookdistill._MODULES)


def test_no_module_bears_the_name_of_something_else():
    """Or importing it would put the module in the place of the function."""
    for name in hookdistill._HOMES:
        assert importlib.util.find_spec(f"hookdistill.{name}") is None, name


def test_a_name_that_is_not_there_is_an_attribute_error():
    assert not hasattr(hookdistill, "Distillr")
    assert python("import hookdistill; print(hookdistill.losses.mse.__name__, hookdistill.Match.__name__)") == "mse Match\n"


def test_every_exported_class_and_function_is_documented():
    for name in EXPORTED:
        assert getattr(hookdistill, name).__doc__, name


def test_losses_are_exported_by_name_and_documented():
    assert set(hookdistill.losses.__all__) <= set(vars(hookdistill.losses))
    for name in hookdistill.losses.__all__:
        assert getattr(hookdistill.losses, name).__doc__, name


def test_importing_loads_nothing_heavy_and_prints_nothing():
    code = (
        "import sys, torch; before = set(sys.modules); import hookdistill as h; [getattr(h, name) for name in dir(h)]; "
        f"print(sorted({{n.split('.')[0] for n in set(sys.modules) - before}} & set({HEAVY!r})))"
    )
    assert python(code) == "[]\n"


def test_importing_does_not_even_load_torch():
    assert python("import sys, hookdistill, hookdistill.errors; print('torch' in sys.modules)") == "False\n"


def test_importing_changes_no_global_of_torch():
    code = (
        "import torch, random; import hookdistill as h; seed = torch.random.get_rng_state(); "
        "was = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(), torch.nn.Module.__call__, "
        "torch.nn.functional.scaled_dot_product_attention); "
        "[getattr(h, name) for name in dir(h)]; "
        "now = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(), torch.nn.Module.__call__, "
        "torch.nn.functional.scaled_dot_product_attention); "
        "print(was == now and torch.equal(seed, torch.random.get_rng_state()))"
    )
    assert python(code) == "True\n"


def test_a_step_works_where_nothing_that_it_does_not_need_can_be_imported():
    missing = {"triton", "transformers", "accelerate", "matplotlib", "typer", "tqdm", "sklearn"}
    code = (
        f"import sys, torch; sys.modules.update(dict.fromkeys({missing!r})); import hookdistill as h; nn = torch.nn; "
        "t, s = nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(3, 4)); "
        "d = h.Distiller(t, s, [h.Match('0', '0'), h.Match('', '', loss='kl', temperature=2.0)]); "
        "x = torch.randn(2, 3); d.plan(x); d(x).total.backward(); print(s[0].weight.grad.shape)"
    )
    assert python(code) == "torch.Size([4, 3])\n"
