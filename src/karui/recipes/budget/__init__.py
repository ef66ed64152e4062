"""From a stated budget (time, bytes, accuracy) to a model: by measurement, across techniques."""

from karui.index import lazy

# Limits are read before torch is; what searches needs torch.
__getattr__, __dir__ = lazy(
    __name__,
    {
        "Budget": "karui.recipes.budget.limits",
        "read_budget": "karui.recipes.budget.limits",
        "Settings": "karui.recipes.budget.run",
        "run_budget": "karui.recipes.budget.run",
    },
)
