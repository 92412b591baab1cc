"""The models: D-ReLU and its caps, how a timm architecture gets them, nets that timm lacks, a model as a folder."""
