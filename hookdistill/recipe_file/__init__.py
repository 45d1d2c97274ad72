"""A whole distillation as a YAML or JSON file: read, checked, built.

run = load("recipe.yaml", overrides=["trainer.lr=3e-5"])
print(run.plan())
run.trainer.train()
"""

from .assembly import Run as Run
from .assembly import load as load
from .schema import Recipe as Recipe
