"""What `drelu-timm export` is made of: entries, cards and checks; and trained models under RobustBench's names."""
