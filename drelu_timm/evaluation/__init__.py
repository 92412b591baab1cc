"""What `drelu-timm evaluate` is made of: measuring, batch by batch, and the verdict on gradient masking."""
