"""Parts of `drelu-timm export`: RobustBench's entry and forms, the model card, the recipe, the checks."""
