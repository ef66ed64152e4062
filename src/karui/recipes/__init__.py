"""Pipelines of techniques, planned before anything runs."""

from karui.index import lazy

# What runs a recipe needs torch; reading one does not, until its techniques are made.
__getattr__, __dir__ = lazy(
    __name__,
    {
        "Recipe": "karui.recipes.recipe",
        "read_recipe": "karui.recipes.recipe",
        "recipe_from": "karui.recipes.recipe",
        "recipe_from_values": "karui.recipes.recipe",
    },
)
