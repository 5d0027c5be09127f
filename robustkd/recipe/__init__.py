"""Recipes, target profiles and policies: YAML in, frozen pydantic out."""
