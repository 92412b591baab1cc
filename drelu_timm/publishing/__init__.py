"""What `drelu-timm export` is made of: RobustBench's entry and issues, the model card, recipes, checks."""
