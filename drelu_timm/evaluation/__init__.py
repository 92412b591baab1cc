"""What `drelu-timm evaluate` is made of: subjects, measuring, the verdict on gradient masking, results."""
