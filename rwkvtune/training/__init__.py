"""Training: the loop, its parts, and the recipes that know both data and model."""
