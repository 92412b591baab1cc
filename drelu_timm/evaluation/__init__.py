"""Parts of `drelu-timm evaluate`: finding a model, measuring it, the verdict on gradient masking."""
